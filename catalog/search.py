r"""Search over the records, built from them in a fraction of a second.

A paper is scored by how much of the query it has. With :math:`m_w \in [0, 1]` for how well it has the word *w* (1 in
its title, less in other fields, by its stem, by a word of the same or a near meaning, as a beginning or as a part),

.. math:: s = \frac{\sum_w \mathrm{idf}_w m_w}{\sum_w \mathrm{idf}_w} + \text{bonuses}, \qquad
          \mathrm{idf}_w = \log\Bigl(1 + \frac{N}{n_w + 1/2}\Bigr)

for *N* papers of which :math:`n_w` have the word; bonuses go to papers with every word, to words that stand side by
side in the title as in the query, to titles that hold little else, and to papers like the best ones (relevance
feedback without a user: the title words they share, and their topic, in which the words of the query have half a
say). Nothing that a user types is query syntax. An identifier, address or citation key is looked up exactly before
anything is ranked. Ties are broken by date, newest first, then by key.
"""

import threading
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, Literal, get_args

from latentcot.catalog.filters import Filters
from latentcot.catalog.identifiers import identify
from latentcot.catalog.leaves import load_taxonomy
from latentcot.catalog.postings import FIELDS, STEMMED, Postings
from latentcot.catalog.record import Record
from latentcot.catalog.search_text import Snippet, Spans, Wanted, find_spans, marked, snippet
from latentcot.catalog.search_topics import TopicWords
from latentcot.catalog.search_words import (
    SAME_FACTOR,
    Phrase,
    Stemmer,
    clean_query,
    hump_words,
    load_terms,
    method_names,
    query_words,
    words_of,
)
from latentcot.catalog.store import build_lookup, load_records, lookup
from latentcot.catalog.text import normal_title

Sort = Literal["relevance", "date", "added"]
Match = Literal["exact", "all", "some", "none"]

FIELD_WEIGHTS = {
    "title": 1.0, "other": 1.0, "names": 1.0, "authors": 0.9, "tags": 0.25, "venue": 0.6, "definition": 0.1,
    "abstract": 0.3,
}  # fmt: skip
# Factors of m: another word of the same stem, a longer word than typed (when the typed one is there, and when not), a
# part of a word.
_STEM, _LONGER, _BEGINNING, _PART = 0.85, 0.3, 0.7, 0.5
_BOTH = 0.1
_ALL_WORDS, _SIDE_BY_SIDE, _LITTLE_ELSE = 0.08, 0.2, 0.1
_TITLE, _NAME = 3.0, 2.0  # the query is a title, or the name before its colon
# Bonuses for the topic of the best papers and for title words that they share; how many papers and words those are.
_TOPIC, _TERMS, _FROM, _SHARED = 0.6, 0.4, 5, 6
_ALL_THERE = 0.05  # share of these bonuses for papers that lack no word
_ENOUGH, _NEAR_BEST = 0.25, 0.3  # what a paper must have of the words' weight, and of the best paper's score
_RERANKED = 60


@dataclass(frozen=True)
class Hit:
    """A found paper. ``spans`` are the places in ``record.title`` to highlight, as (start, end).

    ``score`` is larger for a better fit. ``snippet`` is the part of the abstract that fits best, where there is one.
    """

    record: Record
    score: float
    spans: Spans = ()
    snippet: Snippet | None = None

    def marked(self, left: str, right: str) -> str:
        """The title with ``left`` and ``right`` around every highlighted place. Not escaped: for terminals."""
        return marked(self.record.title, self.spans, left, right)


@dataclass(frozen=True)
class Result:
    """Hits in order, how many there are without the limit, and how they were matched.

    ``match`` is ``exact`` (an identifier was looked up), ``all`` (there are papers with every word; they may be followed
    by papers with most of the words), ``some`` (no paper has every word, these have most of them) or ``none``.
    """

    hits: tuple[Hit, ...]
    total: int
    match: Match


@dataclass
class SearchIndex:
    """A search index over ``records``; ``abstracts`` maps keys to abstracts. Safe to share between threads."""

    records: Sequence[Record]
    abstracts: Mapping[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(init=False, repr=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        import numpy as np

        by_key = sorted(self.records, key=lambda record: record.key)
        self._papers = sorted(by_key, key=_date, reverse=True)  # numbers are in the order of ties
        self._number = {record.key: number for number, record in enumerate(self._papers)}
        self._stemmer = Stemmer()
        named: dict[str, list[str]] = {}
        for name, key in method_names().items():
            named.setdefault(key, []).append(name)
        rows = (_row(record, named.get(record.key, []), self.abstracts.get(record.key, "")) for record in self._papers)
        self._postings = Postings(rows, self._stemmer)
        self._table = build_lookup(self._papers)
        in_leaf: dict[str, list[int]] = {}
        for number, record in enumerate(self._papers):
            in_leaf.setdefault(record.taxonomy.primary, []).append(number)
        self._in_leaf = {leaf: np.array(numbers, dtype=np.int32) for leaf, numbers in in_leaf.items()}
        self._titles: dict[str, list[int]] = {}
        self._names: dict[str, list[int]] = {}
        self._title_stems: list[tuple[str, ...]] = []
        for number, record in enumerate(self._papers):
            for title in (record.title, *record.other_titles):
                self._titles.setdefault(normal_title(title), []).append(number)
                name, colon, _ = title.partition(":")
                if colon:
                    self._names.setdefault(normal_title(name), []).append(number)
            for name in named.get(record.key, []):
                self._names.setdefault(normal_title(name), []).append(number)
            title_words = words_of(record.title)
            stems = self._stemmer.stem(title_words)
            self._title_stems.append(tuple(stems[word] for word in title_words))
        self._topic_words = TopicWords(self._title_stems, [record.taxonomy.primary for record in self._papers])

    def search(
        self, query: str, *, filters: Filters | None = None, sort: Sort = "relevance", limit: int | None = 20
    ) -> Result:
        """Papers that fit ``query`` and ``filters``.

        An empty query lists every paper that passes the filters, newest first. Raises ``TypeError`` for a query that is
        no string, ``ValueError`` for an unknown sort or a limit below one, :class:`CatalogError` for an unknown leaf,
        facet value or venue in the filters.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 or None, given {limit}")
        found, scores, match, words = self._find(query, filters, sort)
        wanted = self._wanted(words)
        hits = []
        for number in found if limit is None else found[:limit]:
            record = self._papers[number]
            abstract = self.abstracts.get(record.key)
            piece = snippet(abstract, wanted) if abstract else None
            hits.append(Hit(record, scores.get(number, 0.0), find_spans(record.title, wanted), piece))
        return Result(tuple(hits), len(found), match if found else "none")

    def counts(self, query: str, *, filters: Filters | None = None) -> dict[str, Counter[str]]:
        """How many of the found papers have each leaf, year, venue, and value of each facet."""
        found, *_ = self._find(query, filters, "date")
        counts: dict[str, Counter[str]] = {name: Counter() for name in ("leaf", "year", "venue", "has")}
        for number in found:
            record = self._papers[number]
            counts["leaf"].update(record.leaves)
            counts["year"][str(record.year or "unknown")] += 1
            counts["venue"][record.venue.name if record.venue else "none"] += 1
            counts["has"].update(["code"] * record.has_code + ["runnable"] * bool(record.runnable))
            for name, values in record.facets.model_dump().items():
                counts.setdefault(name, Counter()).update(values)
        return counts

    def _find(
        self, query: str, filters: Filters | None, sort: Sort
    ) -> tuple[list[int], dict[int, float], Match, list[str]]:
        """Numbers of the papers in order, scores of the first of them, how they matched, the words of the query."""
        if not isinstance(query, str):
            raise TypeError(f"query must be a string, given {type(query).__name__}")
        if sort not in get_args(Sort):
            raise ValueError(f"sort must be one of {', '.join(get_args(Sort))}, given {sort!r}")
        accept = filters.compile() if filters is not None and filters != Filters() else None
        text = clean_query(query)
        words: list[str] = []
        scores: dict[int, float] = {}
        match: Match = "all"
        if not text:
            found = list(range(len(self._papers)))
        elif (record := lookup(self._table, text)) is not None:
            found, match = [self._number[record.key]], "exact"
        elif identify(text) is not None:
            found = []  # an identifier that no record has: papers with the same digits are of no help
        else:
            words = query_words(text)
            with self._lock:
                found, scores, match = self._rank(text, words)
        if accept is not None:
            found = [number for number in found if accept(self._papers[number])]
        if sort != "relevance":
            found.sort()
            if sort == "added":  # Python's sort is stable: the order of numbers decides between equals
                found.sort(key=lambda number: self._papers[number].added, reverse=True)
        return found, scores, match, words

    def _rank(self, text: str, words: list[str]) -> tuple[list[int], dict[int, float], Match]:
        import numpy as np

        terms = load_terms()
        used = [place for place, word in enumerate(words) if word not in terms.ignored] or list(range(len(words)))
        size = len(self._papers)
        if not used or not size:
            return [], {}, "none"
        having = _Having(self._postings, self._stemmer)
        strength = {place: having.typed(words[place], last=place == len(words) - 1).copy() for place in used}
        idf = {place: np.log1p(size / (np.count_nonzero(m >= 0.3) + 0.5)) for place, m in strength.items()}
        has_all = bool(np.logical_and.reduce([m > 0 for m in strength.values()]).any())
        for start, end, others in terms.phrases(words):
            for phrase, factor in others:
                docs, alike = having.phrase(phrase)
                alike = alike * np.float32(factor)
                for place in range(start, end) if len(docs) else ():
                    if place in strength:
                        # Having both the word and one of its meaning is a little better than having one.
                        own = strength[place][docs]
                        both = np.float32(_BOTH) * np.minimum(own, alike)
                        strength[place][docs] = np.maximum(own, alike) + both
        for place, parts in _shares(terms.phrases(words), strength).items():
            idf[place] /= parts
        every = np.logical_and.reduce([m > 0 for m in strength.values()])
        score = sum(np.float32(idf[place]) * m for place, m in strength.items()) / np.float32(sum(idf.values()))
        enough = np.asarray(score >= max(_ENOUGH, _NEAR_BEST * float(score.max())))
        normal = normal_title(text)
        score += np.float32(_ALL_WORDS) * every
        for table, bonus in ((self._titles, _TITLE), (self._names, _NAME)):
            for number in table.get(normal, ()):
                score[number] += bonus
                enough[number] = True
        stems = self._stemmer.stem(words)
        asked = [stems[words[place]] for place in used]
        self._add_feedback(score, asked)
        chosen = np.flatnonzero(enough | every)
        ranked = chosen[np.argsort(-np.round(score[chosen], 6), kind="stable")].tolist()
        scores = {
            number: round(float(score[number]) + _title_bonus(self._title_stems[number], asked), 6)
            for number in ranked[:_RERANKED]
        }
        head = sorted(scores, key=lambda number: (-scores[number], number))
        return [*head, *ranked[_RERANKED:]], scores, "all" if has_all else "some"

    def _add_feedback(self, score: Any, asked: Sequence[str]) -> None:
        """Let the best papers speak for others: of their topic, and with the title words that several of them share.

        What people mean by a query is often clearer from the papers that answer it best than from its words.
        """
        import numpy as np

        best = np.argpartition(-score, min(_FROM, len(score)) - 1)[:_FROM]
        best = sorted(best[score[best] > 0].tolist())
        weights = {number: float(score[number]) for number in best}
        whole = sum(weights.values())
        topics = self._topic_words.chances(asked)
        parts = 2 if topics else 1  # the words and the best papers have half a say each
        topics = {leaf: share / parts for leaf, share in topics.items()}
        stems: dict[str, float] = {}
        times: Counter[str] = Counter()
        for number, weight in weights.items():
            leaf = self._papers[number].taxonomy.primary
            topics[leaf] = topics.get(leaf, 0.0) + weight / whole / parts
            for stem in sorted(set(self._title_stems[number]).difference(asked, load_terms().ignored)):
                if len(stem) > 2:
                    times[stem] += 1
                    stems[stem] = stems.get(stem, 0.0) + weight / whole
        extra = np.zeros_like(score)
        for leaf, share in topics.items():
            extra[self._in_leaf[leaf]] += np.float32(_TOPIC * share)
        shared = []
        for stem, share in stems.items():
            if times[stem] >= 2:
                stretches = self._postings.stem(stem)
                count = sum(len(docs) for docs, _ in stretches)
                shared.append((share * float(np.log1p(len(score) / (count + 0.5))), stem, stretches))
        shared = sorted(shared, key=lambda entry: (-entry[0], entry[1]))[:_SHARED]
        together = sum(value for value, _, _ in shared)
        for value, _, stretches in shared:
            for docs, fields in stretches:
                extra[docs] += np.float32(_TERMS * value / together) * _stemmed_table()[fields]
        # In place of words that a paper lacks. One that has them all needs little of it, to come before its like.
        score += extra * np.maximum(1 - np.minimum(score, 1), np.float32(_ALL_THERE))

    def _wanted(self, words: list[str]) -> Wanted:
        if not words:
            return Wanted()
        last = words[-1] if len(words[-1]) >= 2 else ""
        return Wanted(self._postings.family(words), last, words)


class _Having:
    """How well every paper has a word or phrase, as float32 arrays in [0, 1]; each is worked out once a query."""

    def __init__(self, postings: Postings, stemmer: Stemmer) -> None:
        self._postings, self._stemmer = postings, stemmer
        self._kept: dict[str, Any] = {}

    def typed(self, word: str, *, last: bool) -> Any:
        """A word of the user: whole or by its stem, else as a beginning, else as a part.

        The last word counts as a beginning as well, because it may still be being typed.
        """
        import numpy as np

        found = self.word(word)
        missing = not found.any()
        if (last or missing) and len(word) >= 2:
            found = found.copy()
            docs, fields = self._postings.beginning(word)
            np.maximum.at(found, docs, _table()[fields] * np.float32(_BEGINNING if missing else _LONGER))
            missing = not found.any()
        if missing and len(word) >= 3:
            found = found.copy()
            for docs, fields in self._postings.containing(word):
                found[docs] = np.maximum(found[docs], _table()[fields] * np.float32(_PART))
        return found

    def word(self, word: str) -> Any:
        import numpy as np

        if word not in self._kept:
            found = np.zeros(self._postings.count, dtype=np.float32)
            docs, fields = self._postings.word(word)
            found[docs] = _table()[fields]
            stem = self._stemmer.stem([word])[word]
            for docs, fields in self._postings.stem(stem):
                found[docs] = np.maximum(found[docs], _stemmed_table()[fields] * np.float32(_STEM))
            self._kept[word] = found
        return self._kept[word]

    def phrase(self, words: Sequence[str]) -> tuple[Any, Any]:
        """Papers that have all of the words, and how well."""
        import numpy as np

        arrays = [self.word(word) for word in words]
        together = np.minimum.reduce(arrays) if len(arrays) > 1 else arrays[0]
        docs = np.flatnonzero(together)
        return docs, together[docs]


def _shares(phrases: Iterable[Phrase], used: Container[int]) -> dict[int, int]:
    """Of how many used words the longest phrase around each place is: "chain of thought" counts as one word does."""
    shares: dict[int, int] = {}
    for start, end, others in phrases:
        if any(factor == SAME_FACTOR for _, factor in others):
            places = [place for place in range(start, end) if place in used]
            for place in places:
                shares[place] = max(shares.get(place, 1), len(places))
    return shares


def _title_bonus(title: Sequence[str], asked: Sequence[str]) -> float:
    """For stems that stand side by side in the title as in the query, and for a title that holds little else."""
    if not title:
        return 0.0
    there = set(asked).intersection(title)
    bonus = _LITTLE_ELSE * sum(map(there.__contains__, title)) / len(title)
    if len(there) > 1:
        pairs = set(pairwise(title))
        bonus += _SIDE_BY_SIDE * sum(map(pairs.__contains__, pairwise(asked))) / (len(asked) - 1)
    return bonus


@cache
def _table() -> Any:
    """The largest weight of the fields in a set of fields (a byte)."""
    return _weights(FIELDS)


@cache
def _stemmed_table() -> Any:
    return _weights(STEMMED)


def _weights(fields: Sequence[str]) -> Any:
    import numpy as np

    bits = [(1 << place, FIELD_WEIGHTS[name]) for place, name in enumerate(FIELDS) if name in fields]
    values = [max((weight for bit, weight in bits if byte & bit), default=0.0) for byte in range(256)]
    return np.array(values, dtype=np.float32)


def _row(record: Record, known_as: Sequence[str], abstract: str) -> tuple[str, ...]:
    """The texts of a paper in the order of :data:`~latentcot.catalog.postings.FIELDS`."""
    leaves = load_taxonomy().leaves
    filed = [leaves[slug] for slug in record.leaves if slug in leaves]
    tags = [leaf.name for leaf in filed] + [slug.replace("/", " ") for slug in record.leaves]
    facets = record.facets
    tags += [*facets.mechanism, *facets.stage, *facets.modality, *facets.domain]
    venue = record.venue
    when = [str(record.year)] if record.year else []
    where = [str(part) for part in (venue.name, venue.year, venue.track) if part] if venue else []
    ids = record.ids
    names = [record.key, record.citekey, *record.citekey_aliases, *known_as]
    names += [value for value in (ids.doi, ids.openreview, ids.acl, ids.dblp, ids.s2) if value]
    names += [link.url.rstrip("/").rpartition("/")[2] for link in record.links if link.kind in ("code", "weights")]
    other = [*record.other_titles, *sorted(hump_words(record.title))]
    return (
        record.title, " | ".join(other), " | ".join(names), " | ".join(record.author_names), " | ".join(tags),
        " ".join([*where, *when]), " ".join(leaf.definition for leaf in filed), abstract,
    )  # fmt: skip


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
