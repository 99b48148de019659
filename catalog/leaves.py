"""The taxonomy and the facet vocabularies: data in ``taxonomy/``, read once."""

import json
from functools import cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from latentcot.catalog.store import CATALOG, CatalogError, explain


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Leaf(_Strict):
    """A leaf: permanent slug, name, place in the survey (``None``: ours) and one-line definition."""

    slug: str
    name: str
    section: str | None
    definition: str


class Branch(_Strict):
    slug: str
    name: str
    section: str | None
    leaves: list[Leaf]


class Retired(_Strict):
    """A slug that is no longer used and the leaf that took its place. A slug is never given twice."""

    slug: str
    replaced_by: str
    date: str
    reason: str


class Tree(_Strict):
    """The whole taxonomy, in the order in which pages show it."""

    version: int
    backbone: str
    branches: list[Branch]
    retired: list[Retired]

    @property
    def leaves(self) -> dict[str, Leaf]:
        return {leaf.slug: leaf for branch in self.branches for leaf in branch.leaves}

    def branch_of(self, slug: str) -> Branch:
        """The branch that holds a leaf."""
        for branch in self.branches:
            if any(leaf.slug == slug for leaf in branch.leaves):
                return branch
        raise CatalogError(f"no leaf has the slug {slug!r}")


class FacetValue(_Strict):
    slug: str
    name: str


class Facet(_Strict):
    slug: Literal["mechanism", "stage", "modality", "domain", "artifacts", "depth_region"]
    name: str
    definition: str
    values: list[FacetValue]


class FacetSet(_Strict):
    version: int
    facets: list[Facet]

    def allowed(self, facet: str) -> set[str]:
        return {value.slug for entry in self.facets if entry.slug == facet for value in entry.values}


def _load(name: str, model: type[BaseModel]) -> BaseModel:
    path = CATALOG / "taxonomy" / name
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CatalogError(f"taxonomy/{name}: {explain(error)}") from None


@cache
def load_taxonomy() -> Tree:
    """The taxonomy of the catalog: branches, leaves with definitions, retired slugs."""
    tree = _load("taxonomy.json", Tree)
    assert isinstance(tree, Tree)
    return tree


@cache
def load_facets() -> FacetSet:
    """The closed vocabularies of the facets."""
    facets = _load("facets.json", FacetSet)
    assert isinstance(facets, FacetSet)
    return facets


def load_table(name: str) -> dict:
    """A JSON table of ``taxonomy/`` that has no model of its own (venue aliases, import rules)."""
    return json.loads((CATALOG / "taxonomy" / name).read_text(encoding="utf-8"))
