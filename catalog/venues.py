"""Venues as lists write them (``NIPS2024``, ``CoLM 2024``, ``ACL 2024 (Finding)``), brought to one form.

A venue is confirmed only where somebody states acceptance: a list that names it. Where the only thing known is an
OpenReview page, a list's badge may stand for a submission, so the status stays ``null``.
"""

import re
from dataclasses import dataclass
from functools import cache

from latentcot.catalog.leaves import load_table
from latentcot.catalog.record import Venue


@dataclass(frozen=True)
class Parsed:
    """A venue string that was understood: ``name`` is ``None`` where it names no venue, with the reason."""

    name: str | None
    year: int | None = None
    track: str | None = None
    type: str | None = None
    reason: str | None = None


def _squeeze(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


@cache
def _tables() -> tuple[dict[str, tuple[str, str]], list[tuple[str, str]], dict[str, str]]:
    data = load_table("venues.json")
    aliases: dict[str, tuple[str, str]] = {}
    for entry in data["venues"]:
        for name in [entry["name"], *entry["aliases"]]:
            if aliases.setdefault(_squeeze(name), (entry["name"], entry["type"]))[0] != entry["name"]:
                raise ValueError(f"venues.json: the alias {name!r} stands for two venues")
    not_venues = {_squeeze(name): reason for name, reason in data["not_venues"].items()}
    return aliases, [(word, track) for word, track in data["tracks"]], not_venues


def parse_venue(text: str) -> Parsed:
    """Name, year, track and type of a listed venue.

    Raises ``ValueError`` for a string whose name is in no table: a new venue is added to ``taxonomy/venues.json`` on
    purpose, it is not made up on the way.
    """
    aliases, tracks, not_venues = _tables()
    body = " ".join(text.split())
    track = None
    for word, value in tracks:
        pattern = re.compile(rf"\(?\s*{word}\s*\)?", re.IGNORECASE)
        if pattern.search(body):
            body, track = pattern.sub(" ", body), value
            break
    year = None
    if match := re.search(r"(?<!\d)((?:19|20)\d{2})(?:\.\d{2})?(?!\d)", body):
        year, body = int(match[1]), body[: match.start()] + " " + body[match.end() :]
    elif match := re.search(r"['’]?(?<!\d)(\d{2})\s*$", body):
        year, body = 2000 + int(match[1]), body[: match.start()]
    name = _squeeze(re.sub(r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)\b", "", body, flags=re.IGNORECASE))
    if name in not_venues:
        return Parsed(None, reason=not_venues[name])
    if name not in aliases:
        raise ValueError(f"{text!r} is a venue that taxonomy/venues.json does not know")
    canonical, kind = aliases[name]
    return Parsed(canonical, year, track, "workshop" if track == "workshop" else kind)


@dataclass(frozen=True)
class VenueClaim:
    """One list's statement about the venue of a paper."""

    parsed: Parsed
    source: str
    ref: str
    text: str
    status: str | None  # accepted, published, or None where a submission cannot be ruled out


@dataclass(frozen=True)
class VenueVerdict:
    venue: Venue | None
    conflict: str | None
    confidence: str


def settle(claims: list[VenueClaim]) -> VenueVerdict:
    """One venue from several claims.

    A claim with less detail (no year, no track) agrees with one that has more. Where claims name different venues, the
    one that more lists make wins; at a tie the venue is unknown (``None``). Every disagreement is described.
    """
    groups: list[list[VenueClaim]] = []
    for claim in sorted(claims, key=_detail):
        for group in groups:
            if all(_agree(claim.parsed, other.parsed) for other in group):
                group.append(claim)
                break
        else:
            groups.append([claim])
    if not groups:
        return VenueVerdict(None, None, "low")
    ranked = sorted(groups, key=lambda group: -len({claim.source for claim in group}))
    conflict = None
    if len(ranked) > 1:
        conflict = "; ".join(f"{claim.text} ({claim.ref})" for group in ranked for claim in group)
        if len({claim.source for claim in ranked[0]}) == len({claim.source for claim in ranked[1]}):
            return VenueVerdict(None, conflict, "low")
    best = ranked[0]
    parsed = best[0].parsed
    status = next((s for s in ("published", "accepted") if any(claim.status == s for claim in best)), None)
    venue = Venue.model_validate(
        {
            "name": parsed.name,
            "year": next((c.parsed.year for c in best if c.parsed.year), None),
            "track": next((c.parsed.track for c in best if c.parsed.track), None),
            "type": "workshop" if any(c.parsed.type == "workshop" for c in best) else parsed.type,
            "status": status,
            "source": best[0].source,
        }
    )
    agreed = len({claim.source for claim in best}) > 1
    return VenueVerdict(venue, conflict, "low" if conflict or not status else "high" if agreed else "medium")


def _detail(claim: VenueClaim) -> tuple[bool, bool]:
    return claim.parsed.year is None, claim.parsed.track is None


def _agree(one: Parsed, other: Parsed) -> bool:
    if one.name != other.name:
        return False
    if one.year is not None and other.year is not None and one.year != other.year:
        return False
    return one.track is None or other.track is None or one.track == other.track
