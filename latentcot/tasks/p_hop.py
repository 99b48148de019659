r"""p-hop induction: follow earlier occurrences p times (arXiv 2502.17416).

A sequence x of n symbols without equal neighbours. From place i, the hop goes to

.. math:: hop(i) = \max \{ j < i : x_{j-1} = x_i \},

the symbol behind the last earlier occurrence of the current one. The answer is :math:`x_{hop^p(n)}`. Equal neighbours would be fixed
points; sequences without p hops are drawn again.

Layout (d = p)::

    prompt   <bos> x_1 ... x_n <sep> p
    steps    the symbols reached after 1 ... p - 1 hops, one token each
    answer   the symbol reached after p hops

The prompt names p, so that one model can be asked for several; with a range of one value it is a constant.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentcot.reasoner import SPECIAL, TaskBatch, TaskLimits
from latentcot.tasks.base import Example, Latents, Rows, Task, TaskConfig, check_integer
from latentcot.tasks.counter import Draws, Integers, Words
from latentcot.tasks.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class PHopConfig(TaskConfig):
    """Options of :class:`PHopTask`; the difficulty is p.

    Args:
        alphabet: different symbols A, at least 3 (two that may not be neighbours leave one sequence); published 4.
        length: n; published 256. About A symbols lie between a place and its hop, so p hops want a length of some A p and more.
    """

    alphabet: int = 4
    length: int = 64
    max_difficulty: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("alphabet", self.alphabet, 3, 1024)
        check_integer("length", self.length, 3, 65_536)
        check_integer("max_difficulty", self.max_difficulty, self.min_difficulty, self.length - 2)


class PHopTask(Task):
    """p-hop induction; see the module for the layout."""

    name = "p_hop"
    config_type = PHopConfig
    config: PHopConfig

    @property
    def domain(self) -> str:
        return f"p_hop/{self.config.alphabet}/{self.config.length}"

    def _make_vocabulary(self) -> Vocabulary:
        symbols = [f"s{i}" for i in range(self.config.alphabet)]
        return Vocabulary([*symbols, *(str(p) for p in range(1, self.config.max_difficulty + 1))])

    def _make_limits(self) -> TaskLimits:
        c = self.config
        return TaskLimits(len(self.vocabulary), c.length + 3, c.max_difficulty - 1, 1, 1)

    def _draw(self, draws: Draws, lowest: int, highest: int) -> Latents:
        c, n = self.config, len(draws)
        p = lowest + draws.integers(1, highest - lowest + 1)[:, 0]
        # The first symbol is any, each later one differs from its neighbour by 1 ... A - 1.
        first, shifts = draws.integers(1, c.alphabet), 1 + draws.integers(c.length - 1, c.alphabet - 1)
        sequence = np.concatenate((first, shifts), axis=1).cumsum(axis=1) % c.alphabet
        hop = next_places(sequence, c.alphabet)
        place = np.full(n, c.length - 1)
        valid = np.ones(n, dtype=bool)
        reached = np.full((n, c.max_difficulty), -1)
        rows = np.arange(n)
        for step in range(highest):
            still = step < p
            new = hop[rows, place]
            valid &= ~still | (new >= 0)
            place = np.where(still & (new >= 0), new, place)
            reached[:, step] = np.where(still, sequence[rows, place], -1)
        return {"difficulty": p, "sequence": sequence, "reached": reached, "valid": valid}

    def _canonical_words(self, latents: Latents) -> tuple[Words, Integers]:
        words = renamed(latents["sequence"])
        return words.astype(np.uint64), np.full(len(words), words.shape[1])

    def _write(self, latents: Latents) -> Rows:
        c, p = self.config, latents["difficulty"]
        n, rows = len(p), np.arange(len(p))
        column = np.full((n, 1), SPECIAL.bos)
        asked = (SPECIAL.count + c.alphabet + p - 1)[:, None]
        prompt = np.concatenate(
            (column, SPECIAL.count + latents["sequence"], np.full_like(column, SPECIAL.sep), asked), axis=1
        )
        reached = np.where(latents["reached"] < 0, -1, SPECIAL.count + latents["reached"])
        answer = reached[rows, p - 1][:, None]
        steps = np.where(np.arange(c.max_difficulty - 1) < (p - 1)[:, None], reached[:, :-1], -1)
        return Rows(prompt=prompt, steps=steps[..., None], answer=answer)

    def _read(self, example: Example) -> tuple[list[int], int]:
        *sequence, _, asked = (token - SPECIAL.count for token in example.prompt_ids[1:])
        return sequence, asked - self.config.alphabet + 1

    def oracle(self, example: Example) -> tuple[int, ...]:
        """The definition, place by place."""
        sequence, p = self._read(example)
        place = len(sequence) - 1
        for _ in range(p):
            place = max(j for j in range(1, place) if sequence[j - 1] == sequence[place])
        return (SPECIAL.count + sequence[place],)

    def canonical(self, example: Example) -> tuple[int, ...]:
        """The sequence with its symbols renamed by first appearance; p does not count."""
        sequence, _ = self._read(example)
        return tuple(int(s) for s in renamed(np.array([sequence]))[0])

    def chance(self, batch: TaskBatch) -> Tensor:
        return torch.full((len(batch),), 1.0 / self.config.alphabet, dtype=torch.float64)

    def guesses(self, batch: TaskBatch) -> dict[str, Tensor]:
        """``last``: the last symbol; ``one_hop``: what plain induction finds; ``most_frequent``: of the sequence."""
        sequence = batch.prompts.ids[:, 1 : 1 + self.config.length].cpu() - SPECIAL.count
        counts = torch.nn.functional.one_hot(sequence, self.config.alphabet).sum(1)
        hop = torch.from_numpy(next_places(sequence.numpy(), self.config.alphabet))[:, -1:]
        found = {
            "last": sequence[:, -1:],
            "one_hop": sequence.gather(1, hop.clamp(min=0)),
            "most_frequent": counts.argmax(1, keepdim=True),
        }
        return {name: SPECIAL.count + symbols for name, symbols in found.items()}


def next_places(sequence: Integers, alphabet: int) -> Integers:
    """``hop`` of every place of ``sequence [n, length]``, counted from 0; -1 where there is none."""
    n, length = sequence.shape
    rows = np.arange(n)
    behind = np.full((n, alphabet), -1)  # the place behind the last occurrence of each symbol so far
    hop = np.empty_like(sequence)
    for place in range(length):
        hop[:, place] = behind[rows, sequence[:, place]]
        behind[rows, sequence[:, place]] = place + 1
    return hop


def renamed(sequence: Integers) -> Integers:
    """Symbols of each row of ``[n, length]`` numbered by first appearance."""
    first = (sequence[:, None, :] == np.arange(sequence.max() + 1)[:, None]).argmax(axis=2)
    absent = ~(sequence[:, None, :] == np.arange(sequence.max() + 1)[:, None]).any(axis=2)
    first = np.where(absent, sequence.shape[1], first)
    return np.take_along_axis(first.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable"), sequence, axis=1)
