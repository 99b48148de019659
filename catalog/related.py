r"""Related papers: TF-IDF over title words, pairs of title words, topics and mechanisms; nothing is fetched or trained.

With :math:`w_{d,t} = \lambda_t \log(N / n_t)` for the terms *t* of paper *d* (:math:`n_t` of *N* papers have the term,
:math:`\lambda_t` is 1 for words, less for topics), two papers are as similar as the cosine of their vectors. Terms that
more than 30 % of the papers have say nothing and are left out. The terms that add most to the cosine are given as the
reason.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from latentcot.catalog.leaves import load_taxonomy
from latentcot.catalog.record import Record
from latentcot.catalog.search_words import Stemmer, load_terms, words_of

MOST = 8
_LEAST = 0.12  # cosine below which papers are not called related
_COMMON = 0.3  # share of the papers above which a term says nothing
_PAIR, _PRIMARY, _ALSO, _MECHANISM = 0.6, 1.0, 0.5, 0.5
_REASONS = 3


@dataclass(frozen=True)
class Related:
    """A related paper: its key, the cosine, and the shared terms that count most, as a reader would write them."""

    key: str
    score: float
    terms: tuple[str, ...]


def related_papers(records: Sequence[Record], limit: int = MOST) -> dict[str, tuple[Related, ...]]:
    """For every record the papers most like it, best first: at most ``limit``, never itself, none that was withdrawn or
    superseded. The same records in any order give the same result; ties are broken by key.

    Raises ``ValueError`` for a limit below one.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, given {limit}")
    ordered = sorted(records, key=lambda record: record.key)
    stemmer = Stemmer()
    terms = [_terms(record, stemmer) for record in ordered]
    holders: dict[str, list[int]] = {}
    for number, own in enumerate(terms):
        for term in own:
            holders.setdefault(term, []).append(number)
    rare = {
        term: math.log(len(ordered) / len(found))
        for term, found in holders.items()
        if 1 < len(found) < len(ordered) and len(found) <= max(10, _COMMON * len(ordered))
    }
    vectors = [_unit({term: weight * rare[term] for term, (weight, _) in own.items() if term in rare}) for own in terms]
    result: dict[str, tuple[Related, ...]] = {}
    for number, vector in enumerate(vectors):
        scores: dict[int, float] = {}
        for term, weight in vector.items():
            for other in holders[term]:
                scores[other] = scores.get(other, 0.0) + weight * vectors[other][term]
        scores.pop(number, None)
        usable = sorted(
            (-round(score, 9), other)
            for other, score in scores.items()
            if score >= _LEAST and ordered[other].status == "active" and _share_a_word(vector, vectors[other])
        )[:limit]
        result[ordered[number].key] = tuple(
            Related(ordered[other].key, -score, _reasons(vector, vectors[other], terms[number]))
            for score, other in usable
        )
    return result


def _terms(record: Record, stemmer: Stemmer) -> dict[str, tuple[float, str]]:
    """Terms of a paper with their weight and how a reader would write them."""
    ignored = load_terms().ignored | load_terms().dull
    words = words_of(record.title)
    stems = stemmer.stem(words)
    found: dict[str, tuple[float, str]] = {}
    for word in words:
        if word not in ignored and (len(word) > 1 or word.isdigit()):
            found.setdefault(f"word {stems[word]}", (1.0, word))
    for left, right in pairwise(words):
        if left not in ignored and right not in ignored:
            found.setdefault(f"pair {stems[left]} {stems[right]}", (_PAIR, f"{left} {right}"))
    leaves = load_taxonomy().leaves
    for slug in record.leaves:
        name = leaves[slug].name if slug in leaves else slug
        weight = _PRIMARY if slug == record.taxonomy.primary else _ALSO
        found[f"leaf {slug}"] = (weight, f"topic “{name}”")
    for value in record.facets.mechanism:
        found[f"mechanism {value}"] = (_MECHANISM, f"mechanism “{value}”")
    return found


def _unit(vector: dict[str, float]) -> dict[str, float]:
    length = math.sqrt(math.fsum(value * value for value in vector.values()))
    return {term: value / length for term, value in vector.items()} if length else {}


def _share_a_word(one: dict[str, float], other: dict[str, float]) -> bool:
    """A topic alone makes no two papers related: the topic's page lists those."""
    return any(term in other and term.startswith("word ") for term in one)


def _reasons(one: dict[str, float], other: dict[str, float], written: dict[str, tuple[float, str]]) -> tuple[str, ...]:
    shared = sorted((term for term in one if term in other), key=lambda term: (-one[term] * other[term], term))
    shared.sort(key=lambda term: not term.startswith(("word ", "pair ")))  # words say more than topics
    reasons: list[str] = []
    for term in shared:
        text = written[term][1]
        # A pair says its words already, and a word of a pair that was given says nothing new.
        if any(text in reason.split() or text == reason for reason in reasons):
            continue
        reasons = [reason for reason in reasons if reason not in text.split()]
        reasons.append(text)
        if len(reasons) == _REASONS:
            break
    return tuple(reasons)
