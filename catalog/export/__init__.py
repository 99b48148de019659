"""Papers for other programs: BibTeX, CSL-JSON, RIS, Atom, RSS, JSON, CSV, a Markdown list, plain references.

>>> from latentcot.catalog import get
>>> from latentcot.catalog.export import render
>>> print(render("ris", [get("2412.06769")]).splitlines()[0])
TY  - CPAPER

Every format is deterministic: the same records in any order give the same text, and nothing in it depends on the day.
What is not known (authors, dates) is left out, never invented.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from latentcot.catalog import bibtex
from latentcot.catalog.export import csl, feeds, lists, references, ris, tables
from latentcot.catalog.record import Record

FORMATS: Mapping[str, Callable[[Iterable[Record]], str]] = MappingProxyType(
    {
        "bibtex": bibtex.export,
        "csl": csl.export,
        "ris": ris.export,
        "atom": feeds.atom,
        "rss": feeds.rss,
        "json": tables.export_json,
        "csv": tables.export_csv,
        "markdown": lists.export,
        "text": references.export,
    }
)


def render(format: str, records: Iterable[Record]) -> str:
    """``records`` in one of :data:`FORMATS`. Raises ``ValueError`` for an unknown format."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, given {format!r}")
    return FORMATS[format](records)


__all__ = ["FORMATS", "render"]
