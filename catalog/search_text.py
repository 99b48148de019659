"""What a result shows: places to highlight in a title, and the part of an abstract that fits a query best."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from latentcot.catalog.search_words import fold

_WORD = re.compile(r"[^\W_]+(?:[\u0300-\u036f][^\W_]*)*")

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Snippet:
    """A piece of text and the places in it to highlight."""

    text: str
    spans: Spans

    def marked(self, left: str, right: str) -> str:
        """The text with ``left`` and ``right`` around every highlighted place. Not escaped: for terminals."""
        return marked(self.text, self.spans, left, right)


@dataclass(frozen=True)
class Wanted:
    """What to highlight: whole words (folded), words that begin with ``beginning``, else ``parts`` of words."""

    words: Collection[str] = ()
    beginning: str = ""
    parts: Sequence[str] = ()


def marked(text: str, spans: Spans, left: str, right: str) -> str:
    """``text`` with ``left`` and ``right`` around every span."""
    parts, last = [], 0
    for start, end in spans:
        parts += [text[last:start], left, text[start:end], right]
        last = end
    return "".join([*parts, text[last:]])


def find_spans(text: str, wanted: Wanted) -> Spans:
    """Places of the wanted words in ``text``; where none is there, places of the parts."""
    found = []
    for match in _WORD.finditer(text):
        word = fold(match.group())
        if word in wanted.words or (wanted.beginning and word.startswith(wanted.beginning)):
            found.append(match.span())
    if not found:
        lower = text.lower()
        if len(lower) == len(text):  # the lower case of a few letters is longer than the letter
            places = [(lower.find(part), len(part)) for part in wanted.parts if len(part) >= 3]
            found = [(start, start + length) for start, length in places if start >= 0]
    return _merged(found)


def snippet(text: str, wanted: Wanted, length: int = 200) -> Snippet | None:
    """The stretch of at most ``length`` letters with the most wanted words; ``None`` where no word is there."""
    spans = find_spans(text, wanted)
    if not spans:
        return None
    best = max((start for start, _ in spans), key=lambda at: (sum(at <= a and b <= at + length for a, b in spans), -at))
    first = max(0, best - 30)
    if first:
        first = text.find(" ", first, best) + 1 or best
    last = min(len(text), first + length)
    if last < len(text):
        last = max(text.rfind(" ", best, last), min(len(text), best + 1))
        last = last if last > best + 1 else min(len(text), first + length)
    inside = tuple((a - first, b - first) for a, b in spans if first <= a and b <= last)
    head, tail = "… " if first else "", " …" if last < len(text) else ""
    shift = len(head)
    return Snippet(f"{head}{text[first:last]}{tail}", tuple((a + shift, b + shift) for a, b in inside))


def _merged(spans: list[tuple[int, int]]) -> Spans:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)
