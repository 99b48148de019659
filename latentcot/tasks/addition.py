r"""Addition: the digits of a sum.

Two numbers of d digits each in base b, the leading digit not 0 (but for d = 1). With digits :math:`x_i, y_i` of weight :math:`b^i` and
:math:`c_0 = 0`,

.. math::  s_i = (x_i + y_i + c_i) \bmod b, \qquad c_{i+1} = \lfloor (x_i + y_i + c_i) / b \rfloor, \qquad i = 0, \ldots, d - 1,

and a last carry :math:`c_d = 1` is one more digit of the sum, which has d digits otherwise.

Layout::

    prompt   <bos> 4 7 + 8 5
    steps    none, or with ``carries`` the carries c_1 ... c_d, one token each: 1 | 1
    answer   1 3 2, or with ``reverse`` 2 3 1

By default the answer is written as people write it, the greatest digit first. Carries run the other way, so that the first token depends
on every digit of the prompt; who writes in an order of its own may begin at the other end. ``reverse`` writes the least digit first, and
then a writer from left to right never needs more than two digits and the last carry. Two prompts are the same problem when they have the
same two numbers, in either order.

Shapes: ``n`` rows, ``D`` digits at most; column i of a number is its digit of weight :math:`b^i`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentcot.reasoner import SPECIAL, TaskBatch, TaskLimits
from latentcot.tasks.base import Example, Latents, Rows, Task, TaskConfig, check_integer, left_align
from latentcot.tasks.counter import Draws, Integers, Words, scale_words
from latentcot.tasks.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class AdditionConfig(TaskConfig):
    """Options of :class:`AdditionTask`; the difficulty is the number of digits.

    Args:
        base: b, the number of digits; a digit is one token.
        reverse: write the answer with its least digit first.
        carries: give the carries as steps, from the least digit on.
    """

    base: int = 10
    reverse: bool = False
    carries: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("base", self.base, 2, 1024)
        for name in ("reverse", "carries"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")


class AdditionTask(Task):
    """The sum of two numbers of d digits; see the module for the layout."""

    name = "addition"
    config_type = AdditionConfig
    config: AdditionConfig
    layout_options = ("reverse", "carries")

    @property
    def domain(self) -> str:
        return f"addition/{self.config.base}"

    def _make_vocabulary(self) -> Vocabulary:
        return Vocabulary([*map(str, range(self.config.base)), "+"])

    def _make_limits(self) -> TaskLimits:
        most = self.config.max_difficulty
        steps = most if self.config.carries else 0
        return TaskLimits(len(self.vocabulary), 2 * most + 2, steps, 1, most + 1)

    def _draw(self, draws: Draws, lowest: int, highest: int) -> Latents:
        base, most, n = self.config.base, self.config.max_difficulty, len(draws)
        d = lowest + draws.integers(1, highest - lowest + 1)[:, 0]
        first, leading = np.arange(n), (d > 1).astype(np.int64)
        numbers = []
        for _ in range(2):
            digits = draws.integers(most, base) * (np.arange(most) < d[:, None])
            digits[first, d - 1] = leading + scale_words(draws.words(1)[:, 0], base - leading)
            numbers.append(digits)
        return {"difficulty": d, "x": numbers[0], "y": numbers[1]}

    def _canonical_words(self, latents: Latents) -> tuple[Words, Integers]:
        """Digits of both numbers in turn, the greater number first, from the least digit on."""
        d, x, y = latents["difficulty"], latents["x"], latents["y"]
        highest = ((x != y) * np.arange(1, x.shape[1] + 1)).argmax(axis=1)  # where they differ; any column if nowhere
        rows = np.arange(len(d))
        swap = (x[rows, highest] < y[rows, highest])[:, None]
        pairs = np.stack((np.where(swap, y, x), np.where(swap, x, y)), axis=-1)
        return pairs.reshape(len(d), -1).astype(np.uint64), 2 * d

    def _write(self, latents: Latents) -> Rows:
        d, x, y = latents["difficulty"], latents["x"], latents["y"]
        n, most = x.shape
        total, carry = add_digits(x, y, self.config.base)
        length = d + np.take_along_axis(total, d[:, None], 1)[:, 0]  # column d holds the last carry
        plus = np.full((n, 1), self.config.base)
        prompt = left_align(np.concatenate((greatest_first(x, d), plus, greatest_first(y, d)), axis=1))
        prompt = np.concatenate((np.full((n, 1), SPECIAL.bos), np.where(prompt < 0, -1, SPECIAL.count + prompt)), 1)
        answer = self._ordered(total, length)
        steps = np.where(np.arange(most) < d[:, None], SPECIAL.count + carry, -1)[..., None]
        return Rows(
            prompt=prompt,
            steps=steps if self.config.carries else steps[:, :0],
            answer=np.where(answer < 0, -1, SPECIAL.count + answer),
        )

    def _ordered(self, digits: Integers, length: Integers) -> Integers:
        """The first ``length [n]`` columns of ``digits`` as an answer has them; the rest is -1."""
        if self.config.reverse:
            return np.where(np.arange(digits.shape[1]) < length[:, None], digits, -1)
        return greatest_first(digits, length)

    def _numbers(self, example: Example) -> tuple[list[int], list[int]]:
        """Digits of both numbers as the prompt has them."""
        digits = [token - SPECIAL.count for token in example.prompt_ids[1:]]
        middle = digits.index(self.config.base)
        return digits[:middle], digits[middle + 1 :]

    def oracle(self, example: Example) -> tuple[int, ...]:
        """Both numbers as Python's integers, and their sum by repeated division."""
        values = []
        for digits in self._numbers(example):
            value = 0
            for digit in digits:
                value = value * self.config.base + digit
            values.append(value)
        total, found = sum(values), []
        while total or not found:
            total, digit = divmod(total, self.config.base)
            found.append(SPECIAL.count + digit)
        return tuple(found if self.config.reverse else reversed(found))

    def canonical(self, example: Example) -> tuple[int, ...]:
        """The digits of both numbers in turn, the greater number first, from the least digit on."""
        greater, smaller = sorted(self._numbers(example), reverse=True)
        return tuple(digit for pair in zip(reversed(greater), reversed(smaller), strict=True) for digit in pair)

    def chance(self, batch: TaskBatch) -> Tensor:
        """One of the sums that two numbers of d digits can have: :math:`2 b^{d-1}` to :math:`2 (b^d - 1)`, and from 0 on for d = 1."""
        base, d = float(self.config.base), batch.difficulty.double()
        return 1 / torch.where(d > 1, 2 * (base - 1) * base ** (d - 1) - 1, 2 * base - 1)

    def guesses(self, batch: TaskBatch) -> dict[str, Tensor]:
        """``no_carry``: digits added one by one, modulo b; ``near_carry``: each with the carry that the two digits right of it make by
        themselves, which is wrong only where a carry runs through a place whose digits add up to b - 1."""
        base, d = self.config.base, batch.difficulty.cpu().numpy()
        numbers, rows = batch.prompts.ids.cpu().numpy() - SPECIAL.count, np.arange(len(batch))
        most = int(d.max())
        sums = np.zeros((len(batch), most + 1), dtype=np.int64)
        for i in range(most):  # digit i of both numbers stands i places left of where each of them ends
            x, y = numbers[rows, np.maximum(d - i, 0)], numbers[rows, np.maximum(2 * d + 1 - i, 0)]
            sums[:, i] = np.where(d > i, x + y, 0)
        carry = np.zeros_like(sums)
        carry[:, 1:] = sums[:, :-1] >= base
        near = (sums + carry) % base

        def as_ids(written: Integers) -> Tensor:
            return torch.from_numpy(np.where(written < 0, SPECIAL.pad, SPECIAL.count + written))

        return {
            "no_carry": as_ids(self._ordered(sums % base, d)),
            "near_carry": as_ids(self._ordered(near, d + near[rows, d])),
        }


def add_digits(x: Integers, y: Integers, base: int) -> tuple[Integers, Integers]:
    """The sum ``[n, D + 1]`` of numbers ``x, y [n, D]``, least digit first, and the carry ``[n, D]`` out of every column."""
    total = np.zeros((x.shape[0], x.shape[1] + 1), dtype=np.int64)
    carries = np.zeros_like(x)
    carry = np.zeros(len(x), dtype=np.int64)
    for i in range(x.shape[1]):
        column = x[:, i] + y[:, i] + carry
        total[:, i], carry = column % base, column // base
        carries[:, i] = carry
    total[:, -1] = carry
    return total, carries


def greatest_first(digits: Integers, length: Integers) -> Integers:
    """The first ``length [n]`` columns of ``digits [n, D]``, the last of them first; the rest is -1."""
    place = length[:, None] - 1 - np.arange(digits.shape[1])
    return np.where(place < 0, -1, np.take_along_axis(digits, np.maximum(place, 0), axis=1))
