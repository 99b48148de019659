"""Filters of a search: leaf, facets, years, venue, code, runnable, status. Wrong names are errors with suggestions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import get_args

from latentcot.catalog.leaves import load_facets, load_taxonomy
from latentcot.catalog.record import Record, Taxonomy
from latentcot.catalog.store import CatalogError
from latentcot.catalog.venues import parse_venue

STATUSES = get_args(Record.model_fields["status"].annotation)
FILINGS = get_args(Taxonomy.model_fields["status"].annotation)


@dataclass(frozen=True)
class Filters:
    """What a paper must be. ``None`` and empty ask nothing.

    ``leaf``: slug of a leaf, of a retired leaf or of a branch. ``facets``: pairs (facet, value), all of which must
    hold. ``venue``: as lists write it, with or without a year (``NIPS2024``). ``status``: of the paper; ``filed``: how
    its leaf came about.
    """

    leaf: str | None = None
    facets: tuple[tuple[str, str], ...] = field(default=())
    year_from: int | None = None
    year_to: int | None = None
    venue: str | None = None
    has_code: bool | None = None
    runnable: bool | None = None
    status: str | None = None
    filed: str | None = None

    def compile(self) -> Callable[[Record], bool]:
        """A test for records; raises :class:`CatalogError` where a name is unknown."""
        tests: list[Callable[[Record], bool]] = []
        if self.leaf is not None:
            wanted = resolve_leaf(self.leaf)
            tests.append(lambda record: not wanted.isdisjoint(record.leaves))
        for facet, value in self.facets:
            check_facet(facet, value)
            tests.append(lambda record, facet=facet, value=value: value in getattr(record.facets, facet))
        if self.year_from is not None and self.year_to is not None and self.year_from > self.year_to:
            raise CatalogError(f"the first year {self.year_from} is after the last year {self.year_to}")
        if self.year_from is not None:
            first = self.year_from
            tests.append(lambda record: record.year is not None and record.year >= first)
        if self.year_to is not None:
            last = self.year_to
            tests.append(lambda record: record.year is not None and record.year <= last)
        if self.venue is not None:
            tests.append(_venue_test(self.venue))
        if self.has_code is not None:
            code = self.has_code
            tests.append(lambda record: record.has_code is code)
        if self.runnable is not None:
            runnable = self.runnable
            tests.append(lambda record: bool(record.runnable) is runnable)
        if self.status is not None:
            status = _one_of("status", self.status, STATUSES)
            tests.append(lambda record: record.status == status)
        if self.filed is not None:
            filed = _one_of("filed", self.filed, FILINGS)
            tests.append(lambda record: record.taxonomy.status == filed)
        return lambda record: all(test(record) for test in tests)


def _venue_test(text: str) -> Callable[[Record], bool]:
    try:
        parsed = parse_venue(text)
    except ValueError:
        raise CatalogError(f"no venue is called {text!r}") from None
    if parsed.name is None:
        raise CatalogError(f"{text!r} is {parsed.reason}, expected a venue")

    def test(record: Record) -> bool:
        venue = record.venue
        return venue is not None and venue.name == parsed.name and parsed.year in (None, venue.year)

    return test


def resolve_leaf(slug: str) -> set[str]:
    """The leaves that a slug stands for: itself, the successor of a retired one, or all leaves of a branch."""
    tree = load_taxonomy()
    if slug in tree.leaves:
        return {slug}
    for retired in tree.retired:
        if retired.slug == slug:
            return {retired.replaced_by}
    for branch in tree.branches:
        if branch.slug == slug:
            return {leaf.slug for leaf in branch.leaves}
    known = [*tree.leaves, *(branch.slug for branch in tree.branches)]
    tails = {name.rpartition("/")[2]: name for name in known}
    near = get_close_matches(slug, known, n=3, cutoff=0.5) or [tails[n] for n in get_close_matches(slug, tails, n=3)]
    raise CatalogError(f"no leaf or branch has the slug {slug!r}{_hint(near)}")


def check_facet(facet: str, value: str) -> None:
    """Raise :class:`CatalogError` unless ``value`` is in the vocabulary of ``facet``."""
    names = [entry.slug for entry in load_facets().facets]
    if facet not in names:
        near = get_close_matches(facet, names, n=3, cutoff=0.5) or names
        raise CatalogError(f"no facet is called {facet!r}{_hint(near)}")
    allowed = load_facets().allowed(facet)
    if value not in allowed:
        near = get_close_matches(value, sorted(allowed), n=3, cutoff=0.5) or sorted(allowed)
        raise CatalogError(f"the facet {facet!r} has no value {value!r}{_hint(near)}")


def _one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    if value not in allowed:
        raise CatalogError(f"{name} must be one of {', '.join(allowed)}, given {value!r}")
    return value


def _hint(near: list[str]) -> str:
    return f"; close: {', '.join(near)}" if near else ""
