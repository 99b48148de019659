"""How good the scorer is, measured on papers later than everything it was fitted to.

Three cuts in time. Models are fitted on what is before a cut and judged on the months after it; the last cut is the
test, and its threshold is the one that the cut before it chose. Months are those of arXiv ids.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentcot.catalog.relevance.concepts import FAMILIES
from latentcot.catalog.relevance.data import KINDS, Paper
from latentcot.catalog.relevance.keywords import keyword_score
from latentcot.catalog.relevance.model import Model
from latentcot.catalog.relevance.train import Corpus, fit

# (first month, last month) judged; the model knows what is before the first month.
CUTS = (("2025-05", "2025-07"), ("2025-08", "2025-09"), ("2025-10", "2026-01"))
FALSE_POSITIVES = 0.01

Array = np.ndarray[Any, np.dtype[Any]]


def auroc(positive: Array, negative: Array) -> float:
    """Probability that a positive scores above a negative; ties count half.

    Raises:
        ValueError: one of the two is empty.
    """
    if len(positive) == 0 or len(negative) == 0:
        raise ValueError(f"expected scores of both kinds, given {len(positive)} and {len(negative)}")
    order = np.sort(negative)
    below = np.searchsorted(order, positive, "left") + np.searchsorted(order, positive, "right")
    return float(below.mean() / (2 * len(negative)))


def threshold_at(negative: Array, rate: float) -> float:
    """The lowest score that at most ``rate`` of the negatives exceed."""
    if not 0 < rate < 1:
        raise ValueError(f"rate: expected a share between 0 and 1, given {rate}")
    allowed = int(np.floor(rate * len(negative)))
    return float(np.sort(negative)[len(negative) - 1 - allowed])


def wilson(found: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's method: what so few papers allow to say."""
    if not 0 <= found <= of or of == 0:
        raise ValueError(f"expected 0 to {of} of at least one, given {found} of {of}")
    z, p = 1.959964, found / of
    middle = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Judged:
    """Later papers with the scores that a model and the keyword rule give them."""

    papers: Sequence[Paper]
    scores: Array
    keywords: Array

    @property
    def negative(self) -> Array:
        return np.array([not paper.families for paper in self.papers])

    def of_family(self, family: str) -> Array:
        return np.array([family in paper.families for paper in self.papers])

    def of_kind(self, kind: str) -> Array:
        return np.array([paper.kind == kind for paper in self.papers])


def judge(model: Model, later: Corpus) -> Judged:
    """Score later papers by the model and by the keyword rule."""
    scores = np.array([model.decide(vector).value for vector in later.vectors(model.rarity)])
    return Judged(later.papers, scores, np.array([keyword_score(paper.title).points for paper in later.papers]))


def calibrate(judged: Judged) -> tuple[float, float]:
    """Slope and offset of the probability, by Platt's method: a logistic fit of the outcome on the decision.

    Titles that belong to the catalog only in a broad sense are left out. Targets are drawn in from 0 and 1 as Platt
    does, so that a cut that separates perfectly still gives a finite slope.
    """
    only_broad = np.array([paper.families == {"broad"} for paper in judged.papers])
    x, y = judged.scores[~only_broad], ~judged.negative[~only_broad]
    high, low = (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2)
    target = np.where(y, high, low)
    slope, offset = 1.0, 0.0
    for _ in range(100):  # Newton's method in two unknowns
        p = 1 / (1 + np.exp(-np.clip(slope * x + offset, -500, 500)))
        w = np.maximum(p * (1 - p), 1e-12)
        gradient = np.array([((p - target) * x).sum(), (p - target).sum()])
        hessian = np.array([[(w * x * x).sum() + 1e-9, (w * x).sum()], [(w * x).sum(), w.sum() + 1e-9]])
        change = np.linalg.solve(hessian, gradient)
        slope, offset = slope - change[0], offset - change[1]
        if np.abs(change).max() < 1e-9:
            break
    return float(slope), float(offset)


def measure(judged: Judged, chosen: float | None = None) -> dict[str, Any]:
    """AUROC and recall at 1 % false positives of every family, for the scorer (with a 95 % interval) and the keyword rule.

    ``chosen`` is a threshold from an earlier cut: recall, precision and false positives at it are added, the latter
    for every kind of negative.
    """
    result: dict[str, Any] = {"negatives": int(judged.negative.sum()), "families": {}}
    for name, scores in (("scorer", judged.scores), ("keywords", judged.keywords)):
        limit = threshold_at(scores[judged.negative], FALSE_POSITIVES)
        for family in FAMILIES:
            inside = judged.of_family(family)
            if inside.any():
                entry = result["families"].setdefault(family, {"papers": int(inside.sum())})
                entry[f"{name}_auroc"] = round(auroc(scores[inside], scores[judged.negative]), 4)
                found = int((scores[inside] > limit).sum())
                entry[f"{name}_recall"] = round(found / int(inside.sum()), 4)
                if name == "scorer":
                    entry["recall_interval"] = [round(end, 4) for end in wilson(found, int(inside.sum()))]
    kinds = [kind for kind in KINDS if judged.of_kind(kind).any()]
    limit = threshold_at(judged.scores[judged.negative], FALSE_POSITIVES)
    result["kinds"] = {
        kind: {
            "papers": int(judged.of_kind(kind).sum()),
            "false_positives": round(float((judged.scores[judged.of_kind(kind)] > limit).mean()), 4),
            "latent_auroc": round(_auroc_or_nan(judged, "latent", kind), 4),
        }
        for kind in kinds
    }
    if chosen is not None:
        above = judged.scores > chosen
        wanted = ~judged.negative & np.array([paper.families != {"broad"} for paper in judged.papers])
        hit, false = int((above & wanted).sum()), int((above & judged.negative).sum())
        result["at_chosen"] = {
            "recall": {
                family: round(float(above[judged.of_family(family)].mean()), 4) for family in result["families"]
            },
            "false_positives": round(float(above[judged.negative].mean()), 4),
            "by_kind": {kind: round(float(above[judged.of_kind(kind)].mean()), 4) for kind in kinds},
            "precision": round(hit / (hit + false), 4) if hit + false else None,
            "recall_all": round(hit / int(wanted.sum()), 4) if wanted.any() else None,
        }
    return result


def _auroc_or_nan(judged: Judged, family: str, kind: str) -> float:
    inside = judged.of_family(family)
    return auroc(judged.scores[inside], judged.scores[judged.of_kind(kind)]) if inside.any() else float("nan")


def leaf_accuracy(
    model: Model, later: Corpus, propose: Callable[[Model, dict[str, float]], list[str]]
) -> dict[str, Any]:
    """How often a listed leaf of a later record is the first proposal, and among the three."""
    first = third = 0
    known = [i for i, paper in enumerate(later.papers) if paper.families and set(paper.leaves) & set(model.leaves)]
    vectors = later.vectors(model.rarity)
    for i in known:
        proposed = propose(model, vectors[i])[:3]
        first += proposed[0] in later.papers[i].leaves
        third += bool(set(proposed) & set(later.papers[i].leaves))
    return {"papers": len(known), "first": round(first / len(known), 4), "among_three": round(third / len(known), 4)}


def cuts_in_time(
    corpus: Corpus,
    propose: Callable[[Model, dict[str, float]], list[str]],
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[dict[str, Any]], Judged]:
    """Measure every cut; returns the results and what the last cut judged, which calibrates the model that ships."""
    results, chosen, judged = [], None, None
    for first, last in CUTS:
        say(f"fitting on papers before {first}, judging {first} to {last}")
        model = fit(corpus.part(lambda paper, first=first: paper.month < first))
        later = corpus.part(lambda paper, first=first, last=last: first <= paper.month <= last)
        judged = judge(model, later)
        entry = {"from": first, "to": last, **measure(judged, chosen)}
        entry["leaves"] = leaf_accuracy(model, later, propose)
        results.append(entry)
        chosen = threshold_at(judged.scores[judged.negative], FALSE_POSITIVES)
    assert judged is not None
    return results, judged
