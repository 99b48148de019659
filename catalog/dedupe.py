"""When are two descriptions the same paper? The rules of de-duplication, in order; the first that fires decides.

1. the arXiv id; 2. another strong id (DOI, OpenReview, ACL); 3. equal titles and the same people; 4. near titles, which
are never merged but go to review. Titles are compared in their normal form, with and without a leading ``Name:``.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from latentcot.catalog.names import key_stem, split_name
from latentcot.catalog.text import bare_title, jaccard, normal_title, title_tokens

NEAR = 0.85
STRONG = ("doi", "openreview", "acl")


@dataclass(frozen=True)
class Evidence:
    """What is known of a paper when it is compared. ``None`` and empty mean unknown."""

    title: str
    arxiv: str | None = None
    doi: str | None = None
    openreview: str | None = None
    acl: str | None = None
    first_author: str | None = None
    year: int | None = None
    venues: frozenset[str] = field(default_factory=frozenset)
    lists: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Verdict:
    """``same`` merges, ``review`` asks a person, ``different`` keeps apart; ``rule`` names what decided."""

    outcome: Literal["same", "review", "different"]
    rule: str


def compare(one: Evidence, other: Evidence) -> Verdict:
    """Apply the rules to two descriptions."""
    if one.arxiv and other.arxiv:
        if one.arxiv == other.arxiv:
            return Verdict("same", "arxiv id")
        if same_title(one.title, other.title):
            return Verdict("review", "equal titles with two arXiv ids")
    for kind in STRONG:
        left, right = getattr(one, kind), getattr(other, kind)
        if left and right and left == right:
            return Verdict("same", kind)
    if same_title(one.title, other.title):
        return _by_people(one, other)
    if not (one.arxiv and other.arxiv) and near_title(one.title, other.title):
        return Verdict("review", "near titles")
    if near_title(one.title, other.title):
        return Verdict("review", "near titles with two arXiv ids")
    return Verdict("different", "titles differ")


def _by_people(one: Evidence, other: Evidence) -> Verdict:
    if one.year is None or other.year is None:
        return Verdict("review", "equal titles, a year is unknown")
    if abs(one.year - other.year) > 1:
        return Verdict("review", "equal titles, years more than one apart")
    if one.first_author and other.first_author:
        if _surname(one.first_author) == _surname(other.first_author):
            return Verdict("same", "title and first author")
        return Verdict("review", "equal titles, first authors differ")
    if one.venues & other.venues:
        return Verdict("same", "title and venue")
    if one.lists & other.lists:
        return Verdict("same", "title and list")
    return Verdict("review", "equal titles, authors unknown, neither venue nor list agrees")


def _surname(name: str) -> str:
    family = split_name(name).family
    return (key_stem(family) or family).casefold()


def same_title(one: str, other: str) -> bool:
    """Equal normal forms, where a leading ``Name:`` of either side is ignored."""
    if normal_title(one) == normal_title(other):
        return True
    return bool({normal_title(one), bare_title(one)} & {normal_title(other), bare_title(other)})


def near_title(one: str, other: str) -> bool:
    """Token Jaccard of at least 0.85, or one title equals the part after the colon of the other."""
    if jaccard(title_tokens(one), title_tokens(other)) >= NEAR:
        return True
    return _contained(one, other) or _contained(other, one)


def _contained(part: str, whole: str) -> bool:
    tail = normal_title(whole.partition(":")[2])
    return len(tail.split()) >= 4 and tail == normal_title(part)


def near_pairs(titles: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs of keys whose titles are near or equal, each pair once and sorted. ``titles`` gives (key, title)."""
    entries = list(titles)
    tokens = [title_tokens(title) for _, title in entries]
    holders: dict[str, list[int]] = defaultdict(list)
    for index, words in enumerate(tokens):
        for word in words:
            holders[word].append(index)
    pairs: set[tuple[str, str]] = set()
    for index, (key, title) in enumerate(entries):
        # Near titles share most words, so the two rarest words of one must meet the other in at least one of them,
        # unless the title is a part of a longer one: the rarest words of the part then stand in the whole.
        rare = sorted(tokens[index], key=lambda word: (len(holders[word]), word))[:4]
        for other in sorted({place for word in rare for place in holders[word]} - {index}):
            other_key, other_title = entries[other]
            if other_key != key and (near_title(title, other_title) or same_title(title, other_title)):
                left, right = sorted((key, other_key))
                pairs.add((left, right))
    return sorted(pairs)
