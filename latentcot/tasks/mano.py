r"""Mano: modular arithmetic on expression trees in prefix form (arXiv 2510.25741).

An expression of d operations over the residues modulo m (23): the operator first, then its two operands, each a residue or an
expression. The split of the remaining operations between both operands is uniform at every node. With ``division`` a node may divide
by a unit; a draw that divides by anything else is thrown away.

Layout::

    prompt   <bos> + × 3 4 − 5 6            (3 · 4) + (5 − 6)
    steps    the values of the inner nodes, in the order in which a reader from right to left completes them; the root's is the answer
    answer   the value of the whole

The published task gives answers only; steps are there for methods that use them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentcot.reasoner import SPECIAL, TaskBatch, TaskLimits
from latentcot.tasks.base import Example, Latents, Rows, Task, TaskConfig, check_integer
from latentcot.tasks.counter import Draws, Integers, Words, scale_words
from latentcot.tasks.vocabulary import Vocabulary

_OPERATORS = ("+", "−", "×", "÷")


@dataclass(frozen=True, kw_only=True)
class ManoConfig(TaskConfig):
    """Options of :class:`ManoTask`; the difficulty is the number of operations.

    Args:
        modulus: m; published 23. Published lengths: at most 10, 16 or 24 operations, tested at the most.
        division: allow division by units too.
    """

    modulus: int = 23
    division: bool = False
    max_difficulty: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("modulus", self.modulus, 2, 1024)
        if not isinstance(self.division, bool):
            raise TypeError(f"division: expected True or False, got {self.division!r}")


class ManoTask(Task):
    """Modular expression trees; see the module for the layout."""

    name = "mano"
    config_type = ManoConfig
    config: ManoConfig

    @property
    def domain(self) -> str:
        return f"mano/{self.config.modulus}/{self.config.division}"

    @property
    def operators(self) -> tuple[str, ...]:
        return _OPERATORS if self.config.division else _OPERATORS[:3]

    def _make_vocabulary(self) -> Vocabulary:
        return Vocabulary([*map(str, range(self.config.modulus)), *self.operators])

    def _make_limits(self) -> TaskLimits:
        most = self.config.max_difficulty
        return TaskLimits(len(self.vocabulary), 2 * most + 2, most - 1, 1, 1)

    def _draw(self, draws: Draws, lowest: int, highest: int) -> Latents:
        c, n = self.config, len(draws)
        width = 2 * c.max_difficulty + 1
        d = lowest + draws.integers(1, highest - lowest + 1)[:, 0]
        numbers = draws.integers(width, c.modulus)
        signs = c.modulus + draws.integers(width, len(self.operators))
        shares = draws.words(width)
        # A stack of operations still to be placed, top last: a node of k operations leaves k - 1 to share between its operands.
        symbols = np.full((n, width), -1)
        stack = np.zeros((n, c.max_difficulty + 2), dtype=np.int64)
        stack[:, 0], height, rows = d, np.ones(n, dtype=np.int64), np.arange(n)
        for place in range(width):
            active = height > 0
            top = np.where(active, stack[rows, height - 1], 0)
            inner = active & (top > 0)
            leaf = active & (top == 0)
            symbols[:, place] = np.where(inner, signs[:, place], np.where(leaf, numbers[:, place], -1))
            left = scale_words(shares[:, place], np.maximum(top, 1))
            r = rows[inner]
            stack[r, height[r] - 1] = top[r] - 1 - left[r]
            stack[r, height[r]] = left[r]
            height = height + inner - leaf
        values, valid = evaluate(symbols, c.modulus)
        return {"difficulty": d, "symbols": symbols, "values": values, "valid": valid}

    def _canonical_words(self, latents: Latents) -> tuple[Words, Integers]:
        symbols = latents["symbols"]
        return np.maximum(symbols, 0).astype(np.uint64), (symbols >= 0).sum(axis=1)

    def _write(self, latents: Latents) -> Rows:
        symbols, values = latents["symbols"], latents["values"]
        n, d = len(symbols), latents["difficulty"]
        prompt = np.concatenate((np.full((n, 1), SPECIAL.bos), np.where(symbols < 0, -1, SPECIAL.count + symbols)), 1)
        inner = symbols >= self.config.modulus
        # completed from right to left: the last inner node first, the root last
        order = np.argsort(~inner[:, ::-1], axis=1, kind="stable")[:, : self.config.max_difficulty]
        found = np.take_along_axis(np.where(inner, values, -1)[:, ::-1], order, axis=1)
        answer = found[np.arange(n), d - 1][:, None] + SPECIAL.count
        kept = np.arange(self.config.max_difficulty - 1) < (d - 1)[:, None]
        return Rows(prompt=prompt, steps=np.where(kept, SPECIAL.count + found[:, :-1], -1)[..., None], answer=answer)

    def oracle(self, example: Example) -> tuple[int, ...]:
        """Read the names from the left by recursive descent, with Python's own modular arithmetic."""
        names = iter(self.vocabulary.decode(example.prompt_ids[1:]))

        def value() -> int:
            name = next(names)
            if name not in _OPERATORS:
                return int(name)
            a, b = value(), value()
            match name:
                case "+":
                    return a + b
                case "−":
                    return a - b
                case "×":
                    return a * b
                case _:
                    return a * pow(b % self.config.modulus, -1, self.config.modulus)

        return self.vocabulary.encode([str(value() % self.config.modulus)])

    def canonical(self, example: Example) -> tuple[int, ...]:
        """The expression itself."""
        return tuple(token - SPECIAL.count for token in example.prompt_ids[1:])

    def chance(self, batch: TaskBatch) -> Tensor:
        return torch.full((len(batch),), 1.0 / self.config.modulus, dtype=torch.float64)

    def guesses(self, batch: TaskBatch) -> dict[str, Tensor]:
        """``zero``, which products favour; ``last``: the last number; ``first``: the first number."""
        ids, mask = batch.prompts.ids, batch.prompts.mask
        number = mask & (ids >= SPECIAL.count) & (ids < SPECIAL.count + self.config.modulus)
        return {
            "zero": torch.full((len(batch), 1), SPECIAL.count),
            "last": ids.gather(1, mask.sum(1, keepdim=True) - 1),
            "first": ids.gather(1, number.long().argmax(1, keepdim=True)),
        }


def evaluate(symbols: Integers, modulus: int) -> tuple[Integers, np.ndarray]:
    """Values of the nodes of prefix expressions ``symbols [n, width]`` (residues, then operators by number from ``modulus`` on, -1
    padding on the right), at their places, and whether every division was by a unit."""
    n, width = symbols.shape
    inverse = np.full(modulus, -1)
    for a in range(modulus):
        for b in range(modulus):
            if a * b % modulus == 1 % modulus:
                inverse[a] = b
    rows = np.arange(n)
    stack, height = np.zeros((n, width + 2), dtype=np.int64), np.zeros(n, dtype=np.int64)
    values, valid = np.full_like(symbols, -1), np.ones(n, dtype=bool)
    for place in range(width - 1, -1, -1):
        symbol = symbols[:, place]
        inner = symbol >= modulus
        # the operand nearer to the operator is on top: it is the left one
        a, b = stack[rows, np.maximum(height - 1, 0)], stack[rows, np.maximum(height - 2, 0)]
        operator = symbol - modulus
        quotient = np.where(inner & (operator == 3), inverse[b], 1)
        valid &= quotient >= 0
        results = (a + b, a - b, a * b, a * quotient)
        value = np.where(inner, np.select([operator == k for k in range(4)], results, 0) % modulus, symbol)
        values[:, place] = value
        height = height + (symbol >= 0) - 2 * inner
        stack[rows, np.maximum(height - 1, 0)] = np.where(symbol >= 0, value, stack[rows, np.maximum(height - 1, 0)])
    return values, valid
