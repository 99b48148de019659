"""What arXiv says now about a known paper, merged into its record field by field."""

from dataclasses import dataclass, field

from latentcot.catalog.enrich.comments import code_addresses, is_withdrawn, venue_in_comment, venue_in_reference
from latentcot.catalog.enrich.precedence import ARXIV, may_replace
from latentcot.catalog.names import base_citekey
from latentcot.catalog.record import Author, Link, PartialDate, Provenance, Record, Venue
from latentcot.catalog.store import normal_url
from latentcot.catalog.text import normal_title
from latentcot.catalog.update.atom import Entry


@dataclass
class Merge:
    """A record after a merge: what changed, as (field, before, after), and what disagrees and was left alone."""

    record: Record
    changes: list[tuple[str, str, str]] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)


def merge_entry(record: Record, entry: Entry, taken: set[str]) -> Merge:
    """``record`` with what ``entry`` says. ``taken`` are the citation keys of all *other* records, in lower case.

    A version older than the one seen before says nothing. Fields that a person wrote stay; a venue of another name is a conflict for a
    person, unless the old one was a guess. Dates in provenance are those of the version, so a second merge changes nothing.
    """
    merge = Merge(record)
    if record.version is not None and entry.version < record.version:
        return merge
    day = entry.updated.strftime("%Y-%m-%d")
    high = Provenance(source=ARXIV, date=day, confidence="high")
    values: dict[str, object] = {
        "title": entry.title,
        "authors": _authors(record, entry),
        "published": PartialDate(value=entry.published.strftime("%Y-%m-%d"), precision="day"),
        "updated": PartialDate(value=day, precision="day"),
        "version": entry.version,
        "categories": list(entry.categories),
        "primary_category": entry.primary_category,
    }
    if record.status != "superseded":  # decided by a person, whatever arXiv shows
        values["status"] = "withdrawn" if is_withdrawn(entry.comment) else "active"
    provenance = dict(record.provenance)
    update: dict[str, object] = {}
    for name, value in values.items():
        if value in (None, []):
            continue  # what the feed leaves out is not known, it is not empty
        _set(record, update, provenance, merge, name, value, high)
    if "title" in update:
        update["other_titles"] = _titles(record, entry.title)
    _venue(record, entry, day, update, provenance, merge)
    if (
        entry.doi
        and record.ids.doi is None
        and may_replace(provenance.get("ids.doi") or provenance.get("ids"), high, known=False)
    ):
        update["ids"] = record.ids.model_copy(update={"doi": entry.doi})
        provenance["ids.doi"] = high
        merge.changes.append(("doi", "unknown", entry.doi))
    if links := _links(record, entry):
        update["links"] = [*record.links, *links]
        merge.changes += [("link", "unknown", link.url) for link in links]
    names = [author.name for author in update.get("authors", record.authors) or []]  # type: ignore[union-attr, attr-defined]
    if alias := _alias(record, names, entry, taken):
        update["citekey_aliases"] = [*record.citekey_aliases, alias]
    order = list(Record.model_fields)
    update["provenance"] = dict(
        sorted(provenance.items(), key=lambda item: (order.index(item[0].partition(".")[0]), item[0]))
    )
    merge.record = Record.model_validate(record.model_copy(update=update).model_dump())
    return merge


def _set(
    record: Record,
    update: dict[str, object],
    provenance: dict[str, Provenance],
    merge: Merge,
    name: str,
    value: object,
    new: Provenance,
) -> None:
    before, old = getattr(record, name), provenance.get(name)
    if before == value:
        if old is None or (may_replace(old, new, known=True) and old.source != new.source):
            provenance[name] = new  # the same value from a better source
        return
    # A status or category list that nobody filled in has no provenance; only text written by hand has none on purpose.
    known = before not in (None, []) and not (
        old is None and name in ("status", "version", "categories", "primary_category")
    )
    if not may_replace(old, new, known=known):
        if old is None or old.source != new.source:
            merge.conflicts.append(f"{name}: {_show(before)} is kept, arXiv says {_show(value)}")
        return
    update[name] = value
    provenance[name] = new
    merge.changes.append((name, _show(before), _show(value)))


def _show(value: object) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, PartialDate):
        return value.value
    if isinstance(value, list):
        return ", ".join(item.name if isinstance(item, Author) else str(item) for item in value)[:120] or "none"
    return str(value)[:200]


def _authors(record: Record, entry: Entry) -> list[Author]:
    orcids = {author.name: author.orcid for author in record.authors or []}
    return [Author(name=name, orcid=orcids.get(name)) for name in entry.authors]


def _titles(record: Record, title: str) -> list[str]:
    """Other titles once ``title`` is the current one: none of them equal to it, none twice."""
    seen = {normal_title(title)}
    found = []
    for text in (*record.other_titles, record.title):
        if normal_title(text) not in seen:
            seen.add(normal_title(text))
            found.append(text)
    return found


def _venue(
    record: Record, entry: Entry, day: str, update: dict[str, object], provenance: dict[str, Provenance], merge: Merge
) -> None:
    found = venue_in_reference(entry.journal_ref, ARXIV) or venue_in_comment(entry.comment, ARXIV)
    if found is None:
        return
    new = Provenance.model_validate({"source": ARXIV, "date": day, "confidence": found.confidence})
    old, before = provenance.get("venue"), record.venue
    if before is not None and _agrees(before, found.venue):
        return
    guess = old is not None and old.confidence == "low"
    if before is not None and before.name != found.venue.name and not guess:
        merge.conflicts.append(f"venue: {before.name} {before.year or ''} is kept, arXiv says {found.text!r}")
        return
    if not may_replace(old, new, known=before is not None):
        return
    update["venue"], provenance["venue"] = found.venue, new
    merge.changes.append(("venue", before.name if before else "unknown", f"{found.venue.name} {found.venue.year}"))


def _agrees(old: Venue, new: Venue) -> bool:
    """Whether ``new`` adds nothing: same name and year, no track or status that the old one lacks."""
    same = old.name == new.name and old.year == new.year
    return same and new.track in (None, old.track) and (old.status == "published" or new.status == old.status)


def _links(record: Record, entry: Entry) -> list[Link]:
    known = {normal_url(link.url) for link in record.links}
    return [
        Link(kind="code", url=url, official=None, source=ARXIV, checked=None)
        for url in code_addresses(entry.comment, entry.abstract)
        if normal_url(url) not in known
    ]


def _alias(record: Record, names: list[str], entry: Entry, taken: set[str]) -> str | None:
    """The key that the record would have had if its authors had been known; the given one never changes."""
    if not names or not record.citekey.startswith("arxiv_"):
        return None
    base = base_citekey(record.key, record.title, names, entry.published.year)
    used = taken | {name.lower() for name in (record.citekey, *record.citekey_aliases)}
    return base if base.lower() not in used and not record.citekey_aliases else None
