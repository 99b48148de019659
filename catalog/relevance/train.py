"""Training: titles to weights. Deterministic, one process, numpy alone; under a minute.

Each family is fitted against the negatives, papers of other families left out; the weights of concepts start from
their priors. Leaves are fitted among the records. Features whose weights all end near zero are dropped and the rest
fitted again, which keeps the file small.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentcot.catalog.relevance.concepts import FAMILIES, concepts_in, priors
from latentcot.catalog.relevance.data import Paper
from latentcot.catalog.relevance.features import Rarity, grams, normal_text
from latentcot.catalog.relevance.logistic import Sparse, fit_logistic
from latentcot.catalog.relevance.model import Linear, Model

# Weight of a positive of a family; small families count more by (100 / n) ** BALANCE.
POSITIVE_WEIGHT = 3.0
BALANCE = 0.8
STRENGTH = 0.3
LEAF_STRENGTH = 1.0
LEAST = 3  # titles that a gram must be in
NEAR_ZERO = 0.02
LEAST_OF_LEAF = 5  # records that a leaf must have to be proposed


@dataclass
class Corpus:
    """Papers with their grams and concepts, read once and used for several fits."""

    papers: Sequence[Paper]
    grams: list[set[str]] = field(init=False)
    concepts: list[list[str]] = field(init=False)

    def __post_init__(self) -> None:
        plain = [normal_text(paper.title) for paper in self.papers]
        self.grams = [grams(text) for text in plain]
        self.concepts = [[f"k:{name}" for name in concepts_in(text)] for text in plain]

    def part(self, wanted: Callable[[Paper], bool]) -> "Corpus":
        """The papers that ``wanted`` wants, without reading them again."""
        which = [i for i, paper in enumerate(self.papers) if wanted(paper)]
        part = object.__new__(Corpus)
        part.papers = [self.papers[i] for i in which]
        part.grams = [self.grams[i] for i in which]
        part.concepts = [self.concepts[i] for i in which]
        return part

    def vectors(self, rarity: Rarity) -> list[dict[str, float]]:
        """The features of every paper, as :func:`features` gives them."""
        return [
            rarity.vector(names) | dict.fromkeys(concepts, 1.0)
            for names, concepts in zip(self.grams, self.concepts, strict=True)
        ]


def fit(corpus: Corpus, *, leaves: bool = True, prune: bool = True) -> Model:
    """A model of a corpus; slope 1, offset 0 and threshold 0 until it is calibrated on later papers.

    Raises:
        ValueError: there are no negatives, or no positives of any family.
    """
    negatives = sum(not paper.families for paper in corpus.papers)
    if negatives == 0 or negatives == len(corpus.papers):
        raise ValueError(
            f"papers: expected positives and negatives, given {negatives} negatives of {len(corpus.papers)}"
        )
    model = _fit(corpus, Rarity.fit(corpus.grams, LEAST), None, leaves=False)
    if not prune:
        return model if not leaves else _fit(corpus, model.rarity, None, leaves=True)
    kept = {
        name for linear in model.families.values() for name, weight in linear.weight.items() if abs(weight) > NEAR_ZERO
    }
    rarity = Rarity({name: weight for name, weight in model.rarity.weight.items() if name in kept})
    return _fit(corpus, rarity, kept, leaves=leaves)


def _fit(corpus: Corpus, rarity: Rarity, kept: set[str] | None, *, leaves: bool) -> Model:
    vectors = corpus.vectors(rarity)
    counts: dict[str, int] = {}
    for vector in vectors:
        for name in vector:
            counts[name] = counts.get(name, 0) + 1
    names = sorted(n for n, count in counts.items() if count >= LEAST and (kept is None or n in kept or n[:2] == "k:"))
    names = sorted({*names, *(f"k:{name}" for prior in priors().values() for name in prior)})
    column = {name: i for i, name in enumerate(names)}
    rows = Sparse.of([{column[n]: v for n, v in vector.items() if n in column} for vector in vectors], len(names))
    families = {}
    for family in FAMILIES:
        linear = _fit_family(corpus, rows, names, column, family)
        if linear is not None:
            families[family] = linear
    if not families:
        raise ValueError("papers: expected positives of at least one family, given none")
    return Model(rarity, families, _fit_leaves(corpus, rows, names) if leaves else {}, 1.0, 0.0, 0.0)


def _fit_family(corpus: Corpus, rows: Sparse, names: list[str], column: dict[str, int], family: str) -> Linear | None:
    inside = np.array([family in paper.families for paper in corpus.papers])
    used = np.flatnonzero(inside | np.array([not paper.families for paper in corpus.papers]))
    count = int(inside.sum())
    if count == 0:
        return None
    prior = np.zeros(len(names))
    for name, weight in priors()[family].items():
        prior[column[f"k:{name}"]] = weight
    weight = np.where(inside, POSITIVE_WEIGHT * (100 / count) ** BALANCE, 1.0)[used]
    beta, intercept = fit_logistic(rows.take(used), inside[used], weight, prior, c=STRENGTH)
    return _linear(names, beta, intercept)


def _fit_leaves(corpus: Corpus, rows: Sparse, names: list[str]) -> dict[str, Linear]:
    records = np.flatnonzero(np.array([bool(paper.families) for paper in corpus.papers]))
    taken = rows.take(records)
    papers = [corpus.papers[int(i)] for i in records]
    found = {}
    for leaf in sorted({leaf for paper in papers for leaf in paper.leaves}):
        inside = np.array([leaf in paper.leaves for paper in papers])
        if LEAST_OF_LEAF <= inside.sum() < len(papers):
            weight = np.where(inside, np.sqrt((~inside).sum() / inside.sum()), 1.0)
            beta, intercept = fit_logistic(taken, inside, weight, np.zeros(len(names)), c=LEAF_STRENGTH, most_steps=100)
            found[leaf] = _linear(names, beta, intercept, least=0.05)
    return found


def _linear(names: list[str], beta: Any, intercept: float, least: float = 0.0005) -> Linear:
    return Linear({name: float(w) for name, w in zip(names, beta, strict=True) if abs(w) >= least}, intercept)
