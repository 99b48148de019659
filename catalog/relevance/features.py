"""From a title to named features: words, pairs of words and concepts.

Names begin with their kind: ``w:`` word, ``b:`` neighbouring words, ``s:`` two words with one between, ``k:`` concept.
The first three are weighted by rarity and scaled to a fixed length together; a concept counts one. Pieces of words and
pairs of concepts were tried and brought nothing.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from latentcot.catalog.relevance.concepts import concepts_in

MAX_TEXT = 600  # characters read of a title or a sentence: titles are shorter, and patterns take time
KIND_FACTOR = {"w": 1.0, "b": 0.7, "s": 0.7}
GRAM_LENGTH = 2.0  # length of the vector of words and pairs, beside concepts of length 1 each

_WORD = re.compile(r"[a-z0-9]+|\?")
_ENDINGS = (("ization", "ize"), ("isation", "ize"), ("ising", "ize"), ("ings", ""), ("ing", ""), ("ively", "ive"),
            ("edly", ""), ("ed", ""), ("ies", "y"), ("s", ""))  # fmt: skip


def normal_text(text: str) -> str:
    """Compatibility forms and dashes made plain, white space collapsed, cut to :data:`MAX_TEXT` characters."""
    plain = unicodedata.normalize("NFKC", text[: 4 * MAX_TEXT])
    return " ".join(re.sub(r"[\u2010-\u2015\u2212]", "-", plain).split())[:MAX_TEXT]


def stem(word: str) -> str:
    """A word without the commonest English endings; at least three letters stay."""
    for ending, instead in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word[: len(word) - len(ending)] + instead
    return word


def words(text: str) -> list[str]:
    """The stemmed words of a normal text, in order."""
    return [stem(word) for word in _WORD.findall(text.lower())]


def grams(text: str) -> set[str]:
    """Words and pairs of words of a normal text."""
    found = words(text)
    names = {f"w:{word}" for word in found}
    names.update(f"b:{a}_{b}" for a, b in pairwise(found))
    names.update(f"s:{a}_{b}" for a, b in zip(found, found[2:], strict=False))
    return names


@dataclass(frozen=True)
class Rarity:
    """``ln((n + 1) / (df + 1)) + 1`` for every gram kept, times the factor of its kind."""

    weight: Mapping[str, float]

    @classmethod
    def fit(cls, titles: Iterable[set[str]], least: int) -> "Rarity":
        """From the grams of the training titles; a gram in fewer than ``least`` of them is dropped."""
        counts: dict[str, int] = {}
        n = 0
        for names in titles:
            n += 1
            for name in names:
                counts[name] = counts.get(name, 0) + 1
        kept = sorted(name for name, count in counts.items() if count >= least)
        return cls({
            name: round(KIND_FACTOR[name[0]] * (math.log((n + 1) / (counts[name] + 1)) + 1), 4) for name in kept
        })  # fmt: skip

    def vector(self, names: set[str]) -> dict[str, float]:
        """Values of the known grams, scaled to :data:`GRAM_LENGTH`; empty where none is known."""
        values = {name: self.weight[name] for name in sorted(names) if name in self.weight}
        length = math.sqrt(sum(value * value for value in values.values()))
        return {name: GRAM_LENGTH * value / length for name, value in values.items()}


def features(text: str, rarity: Rarity) -> dict[str, float]:
    """All features of a text with their values. Concepts are read from the text, grams from its normal form."""
    plain = normal_text(text)
    values = rarity.vector(grams(plain))
    return values | {f"k:{name}": 1.0 for name in concepts_in(plain)}
