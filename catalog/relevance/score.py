"""The score of one title: probability, leaf proposals and reasons."""

from dataclasses import dataclass

from latentcot.catalog.classify import title_leaf
from latentcot.catalog.leaves import load_table
from latentcot.catalog.relevance.keywords import keyword_score

MAX_LENGTH = 20_000  # characters read of a title or an abstract; what is longer is cut


@dataclass(frozen=True)
class Proposal:
    """A leaf that may fit, its share among the leaves, and what speaks for it."""

    leaf: str
    share: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """What the scorer says about one paper.

    ``probability`` in [0, 1] that the paper belongs to the catalog; ``leaf`` the best leaf; ``reasons`` the terms that
    moved the score most, strongest first, each with its sign; ``leaves`` up to three proposals, best first.
    """

    probability: float
    leaf: str
    reasons: tuple[str, ...]
    leaves: tuple[Proposal, ...] = ()


def score(title: str, abstract: str | None = None) -> Score:
    """Score a paper by its title, and by its abstract where there is one.

    Raises:
        TypeError: ``title`` is not a string, or ``abstract`` is neither a string nor ``None``.
        ValueError: ``title`` holds nothing but white space.
    """
    if not isinstance(title, str):
        raise TypeError(f"title: expected a string, given {type(title).__name__}")
    if abstract is not None and not isinstance(abstract, str):
        raise TypeError(f"abstract: expected a string or None, given {type(abstract).__name__}")
    if not title.strip():
        raise ValueError("title: expected some text, given only white space")
    found = keyword_score(title[:MAX_LENGTH])
    rules = load_table("import_rules.json")
    leaf = title_leaf(title[:MAX_LENGTH], rules) or rules["title_default"]
    reasons = tuple(f"+ {term}" for term in found.terms)
    return Score(found.probability, leaf, reasons, (Proposal(leaf, 1.0, reasons),))
