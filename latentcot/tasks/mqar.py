r"""Multi-query associative recall: pairs first, then each key is asked once (arXiv 2312.04927).

A sequence of T tokens over the ids :math:`0 \ldots M - 1` with n pairs:

* keys: n distinct ids of :math:`1 \ldots M/2 - 1`; values: n distinct ids of :math:`M/2 \ldots M - 1`;
* places 0 to 2n - 1 hold :math:`k_1 v_1 k_2 v_2 \ldots`; the rest is a grid of :math:`(T - 2n)/2` two-token slots;
* each key stands once more, in the first place of a slot of its own. Slots are drawn one after another without replacement, slot
  x (from 1) with probability :math:`\propto a x^{a - 1}`, a = 0.01: most queries come soon after the pairs;
* the target at a query is the key's value; no other place is scored. What is free holds ``filler``.

Two forms of the same example: :meth:`MQARTask.dense` gives these ids as they are, with a label at each query (how the task is
trained in the literature); the task contract writes ``<bos>`` and the T symbols as the prompt and the values in the order of the
queries as the answer. Two examples are the same problem when they hold the same pairs, wherever they are asked.

Shapes: ``B`` rows, ``T`` tokens, ``N`` pairs at most, ``G`` slots at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentcot.reasoner import SPECIAL, TaskBatch, TaskLimits
from latentcot.tasks.base import Example, Latents, Rows, Split, Task, TaskConfig, check_integer
from latentcot.tasks.counter import Draws, Integers, Words, scale_words
from latentcot.tasks.vocabulary import Vocabulary

Filler = Literal["no_keys", "random", "zero"]
IGNORED = -100  # label that no loss counts
_WEIGHT = 2**28  # of the first slot; integer weights, so that no rounding of a machine moves a draw
_NO_KEY = 2**40


@dataclass(frozen=True, kw_only=True)
class MQARConfig(TaskConfig):
    """Options of :class:`MQARTask`; the difficulty is the number of pairs.

    Args:
        length: T, even; at least four tokens a pair.
        vocabulary: M, even.
        power: a of the slots' distribution, above 0; small = queries close to the pairs.
        filler: what free places hold: ``no_keys``, uniform ids except this example's keys; ``random``, uniform ids, keys included (the
            published behaviour: a filler may then look like a query that is not scored); ``zero``, token 0 (the published figure).
    """

    min_difficulty: int = 4
    max_difficulty: int = 4
    length: int = 64
    vocabulary: int = 8192
    power: float = 0.01
    filler: Filler = "no_keys"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("length", self.length, 4, 2**20)
        check_integer("vocabulary", self.vocabulary, 4, 2**20)
        for name in ("length", "vocabulary"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name}: expected an even number, got {getattr(self, name)}")
        if 4 * self.max_difficulty > self.length:
            raise ValueError(
                f"length: {self.max_difficulty} pairs (max_difficulty) need at least {4 * self.max_difficulty} tokens, got {self.length}"
            )
        if self.max_difficulty > self.vocabulary // 2 - 1:
            raise ValueError(
                f"vocabulary: {self.vocabulary} ids hold {self.vocabulary // 2 - 1} keys, max_difficulty asks for {self.max_difficulty}"
            )
        if isinstance(self.power, bool) or not isinstance(self.power, int | float) or not 0 < self.power <= 1:
            raise ValueError(f"power: expected a number above 0 and at most 1, got {self.power!r}")
        if self.filler not in get_args(Filler):
            raise ValueError(f"filler: expected one of {', '.join(get_args(Filler))}, got {self.filler!r}")


@dataclass(frozen=True)
class DenseBatch:
    """``ids [B, T]`` and ``labels [B, T]``: the value at each query, -100 elsewhere; label i belongs to position i."""

    ids: Tensor
    labels: Tensor


class MQARTask(Task):
    """Multi-query associative recall; see the module for the rules and both forms."""

    name = "mqar"
    config_type = MQARConfig
    config: MQARConfig
    layout_options = ("filler",)

    @property
    def domain(self) -> str:
        return f"mqar/{self.config.vocabulary}"

    def _make_vocabulary(self) -> Vocabulary:
        half = self.config.vocabulary // 2
        keys = (f"k{i}" for i in range(1, half))
        return Vocabulary((".", *keys, *(f"v{i}" for i in range(half, self.config.vocabulary))))

    def _make_limits(self) -> TaskLimits:
        return TaskLimits(
            vocab_size=SPECIAL.count + self.config.vocabulary,
            prompt_tokens=1 + self.config.length,
            steps=0,
            step_tokens=1,
            answer_tokens=self.config.max_difficulty,
        )

    # Latents: ``key``, ``value``, ``slot`` [B, N], of which the first ``difficulty`` count, and ``filler`` [B, T]: words.

    def _draw(self, draws: Draws, lowest: int, highest: int) -> Latents:
        c = self.config
        half, most = c.vocabulary // 2, c.max_difficulty
        n = lowest + draws.integers(1, highest - lowest + 1)[:, 0]
        key, enough_keys = first_distinct(draws, n, most, half - 1)
        value, enough_values = first_distinct(draws, n, most, half)
        return {
            "difficulty": n,
            "valid": enough_keys & enough_values,
            "key": 1 + key,
            "value": half + value,
            "slot": self._slots(draws.words(most), n),
            "filler": draws.words(c.length),
        }

    def _slots(self, words: Words, n: Integers) -> Integers:
        """Slots drawn one after another, each with its share of what is left: ``[B, N]``."""
        c = self.config
        most = (c.length - 2) // 2
        weights = np.array([round(_WEIGHT * x ** (c.power - 1)) for x in range(1, most + 1)], dtype=np.int64)
        weights = np.maximum(weights, 1)
        left = np.where(np.arange(most) < ((c.length - 2 * n) // 2)[:, None], weights, 0)
        slot = np.zeros((len(n), words.shape[1]), dtype=np.int64)
        rows = np.arange(len(n))
        for j in range(words.shape[1]):
            sums = left.cumsum(axis=1)
            place = scale_words(words[:, j], np.maximum(sums[:, -1], 1))
            picked = np.minimum((sums <= place[:, None]).sum(axis=1), most - 1)
            slot[:, j] = picked
            left[rows, picked] = 0
        return slot

    def _canonical_words(self, latents: Latents) -> tuple[Words, Integers]:
        n, key, value = latents["difficulty"], latents["key"], latents["value"]
        order = np.argsort(np.where(np.arange(key.shape[1]) < n[:, None], key, _NO_KEY), axis=1, kind="stable")
        pairs = np.stack((np.take_along_axis(key, order, 1), np.take_along_axis(value, order, 1)), axis=-1)
        return pairs.reshape(len(n), -1).astype(np.uint64), 2 * n

    def _sequences(self, latents: Latents) -> tuple[Integers, Integers]:
        """``ids [B, T]`` and ``labels [B, T]`` as published."""
        n, key, value, slot = (latents[name] for name in ("difficulty", "key", "value", "slot"))
        ids = self._filled(latents)
        labels = np.full_like(ids, IGNORED)
        row, pair = np.nonzero(np.arange(key.shape[1]) < n[:, None])
        ids[row, 2 * pair] = key[row, pair]
        ids[row, 2 * pair + 1] = value[row, pair]
        asked = 2 * n[row] + 2 * slot[row, pair]
        ids[row, asked] = key[row, pair]
        labels[row, asked] = value[row, pair]
        return ids, labels

    def _filled(self, latents: Latents) -> Integers:
        c, words, n = self.config, latents["filler"], latents["difficulty"]
        if c.filler == "zero":
            return np.zeros(words.shape, dtype=np.int64)
        if c.filler == "random":
            return scale_words(words, c.vocabulary)
        number = scale_words(words, (c.vocabulary - n)[:, None])
        # The r-th id that is no key is r + (how many keys have at most r other ids below them).
        most = latents["key"].shape[1]
        keys = np.sort(np.where(np.arange(most) < n[:, None], latents["key"], _NO_KEY), axis=1) - np.arange(most)
        shift = _NO_KEY * 2 * np.arange(len(n))[:, None]
        below = np.searchsorted((keys + shift).ravel(), (number + shift).ravel(), side="right").reshape(number.shape)
        return number + below - most * np.arange(len(n))[:, None]

    def _write(self, latents: Latents) -> Rows:
        ids, labels = self._sequences(latents)
        most = latents["key"].shape[1]
        order = np.argsort(labels < 0, axis=1, kind="stable")[:, :most]
        answer = np.take_along_axis(labels, order, axis=1)
        start = np.full((len(ids), 1), SPECIAL.bos)
        return Rows(
            prompt=np.concatenate((start, SPECIAL.count + ids), axis=1),
            steps=np.full((len(ids), 0, 1), -1, dtype=np.int64),
            answer=np.where(answer < 0, -1, SPECIAL.count + answer),
        )

    def dense(
        self, split: Split, indices: Sequence[int] | Tensor | NDArray[np.int64], difficulty: int | None = None
    ) -> DenseBatch:
        """Examples ``indices`` of ``split`` in the published form: ids below M, no ``<bos>``, a label at every query."""
        if difficulty is not None:
            check_integer("difficulty", difficulty, self.config.min_difficulty, self.config.max_difficulty)
        latents = self._objects(split, self._check_request(split, indices, difficulty), difficulty)
        ids, labels = self._sequences(latents)
        return DenseBatch(torch.from_numpy(ids), torch.from_numpy(labels))

    def _pairs_and_queries(self, example: Example) -> tuple[dict[int, int], list[int]]:
        """Key -> value, and the keys asked, in order, read from the prompt: only its first 2n places hold pairs."""
        symbols = example.prompt_ids[1:]
        n = len(example.answer_ids)
        pairs = dict(zip(symbols[: 2 * n : 2], symbols[1 : 2 * n : 2], strict=True))
        asked: list[int] = []
        for symbol in symbols[2 * n :: 2]:
            if symbol in pairs and symbol not in asked:
                asked.append(symbol)
        return pairs, asked

    def oracle(self, example: Example) -> tuple[int, ...]:
        """Look every query up among the pairs. With ``filler="random"`` a filler on a query's place may pass for one, and the order of
        two answers may then be wrong; the other fillers admit no doubt."""
        pairs, asked = self._pairs_and_queries(example)
        return tuple(pairs[key] for key in asked)

    def canonical(self, example: Example) -> tuple[int, ...]:
        pairs, _ = self._pairs_and_queries(example)
        return tuple(symbol - SPECIAL.count for pair in sorted(pairs.items()) for symbol in pair)

    def chance(self, batch: TaskBatch) -> Tensor:
        """Every answer a value at random."""
        return (2.0 / self.config.vocabulary) ** batch.answer_mask.sum(1).double()

    def guesses(self, batch: TaskBatch) -> dict[str, Tensor]:
        """``last_value``: the last pair's value for every query; ``in_order``: values in the order of the pairs."""
        n = batch.answer_mask.sum(1, keepdim=True)
        column = torch.arange(batch.answer_ids.shape[1])[None]
        last = batch.prompts.ids.gather(1, 2 * n).expand(-1, column.shape[1])
        ordered = batch.prompts.ids.gather(1, (2 + 2 * column).expand(len(batch), -1))
        kept = {"last_value": last, "in_order": ordered}
        return {name: ids.masked_fill(~batch.answer_mask, SPECIAL.pad) for name, ids in kept.items()}


def first_distinct(draws: Draws, n: Integers, most: int, size: int) -> tuple[Integers, NDArray[np.bool_]]:
    """The first ``n [B]`` different ones of a row of uniform draws below ``size``: ``[B, most]``, and whether the row had so many.

    What a row gets depends on its own n alone, not on ``most``.
    """
    allowed = np.array([_candidates(pairs, size) for pairs in range(most + 1)])[n]
    numbers = draws.integers(_candidates(most, size), size)
    width = numbers.shape[1]
    order = np.argsort(numbers, axis=1, kind="stable")
    ordered = np.take_along_axis(numbers, order, axis=1)
    repeated = np.zeros(numbers.shape, dtype=bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    fresh = ~repeated & (np.arange(width) < allowed[:, None])
    place = np.argsort(~fresh, axis=1, kind="stable")[:, :most]
    return np.take_along_axis(numbers, place, axis=1), fresh.sum(axis=1) >= n


def _candidates(pairs: int, size: int) -> int:
    """Draws that nearly always hold ``pairs`` different ones of ``size``: twice the expected number, and some."""
    return int(2 * size * np.log(size / (size - pairs + (pairs == size)))) + 16


@dataclass(frozen=True)
class MQARSetting:
    """Sequences of ``length`` tokens with ``pairs`` pairs: ``train`` and ``test`` examples, and the published batch size."""

    length: int
    pairs: int
    train: int
    test: int
    batch_size: int = 256

    def task(self, **options: Any) -> MQARTask:
        """The task of this setting; ``options`` of :class:`MQARConfig` are passed on."""
        return MQARTask(MQARConfig(min_difficulty=self.pairs, max_difficulty=self.pairs, length=self.length, **options))


PROTOCOL_A = tuple(
    MQARSetting(length, pairs, 100_000, 3_000, batch)
    for length, pairs, batch in ((64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128))
)
"""The original figure: one setting a run, filler 0, best of four learning rates between 1e-4 and 1e-2."""

PROTOCOL_B_TRAIN = tuple(
    MQARSetting(length, pairs, count, 0)
    for length, pairs, count in (
        (64, 4, 100_000),
        (128, 8, 20_000),
        (256, 16, 20_000),
        (256, 32, 20_000),
        (256, 64, 20_000),
    )
)
PROTOCOL_B_TEST = tuple(
    MQARSetting(length, pairs, 0, 1_000)
    for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
)
"""Capacity: train on the mixture, test each setting, plot accuracy against state bytes."""
