"""Closed vocabularies: the shared special tokens first, then a task's own symbols."""

import difflib
from collections.abc import Iterable, Sequence

from latentcot.reasoner import SPECIAL


class Vocabulary:
    """One symbol a token. Ids ``0 .. SPECIAL.count - 1`` are the shared specials (``<pad>``, ``<bos>``, ...).

    Args:
        symbols: the task's own symbols in id order; distinct, without white space, none equal to a special token.

    Raises:
        ValueError: for symbols that are empty, repeated, contain white space or collide with a special token.
    """

    def __init__(self, symbols: Sequence[str]):
        self.tokens: tuple[str, ...] = (*SPECIAL.names, *symbols)
        for symbol in symbols:
            if not symbol or any(c.isspace() for c in symbol):
                raise ValueError(f"symbols: {symbol!r} is empty or contains white space")
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self._ids) != len(self.tokens):
            repeated = sorted({t for t in self.tokens if self.tokens.count(t) > 1})
            raise ValueError(f"symbols: {repeated[:5]} occur more than once (special tokens included)")

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, symbol: object) -> bool:
        return symbol in self._ids

    def id(self, symbol: str) -> int:
        """Id of one symbol. Raises ``ValueError`` with the closest known symbols when it is unknown."""
        try:
            return self._ids[symbol]
        except KeyError:
            close = difflib.get_close_matches(str(symbol), self.tokens, n=3, cutoff=0.4)
            known = f"known: {' '.join(self.tokens[:20])} ..."
            hint = f"did you mean {', '.join(map(repr, close))}?" if close else known
            raise ValueError(f"symbol: unknown symbol {symbol!r}; {hint}") from None

    def encode(self, symbols: str | Iterable[str]) -> tuple[int, ...]:
        """Ids of symbols, given as an iterable or as one string with the symbols separated by white space."""
        return tuple(self.id(s) for s in (symbols.split() if isinstance(symbols, str) else symbols))

    def decode(self, ids: Iterable[int]) -> tuple[str, ...]:
        """Symbols of ids. Raises ``ValueError`` for an id outside the vocabulary."""
        out = []
        for i in ids:
            i = int(i)
            if not 0 <= i < len(self.tokens):
                raise ValueError(f"ids: {i} is outside the vocabulary of {len(self.tokens)} tokens")
            out.append(self.tokens[i])
        return tuple(out)

    def render(self, ids: Iterable[int]) -> str:
        """Readable text: symbols separated by spaces, trailing padding left out. ``encode`` reads it back."""
        kept = [int(i) for i in ids]
        while kept and kept[-1] == SPECIAL.pad:
            kept.pop()
        return " ".join(self.decode(kept))
