"""A bibliography of one's own against the catalog: which entries are known, which may be, which are missing.

An entry is *known* by its arXiv id, DOI or another strong id, else by title and people (the rules of
:mod:`latentcot.catalog.dedupe`); *likely* where the titles are equal or near and the rest cannot be told; else
*missing*. A missing entry is proposed with the relevance of its title, so that the papers of the field stand first.
Reading BibTeX is pybtex's work (``pip install latentcot[bib]``).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from latentcot.catalog.dedupe import Evidence, compare, near_title, same_title
from latentcot.catalog.export.plain import one_line
from latentcot.catalog.identifiers import IdentifierError, identify, parse_arxiv
from latentcot.catalog.record import Record
from latentcot.catalog.store import CatalogError, build_lookup, load_records, lookup
from latentcot.catalog.text import title_tokens
from latentcot.catalog.venues import parse_venue

MOST_BYTES = 64 * 1024 * 1024
_ARXIV = re.compile(r"arxiv[.:\s/]*(?:abs/|pdf/)?\s*((?:\d{4}\.\d{4,5}|[a-z-]+(?:\.[a-z]{2})?/\d{7})(?:v\d+)?)", re.I)
_ENTRY = re.compile(r"^(?=[ \t]*@\w+\s*[{(])", re.MULTILINE)
_UNCLOSED = "premature end of file"
_PLACES = ("url", "howpublished", "note", "journal", "booktitle", "series", "volume", "number", "pages", "archive")

Outcome = Literal["known", "likely", "missing"]


@dataclass(frozen=True)
class Entry:
    """One entry of the bibliography, as plain text."""

    key: str
    title: str
    authors: tuple[str, ...] = ()
    year: int | None = None
    arxiv: str | None = None
    doi: str | None = None
    addresses: tuple[str, ...] = ()
    venue: str | None = None


@dataclass(frozen=True)
class Proposal:
    """Why a missing paper may belong here: relevance in [0, 1], the leaf, the reasons."""

    probability: float
    leaf: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What became of an entry: ``record`` is the paper it is or may be, ``rule`` says why, ``remark`` what is odd."""

    entry: Entry
    outcome: Outcome
    rule: str
    record: Record | None = None
    remark: str | None = None
    proposal: Proposal | None = None


@dataclass(frozen=True)
class Compared:
    """All entries in the order of the file, and what could not be read."""

    found: tuple[Found, ...]
    problems: tuple[str, ...] = ()
    counts: dict[Outcome, int] = field(default_factory=dict)


def read_bib(path: Path) -> tuple[list[Entry], list[str]]:
    """The entries of a BibTeX file and what could not be read of it.

    Damaged entries are told and passed over; the others are read. Raises :class:`CatalogError` where there is no such
    file, it is too large, or pybtex is not installed.
    """
    if not path.is_file():
        raise CatalogError(f"{path} is {'a folder' if path.is_dir() else 'not there'}, expected a BibTeX file")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise CatalogError(f"{path} has {size} bytes, expected at most {MOST_BYTES}")
    data = path.read_bytes()
    problems = []
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"not UTF-8 from byte {error.start} on: read as Latin-1")
        text = data.decode("latin-1")
    entries, more = parse_bib(text)
    return entries, [*problems, *more]


def parse_bib(text: str) -> tuple[list[Entry], list[str]]:
    """As :func:`read_bib`, from text."""
    raw_entries, problems = _parse(text)
    if any(_UNCLOSED in problem for problem in problems):
        # A brace that is never closed takes the rest of the file with it: without its entry the others are there.
        text, lines = _without_unclosed(text)
        raw_entries, problems = _parse(text)
        problems = [*(f"the entry in line {line} is not closed: passed over" for line in lines), *problems]
    entries = []
    for key, raw in raw_entries.items():
        entry = _entry(key, raw)
        if entry.title or entry.arxiv or entry.doi or entry.addresses:
            entries.append(entry)
        else:
            problems.append(f"the entry {entry.key!r} has neither title nor identifier")
    if not entries and not problems and text.strip():
        problems.append("no BibTeX entry was found in the file")
    return entries, problems


def _parse(text: str) -> tuple[dict[str, Any], list[str]]:
    """pybtex's entries by key, and what it complains about."""
    try:
        from pybtex import errors
        from pybtex.database.input.bibtex import Parser
        from pybtex.exceptions import PybtexError
    except ModuleNotFoundError:
        raise CatalogError(
            "reading BibTeX needs pybtex, which is not installed: pip install 'latentcot[bib]'"
        ) from None
    with errors.capture() as captured:
        try:
            entries = dict(Parser().parse_string(text).entries.items())
        except PybtexError as error:
            captured.append(error)
            entries = {}
    return entries, [one_line(str(error)) for error in captured]


def _without_unclosed(text: str) -> tuple[str, list[int]]:
    """``text`` with empty lines in place of the entries that are never closed, and the lines where those begin."""
    parts, lines, line = [], [], 1
    for part in _ENTRY.split(text):
        if any(_UNCLOSED in problem for problem in _parse(part)[1]):
            lines.append(line)
            part = "\n" * part.count("\n")
        line += part.count("\n")
        parts.append(part)
    return "".join(parts), lines


def _entry(key: str, entry: Any) -> Entry:
    fields = {name.lower(): value for name, value in entry.fields.items()}
    people = entry.persons.get("author", [])
    names = [
        " ".join(plain(part) for group in ("first_names", "middle_names", "prelast_names", "last_names", "lineage_names")
                 for part in getattr(person, group))
        for person in people
    ]  # fmt: skip
    year = re.search(r"\b(1[89]\d\d|20\d\d)\b", f"{fields.get('year', '')} {fields.get('date', '')}")
    venue = fields.get("booktitle") or fields.get("journal")
    return Entry(
        key=one_line(key),
        title=plain(fields.get("title", "")),
        authors=tuple(name for name in names if name and name != "others"),
        year=int(year[1]) if year else None,
        arxiv=_arxiv(fields),
        doi=_doi(fields),
        addresses=tuple(_addresses(fields)),
        venue=plain(venue) if venue else None,
    )


def plain(tex: str) -> str:
    """TeX as a reader sees it: accents made letters, braces gone; what is not understood stays as it is."""
    from pybtex.exceptions import PybtexError
    from pybtex.richtext import Text

    text = re.sub(r"\\(?:url|href)\s*\{([^{}]*)\}", r"\1", tex)
    try:
        text = str(Text.from_latex(text))
    except (PybtexError, ValueError, IndexError, TypeError, KeyError, RecursionError):
        text = re.sub(r"[{}]", "", text)
    return one_line(text.replace("\xa0", " ").replace("–", "-").replace("’", "'"))


def _arxiv(fields: dict[str, str]) -> str | None:
    eprint = fields.get("eprint", "").strip()
    archive = fields.get("archiveprefix", fields.get("eprinttype", "arxiv")).strip().lower()
    candidates = [eprint] if eprint and archive in ("arxiv", "") else []
    candidates += [fields[name] for name in ("doi",) if "arxiv" in fields.get(name, "").lower()]
    for name in _PLACES:
        candidates += [match[1] for match in _ARXIV.finditer(fields.get(name, ""))]
    for text in candidates:
        try:
            return parse_arxiv(text.strip()).base
        except IdentifierError:
            continue
    return None


def _doi(fields: dict[str, str]) -> str | None:
    text = fields.get("doi", "").strip().replace("\\_", "_")
    found = identify(text) if text else None
    return found.value if found and found.kind == "doi" else None


def _addresses(fields: dict[str, str]) -> Iterator[str]:
    for name in ("url", "howpublished", "note", "ee"):
        yield from (address.rstrip(".,;)}") for address in re.findall(r"https?://[^\s{}]+", fields.get(name, "")))


class Matcher:
    """Finds the record of an entry among ``records``."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._table = build_lookup(list(records))
        self._records = list(records)
        self._titles = [(record.title, *record.other_titles) for record in records]
        self._holders: dict[str, list[int]] = {}
        for place, titles in enumerate(self._titles):
            for word in {word for title in titles for word in title_tokens(title)}:
                self._holders.setdefault(word, []).append(place)

    def match(self, entry: Entry) -> Found:
        """Known, likely or missing, and why."""
        for rule, name in self._names(entry):
            record = lookup(self._table, name)
            if record is not None:
                return Found(entry, "known", rule, record, self._remark(entry, record))
        best: Found | None = None
        for place in self._candidates(entry.title):
            record = self._records[place]
            for title in self._titles[place]:
                verdict = compare(_of_entry(entry), _of_record(record, title))
                if verdict.outcome == "same":
                    return Found(entry, "known", verdict.rule, record)
                if verdict.outcome == "review" and (best is None or same_title(entry.title, title)):
                    best = Found(entry, "likely", verdict.rule, record)
        return best or Found(entry, "missing", "no id and no title of the catalog fits")

    def _names(self, entry: Entry) -> Iterator[tuple[str, str]]:
        if entry.arxiv:
            yield "arXiv id", f"arXiv:{entry.arxiv}"
        if entry.doi:
            yield "DOI", entry.doi
        for address in entry.addresses:
            yield "address", address

    def _remark(self, entry: Entry, record: Record) -> str | None:
        titles = (record.title, *record.other_titles)
        if not entry.title or any(same_title(entry.title, t) or near_title(entry.title, t) for t in titles):
            return None
        return f"the entry's title is another; the catalog has “{record.title}”"

    def _candidates(self, title: str) -> list[int]:
        words = [word for word in title_tokens(title) if word in self._holders]
        rare = sorted(words, key=lambda word: (len(self._holders[word]), word))[:4]
        return sorted({place for word in rare for place in self._holders[word]})


def _of_entry(entry: Entry) -> Evidence:
    return Evidence(entry.title, entry.arxiv, entry.doi, first_author=entry.authors[0] if entry.authors else None,
                    year=entry.year, venues=_venues(entry.venue))  # fmt: skip


def _of_record(record: Record, title: str) -> Evidence:
    names = record.author_names
    venue = frozenset({record.venue.name}) if record.venue else frozenset()
    return Evidence(title, record.ids.arxiv, record.ids.doi, first_author=names[0] if names else None,
                    year=record.year, venues=venue)  # fmt: skip


def _venues(text: str | None) -> frozenset[str]:
    if not text:
        return frozenset()
    try:
        name = parse_venue(text).name
    except ValueError:
        return frozenset()
    return frozenset({name} if name else ())


def compare_bib(
    entries: Iterable[Entry],
    records: Sequence[Record] | None = None,
    *,
    problems: Sequence[str] = (),
    score: bool = True,
) -> Compared:
    """Every entry against ``records`` (default: the shipped ones).

    ``score``: whether missing entries are scored for relevance.
    """
    matcher = Matcher(load_records() if records is None else records)
    found = [matcher.match(entry) for entry in entries]
    if score:
        found = [_proposed(one) if one.outcome == "missing" and one.entry.title else one for one in found]
    counts: dict[Outcome, int] = {"known": 0, "likely": 0, "missing": 0}
    for one in found:
        counts[one.outcome] += 1
    return Compared(tuple(found), tuple(problems), counts)


def _proposed(found: Found) -> Found:
    from latentcot.catalog.relevance import score

    judged = score(found.entry.title)
    proposal = Proposal(round(float(judged.probability), 4), judged.leaf, tuple(judged.reasons))
    return Found(found.entry, found.outcome, found.rule, found.record, found.remark, proposal)
