r"""Copying: say a sequence again.

d symbols, each any of an alphabet of A, and the same symbols once more as the answer: the least that a memory must do. What is hard about
it is d, not the rule: a state of fixed size must hold :math:`d \log_2 A` bits, attention only has to find its place.

Layout::

    prompt   <bos> s3 s0 s3 s7
    steps    none
    answer   s3 s0 s3 s7

The sequence is the object: two examples are the same problem when they have the same symbols in the same order.
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
class CopyConfig(TaskConfig):
    """Options of :class:`CopyTask`; the difficulty is the length of the sequence.

    Args:
        alphabet: different symbols A.
    """

    min_difficulty: int = 4
    max_difficulty: int = 16
    alphabet: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("alphabet", self.alphabet, 2, 65_536)


class CopyTask(Task):
    """Repeat a sequence; see the module for the layout."""

    name = "copy"
    config_type = CopyConfig
    config: CopyConfig

    @property
    def domain(self) -> str:
        return f"copy/{self.config.alphabet}"

    def _make_vocabulary(self) -> Vocabulary:
        return Vocabulary([f"s{i}" for i in range(self.config.alphabet)])

    def _make_limits(self) -> TaskLimits:
        most = self.config.max_difficulty
        return TaskLimits(len(self.vocabulary), most + 1, 0, 1, most)

    def _draw(self, draws: Draws, lowest: int, highest: int) -> Latents:
        d = lowest + draws.integers(1, highest - lowest + 1)[:, 0]
        return {"difficulty": d, "symbol": draws.integers(self.config.max_difficulty, self.config.alphabet)}

    def _canonical_words(self, latents: Latents) -> tuple[Words, Integers]:
        return latents["symbol"].astype(np.uint64), latents["difficulty"]

    def _write(self, latents: Latents) -> Rows:
        symbol, d = latents["symbol"], latents["difficulty"]
        n, most = symbol.shape
        written = np.where(np.arange(most) < d[:, None], SPECIAL.count + symbol, -1)
        return Rows(
            prompt=np.concatenate((np.full((n, 1), SPECIAL.bos), written), axis=1),
            steps=np.full((n, 0, 1), -1, dtype=np.int64),
            answer=written,
        )

    def oracle(self, example: Example) -> tuple[int, ...]:
        """The prompt without its ``<bos>``."""
        return example.prompt_ids[1:]

    def canonical(self, example: Example) -> tuple[int, ...]:
        """The sequence itself."""
        return tuple(token - SPECIAL.count for token in example.prompt_ids[1:])

    def chance(self, batch: TaskBatch) -> Tensor:
        """Every symbol at random, the length known."""
        return float(self.config.alphabet) ** -batch.difficulty.double()

    def guesses(self, batch: TaskBatch) -> dict[str, Tensor]:
        """``backwards``: the sequence from its end on, right for palindromes; ``first``, ``last``: one symbol throughout."""
        symbols, mask = batch.prompts.ids[:, 1:], batch.prompts.mask[:, 1:]
        d = mask.sum(1, keepdim=True)
        place = (d - 1 - torch.arange(symbols.shape[1], device=symbols.device)).clamp(min=0)
        found = {
            "backwards": symbols.gather(1, place),
            "first": symbols[:, :1].expand_as(symbols),
            "last": symbols.gather(1, d - 1).expand_as(symbols),
        }
        return {name: ids.masked_fill(~mask, SPECIAL.pad) for name, ids in found.items()}
