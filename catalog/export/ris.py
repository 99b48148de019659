"""RIS: what EndNote, Mendeley and Zotero import.

Every line is a tag of two characters, two spaces, a hyphen, a space and the value, ended by CR LF; ``TY`` is first,
``ER`` last. ``UNPB`` is a preprint, ``CPAPER`` a paper with a confirmed conference, ``JOUR`` one with a journal.
"""

from collections.abc import Iterable

from latentcot.catalog.bibtex import TRACKS, is_confirmed, venue_year
from latentcot.catalog.export.plain import date_parts, names, one_line
from latentcot.catalog.names import split_name
from latentcot.catalog.record import Record


def entry(record: Record) -> str:
    """The RIS entry of a record, with its last line ended."""
    venue = record.venue
    confirmed = venue if venue is not None and is_confirmed(record) else None
    kind = "UNPB" if confirmed is None else "JOUR" if confirmed.type == "journal" else "CPAPER"
    lines = [("TY", kind), ("ID", record.citekey), ("TI", record.title)]
    lines += [("AU", author(full)) for full in names(record)]
    if confirmed is not None:
        year = venue_year(record)
        track = f" {TRACKS[confirmed.track]}" if confirmed.track in TRACKS else ""
        name = confirmed.name if confirmed.type == "journal" else f"{confirmed.name} {year}{track}"
        lines += [("T2", name), ("PY", str(year))]
    elif parts := date_parts(record):
        lines.append(("PY", str(parts[0])))
        if len(parts) > 1:
            month, day = (f"{part:02d}" for part in (*parts[1:], 0)[:2])
            lines.append(("DA", f"{parts[0]}/{month}/{day if len(parts) > 2 else ''}/"))
    if record.ids.arxiv:
        lines.append(("AN", f"arXiv:{record.ids.arxiv}"))
        if kind == "UNPB":
            lines.append(("PB", "arXiv"))
    if record.ids.doi:
        lines.append(("DO", record.ids.doi))
    elif record.ids.arxiv and kind == "UNPB":
        lines.append(("DO", f"10.48550/arXiv.{record.ids.arxiv}"))
    if record.url:
        lines.append(("UR", record.url))
    if record.status == "withdrawn":
        lines.append(("N1", "Withdrawn"))
    lines.append(("ER", ""))
    return "".join(f"{tag}  - {one_line(value)}\r\n" for tag, value in lines)


def author(full: str) -> str:
    """One name: ``Last, First`` or ``Last, First, Suffix`` where the split is certain, else as it stands."""
    parts = split_name(full)
    if not parts.certain or not parts.given:
        return parts.full
    return ", ".join(part for part in (parts.family, parts.given, parts.suffix) if part)


def export(records: Iterable[Record]) -> str:
    """RIS of several records, sorted by citation key, with an empty line between."""
    return "\r\n".join(entry(record) for record in sorted(records, key=lambda record: record.citekey.lower()))
