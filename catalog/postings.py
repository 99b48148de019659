"""Postings of the search: for every word, the papers that have it and in which fields, as NumPy arrays.

Papers are numbered in the order of ties (newest first), words are sorted, so that a beginning is one stretch of the
arrays. Ranking by SQLite's ``bm25`` needs about 2.5 µs a row, a quarter of a second for a common word among 100,000
papers; adding up arrays needs a thousandth of that and ranks every paper that has any of the words.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

from latentcot.catalog.search_words import Stemmer, index_words

FIELDS = ("title", "other", "names", "authors", "tags", "venue", "definition", "abstract")
STEMMED = ("title", "other", "tags", "definition", "abstract")


class Postings:
    """Word postings of papers given as one text a field.

    ``docs`` (int32) holds the papers of every word, one after the other; ``fields`` (uint8) the set of fields as bits;
    ``starts[w] : starts[w + 1]`` is the stretch of word ``w`` in ``words``.
    """

    def __init__(self, papers: Iterable[Sequence[str]], stemmer: Stemmer) -> None:
        import numpy as np

        table: dict[str, tuple[array[int], array[int]]] = {}
        count = 0
        kept: dict[tuple[int, str], frozenset[str]] = {}  # topics and venues repeat
        for number, texts in enumerate(papers):
            count += 1
            bits: dict[str, int] = {}
            for field, text in enumerate(texts):
                if not text:
                    continue
                if FIELDS[field] in ("tags", "venue", "definition"):
                    found = kept.get((field, text))
                    if found is None:
                        found = kept[field, text] = frozenset(index_words(text))
                else:
                    found = index_words(text)
                for word in found:
                    bits[word] = bits.get(word, 0) | 1 << field
            for word, value in bits.items():
                entry = table.get(word)
                if entry is None:
                    entry = table[word] = array("i"), array("B")
                entry[0].append(number)
                entry[1].append(value)
        self.count = count
        self.words = sorted(table)
        lengths = [len(table[word][0]) for word in self.words]
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        self.docs = np.empty(int(self.starts[-1]), dtype=np.int32)
        self.fields = np.empty(len(self.docs), dtype=np.uint8)
        for place, word in enumerate(self.words):
            docs, values = table.pop(word)
            part = slice(int(self.starts[place]), int(self.starts[place + 1]))
            self.docs[part] = docs
            self.fields[part] = values
        self._place = {word: place for place, word in enumerate(self.words)}
        self._stemmer = stemmer
        self._same_stem: dict[str, list[int]] = {}
        for word, stem in stemmer.stem(self.words).items():
            self._same_stem.setdefault(stem, []).append(self._place[word])
        self._text = "\n".join(["", *self.words, ""])

    def word(self, word: str) -> tuple[Any, Any]:
        """Papers and fields of one word."""
        place = self._place.get(word)
        return self._stretch(0, 0) if place is None else self._stretch(place, place + 1)

    def stem(self, stem: str) -> list[tuple[Any, Any]]:
        """Papers and fields of every word that has this stem."""
        return [self._stretch(place, place + 1) for place in self._same_stem.get(stem, ())]

    def beginning(self, prefix: str) -> tuple[Any, Any]:
        """Papers and fields of every word that begins so; a paper may come more than once."""
        last = bisect_left(self.words, prefix + chr(0x10FFFF))
        return self._stretch(bisect_left(self.words, prefix), last)

    def containing(self, part: str) -> list[tuple[Any, Any]]:
        """Papers and fields of every word that holds ``part``."""
        found, at = [], self._text.find(part)
        while at >= 0:
            start, end = self._text.rfind("\n", 0, at) + 1, self._text.find("\n", at)
            found.append(self.word(self._text[start:end]))
            at = self._text.find(part, end)
        return found

    def family(self, words: Iterable[str]) -> set[str]:
        """The words themselves and all words here of the same stem."""
        words = list(words)
        found = set(words)
        for stem in self._stemmer.stem(words).values():
            found.update(self.words[place] for place in self._same_stem.get(stem, ()))
        return found

    def _stretch(self, first: int, last: int) -> tuple[Any, Any]:
        part = slice(int(self.starts[first]), int(self.starts[last]))
        return self.docs[part], self.fields[part]
