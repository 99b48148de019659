"""arXiv's Atom feed, read as data from a stranger.

A feed that is not plain UTF-8 Atom raises :class:`DamagedFeedError`; document types and entities are refused before the parser sees
them. Inside a sound feed each entry is judged alone: one that cannot be trusted (no valid arXiv id, no date, a title of ten megabytes)
is *refused* with its reason and the others are read. Texts come out in one line, without control and direction characters.
Elements are found by namespace address, not by prefix. Source: arXiv API user's manual, sections 3 and 5.
"""

import re
import unicodedata
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from latentcot.catalog.identifiers import Identifier, IdentifierError, parse_arxiv, parse_doi, record_key
from latentcot.catalog.text import collapse

ATOM = "{http://www.w3.org/2005/Atom}"
ARXIV = "{http://arxiv.org/schemas/atom}"
OPENSEARCH = "{http://a9.com/-/spec/opensearch/1.1/}"

MAX_TITLE, MAX_NAME, MAX_AUTHORS, MAX_ABSTRACT, MAX_FIELD = 1_000, 300, 5_000, 20_000, 2_000
_ARCHIVES = """
astro-ph cond-mat cs econ eess gr-qc hep-ex hep-lat hep-ph hep-th math math-ph nlin nucl-ex nucl-th physics q-bio q-fin
quant-ph stat
"""
ARCHIVES = frozenset(_ARCHIVES.split())
# Marks that reorder or hide text: embeddings, overrides, isolates, direction marks, zero width, byte order, tags.
_UNSEEN = re.compile("[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")
_CONTROL_REFERENCE = re.compile(r"&#(?:0*(?:[0-8]|1[124-9]|2\d|3[01])|x0*(?:[0-8bcefBCEF]|1[0-9a-fA-F]));")


class DamagedFeedError(ValueError):
    """The answer is no readable Atom feed. One line, for the reader."""


@dataclass(frozen=True)
class Entry:
    """One paper as the feed shows it: the version that was returned, ``published`` is that of version 1."""

    base: str
    version: int
    title: str
    abstract: str | None
    authors: tuple[str, ...]
    published: datetime
    updated: datetime
    comment: str | None = None
    journal_ref: str | None = None
    doi: str | None = None
    primary_category: str | None = None
    categories: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return record_key(Identifier("arxiv", self.base))


@dataclass(frozen=True)
class Refused:
    """An entry that was not taken in, and why. ``name`` is its id where it has one, shortened."""

    name: str
    reason: str


@dataclass(frozen=True)
class FeedPage:
    """One answer. ``error`` is the text of an error entry; ``total`` is what the feed claims, which can be wrong."""

    total: int
    start: int
    entries: tuple[Entry, ...] = ()
    refused: tuple[Refused, ...] = ()
    error: str | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def arrived(self) -> int:
        """How far the page brings the reader."""
        return len(self.entries) + len(self.refused)


def clean(text: str | None) -> str:
    """``text`` in one line: composed letters, no control, direction or invisible characters."""
    if not text:
        return ""
    text = _UNSEEN.sub("", _CONTROL.sub(" ", text))
    return collapse(unicodedata.normalize("NFC", text))


def parse_feed(data: bytes) -> FeedPage:
    """Read one answer of the query API."""
    from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

    notes: list[str] = []
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        # The bytes are lost either way; as U+FFFD they spoil the entries that hold them and no other.
        text = data.decode("utf-8", errors="replace")
        notes.append("the answer was not valid UTF-8")
    text = _CONTROL_REFERENCE.sub("\ufffd", _CONTROL.sub("\ufffd", text.removeprefix("\ufeff")))
    if re.search(r"<!(?:DOCTYPE|ENTITY)", text, re.IGNORECASE):
        raise DamagedFeedError("the answer declares a document type or entities, which a feed of arXiv never does")
    # No entities, no network, no DTD. Long texts are let through and refused entry by entry: a single huge title must not hide the
    # other papers of its page, and the length of the whole answer is limited before it comes here.
    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=True,
        remove_comments=True,
        remove_pis=True,
        encoding="utf-8",
    )
    try:
        root = etree.fromstring(text.encode("utf-8"), parser)
    except etree.XMLSyntaxError as error:
        raise DamagedFeedError(f"the answer is not well-formed XML: {' '.join(str(error).split())[:200]}") from None
    if root.tag != f"{ATOM}feed":
        raise DamagedFeedError(f"the answer is no Atom feed: its root is {str(root.tag)[:80]!r}")
    entries: list[Entry] = []
    refused: list[Refused] = []
    error = None
    for node in root.iterchildren(f"{ATOM}entry"):
        name = clean(node.findtext(f"{ATOM}id"))
        if "/api/errors" in name:
            error = clean(node.findtext(f"{ATOM}summary"))[:300] or "no reason given"
            continue
        try:
            entries.append(_entry(node))
        except ValueError as problem:
            refused.append(Refused(name[:80] or "an entry without id", str(problem)))
    total, start = _number(root, "totalResults"), _number(root, "startIndex")
    if total is None:
        raise DamagedFeedError("the feed does not say how many results there are (opensearch:totalResults)")
    return FeedPage(total, start or 0, tuple(entries), tuple(refused), error, tuple(notes))


def _number(root: Any, name: str) -> int | None:
    text = (root.findtext(f"{OPENSEARCH}{name}") or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else None


def _entry(node: Any) -> Entry:
    try:
        identifier = parse_arxiv(node.findtext(f"{ATOM}id") or "")
    except IdentifierError as error:
        raise ValueError(str(error)) from None
    if identifier.version is None:
        raise ValueError("the id names no version")
    title = _text(node, f"{ATOM}title", "title", MAX_TITLE)
    if not title:
        raise ValueError("the title is empty")
    names = []
    for author in node.iterchildren(f"{ATOM}author"):
        if len(names) == MAX_AUTHORS:
            raise ValueError(f"more than {MAX_AUTHORS} authors")
        if name := _text(author, f"{ATOM}name", "name of an author", MAX_NAME):
            names.append(name)
    published, updated = (_time(node, name) for name in ("published", "updated"))
    if updated < published:
        raise ValueError(f"updated {updated.isoformat()} lies before published {published.isoformat()}")
    abstract = clean(node.findtext(f"{ATOM}summary"))
    if len(abstract) > MAX_ABSTRACT or "\ufffd" in abstract:
        abstract = ""  # the paper can be judged without it
    categories = [term for child in node.iterchildren(f"{ATOM}category") if (term := _category(child))]
    primary = node.find(f"{ARXIV}primary_category")
    return Entry(
        identifier.base,
        identifier.version,
        title,
        abstract or None,
        tuple(names),
        published,
        updated,
        _free(node, "comment"),
        _free(node, "journal_ref"),
        _doi(node.findtext(f"{ARXIV}doi")),
        _category(primary) if primary is not None else None,
        tuple(dict.fromkeys(categories)),
    )


def _text(node: Any, tag: str, name: str, limit: int) -> str:
    raw = node.findtext(tag) or ""
    if len(raw) > limit:
        raise ValueError(f"the {name} has {len(raw):,} characters, expected at most {limit:,}")
    text = clean(raw)
    if "\ufffd" in text:
        raise ValueError(f"the {name} holds characters that are no text")
    return text


def _free(node: Any, name: str) -> str | None:
    """A field that a paper can do without: cut where it is too long, left out where it is no text."""
    text = clean((node.findtext(f"{ARXIV}{name}") or "")[: 2 * MAX_FIELD])[:MAX_FIELD].strip()
    return None if not text or "\ufffd" in text else text


def _time(node: Any, name: str) -> datetime:
    text = (node.findtext(f"{ATOM}{name}") or "").strip()[:40]
    try:
        value = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, expected a date with time and zone") from None
    if value.tzinfo is None:
        raise ValueError(f"{name} is {text!r}, expected a time zone")
    value = value.astimezone(UTC)
    if not 1991 <= value.year <= 2100:
        raise ValueError(f"{name} is {text!r}, expected a year between 1991 and 2100")
    return value


def _category(node: Any) -> str | None:
    """The term of a category if it is one of arXiv's; feeds also carry ACM and MSC codes."""
    term = (node.get("term") or "").strip()
    if not re.fullmatch(r"[a-z-]{2,10}(?:\.[A-Za-z-]{2,20})?", term) or term.partition(".")[0] not in ARCHIVES:
        return None
    return term


def _doi(text: str | None) -> str | None:
    """The first DOI of the field; authors write several, or a sentence. The DOI that arXiv itself gives says nothing new."""
    words = [word for word in clean(text)[:MAX_FIELD].split() if "10." in word]
    for word in words:
        try:
            doi = parse_doi(word)
        except IdentifierError:
            continue
        if re.fullmatch(r"10\.\d{4,9}/[!-~]{1,200}", doi) and not doi.startswith("10.48550/"):
            return doi
    return None
