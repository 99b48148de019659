"""The full dump as JSON, and a table as CSV."""

import csv
import io
import json
from collections.abc import Iterable

from latentcot.catalog.export.plain import one_line
from latentcot.catalog.record import SCHEMA_VERSION, Record

LICENCE = "Facts about papers, no abstracts; arXiv's descriptive metadata are CC0."
COLUMNS = (
    "key", "title", "authors", "published", "year", "venue", "venue_year", "track", "status", "primary_leaf",
    "other_leaves", "taxonomy_status", "mechanism", "stage", "modality", "domain", "arxiv", "doi", "url", "code",
    "runnable", "citekey", "added",
)  # fmt: skip


def export_json(records: Iterable[Record]) -> str:
    """Every field of every record, with the version of the schema and the licence, sorted by key."""
    dump = {
        "schema_version": SCHEMA_VERSION,
        "licence": LICENCE,
        "records": [record.model_dump(mode="json") for record in sorted(records, key=lambda record: record.key)],
    }
    return json.dumps(dump, ensure_ascii=False, indent=2) + "\n"


def export_csv(records: Iterable[Record]) -> str:
    """One row a record under a row of names (RFC 4180, UTF-8), sorted by key; several values are joined by ``; ``.

    Values are written as they are. A spreadsheet may take a value that begins with ``=`` for a formula: import the
    columns as text.
    """
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for record in sorted(records, key=lambda record: record.key):
        venue, facets, code = record.venue, record.facets, record.link("code")
        values = (
            record.key, record.title, record.author_names, record.published.value if record.published else None,
            record.year, venue.name if venue else None, venue.year if venue else None, venue.track if venue else None,
            record.status, record.taxonomy.primary, record.taxonomy.also, record.taxonomy.status, facets.mechanism,
            facets.stage, facets.modality, facets.domain, record.ids.arxiv, record.ids.doi, record.url,
            code.url if code else None, [entry.module for entry in record.runnable], record.citekey, record.added,
        )  # fmt: skip
        writer.writerow([_cell(value) for value in values])
    return out.getvalue()


def _cell(value: str | int | list[str] | None) -> str:
    if isinstance(value, list):
        return "; ".join(one_line(part) for part in value)
    return "" if value is None else one_line(str(value))
