"""Choosing papers on the command line: ``--select leaf=vertical/feedback --select year=2024-``.

A selection is a list of ``field=value``; all of them must hold. Fields: ``leaf``, ``year`` (2024, 2023-2025, 2024-),
``venue``, ``code`` and ``runnable`` (yes, no), ``status``, ``filed``, every facet (``mechanism=loop``), ``key`` (any
identifier; several are alternatives) and ``words`` (a search).
"""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from latentcot.catalog.cli_common import choices, parse_years
from latentcot.catalog.filters import Filters
from latentcot.catalog.leaves import load_facets
from latentcot.catalog.record import Record
from latentcot.catalog.search import SearchIndex, default_index
from latentcot.catalog.store import CatalogError, get, load_records

_PLAIN = ("leaf", "year", "venue", "code", "runnable", "status", "filed", "key", "words")


def select(
    expressions: Sequence[str], records: Sequence[Record] | None = None, index: SearchIndex | None = None
) -> list[Record]:
    """The records for which every expression holds, in the order of ``records`` (default: the shipped ones).

    Raises :class:`CatalogError` for an unknown field or value, with what was meant.
    """
    records = load_records() if records is None else records
    keys: set[str] | None = None
    words: list[str] = []
    values: dict[str, Any] = {}
    facets: list[tuple[str, str]] = []
    names = [facet.slug for facet in load_facets().facets]
    for expression in expressions:
        name, equals, value = (part.strip() for part in expression.partition("="))
        if not equals or not value:
            raise CatalogError(f"--select expects field=value (for instance leaf=vertical), given {expression!r}")
        if name == "key":
            keys = (keys or set()) | {get(value).key}
        elif name == "words":
            words.append(value)
        elif name in names:
            facets.append((name, value))
        elif name not in _PLAIN:
            near = get_close_matches(name, [*_PLAIN, *names], n=2, cutoff=0.6)
            hint = f"; close: {', '.join(near)}" if near else ""
            raise CatalogError(f"--select knows {choices([*_PLAIN, *names])}, given {name!r}{hint}")
        elif name in values:
            raise CatalogError(f"--select gives {name} twice: {expression!r}")
        elif name in ("code", "runnable"):
            values[name] = _yes_no(name, value)
        elif name == "year":
            values["year_from"], values["year_to"] = parse_years(value)
            values["year"] = value
        else:
            values[name] = value
    values.pop("year", None)
    if "code" in values:
        values["has_code"] = values.pop("code")
    accept = Filters(facets=tuple(facets), **values).compile()
    found = [record for record in records if accept(record) and (keys is None or record.key in keys)]
    for text in words:
        hits = {hit.record.key for hit in (index or default_index()).search(text, limit=None).hits}
        found = [record for record in found if record.key in hits]
    return found


def _yes_no(name: str, value: str) -> bool:
    known = {"yes": True, "true": True, "no": False, "false": False}
    if value.lower() not in known:
        raise CatalogError(f"--select {name} expects yes or no, given {value!r}")
    return known[value.lower()]
