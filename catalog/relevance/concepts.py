"""What the field calls its ideas: phrases that mean one thing in many spellings (``taxonomy/concepts.json``).

A title has a dozen words and the smaller families have a few dozen papers, too little to learn from counts alone that
"depth-recurrent", "looped" and "universal transformer" are one idea. Each concept is a list of patterns with a *prior*
for the families that it speaks for or against: the weight that training starts from and leaves only where titles say so.
The list was written with the catalog's titles up to January 2026 in view.
"""

import re
from dataclasses import dataclass
from functools import cache

from latentcot.catalog.leaves import load_table
from latentcot.catalog.store import CatalogError

FAMILIES = ("latent", "looped", "diffusion", "linear", "mechanisms", "broad")

_MACRO = re.compile(r"\{([a-z]+)(?: (\d))?\}")
_GAP = r"[\s\-–—:,/]+"


@dataclass(frozen=True)
class Concept:
    """A named list of patterns, the prior weight (log-odds) for each family that it speaks for or against, and the
    concept in whose presence it does not count."""

    name: str
    patterns: tuple[str, ...]
    prior: dict[str, float]
    silenced_by: str | None

    def compiled(self) -> re.Pattern[str]:
        return re.compile("|".join(self.patterns), re.IGNORECASE)


@cache
def load_concepts() -> tuple[Concept, ...]:
    """The concepts, macros written out.

    Raises:
        CatalogError: a pattern or a macro cannot be read, or a family or concept that is named does not exist.
    """
    table = load_table("concepts.json")
    macros: dict[str, str] = table["macros"]

    def expand(match: re.Match[str]) -> str:
        name, number = match[1], match[2]
        if name == "gap":
            return _GAP
        if name == "upto" and number:
            return rf"(?:{_GAP}[\w']+){{0,{number}}}?{_GAP}"
        if name not in macros:
            raise CatalogError(f"taxonomy/concepts.json: no macro is called {name!r}")
        return macros[name]

    found = []
    for entry in table["concepts"]:
        patterns = tuple(_MACRO.sub(expand, pattern) for pattern in entry["patterns"])
        concept = Concept(entry["name"], patterns, entry["prior"], entry.get("silenced_by"))
        try:
            concept.compiled()
        except re.error as error:
            raise CatalogError(f"taxonomy/concepts.json: {concept.name}: {error}") from None
        if unknown := set(concept.prior) - set(FAMILIES):
            raise CatalogError(f"taxonomy/concepts.json: {concept.name}: no family is called {sorted(unknown)[0]!r}")
        found.append(concept)
    names = [concept.name for concept in found]
    for concept in found:
        if names.count(concept.name) > 1 or (concept.silenced_by and concept.silenced_by not in names):
            raise CatalogError(f"taxonomy/concepts.json: {concept.name}: given twice, or silenced by no concept")
    return tuple(found)


@cache
def _compiled() -> tuple[tuple[str, re.Pattern[str], str | None], ...]:
    return tuple((concept.name, concept.compiled(), concept.silenced_by) for concept in load_concepts())


def concepts_in(text: str) -> dict[str, str]:
    """The concepts of a text: ``{name: the words that showed it}``, in the order of the list."""
    found = {name: match.group() for name, pattern, _ in _compiled() if (match := pattern.search(text))}
    for name, _, other in _compiled():
        if other in found:
            found.pop(name, None)
    return found


@cache
def priors() -> dict[str, dict[str, float]]:
    """``{family: {concept: prior weight}}``; what is not named has the prior 0."""
    return {family: {c.name: c.prior[family] for c in load_concepts() if family in c.prior} for family in FAMILIES}
