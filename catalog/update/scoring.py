"""Who judges relevance: the trained scorer where it is there, a rule of key phrases where it is not. The summary says which."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from latentcot.catalog.classify import title_leaf
from latentcot.catalog.leaves import load_table, load_taxonomy
from latentcot.catalog.queue_store import Proposal, Score


class Scorer(Protocol):
    """Judges a paper by its title and, where there is one, its abstract. Deterministic, no network."""

    name: str

    def __call__(self, title: str, abstract: str | None) -> Score: ...


class KeywordScorer:
    """The fallback: 0.9 where a phrase of the queries stands in the title, 0.5 in the abstract, else 0.1; a leaf by title rules."""

    name = "keywords 1"

    def __init__(self, phrases: Sequence[str]) -> None:
        self._phrases = [(phrase, re.compile(rf"(?<!\w){_flexible(phrase)}", re.IGNORECASE)) for phrase in phrases]

    def __call__(self, title: str, abstract: str | None) -> Score:
        in_title = [phrase for phrase, pattern in self._phrases if pattern.search(title)]
        in_abstract = [phrase for phrase, pattern in self._phrases if abstract and pattern.search(abstract)]
        rules = load_table("import_rules.json")
        leaf = title_leaf(title, rules) or rules["title_default"]
        reasons = [f"title: {phrase}" for phrase in in_title[:3]] + [
            f"abstract: {p}" for p in in_abstract[:3] if p not in in_title
        ]
        probability = 0.9 if in_title else 0.5 if in_abstract else 0.1
        return Score(
            probability=probability,
            leaves=[Proposal(leaf=leaf, probability=None)],
            reasons=reasons or ["no key phrase"],
            scorer=self.name,
        )


def _flexible(phrase: str) -> str:
    return r"[\s-]+".join(re.escape(word) for word in re.split(r"[\s-]+", phrase))


class RelevanceScorer:
    """The trained scorer of :mod:`latentcot.catalog.relevance`, brought to the form of the queue."""

    def __init__(self, score: Callable[[str, str | None], Any], name: str) -> None:
        self._score, self.name = score, name

    def __call__(self, title: str, abstract: str | None) -> Score:
        found = self._score(title, abstract)
        slugs = load_taxonomy().leaves
        leaves = [
            Proposal(leaf=item.leaf, probability=_rounded(item.share)) for item in found.leaves if item.leaf in slugs
        ]
        if not leaves and found.leaf in slugs:
            leaves = [Proposal(leaf=found.leaf, probability=None)]
        reasons = [" ".join(str(reason).split())[:200] for reason in found.reasons][:6]
        reasons += [f"like {near.key} ({near.cosine:.2f})" for near in found.nearest[:2]]
        return Score(
            probability=_rounded(found.probability),
            leaves=leaves[:3],
            reasons=[reason for reason in reasons if reason],
            scorer=self.name,
        )


def _rounded(value: float) -> float:
    """Six digits in [0, 1]: enough to rank, and the same on every machine."""
    return round(min(1.0, max(0.0, float(value))), 6)


def default_scorer(phrases: Sequence[str]) -> tuple[Scorer, str | None]:
    """The trained scorer, else the keyword rule with the reason why."""
    try:
        from latentcot.catalog import relevance

        scorer = RelevanceScorer(relevance.score, f"relevance {getattr(relevance, 'VERSION', 1)}")
        scorer("Training large language models to reason in a continuous latent space", None)
    except Exception as error:
        # Whatever is wrong with the model (a missing file shows here, not mid-run), candidates still have to reach the queue.
        why = f"the relevance model cannot be used ({type(error).__name__}: {error}); key phrases judge instead"
        return KeywordScorer(phrases), why
    return scorer, None
