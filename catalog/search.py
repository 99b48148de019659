"""Search over the records: SQLite FTS5 in memory, built from the records in a few hundredths of a second.

Three full-text tables share one content table. ``stemmed`` holds titles and abstracts under the Porter stemmer,
``plain`` holds titles, authors, venues and tags without stemming (a name has no stem), ``pieces`` holds trigrams for
parts of words and method names. Every word of the user is looked up by itself, as a quoted string: nothing that a user
types is query syntax. An identifier, address or citation key is looked up exactly before anything is ranked.

Measured with :func:`measure` on the shipped records: see the README.
"""

import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, get_args

from latentcot.catalog.filters import Filters
from latentcot.catalog.leaves import load_taxonomy
from latentcot.catalog.record import Record
from latentcot.catalog.store import CatalogError, build_lookup, load_records, lookup
from latentcot.catalog.text import normal_title, to_latin

Sort = Literal["relevance", "date", "added"]
Match = Literal["exact", "all", "some", "none"]

_SCHEMA = """
CREATE TABLE papers(
  id INTEGER PRIMARY KEY, key TEXT, title TEXT, other TEXT, abstract TEXT,
  authors TEXT, tags TEXT, venue TEXT, names TEXT, letters TEXT);
CREATE VIRTUAL TABLE stemmed USING fts5(
  title, other, abstract, content='papers', content_rowid='id',
  tokenize='porter unicode61 remove_diacritics 2', prefix='2 3');
CREATE VIRTUAL TABLE plain USING fts5(
  title, authors, tags, venue, names, content='papers', content_rowid='id',
  tokenize='unicode61 remove_diacritics 2', prefix='2 3');
CREATE VIRTUAL TABLE pieces USING fts5(letters, content='papers', content_rowid='id', tokenize='trigram');
"""
# Weights of the columns, title far above the rest; bm25 is negative, smaller is better.
_BM25 = {
    "stemmed": "bm25(stemmed, 10.0, 6.0, 1.0)",
    "plain": "bm25(plain, 10.0, 5.0, 2.0, 2.0, 4.0)",
    "pieces": "bm25(pieces)",
}
_PREFIX_FACTOR, _PIECE_FACTOR, _PHRASE_BONUS = 0.4, 0.2, 0.5
_TITLE_BONUS, _NAME_BONUS = 1e3, 1e2
MAX_WORDS, MAX_WORD = 32, 100
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Hit:
    """A found paper. ``spans`` are the places in ``record.title`` to highlight, as (start, end)."""

    record: Record
    score: float
    spans: tuple[tuple[int, int], ...] = ()

    def marked(self, left: str, right: str) -> str:
        """The title with ``left`` and ``right`` around every highlighted place. Not escaped: for terminals."""
        title, parts, last = self.record.title, [], 0
        for start, end in self.spans:
            parts += [title[last:start], left, title[start:end], right]
            last = end
        return "".join([*parts, title[last:]])


@dataclass(frozen=True)
class Result:
    """Hits in order, how many there are without the limit, and how they were matched.

    ``match`` is ``exact`` (an identifier was looked up), ``all`` (every word is there), ``some`` (no paper has every
    word, these have most of them) or ``none``.
    """

    hits: tuple[Hit, ...]
    total: int
    match: Match


@dataclass
class SearchIndex:
    """A search index over ``records``. Safe to share between threads."""

    records: Sequence[Record]
    _database: sqlite3.Connection = field(init=False, repr=False)
    _lock: threading.Lock = field(init=False, repr=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if sqlite3.sqlite_version_info < (3, 34):
            raise CatalogError(
                f"search needs SQLite 3.34 or newer (trigrams), this Python has {sqlite3.sqlite_version}"
            )
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.executescript(_SCHEMA)
        self._database.executemany(
            "INSERT INTO papers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (_row(number, record) for number, record in enumerate(self.records)),
        )
        for table in ("stemmed", "plain", "pieces"):
            self._database.execute(f"INSERT INTO {table}({table}) VALUES ('rebuild')")
        self._table = build_lookup(list(self.records))
        self._number = {record.key: number for number, record in enumerate(self.records)}
        by_key = sorted(range(len(self.records)), key=lambda number: self.records[number].key)
        by_date = sorted(by_key, key=lambda number: _date(self.records[number]), reverse=True)
        self._order = {number: place for place, number in enumerate(by_date)}
        self._titles: dict[str, list[int]] = {}
        self._names: dict[str, list[int]] = {}
        for number, record in enumerate(self.records):
            for title in (record.title, *record.other_titles):
                self._titles.setdefault(normal_title(title), []).append(number)
                name, colon, _ = title.partition(": ")
                if colon:
                    self._names.setdefault(normal_title(name), []).append(number)

    def search(
        self, query: str, *, filters: Filters | None = None, sort: Sort = "relevance", limit: int | None = 20
    ) -> Result:
        """Papers that fit ``query`` and ``filters``.

        An empty query lists every paper that passes the filters, newest first. Ties are broken by date, newest first,
        then by key. Raises ``TypeError`` for a query that is no string, ``ValueError`` for an unknown sort or a limit
        below one, :class:`CatalogError` for an unknown leaf, facet value or venue in the filters.
        """
        if not isinstance(query, str):
            raise TypeError(f"query must be a string, given {type(query).__name__}")
        if sort not in get_args(Sort):
            raise ValueError(f"sort must be one of {', '.join(get_args(Sort))}, given {sort!r}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 or None, given {limit}")
        accept = (filters or Filters()).compile()
        text = " ".join(_CONTROL.sub(" ", query).split())
        words: list[str] = []
        if not text:
            scores: dict[int, float] = dict.fromkeys(range(len(self.records)), 0.0)
            match: Match = "all"
        elif (record := lookup(self._table, text)) is not None:
            scores, match = {self._number[record.key]: 0.0}, "exact"
        else:
            words = _words(text)
            with self._lock:
                scores, match = self._rank(text, words)
        found = [number for number in scores if accept(self.records[number])]
        found.sort(key=self._order.__getitem__)  # Python's sort is stable: this order decides between equals below
        if sort == "relevance":
            found.sort(key=lambda number: round(scores[number], 9))
        elif sort == "added":
            found.sort(key=lambda number: self.records[number].added, reverse=True)
        shown = found if limit is None else found[:limit]
        with self._lock:
            spans = self._spans(words, shown)
        hits = tuple(Hit(self.records[number], scores[number], spans.get(number, ())) for number in shown)
        return Result(hits, len(found), match if found else "none")

    def _rank(self, text: str, words: list[str]) -> tuple[dict[int, float], Match]:
        """Scores (smaller is better) of the papers that have every word, else of those that have most words.

        Which papers have a word is asked first, which is cheap; only the papers that remain are scored.
        """
        last = len(words) - 1
        found = [self._word(word, last=place == last) for place, word in enumerate(words) if re.search(r"[^\W_]", word)]
        if not found:
            return {}, "none"
        counts = Counter(number for papers, _ in found for number in papers)
        most = max(counts.values(), default=0)
        if most == 0 or (most < len(found) and most * 2 < len(found)):
            return {}, "none"
        scores = dict.fromkeys((number for number, count in counts.items() if count == most), 0.0)
        together: dict[tuple[str, float], list[str]] = {}
        for _, parts in found:
            for table, match, factor in parts:
                together.setdefault((table, factor), []).append(match)
        for (table, factor), matches in together.items():
            self._score(scores, table, " OR ".join(matches), factor)  # bm25 adds up over the words
        if len(words) > 1:
            self._score(scores, "stemmed", _quote(" ".join(words)), _PHRASE_BONUS)
        # What was asked for by its whole title, or by the name before the colon, comes first.
        for table, bonus in ((self._titles, _TITLE_BONUS), (self._names, _NAME_BONUS)):
            for number in table.get(normal_title(text), ()):
                if number in scores:
                    scores[number] -= bonus
        return scores, "all" if most == len(found) else "some"

    def _word(self, word: str, *, last: bool) -> tuple[set[int], list[tuple[str, str, float]]]:
        """Papers with one word, and what to score them by: (table, match, factor).

        The word counts whole and stemmed, else as a beginning, else as a part. The last word is looked up as a
        beginning as well, because it may still be being typed.
        """
        quoted, length = _quote(word), len(re.sub(r"[\W_]", "", word))
        parts = [("stemmed", quoted, 1.0), ("plain", quoted, 1.0)]  # as typed counts on top of its stem
        papers = self._papers("stemmed", quoted) | self._papers("plain", quoted)
        if (last or not papers) and length >= 2:
            parts.append(("plain", f"{quoted} *", _PREFIX_FACTOR))
            papers |= self._papers("plain", f"{quoted} *")
        if not papers and len(word) >= 3:
            piece = _quote(to_latin(word).lower())
            parts, papers = [("pieces", piece, _PIECE_FACTOR)], self._papers("pieces", piece)
        return papers, parts

    def _papers(self, table: str, match: str) -> set[int]:
        rows = self._database.execute(f"SELECT rowid FROM {table} WHERE {table} MATCH ?", (match,))
        return {number for (number,) in rows}

    def _score(self, scores: dict[int, float], table: str, match: str, factor: float) -> None:
        """Add the bm25 of a match to the papers that are in ``scores``."""
        statement = f"SELECT rowid, {_BM25[table]} FROM {table} WHERE {table} MATCH ?"
        if len(scores) * 4 < len(self.records):
            # Read on and skip: without the plus SQLite would start the match anew for every paper.
            statement += f" AND +rowid IN ({','.join(map(str, scores))})"
        for number, score in self._database.execute(statement, (match,)):
            if number in scores:
                scores[number] += score * factor

    def _spans(self, words: list[str], numbers: list[int]) -> dict[int, tuple[tuple[int, int], ...]]:
        """Places in the titles to highlight, from the index; parts of words are found by comparing letters."""
        usable = [word for word in words if re.search(r"[^\W_]", word)]
        if not usable or not numbers:
            return {}
        spans: dict[int, set[tuple[int, int]]] = {number: set() for number in numbers}
        chosen = ",".join(str(number) for number in numbers)
        tables = (("stemmed", " OR ".join(_quote(word) for word in usable)), ("plain", f"{_quote(usable[-1])} *"))
        for table, match in tables:
            statement = (
                f"SELECT rowid, highlight({table}, 0, char(2), char(3)) FROM {table} "
                f"WHERE {table} MATCH ? AND +rowid IN ({chosen})"
            )
            for number, marked in self._database.execute(statement, (match,)):
                spans[number].update(_marked_spans(marked))
        for number in numbers:
            if not spans[number]:
                title = self.records[number].title.lower()
                for word in usable:
                    place = title.find(word.lower()) if len(word) >= 3 else -1
                    if place >= 0:
                        spans[number].add((place, place + len(word)))
        return {number: _merged(found) for number, found in spans.items()}


def _row(number: int, record: Record) -> tuple[int | str, ...]:
    leaves = load_taxonomy().leaves
    tags = [leaves[slug].name for slug in record.leaves if slug in leaves]
    tags += [slug.replace("/", " ").replace("-", " ") for slug in record.leaves]
    tags += [value.replace("-", " ") for values in record.facets.model_dump().values() for value in values]
    venue = record.venue
    venue_text = " ".join(str(part) for part in (venue.name, venue.year, venue.track) if part) if venue else ""
    names = [record.key, record.citekey, *record.citekey_aliases, *(v for v in record.ids.model_dump().values() if v)]
    other = " | ".join(record.other_titles)
    pieces = to_latin(" | ".join([record.title, *record.other_titles, *record.author_names])).lower()
    authors = " | ".join(record.author_names)
    return (number, record.key, record.title, other, "", authors, " | ".join(tags), venue_text, " ".join(names), pieces)


def _words(text: str) -> list[str]:
    """The words of a query, each once and none absurdly long."""
    return list(dict.fromkeys(word[:MAX_WORD] for word in text.split()))[:MAX_WORDS]


def _quote(word: str) -> str:
    return '"' + word.replace('"', '""') + '"'


def _marked_spans(marked: str) -> list[tuple[int, int]]:
    spans, start, length = [], 0, 0
    for char in marked:
        if char == "\x02":
            start = length
        elif char == "\x03":
            spans.append((start, length))
        else:
            length += 1
    return spans


def _merged(spans: set[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _date(record: Record) -> str:
    if record.published is not None:
        return record.published.value
    return str(record.year) if record.year else ""


@cache
def default_index() -> SearchIndex:
    """The index over the records that ship with this package, built on first use."""
    return SearchIndex(load_records())


def search(query: str, *, filters: Filters | None = None, sort: Sort = "relevance", limit: int | None = 20) -> Result:
    """:meth:`SearchIndex.search` on the shipped records."""
    return default_index().search(query, filters=filters, sort=sort, limit=limit)


def measure(queries: Sequence[str], index: SearchIndex | None = None) -> dict[str, float]:
    """Median, 95th percentile and maximum of the time of one search, in milliseconds."""
    import statistics
    import time

    index = index or default_index()
    times = []
    for query in queries:
        start = time.perf_counter()
        index.search(query)
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    return {"p50": statistics.median(times), "p95": times[int(0.95 * (len(times) - 1))], "max": times[-1]}
