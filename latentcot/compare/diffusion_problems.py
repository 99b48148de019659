"""What the diffusion study fills in: rows of tokens of which some are given, for grids and for text behind a prompt.

Every way of generating sees the same problem, laid out so that it can do it::

    whole    clues and blanks of the grid in their places                  masked diffusion of grids
    behind   the grid with its blanks, then the grid to be completed       autoregression and block diffusion of grids
    text     prompt <bot> steps <ans> answer <eos> <eos> ...               all of them; left-padded, the text has one length
    recall   k v k v ... k [v] k [v] ...                                   all of them; a value to fill in behind each key that is asked

In a grid only blanks are to be filled: clues stay, are never noised and cost no loss. ``behind`` repeats the clues in the second grid,
and they are written there as they are: whoever generates from left to right is given them too. ``recall`` is multi-query associative
recall as it is published, with the value where the next token after a query would stand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from latentcot.reasoner import SPECIAL, TaskBatch
from latentcot.recurrent_depth.recursive_solvers.sudoku_puzzles import look_up, pick, puzzle_sets
from latentcot.sequences import (
    answer,
    answer_after_marker,
    constant,
    join,
    prompt,
    steps,
    until_stop,
    written_step_tokens,
)
from latentcot.tasks import make_task
from latentcot.tasks.base import Split, Task
from latentcot.tasks.baselines import measure_baselines
from latentcot.tasks.mqar import IGNORED, DenseBatch, MQARConfig, MQARTask
from latentcot.tasks.sudoku import GridBatch, SudokuConfig, SudokuTask, grid_metrics

Layout = Literal["whole", "behind", "text", "recall"]


@dataclass(frozen=True)
class Canvas:
    """``ids [B, L]`` as they should read; ``maskable [B, L]``: what is to be filled in; ``real [B, L]``: no padding, ``None`` = all."""

    ids: Tensor
    maskable: Tensor
    real: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> "Canvas":
        real = None if self.real is None else self.real.to(device)
        return Canvas(self.ids.to(device), self.maskable.to(device), real)

    def rows(self, index: slice) -> "Canvas":
        return Canvas(self.ids[index], self.maskable[index], None if self.real is None else self.real[index])


class Problem(Protocol):
    """
    ``vocab_size``; ``length``: tokens of the longest layout; ``block``: tokens of a block of block diffusion; ``tests``: names of the
    test sets.
    """

    vocab_size: int
    length: int
    block: int

    @property
    def tests(self) -> tuple[str, ...]: ...

    def layout(self, whole: bool) -> Layout: ...

    def training(self, step: int, rows: int, seed: int, whole: bool) -> Canvas:
        """The batch of a training step; it depends on these numbers alone."""
        ...

    def test(self, name: str, whole: bool) -> Canvas: ...

    def score(self, name: str, filled: Tensor, whole: bool) -> dict[str, float]:
        """Shares of a test set: ``exact`` (solved) and what else the problem measures."""
        ...

    def baselines(self) -> dict[str, dict[str, float]]:
        """Test set -> name -> share solved without a model."""
        ...

    def describe(self) -> dict[str, Any]: ...


class SudokuProblem:
    """Puzzles with one solution. Training sees a fixed set of them, each time under a random symmetry that stays in its split
    (:meth:`~latentcot.tasks.sudoku.SudokuTask.augment`).

    Args:
        task: options of :class:`~latentcot.tasks.sudoku.SudokuConfig` of the training puzzles.
        puzzles, test: how many puzzles for training, and in each test set.
        test_blanks: a test set for each of these numbers of blanks; empty = one like the training puzzles.
        file: where the puzzles are kept; read when it holds them. ``None`` = nowhere.
        workers: processes that make them, see :func:`~latentcot.recurrent_depth.recursive_solvers.sudoku_puzzles.puzzle_sets`.
    """

    def __init__(
        self,
        task: Mapping[str, Any],
        puzzles: int = 4000,
        test: int = 1000,
        test_blanks: tuple[int, ...] = (),
        file: Path | None = None,
        workers: int | None = None,
        console: Console | None = None,
    ):
        self.task = SudokuTask(SudokuConfig(**task))
        size = self.task.config.size
        self.vocab_size, self.length, self.block = len(self.task.vocabulary), 2 * size**2, size
        self.counts = {"puzzles": puzzles, "test": test, "test_blanks": list(test_blanks)}
        wanted: dict[Split, int] = {"train": puzzles} if test_blanks else {"train": puzzles, "test": test}
        made = puzzle_sets(self.task, wanted, file, workers, console)
        self.train = made["train"]
        self.sets = {} if test_blanks else {f"{self.task.config.most_blanks} blanks": made["test"]}
        for blanks in test_blanks:
            other = SudokuTask(SudokuConfig(**{**task, "blanks": blanks, "fewest_blanks": None}))
            kept = None if file is None else file.with_name(f"{file.stem}-{blanks}{file.suffix}")
            self.sets[f"{blanks} blanks"] = puzzle_sets(other, {"test": test}, kept, workers, console)["test"]

    @property
    def tests(self) -> tuple[str, ...]:
        return tuple(self.sets)

    def layout(self, whole: bool) -> Layout:
        return "whole" if whole else "behind"

    def training(self, step: int, rows: int, seed: int, whole: bool) -> Canvas:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(self.train), (rows,), generator=generator)
        return grid_canvas(self.task.augment(pick(self.train, chosen), generator), whole)

    def test(self, name: str, whole: bool) -> Canvas:
        return grid_canvas(self.sets[name], whole)

    def score(self, name: str, filled: Tensor, whole: bool) -> dict[str, float]:
        batch = self.sets[name]
        grids = filled[:, -batch.inputs.shape[1] :].cpu() - (SPECIAL.count - 1)  # ids of a GridBatch
        figures = grid_metrics(batch.inputs, batch.targets, grids, self.task.config.size)
        found = {key: values.double().mean().item() for key, values in figures.items()}
        for d in sorted(set(batch.difficulty.tolist())):
            found[f"exact_d{d}"] = figures["exact"][batch.difficulty == d].double().mean().item()
        return found

    def baselines(self) -> dict[str, dict[str, float]]:
        size = self.task.config.size
        return {name: {"look-up": look_up(self.train, batch, size)} for name, batch in self.sets.items()}

    def describe(self) -> dict[str, Any]:
        return {"task": repr(self.task), **self.counts}


def grid_canvas(batch: GridBatch, whole: bool) -> Canvas:
    """A :class:`Canvas` of grids, in tokens of the task."""
    answers, puzzle, blank = batch.targets + (SPECIAL.count - 1), batch.inputs + (SPECIAL.count - 1), batch.inputs == 1
    if whole:
        return Canvas(answers, blank)
    return Canvas(torch.cat([puzzle, answers], 1), torch.cat([torch.zeros_like(blank), blank], 1))


class TextProblem:
    """A task whose steps and answer are written behind the prompt, filled up with ``<eos>`` to the length that the task's limits need.

    Args:
        name, options: of the task.
        examples: distinct training examples.
        test: test examples of each difficulty.
        block: tokens of a block of block diffusion.
    """

    def __init__(self, name: str, options: Mapping[str, Any], examples: int, test: int, block: int):
        self.task: Task = make_task(name, **options)
        limits = self.task.limits
        self.vocab_size, self.block = limits.vocab_size, block
        self.text = written_step_tokens(limits) + 1 + limits.answer_tokens + 1
        self.length = limits.prompt_tokens + 1 + self.text
        self.counts = {"examples": examples, "test": test}
        levels = self.task.levels("test")
        self.sets = {f"difficulty {d}": self.task.difficulty_batch("test", d, range(test)) for d in levels}

    @cached_property
    def _canvases(self) -> dict[str, Canvas]:
        return {name: self._canvas(batch) for name, batch in self.sets.items()}

    @property
    def tests(self) -> tuple[str, ...]:
        return tuple(self.sets)

    def layout(self, whole: bool) -> Layout:
        return "text"

    def training(self, step: int, rows: int, seed: int, whole: bool) -> Canvas:
        chosen = drawn_examples(self.counts["examples"], rows, step, seed)
        return self._canvas(self.task.batch("train", chosen))

    def test(self, name: str, whole: bool) -> Canvas:
        return self._canvases[name]

    def score(self, name: str, filled: Tensor, whole: bool) -> dict[str, float]:
        batch, text = self.sets[name], filled[:, -self.text :].cpu()
        ids = answer_after_marker(until_stop(text), self.task.limits)
        return {"exact": self.task.score(batch, ids).double().mean().item()}

    def baselines(self) -> dict[str, dict[str, float]]:
        return _baselines(self.task, self.tests, self.counts["test"])

    def describe(self) -> dict[str, Any]:
        return {"task": repr(self.task), **self.counts, "block": self.block}

    def _canvas(self, batch: TaskBatch) -> Canvas:
        text = join([steps(batch), constant(batch.answer_ids, SPECIAL.ans), answer(batch)])
        ids = F.pad(
            text.ids.masked_fill(~text.mask, SPECIAL.eos), (0, self.text - text.ids.shape[1]), value=SPECIAL.eos
        )
        before = join([prompt(batch.prompts), constant(batch.answer_ids, SPECIAL.bot)], side="left")
        new = torch.ones_like(ids, dtype=torch.bool)
        return Canvas(
            torch.cat([before.ids, ids], 1),
            torch.cat([torch.zeros_like(before.mask), new], 1),
            torch.cat([before.mask, new], 1),
        )


class RecallProblem:
    """Multi-query associative recall (:mod:`latentcot.tasks.mqar`) in its published form: pairs, then queries, and what stands behind a
    query is filled in.

    Args:
        options: of the task.
        examples: distinct training examples.
        test: test examples of each difficulty.
        block: tokens of a block of block diffusion.
    """

    def __init__(self, options: Mapping[str, Any], examples: int, test: int, block: int):
        self.task = MQARTask(MQARConfig(**options))
        self.vocab_size, self.length, self.block = self.task.limits.vocab_size, self.task.config.length, block
        self.counts = {"examples": examples, "test": test}
        self.sets = {
            f"difficulty {d}": recall_canvas(self.task.dense("test", range(test), d)) for d in self.task.levels("test")
        }

    @property
    def tests(self) -> tuple[str, ...]:
        return tuple(self.sets)

    def layout(self, whole: bool) -> Layout:
        return "recall"

    def training(self, step: int, rows: int, seed: int, whole: bool) -> Canvas:
        chosen = drawn_examples(self.counts["examples"], rows, step, seed)
        return recall_canvas(self.task.dense("train", chosen))

    def test(self, name: str, whole: bool) -> Canvas:
        return self.sets[name]

    def score(self, name: str, filled: Tensor, whole: bool) -> dict[str, float]:
        """``exact``: every query of a row right; ``queries``: share of all queries."""
        canvas = self.sets[name]
        right = (filled.cpu() == canvas.ids) | ~canvas.maskable
        return {
            "exact": right.all(1).double().mean().item(),
            "queries": right[canvas.maskable].double().mean().item(),
        }

    def baselines(self) -> dict[str, dict[str, float]]:
        return _baselines(self.task, self.tests, self.counts["test"])

    def describe(self) -> dict[str, Any]:
        return {"task": repr(self.task), **self.counts, "block": self.block}


def drawn_examples(count: int, rows: int, step: int, seed: int) -> Tensor:
    """Which of ``count`` training examples are the ``rows`` of a step, the same whenever it is asked for."""
    return torch.randint(count, (rows,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))


def recall_canvas(batch: DenseBatch) -> Canvas:
    """A :class:`Canvas` of recall, in tokens of the task: the value stands behind its query, in place of the filler there."""
    ids, asked = batch.ids + SPECIAL.count, batch.labels != IGNORED
    values = F.pad(batch.labels, (1, -1), value=IGNORED)  # a query is never the last token of a row: slots have two
    maskable = F.pad(asked, (1, -1), value=False)
    return Canvas(torch.where(maskable, values + SPECIAL.count, ids), maskable)


def _baselines(task: Task, tests: tuple[str, ...], count: int) -> dict[str, dict[str, float]]:
    """Chance and the best shortcut of each of the ``tests``, whose names end in their difficulty."""
    found = {}
    for name in tests:
        known = measure_baselines(task, "test", count, int(name.split()[-1]))
        found[name] = {"chance": known["chance"], known.heuristic_name: known["heuristic"]}
    return found
