"""The score of one paper: probability, leaf proposals and reasons."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from latentcot.catalog.relevance.concepts import concepts_in
from latentcot.catalog.relevance.features import features, grams, normal_text
from latentcot.catalog.relevance.model import Model, load_model
from latentcot.catalog.store import load_records

MAX_ABSTRACT = 10_000  # characters of an abstract that are read
MAX_SENTENCES = 30
REASONS = 6
NEAREST = 3
_LEAST_EFFECT = 0.3  # log-odds below which a term is no reason


class Proposal(NamedTuple):
    """A leaf that may fit, its share among all leaves, and the terms that speak for it."""

    leaf: str
    share: float
    reasons: tuple[str, ...]


class Near(NamedTuple):
    """A known paper with a title like this one: its key, the cosine of the titles, and the words they share."""

    key: str
    cosine: float
    shared: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """What the scorer says about one paper.

    Attributes:
        probability: that the paper belongs to the catalog, in [0, 1]; fitted where one title in eleven belonged.
        leaf: the best leaf, whether or not the paper belongs.
        reasons: the terms that moved the score most, strongest first, with their sign.
        leaves: up to three proposals, best first.
        nearest: up to three known papers with the most similar titles.
        relevant: whether the score is above the threshold that 1 % of other titles exceeded.
        family: the family of ideas that gave the score.
    """

    probability: float
    leaf: str
    reasons: tuple[str, ...]
    leaves: tuple[Proposal, ...]
    nearest: tuple[Near, ...]
    relevant: bool
    family: str


def score(title: str, abstract: str | None = None) -> Score:
    """Score a paper by its title, and by its abstract where there is one.

    The decision is the title's. An abstract can raise it: where the second best of its sentences stands above the
    title, the mean of the two counts. No abstracts were available to measure what that brings.

    Raises:
        TypeError: ``title`` is not a string, or ``abstract`` is neither a string nor ``None``.
        ValueError: ``title`` holds nothing but white space.
        CatalogError: the model's file is missing or damaged.
    """
    if not isinstance(title, str):
        raise TypeError(f"title: expected a string, given {type(title).__name__}")
    if abstract is not None and not isinstance(abstract, str):
        raise TypeError(f"abstract: expected a string or None, given {type(abstract).__name__}")
    text = normal_text(title)
    if not text:
        raise ValueError("title: expected some text, given only white space")
    model = load_model()
    values = features(text, model.rarity)
    decision = model.decide(values)
    value, reasons = decision.value, list(_terms(decision.parts, text))
    if abstract:
        raised, sentence = _from_abstract(model, abstract)
        if raised > value:
            value = (value + raised) / 2
            reasons.insert(0, f"+ the abstract ({_shorten(sentence)})")
    leaves = propose_leaves(model, values, text)
    return Score(
        probability=model.probability(value),
        leaf=leaves[0].leaf,
        reasons=tuple(reasons[:REASONS]) or ("no term of the field",),
        leaves=tuple(leaves[:3]),
        nearest=nearest(text),
        relevant=value > model.threshold,
        family=decision.family,
    )


def _from_abstract(model: Model, abstract: str) -> tuple[float, str]:
    """The second best sentence and its decision; minus infinity where there are not two."""
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", abstract[:MAX_ABSTRACT]) if len(s.split()) > 3][:MAX_SENTENCES]
    ranked = sorted(((model.decision(sentence), sentence) for sentence in sentences), reverse=True)
    return ranked[1] if len(ranked) > 1 else (-math.inf, "")


def _shorten(text: str, limit: int = 80) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= limit else plain[: limit - 1].rstrip() + "…"


def _terms(parts: Mapping[str, float], text: str, sign: bool = True) -> Iterable[str]:
    """Named effects, strongest first."""
    shown = concepts_in(text)
    for name, effect in sorted(parts.items(), key=lambda item: (-abs(item[1]), item[0])):
        kind, _, term = name.partition(":")
        if abs(effect) < _LEAST_EFFECT:
            continue
        if kind == "k":
            term = f"{term} ({_shorten(shown[term], 40)})" if term in shown else term
        else:
            term = f"“{term.replace('_', ' … ' if kind == 's' else ' ')}”"
        yield f"{'+' if effect > 0 else '−'} {term}" if sign else term


def propose_leaves(model: Model, values: Mapping[str, float], text: str = "") -> list[Proposal]:
    """All leaves with their shares (logistic scores made to sum to one), best first."""
    scored = []
    for leaf, linear in model.leaves.items():
        parts = linear.parts(values)
        decision = math.fsum(parts.values()) + linear.intercept
        scored.append((1 / (1 + math.exp(min(-decision, 700))), leaf, parts))
    whole = math.fsum(share for share, _, _ in scored)
    best = sorted(scored, key=lambda entry: (-entry[0], entry[1]))
    return [
        Proposal(
            leaf,
            share / whole,
            tuple(_terms({n: v for n, v in parts.items() if v > 0}, text, sign=False))[:3] if i < 3 else (),
        )
        for i, (share, leaf, parts) in enumerate(best)
    ]


@cache
def _known() -> tuple[dict[str, list[tuple[int, float]]], tuple[str, ...]]:
    """Words and pairs of words of all records: ``{gram: [(record, value)]}``, and the keys of the records."""
    model = load_model()
    table: dict[str, list[tuple[int, float]]] = {}
    records = load_records()
    for i, record in enumerate(records):
        for name, value in _unit(model, record.title).items():
            table.setdefault(name, []).append((i, value))
    return table, tuple(record.key for record in records)


def _unit(model: Model, title: str) -> dict[str, float]:
    names = {name for name in grams(normal_text(title)) if name[0] in "wb"}
    values = model.rarity.vector(names)
    length = math.sqrt(sum(value * value for value in values.values()))
    return {name: value / length for name, value in values.items()}


def nearest(title: str, count: int = NEAREST) -> tuple[Near, ...]:
    """Known papers whose titles share the rarest words with this one, nearest first."""
    table, keys = _known()
    cosine: dict[int, float] = {}
    shared: dict[int, list[tuple[float, str]]] = {}
    for name, value in _unit(load_model(), title).items():
        for i, other in table.get(name, ()):
            cosine[i] = cosine.get(i, 0.0) + value * other
            shared.setdefault(i, []).append((value * other, name[2:].replace("_", " ")))
    best = sorted(cosine, key=lambda i: (-round(cosine[i], 9), keys[i]))[:count]
    return tuple(
        Near(
            keys[i], round(cosine[i], 4), tuple(term for _, term in sorted(shared[i], key=lambda s: (-s[0], s[1]))[:3])
        )
        for i in best
    )
