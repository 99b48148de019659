"""CSL-JSON: what Zotero, Pandoc and citeproc read.

A preprint is ``article``, a paper with a confirmed venue ``paper-conference`` or ``article-journal`` (confirmed as in
:mod:`latentcot.catalog.bibtex`). Names are split where there is one reading, else given whole as ``literal``.
``schema/csl-data.schema.json`` is a JSON Schema of the format, written from its published description.
"""

import json
from collections.abc import Iterable
from typing import Any

from latentcot.catalog.bibtex import TRACKS, is_confirmed, venue_year
from latentcot.catalog.export.plain import date_parts, names, one_line
from latentcot.catalog.names import split_name
from latentcot.catalog.record import Record


def item(record: Record) -> dict[str, Any]:
    """The CSL-JSON item of a record."""
    venue = record.venue
    data: dict[str, Any] = {"id": record.citekey, "type": "article", "title": one_line(record.title)}
    if people := names(record):
        data["author"] = [name(full) for full in people]
    if venue is not None and is_confirmed(record):
        data["type"] = "article-journal" if venue.type == "journal" else "paper-conference"
        track = f" {TRACKS[venue.track]}" if venue.track in TRACKS else ""
        year = venue_year(record)
        data["container-title"] = one_line(venue.name if venue.type == "journal" else f"{venue.name} {year}{track}")
        data["issued"] = {"date-parts": [[year]]}
    elif parts := date_parts(record):
        data["issued"] = {"date-parts": [list(parts)]}
    if record.ids.arxiv:
        data["archive"] = "arXiv"
        data["number"] = f"arXiv:{record.ids.arxiv}"
        if data["type"] == "article":
            data["publisher"] = "arXiv"
    if record.ids.doi:
        data["DOI"] = one_line(record.ids.doi)
    elif record.ids.arxiv and data["type"] == "article":
        data["DOI"] = f"10.48550/arXiv.{record.ids.arxiv}"
    if record.url:
        data["URL"] = record.url
    if record.status == "withdrawn":
        data["note"] = "Withdrawn"
    return data


def name(full: str) -> dict[str, str]:
    """A name of CSL: ``family`` and ``given`` where the split is certain, else ``literal``."""
    parts = split_name(full)
    if not parts.certain or not parts.given:
        return {"literal": parts.full}
    found = {"family": parts.family, "given": parts.given}
    if parts.suffix:
        found["suffix"] = parts.suffix
    return found


def export(records: Iterable[Record]) -> str:
    """CSL-JSON of several records, sorted by citation key."""
    items = [item(record) for record in sorted(records, key=lambda record: record.citekey.lower())]
    return json.dumps(items, ensure_ascii=False, indent=2) + "\n"
