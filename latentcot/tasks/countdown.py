r"""Countdown: reach a target with d numbers, each used once, and + − × ÷ (anchors: arXiv 2410.14157).

A problem is drawn forwards: of d numbers, two are taken out and combined by an operation that gives a whole number from 1 to ``bound``,
the result is put back, and so on until one is left, which is the target. The larger operand is always written first:

.. math:: a + b, \quad a - b, \quad a \times b, \quad a \div b \;(b \mid a), \qquad a \ge b, \; 1 \le \text{result} \le \text{bound}

Layout::

    prompt   <bos> 3 25 4 = 88          numbers in random order, then the target
    steps    25 − 3 = 22 | 22 × 4 = 88  five tokens a step; d - 1 steps
    answer   × − 25 3 4                 the expression in prefix notation, 2 d - 1 tokens

Most targets can be reached in several ways; :meth:`CountdownTask.verify` takes any expression of the numbers whose every part is a whole
number from 1 to ``bound``. Two prompts are the same problem when they have the same numbers, in any order, and the same target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from latentcot.reasoner import SPECIAL, TaskBatch, TaskLimits
from latentcot.tasks.base import Example, Latents, Rows, Task, TaskConfig, check_integer
from latentcot.tasks.counter import Draws, Integers, Words, scale_words
from latentcot.tasks.vocabulary import Vocabulary

OPERATIONS = ("+", "−", "×", "÷")
_PLUS, _MINUS, _TIMES, _OVER = range(4)
_MOST_NUMBERS = 6  # the search behind chance and oracle grows like d! · 4^d


@dataclass(frozen=True, kw_only=True)
class CountdownConfig(TaskConfig):
    """Options of :class:`CountdownTask`; the difficulty is how many numbers there are, 2 to 6.

    Args:
        largest: numbers are drawn from 1 to this.
        bound: largest result of a step, and so of the target.
    """

    min_difficulty: int = 3
    max_difficulty: int = 4
    largest: int = 20
    bound: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("min_difficulty", self.min_difficulty, 2, _MOST_NUMBERS)
        check_integer("max_difficulty", self.max_difficulty, self.min_difficulty, _MOST_NUMBERS)
        check_integer("largest", self.largest, 2, 1000)
        check_integer("bound", self.bound, self.largest, 10_000)


def combine(operation: int, a: int, b: int, bound: int) -> int | None:
    """``a ∘ b`` when it is a whole number from 1 to ``bound``, or ``None``."""
    if operation == _OVER:
        value = a // b if b and a % b == 0 else 0
    else:
        value = (a + b, a - b, a * b)[operation]
    return value if 1 <= value <= bound else None


class CountdownTask(Task):
    """Reach a target; see the module for rules and layout."""

    name = "countdown"
    config_type = CountdownConfig
    config: CountdownConfig

    @property
    def domain(self) -> str:
        return "countdown"

    def _make_vocabulary(self) -> Vocabulary:
        vocabulary = Vocabulary((*map(str, range(1, self.config.bound + 1)), *OPERATIONS, "="))
        self._zero = vocabulary.id("1") - 1  # number v has id _zero + v
        self._first_operation = vocabulary.id(OPERATIONS[0])
        self._equals = vocabulary.id("=")
        return vocabulary

    def _make_limits(self) -> TaskLimits:
        d = self.config.max_difficulty
        return TaskLimits(
            len(self.vocabulary), prompt_tokens=d + 3, steps=d - 1, step_tokens=5, answer_tokens=2 * d - 1
        )

    # Latents: item i < D is a number, item D + s the result of step s (D = max_difficulty); ``value [n, 2D - 1]``;
    # ``operation``, ``larger``, ``smaller [n, D - 1]``: of each step, operands by item.

    def _draw(self, draws: Draws, lowest: int, highest: int) -> Latents:
        c, n, most = self.config, len(draws), self.config.max_difficulty
        rows = np.arange(n)
        d = lowest + draws.integers(1, highest - lowest + 1)[:, 0]
        value = np.zeros((n, 2 * most - 1), dtype=np.int64)
        value[:, :most] = 1 + draws.integers(most, c.largest)
        value[:, :most] *= np.arange(most) < d[:, None]
        pool = np.tile(np.arange(most), (n, 1))  # items that are left, in front
        operation, larger, smaller = (np.zeros((n, most - 1), dtype=np.int64) for _ in range(3))
        valid = np.ones(n, dtype=bool)
        left = d.copy()
        for step in range(most - 1):
            words = draws.words(3)
            works = left > 1
            size = np.maximum(left, 2)
            first = scale_words(words[:, 0], size)
            second = scale_words(words[:, 1], size - 1)
            second += second >= first
            i, j = pool[rows, first], pool[rows, second]
            swap = value[rows, i] < value[rows, j]
            i, j = np.where(swap, j, i), np.where(swap, i, j)
            a, b = value[rows, i], value[rows, j]
            results = np.stack((a + b, a - b, a * b, np.where(a % np.maximum(b, 1) == 0, a // np.maximum(b, 1), 0)), 1)
            fits = (results >= 1) & (results <= c.bound)
            valid &= ~works | fits.any(1)
            wanted = scale_words(words[:, 2], np.maximum(fits.sum(1), 1))
            op = ((np.cumsum(fits, 1) > wanted[:, None]) & fits).argmax(1)
            operation[:, step], larger[:, step], smaller[:, step] = op, i, j
            value[:, most + step] = np.where(works, results[rows, op], 0)
            kept, gone, last = np.minimum(first, second), np.maximum(first, second), size - 1
            put = np.where(works)[0]
            pool[put, gone[put]] = pool[put, last[put]]
            pool[put, kept[put]] = most + step
            left = np.where(works, left - 1, left)
        return {
            "difficulty": d,
            "value": value,
            "operation": operation,
            "larger": larger,
            "smaller": smaller,
            "valid": valid,
        }

    def _target(self, latents: Latents) -> Integers:
        last = self.config.max_difficulty + latents["difficulty"] - 2  # the result of step d - 1
        return np.take_along_axis(latents["value"], last[:, None], 1)[:, 0]

    def _canonical_words(self, latents: Latents) -> tuple[Words, Integers]:
        most, d = self.config.max_difficulty, latents["difficulty"]
        numbers = latents["value"][:, :most]
        numbers = -np.sort(-numbers, axis=1)  # what is not there is 0 and goes last
        words = np.concatenate((self._target(latents)[:, None], numbers), axis=1)
        return words.astype(np.uint64), d + 1

    def _write(self, latents: Latents) -> Rows:
        most, d, value = self.config.max_difficulty, latents["difficulty"], latents["value"]
        n, operation = len(d), latents["operation"]
        there = np.arange(most) < d[:, None]
        numbers = np.where(there, self._zero + value[:, :most], -1)
        ending = np.stack((np.full(n, self._equals), self._zero + self._target(latents)), 1)
        prompt = np.full((n, most + 3), -1)
        prompt[:, 0] = SPECIAL.bos
        prompt[:, 1 : most + 1] = numbers
        rows = np.arange(n)
        prompt[rows, d + 1], prompt[rows, d + 2] = ending[:, 0], ending[:, 1]
        steps = np.empty((n, most - 1, 5), dtype=np.int64)
        steps[:, :, 0] = self._zero + np.take_along_axis(value, latents["larger"], 1)
        steps[:, :, 1] = self._first_operation + operation
        steps[:, :, 2] = self._zero + np.take_along_axis(value, latents["smaller"], 1)
        steps[:, :, 3] = self._equals
        steps[:, :, 4] = self._zero + value[:, most:]
        steps[np.arange(most - 1) >= (d - 1)[:, None]] = -1
        answer = np.full((n, 2 * most - 1), -1)
        for row in range(n):
            tokens = self._prefix(latents, row, most + int(d[row]) - 2)
            answer[row, : len(tokens)] = tokens
        return Rows(prompt=prompt, steps=steps, answer=answer)

    def _prefix(self, latents: Latents, row: int, item: int) -> list[int]:
        most = self.config.max_difficulty
        if item < most:
            return [self._zero + int(latents["value"][row, item])]
        step = item - most
        operands = [self._prefix(latents, row, int(latents[side][row, step])) for side in ("larger", "smaller")]
        return [self._first_operation + int(latents["operation"][row, step]), *operands[0], *operands[1]]

    # -- reading and solving -------------------------------------------------------------------------------------

    def problem(self, prompt_ids: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """``(numbers in the prompt's order, target)``."""
        end = list(prompt_ids).index(self._equals)
        return tuple(t - self._zero for t in prompt_ids[1:end]), prompt_ids[end + 1] - self._zero

    def evaluate(self, tokens: Sequence[int]) -> tuple[int, tuple[int, ...]] | None:
        """``(value, numbers used in ascending order)`` of an expression in prefix notation, or ``None`` when it is none, or a part of it is
        not a whole number from 1 to ``bound``."""
        stack: list[tuple[int, tuple[int, ...]]] = []
        for token in reversed(tokens):
            if self._zero < token <= self._zero + self.config.bound:
                stack.append((token - self._zero, (token - self._zero,)))
                continue
            operation = token - self._first_operation
            if not 0 <= operation < len(OPERATIONS) or len(stack) < 2:
                return None
            (a, one), (b, other) = stack.pop(), stack.pop()
            value = combine(operation, a, b, self.config.bound)
            if value is None:
                return None
            stack.append((value, one + other))
        return (stack[0][0], tuple(sorted(stack[0][1]))) if len(stack) == 1 else None

    def _solves(self, prompt_ids: Sequence[int], output: Sequence[int]) -> bool:
        given: list[int] = []
        for token in output:
            if token in (SPECIAL.eos, SPECIAL.pad):
                break
            given.append(token)
        numbers, target = self.problem(prompt_ids)
        return self.evaluate(given) == (target, tuple(sorted(numbers)))

    def verify(self, example: Example, output_ids: Sequence[int] | Tensor) -> bool:
        """Does ``output_ids`` reach the target with the numbers of the prompt? What follows the first ``<eos>`` or ``<pad>`` does not
        count."""
        output = output_ids.tolist() if isinstance(output_ids, Tensor) else [int(t) for t in output_ids]
        return self._solves(example.prompt_ids, output)

    def score(self, batch: TaskBatch, ids: Tensor) -> Tensor:
        if ids.ndim != 2 or ids.shape[0] != len(batch):
            raise ValueError(f"ids: expected shape [{len(batch)}, A], got {list(ids.shape)}")
        pairs = zip(batch.prompts.ids.tolist(), ids.tolist(), strict=True)
        return torch.tensor([self._solves(prompt, output) for prompt, output in pairs], device=ids.device)

    def _reachable(self, numbers: Sequence[int]) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Every value that all numbers together can make: how many expressions make it (larger operand first), and one of them."""
        full = (1 << len(numbers)) - 1
        made: list[dict[int, tuple[int, tuple[int, ...]]]] = [{} for _ in range(full + 1)]
        for subset in range(1, full + 1):
            if subset & (subset - 1) == 0:
                v = numbers[subset.bit_length() - 1]
                made[subset] = {v: (1, (self._zero + v,))}
                continue
            lowest, found = subset & -subset, made[subset]
            part = (subset - 1) & subset
            while part:
                if part & lowest:  # each way to halve the numbers once
                    for x, (ways_x, text_x) in made[part].items():
                        for y, (ways_y, text_y) in made[subset ^ part].items():
                            a, one, b, other = (x, text_x, y, text_y) if x >= y else (y, text_y, x, text_x)
                            for op in range(len(OPERATIONS)):
                                value = combine(op, a, b, self.config.bound)
                                if value is not None:
                                    ways, text = found.get(value, (0, ()))
                                    text = text or (self._first_operation + op, *one, *other)
                                    found[value] = (ways + ways_x * ways_y, text)
                part = (part - 1) & subset
        return made[full]

    def oracle(self, example: Example) -> tuple[int, ...]:
        """An expression found by search over all subsets of the numbers; the generator's may be another one."""
        numbers, target = self.problem(example.prompt_ids)
        return self._reachable(numbers)[target][1]

    def canonical(self, example: Example) -> tuple[int, ...]:
        """Target, then the numbers in descending order."""
        numbers, target = self.problem(example.prompt_ids)
        return (target, *sorted(numbers, reverse=True))

    # -- baselines -----------------------------------------------------------------------------------------------

    def chance(self, batch: TaskBatch) -> Tensor:
        """Share of the :math:`(2d - 3)!! \\cdot 4^{d-1}` expressions of the numbers (larger operand first) that reach the target."""
        shares = []
        for prompt in batch.prompts.ids.tolist():
            numbers, target = self.problem(prompt)
            every = prod(range(1, 2 * len(numbers) - 2, 2)) * len(OPERATIONS) ** (len(numbers) - 1)
            shares.append(self._reachable(numbers)[target][0] / every)
        return torch.tensor(shares, dtype=torch.float64)

    def guesses(self, batch: TaskBatch) -> dict[str, Tensor]:
        """``sum``: add all numbers; ``nearest``: start with the largest and take in the next largest, each time by the operation that
        comes nearest to the target."""
        width = batch.answer_ids.shape[1]
        sums, nearest = [], []
        for prompt in batch.prompts.ids.tolist():
            numbers, target = self.problem(prompt)
            ordered = sorted(numbers, reverse=True)
            for rows, ops in ((sums, [_PLUS] * (len(ordered) - 1)), (nearest, self._nearest(ordered, target))):
                text = [self._zero + ordered[0]]
                value = ordered[0]
                for op, number in zip(ops, ordered[1:], strict=True):
                    operands = (text, [self._zero + number]) if value >= number else ([self._zero + number], text)
                    text = [self._first_operation + op, *operands[0], *operands[1]]
                    value = combine(op, max(value, number), min(value, number), self.config.bound) or value
                rows.append(text + [SPECIAL.pad] * (width - len(text)))
        return {"sum": torch.tensor(sums), "nearest": torch.tensor(nearest)}

    def _nearest(self, ordered: Sequence[int], target: int) -> list[int]:
        value, chosen = ordered[0], []
        for number in ordered[1:]:
            results = [combine(op, max(value, number), min(value, number), self.config.bound) for op in range(4)]
            op = (
                min((abs(r - target), op) for op, r in enumerate(results) if r is not None)[1]
                if any(results)
                else _PLUS
            )
            chosen.append(op)
            value = results[op] or value
        return chosen
