"""The trained scorer: one logistic model a family, joined by their maximum, and its file.

Decision of a title: ``max_f (x·β_f + b_f − cost_f)``. A family that the catalog holds only in part costs more: a title
must be plainer to be proposed for it. The probability is a logistic function of the decision, fitted on later papers
than those the model had seen.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from latentcot.catalog.relevance.concepts import FAMILIES
from latentcot.catalog.relevance.features import Rarity, features
from latentcot.catalog.store import CATALOG, CatalogError, write_atomic

MODEL_FILE = CATALOG / "data" / "relevance.json"
FORMAT = 1
COST: Mapping[str, float] = {
    "latent": 0.0, "looped": 0.0, "diffusion": 0.5, "linear": 1.0, "mechanisms": 2.5, "broad": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """The joined decision of a title, the family that gave it, and what each feature added there."""

    value: float
    family: str
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Linear:
    """Named weights and an intercept."""

    weight: Mapping[str, float]
    intercept: float

    def parts(self, values: Mapping[str, float]) -> dict[str, float]:
        return {name: value * self.weight[name] for name, value in values.items() if name in self.weight}


@dataclass(frozen=True)
class Model:
    """Everything that a score needs. ``about`` says what it was trained on and how well it did; it is data, not code."""

    rarity: Rarity
    families: Mapping[str, Linear]
    leaves: Mapping[str, Linear]
    slope: float
    offset: float
    threshold: float
    about: Mapping[str, Any] = field(default_factory=dict)

    def decide(self, values: Mapping[str, float]) -> Decision:
        """The decision for the features of a text."""
        best: Decision | None = None
        for family in FAMILIES:
            linear = self.families.get(family)
            if linear is None:
                continue
            parts = linear.parts(values)
            value = math.fsum(parts.values()) + linear.intercept - COST[family]
            if best is None or value > best.value:
                best = Decision(value, family, parts)
        assert best is not None
        return best

    def decision(self, text: str) -> float:
        """The decision for a text."""
        return self.decide(features(text, self.rarity)).value

    def probability(self, decision: float) -> float:
        """The share of papers at this decision that belonged to the catalog, as fitted on later papers."""
        exponent = min(max(-(self.slope * decision + self.offset), -700.0), 700.0)
        return 1 / (1 + math.exp(exponent))


def save_model(model: Model, path: Path = MODEL_FILE) -> bool:
    """Write the model in its one form (sorted, four decimals); says whether a byte changed."""
    used = sorted({name for linear in [*model.families.values(), *model.leaves.values()] for name in linear.weight})
    order, leaf_order = [f for f in FAMILIES if f in model.families], sorted(model.leaves)
    table = {
        name: [
            model.rarity.weight.get(name, 0),
            [_number(model.families[family].weight.get(name, 0.0)) for family in order],
            {str(i): _number(w) for i, leaf in enumerate(leaf_order) if (w := model.leaves[leaf].weight.get(name))},
        ]
        for name in used
    }
    head = {
        "format": FORMAT,
        "about": model.about,
        "families": {family: round(model.families[family].intercept, 4) for family in order},
        "leaves": {leaf: round(model.leaves[leaf].intercept, 4) for leaf in leaf_order},
        "slope": round(model.slope, 4),
        "offset": round(model.offset, 4),
        "threshold": round(model.threshold, 4),
    }
    lines = [json.dumps(name, ensure_ascii=False) + ":" + _compact(row) for name, row in table.items()]
    text = json.dumps(head, ensure_ascii=False, indent=1)[:-2] + ',\n "features": {\n' + ",\n".join(lines) + "\n}}\n"
    return write_atomic(path, text)


def _number(value: float) -> float:
    rounded = round(value, 3)
    return int(rounded) if rounded == int(rounded) else rounded


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def read_model(path: Path = MODEL_FILE) -> Model:
    """The model in a file.

    Raises:
        CatalogError: the file is missing, damaged, or of another format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise CatalogError(f"{path.name}: expected format {FORMAT}, given {data['format']!r}; train it anew")
        rarity: dict[str, float] = {}
        families: dict[str, dict[str, float]] = {family: {} for family in data["families"]}
        leaf_names = list(data["leaves"])
        leaves: dict[str, dict[str, float]] = {leaf: {} for leaf in leaf_names}
        for name, (rare, weights, of_leaf) in data["features"].items():
            if rare:
                rarity[name] = rare
            for family, weight in zip(families, weights, strict=True):
                if weight:
                    families[family][name] = weight
            for i, weight in of_leaf.items():
                leaves[leaf_names[int(i)]][name] = weight
        return Model(
            Rarity(rarity),
            {family: Linear(weight, data["families"][family]) for family, weight in families.items()},
            {leaf: Linear(weight, data["leaves"][leaf]) for leaf, weight in leaves.items()},
            data["slope"], data["offset"], data["threshold"], data["about"],
        )  # fmt: skip
    except FileNotFoundError:
        raise CatalogError(f"{path.name} is missing: `latentcot papers train-relevance` makes it") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, CatalogError):
            raise
        raise CatalogError(f"{path.name}: cannot be read ({type(error).__name__}: {error}); train it anew") from None


@cache
def load_model() -> Model:
    """The model that ships with the package, read once."""
    return read_model()
