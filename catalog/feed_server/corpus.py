"""The papers that the feed server knows, and the part of arXiv's query language that it understands."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from latentcot.catalog.identifiers import IdentifierError, parse_arxiv
from latentcot.catalog.text import normal_title

DEMO = Path(__file__).resolve().parent / "demo.json"


class QueryError(ValueError):
    """The query cannot be read; the server answers with an error feed."""


@dataclass(frozen=True)
class Version:
    """What one version of a paper shows."""

    updated: datetime
    title: str
    abstract: str = ""
    comment: str | None = None
    journal_ref: str | None = None
    doi: str | None = None


@dataclass(frozen=True)
class Paper:
    """A paper with all its versions. Before ``announced`` the server does not show it, though it has been submitted."""

    base: str
    versions: tuple[Version, ...]
    authors: tuple[str, ...] = ("Ada Okafor", "Bo Lind")
    categories: tuple[str, ...] = ("cs.CL",)
    announced: datetime | None = None
    raw_id: str | None = None  # written into the feed instead of the real address: hostile input

    @property
    def published(self) -> datetime:
        return self.versions[0].updated

    def revised(self, version: Version) -> "Paper":
        """The paper with one more version."""
        return replace(self, versions=(*self.versions, version))


def paper(base: str, title: str, submitted: str, *, abstract: str = "", **rest: object) -> Paper:
    """A paper with one version; ``submitted`` such as ``2026-01-12`` or ``2026-01-12T10:00``."""
    when = datetime.fromisoformat(submitted).replace(tzinfo=UTC)
    return Paper(base, (Version(when, title, abstract),), **rest)  # type: ignore[arg-type]


def load_papers(path: Path = DEMO) -> list[Paper]:
    """Papers from a JSON file: a list ``papers`` of ``{id, categories, authors, versions: [{date, title, ...}]}``."""
    found = []
    for item in json.loads(path.read_text(encoding="utf-8"))["papers"]:
        versions = tuple(
            Version(
                datetime.fromisoformat(version["date"]).replace(tzinfo=UTC),
                version["title"],
                version.get("abstract", ""),
                version.get("comment"),
                version.get("journal_ref"),
                version.get("doi"),
            )
            for version in item["versions"]
        )
        found.append(Paper(item["id"], versions, tuple(item.get("authors", ())), tuple(item["categories"])))
    return found


@dataclass
class Corpus:
    """All papers. ``search`` and ``by_ids`` answer as the API does, with versions."""

    papers: list[Paper] = field(default_factory=list)

    def add(self, papers: Iterable[Paper]) -> None:
        """Add papers; one with a known id takes the old one's place (a new version)."""
        table = {item.base: item for item in self.papers} | {item.base: item for item in papers}
        self.papers = list(table.values())

    def visible(self, now: datetime) -> list[Paper]:
        return [item for item in self.papers if item.announced is None or item.announced <= now]

    def search(self, query: str, now: datetime) -> list[Paper]:
        """Matching papers in ascending order of submission."""
        accept = parse_query(query)
        return sorted(
            (item for item in self.visible(now) if accept(item)), key=lambda item: (item.published, item.base)
        )

    def by_ids(self, ids: Sequence[str], now: datetime) -> list[tuple[Paper, int]]:
        """Papers with the version that was asked for; unknown ones are left out, malformed ones are an error."""
        table = {item.base: item for item in self.visible(now)}
        found = []
        for text in ids:
            try:
                wanted = parse_arxiv(text)
            except IdentifierError:
                raise QueryError(f"incorrect id format for {text}") from None
            item = table.get(wanted.base)
            if item and (wanted.version or 1) <= len(item.versions):
                found.append((item, wanted.version or len(item.versions)))
        return found


Accept = Callable[[Paper], bool]
_TOKEN = re.compile(
    r'\s*(?:(?P<open>\()|(?P<close>\))|(?P<op>ANDNOT|AND|OR)\b|(?P<field>[a-zA-Z]+):(?P<value>"[^"]*"|\[[^\]]*\]|[^\s()"\[\]]+))'
)


def parse_query(text: str) -> Accept:
    """``field:value`` with AND, OR, ANDNOT and parentheses; fields ti, abs, all, au, cat, co and submittedDate."""
    tokens = list(_tokens(text))
    accept, rest = _either(tokens)
    if rest:
        raise QueryError(f"cannot read the query from {rest[0].group()!r} on")
    return accept


def _tokens(text: str) -> Iterator[re.Match[str]]:
    place = 0
    text = text.strip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if not match:
            raise QueryError(f"cannot read the query at {text[place : place + 30]!r}")
        yield match
        place = match.end()


def _either(tokens: list[re.Match[str]]) -> tuple[Accept, list[re.Match[str]]]:
    left, tokens = _both(tokens)
    while tokens and tokens[0]["op"] == "OR":
        right, tokens = _both(tokens[1:])
        left = _or(left, right)
    return left, tokens


def _both(tokens: list[re.Match[str]]) -> tuple[Accept, list[re.Match[str]]]:
    left, tokens = _one(tokens)
    while tokens and tokens[0]["op"] in ("AND", "ANDNOT"):
        negative = tokens[0]["op"] == "ANDNOT"
        right, tokens = _one(tokens[1:])
        left = _and(left, right, negative)
    return left, tokens


def _or(left: Accept, right: Accept) -> Accept:
    return lambda item: left(item) or right(item)


def _and(left: Accept, right: Accept, negative: bool) -> Accept:
    return lambda item: left(item) and right(item) is not negative


def _one(tokens: list[re.Match[str]]) -> tuple[Accept, list[re.Match[str]]]:
    if not tokens:
        raise QueryError("the query ends too early")
    token, rest = tokens[0], tokens[1:]
    if token["open"]:
        accept, rest = _either(rest)
        if not rest or not rest[0]["close"]:
            raise QueryError("a parenthesis is not closed")
        return accept, rest[1:]
    if not token["field"]:
        raise QueryError(f"expected field:value, given {token.group().strip()!r}")
    return _condition(token["field"], token["value"]), rest


def _condition(name: str, value: str) -> Accept:
    if name == "submittedDate":
        match = re.fullmatch(r"\[(\d{12}) TO (\d{12})\]", value)
        if not match:
            raise QueryError(f"submittedDate expects [YYYYMMDDHHMM TO YYYYMMDDHHMM], given {value!r}")
        first, last = match.groups()
        return lambda item: first <= item.published.strftime("%Y%m%d%H%M") <= last
    if name == "cat":
        wanted = value.strip('"')
        return lambda item: any(
            category == wanted or (wanted.endswith(".*") and category.startswith(wanted[:-1]))
            for category in item.categories
        )
    fields: dict[str, Callable[[Paper], str]] = {
        "ti": lambda item: item.versions[-1].title,
        "abs": lambda item: item.versions[-1].abstract,
        "co": lambda item: item.versions[-1].comment or "",
        "au": lambda item: " ".join(item.authors),
        "all": lambda item: " ".join((item.versions[-1].title, item.versions[-1].abstract, *item.authors)),
    }
    if name not in fields:
        raise QueryError(f"there is no field {name!r}")
    words = f" {normal_title(value)} "
    return lambda item: words in f" {normal_title(fields[name](item))} "
