"""References as people write them by hand: names, year, title, where."""

from collections.abc import Iterable

from latentcot.catalog.bibtex import TRACKS, is_confirmed, venue_year
from latentcot.catalog.export.plain import one_line
from latentcot.catalog.record import Record

_MOST_NAMES = 10


def reference(record: Record) -> str:
    """One line: authors (the first ten), year, title, venue or arXiv id, DOI or address."""
    venue = record.venue
    confirmed = venue is not None and is_confirmed(record)
    year = venue_year(record) if confirmed else record.year
    names = record.author_names
    people = ", ".join(names[:_MOST_NAMES]) + (" et al." if len(names) > _MOST_NAMES else "")
    parts = [people, f"({year})" if year else "", f"{record.title}."]
    if venue is not None and confirmed:
        track = f" {TRACKS[venue.track]}" if venue.track in TRACKS else ""
        parts.append(f"{venue.name}{'' if venue.type == 'journal' else f' {year}'}{track}.")
    if record.ids.arxiv:
        parts.append(f"arXiv:{record.ids.arxiv}.")
    elif record.ids.doi:
        parts.append(f"https://doi.org/{record.ids.doi}")
    elif record.url:
        parts.append(record.url)
    if record.status == "withdrawn":
        parts.append("Withdrawn.")
    return one_line(" ".join(part for part in parts if part))


def export(records: Iterable[Record]) -> str:
    """One reference a line, sorted by citation key."""
    return "".join(f"{reference(record)}\n" for record in sorted(records, key=lambda record: record.citekey.lower()))
