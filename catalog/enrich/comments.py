"""What authors write in arXiv's comment and journal reference: withdrawal, acceptance, addresses of code.

A claim of acceptance counts only where the same clause names a known venue *with its year* and says that the paper is accepted, to
appear, in the proceedings or camera-ready. "Submitted to", "under review" and a bare "ICLR 2026" are no acceptance.
"""

import re
from dataclasses import dataclass
from functools import cache
from urllib.parse import urlsplit

from latentcot.catalog.leaves import load_table
from latentcot.catalog.record import Venue
from latentcot.catalog.venues import parse_venue

_WITHDRAWN = re.compile(
    r"\b(?:paper|article|submission|manuscript|work|preprint|version|it|arxiv)\b[^.;]{0,60}\bwithdrawn\b(?!\s+from\s+(?!arxiv))"
    r"|^\W*withdrawn\b(?!\s+from\s+(?!arxiv))|\bwithdrawn by\b|\bwe (?:are )?withdraw(?:ing)?\b[^.;]{0,20}\b(?:paper|article|submission)\b",
    re.IGNORECASE,
)
_ACCEPTED = re.compile(
    r"\b(?:accepted|to appear|appear(?:s|ed|ing)?|camera[- ]?ready|presented at|published (?:at|in|as)|in proceedings|proceedings of)\b",
    re.IGNORECASE,
)
_NOT_ACCEPTED = re.compile(
    r"\b(?:submitted|submission to|under (?:double[- ]blind )?review|in review|in submission|reject(?:ed|ion)?|not accepted|"
    r"withdrawn from|resubmi\w+|to be submitted|preliminary|extended version of)\b",
    re.IGNORECASE,
)
_URL = re.compile(r"https?://[^\s<>\"'`{}|\\^\[\]]+", re.IGNORECASE)
CODE_HOSTS = ("github.com", "gitlab.com", "codeberg.org", "bitbucket.org")
_NO_REPOSITORY = frozenset(
    {"orgs", "topics", "search", "features", "about", "sponsors", "settings", "login", "marketplace", "explore"}
)


def is_withdrawn(comment: str | None) -> bool:
    """Whether a comment says that the paper was withdrawn from arXiv (not from a conference)."""
    return bool(comment and _WITHDRAWN.search(comment))


@dataclass(frozen=True)
class VenueFound:
    """A venue and how sure it is: ``high`` from a journal reference, ``medium`` from a comment."""

    venue: Venue
    confidence: str
    text: str


@cache
def _names() -> re.Pattern[str]:
    entries = load_table("venues.json")["venues"]
    names = sorted(
        {name for entry in entries for name in (entry["name"], *entry["aliases"])}, key=lambda name: (-len(name), name)
    )
    return re.compile(rf"(?<![\w-])(?:{'|'.join(re.escape(name) for name in names)})(?![a-z])", re.IGNORECASE)


_YEAR = re.compile(r"(?<!\d)((?:19|20)\d{2})(?!\d)|['’](\d{2})(?!\d)")


def venue_in_comment(comment: str | None, source: str) -> VenueFound | None:
    """The acceptance that a comment states. Two clauses that name different venues give none: a person has to read it."""
    found: dict[tuple[str, int], VenueFound] = {}
    # A full stop ends a clause only before white space, "et al." and numbers stay whole enough for what is looked for here.
    for clause in re.split(r"[;\n]|\.(?=\s|$)", comment or ""):
        if _NOT_ACCEPTED.search(clause) or not _ACCEPTED.search(clause):
            continue
        if venue := _venue(clause, source, "accepted"):
            found[venue.name, venue.year or 0] = VenueFound(venue, "medium", clause.strip()[:120])
    return next(iter(found.values())) if len(found) == 1 else None


def venue_in_reference(reference: str | None, source: str) -> VenueFound | None:
    """The venue of arXiv's ``journal_ref``, which is filled in after publication."""
    if not reference or _NOT_ACCEPTED.search(reference):
        return None
    venue = _venue(reference, source, "published")
    return VenueFound(venue, "high", reference[:120]) if venue else None


def _venue(text: str, source: str, status: str) -> Venue | None:
    mentions = {}
    for match in _names().finditer(text):
        # The year stands behind the name ("ICLR 2026"); in a reference it may also stand before or far behind.
        after = _YEAR.search(text[match.end() : match.end() + 12])
        year = after or (_YEAR.search(text) if status == "published" else None)
        parsed = parse_venue(match.group())
        if year and parsed.name:
            mentions[parsed.name, int(year[1] or 2000 + int(year[2]))] = parsed
    if len(mentions) != 1:
        return None
    (name, year), parsed = next(iter(mentions.items()))
    track = None
    for word, value in load_table("venues.json")["tracks"]:
        if re.search(rf"\b{word}s?\b", text, re.IGNORECASE):
            track = value
            break
    return Venue.model_validate(
        {
            "name": name,
            "year": year,
            "track": track,
            "type": "workshop" if track == "workshop" else parsed.type,
            "status": status,
            "source": source,
        }
    )


def code_addresses(*texts: str | None) -> list[str]:
    """Addresses of repositories in comment or abstract, in order, each once: ``https://host/owner/name``."""
    found: list[str] = []
    for text in texts:
        for match in _URL.finditer(text or ""):
            if url := repository(match.group()):
                found.append(url)
        for match in re.finditer(r"(?<![/\w.])((?:github|gitlab)\.com/[\w.-]+/[\w.-]+)", text or "", re.IGNORECASE):
            if url := repository(f"https://{match[1]}"):
                found.append(url)
    return list(dict.fromkeys(found))


def repository(url: str) -> str | None:
    """``https://host/owner/name`` of an address on a code host, ``None`` for any other address."""
    try:
        parts = urlsplit(url.rstrip(".,;:!?)*'"))
        host = (parts.hostname or "").lower().removeprefix("www.")
    except ValueError:
        return None
    names = [part for part in parts.path.split("/") if part]
    if host not in CODE_HOSTS or len(names) < 2 or names[0].lower() in _NO_REPOSITORY:
        return None
    owner, name = names[0], names[1].removesuffix(".git").rstrip(".")
    if not all(re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", part) and part.strip(".") for part in (owner, name)):
        return None
    return f"https://{host}/{owner}/{name}"
