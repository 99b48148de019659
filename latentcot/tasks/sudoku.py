r"""Sudoku of size 4, 6 and 9 with exactly one solution (anchors: arXiv 2506.21734, 2510.04871).

A full grid is drawn (4x4: one of all 288, uniformly; larger: backtracking over a random order of digits for each cell), then clues
are taken away in a random order as long as the solution stays the only one, until the wanted number of blanks is reached. An
order that ends at a minimal puzzle before is thrown away.

Difficulty d is the class of the guesses that a fixed solver needs (:func:`~latentcot.tasks.sudoku_rules.solve`)::

    d          1            2        3         4
    guesses    0 (singles)  1 - 5    6 - 20    more than 20

Layout, cells row by row, ``.`` a blank::

    prompt   <bos> c_1 ... c_N
    steps    none
    answer   all N digits                       form "grid"
             the digits of the blanks, in order    form "blanks"

Splits (``split_by``) say what a test puzzle may share with training:

========= ====== =====================================================================================================
split_by  size   an object
========= ====== =====================================================================================================
pattern   all    the puzzle up to relabelling: a *sanity* split, unseen clue patterns of grids that training may have seen
grid      6, 9   the solution up to all symmetries (49 classes of 6x6)
grid      4      the solution up to relabelling: 12 classes, 8 in ``train`` and ``val`` (which share them and differ in
                 clue patterns), the other 4 in ``test``
========= ====== =====================================================================================================

Under all symmetries the 4x4 grids form two classes only: nothing on 4x4 is a claim about reasoning. Augment with
:meth:`SudokuTask.augment`, which uses only symmetries that stay inside a split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import permutations
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentcot.reasoner import SPECIAL, TaskBatch, TaskLimits
from latentcot.tasks.base import SPLITS, Example, Latents, NoSuchObject, Rows, Split, Task, TaskConfig, check_integer
from latentcot.tasks.counter import Draws, Integers, Words, sequence_hash
from latentcot.tasks.sudoku_rules import (
    BOXES,
    Grid,
    canonical_grid,
    count_solutions,
    dig,
    random_grid,
    relabelled,
    rules,
    solve,
)
from latentcot.tasks.vocabulary import Vocabulary

_BLANK = SPECIAL.count  # the id of "."; digit d has id _BLANK + d
_GUESSES = (0, 5, 20)  # the most guesses of d = 1, 2, 3
_DEFAULT_BLANKS = {4: 10, 6: 22, 9: 50}
_TRAINING_CLASSES = 8
_SEEN_BY_LOOKUP = 1000


@dataclass(frozen=True, kw_only=True)
class SudokuConfig(TaskConfig):
    """Options of :class:`SudokuTask`; the difficulty is the class of guesses, 1 to 4.

    Args:
        size: 4, 6 or 9.
        blanks: cells without a clue; ``None`` = 10, 22, 50 by size. More than 12, 28, 58 are rare or impossible.
        fewest_blanks: draw the number of blanks evenly from here to ``blanks``; ``None`` = always ``blanks``.
        split_by: see the module.
        form: ``"grid"`` answers with all cells, ``"blanks"`` with the missing ones.
        climb: hill climbing towards harder puzzles: so many swaps of a clue and a blank are tried, and kept when the solution
            stays the only one and the guesses do not fall.
    """

    size: int = 4
    blanks: int | None = None
    fewest_blanks: int | None = None
    split_by: Literal["grid", "pattern"] = "grid"
    form: Literal["grid", "blanks"] = "grid"
    climb: int = 0
    max_difficulty: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("max_difficulty", self.max_difficulty, self.min_difficulty, len(_GUESSES) + 1)
        check_integer("size", self.size, 0)
        if self.size not in BOXES:
            raise ValueError(f"size: expected one of {', '.join(map(str, BOXES))}, got {self.size}")
        if self.blanks is not None:
            check_integer("blanks", self.blanks, 1, self.size**2 - self.size + 1)
        if self.fewest_blanks is not None:
            check_integer("fewest_blanks", self.fewest_blanks, 1, self.most_blanks)
        for name, known in (("split_by", ("grid", "pattern")), ("form", ("grid", "blanks"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected {known[0]!r} or {known[1]!r}, got {getattr(self, name)!r}")
        check_integer("climb", self.climb, 0, 10_000)

    @property
    def most_blanks(self) -> int:
        return _DEFAULT_BLANKS[self.size] if self.blanks is None else self.blanks


@dataclass(frozen=True)
class GridBatch:
    """The equal-length form for models that are not causal: ``inputs [B, N]``, ``targets [B, N]`` with ids 0 pad, 1 blank,
    1 + digit; ``difficulty [B]``, ``index [B]``. The vocabulary has size + 2 ids."""

    inputs: Tensor
    targets: Tensor
    difficulty: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


@cache
def all_small_grids() -> tuple[Grid, ...]:
    """The 288 grids of size 4, in ascending order."""
    game, grids = rules(4), [()]
    for first in range(0, 16, 4):
        units = [tuple(cell for cell in unit if cell < first + 4) for unit in game.units]
        longer = (grid + row for grid in grids for row in permutations(range(1, 5)))
        grids = [g for g in longer if all(len({g[cell] for cell in unit}) == len(unit) for unit in units)]
    return tuple(grids)


class SudokuTask(Task):
    """Sudoku puzzles with one solution; see the module for layout, difficulty and splits."""

    name = "sudoku"
    config_type = SudokuConfig
    layout_options = ("form", "split_by")
    config: SudokuConfig

    @property
    def domain(self) -> str:
        return f"sudoku/{self.config.size}/{self.config.split_by}"

    def _make_vocabulary(self) -> Vocabulary:
        return Vocabulary([".", *map(str, range(1, self.config.size + 1))])

    def _make_limits(self) -> TaskLimits:
        cells = self.config.size**2
        answer = cells if self.config.form == "grid" else self.config.most_blanks
        return TaskLimits(len(self.vocabulary), prompt_tokens=1 + cells, steps=0, step_tokens=1, answer_tokens=answer)

    # -- drawing -----------------------------------------------------------------------------------------------

    def _grids(self, draws: Draws) -> Latents:
        """Full grids, and the random numbers for what follows; the costly digging is left out."""
        c, cells = self.config, self.config.size**2
        if c.size == 4:
            solutions = np.array(all_small_grids())[draws.integers(1, len(all_small_grids()))[:, 0]]
        else:
            words = draws.words(cells * c.size).reshape(len(draws), cells, c.size)
            preference = np.argsort(words, axis=2, kind="stable") + 1
            solutions = np.array([random_grid(order, c.size) for order in preference])
        order = draws.permutation(cells)
        fewest = c.most_blanks if c.fewest_blanks is None else c.fewest_blanks
        blanks = fewest + draws.integers(1, c.most_blanks - fewest + 1)[:, 0]
        swaps = draws.integers(2 * max(1, c.climb), 2**31).reshape(len(draws), -1, 2)
        return {"solution": solutions, "order": order, "blanks": blanks, "swaps": swaps}

    def _dig(self, grids: Latents, lowest: int, highest: int) -> Latents:
        """Puzzles of the grids, their difficulty, and whether the draw is of use."""
        n, size = len(grids["solution"]), self.config.size
        puzzles, level = np.zeros_like(grids["solution"]), np.zeros(n, dtype=np.int64)
        for row in range(n):
            solution = tuple(grids["solution"][row].tolist())
            puzzle = dig(solution, grids["order"][row].tolist(), int(grids["blanks"][row]), size)
            if puzzle is None:
                continue
            guesses = solve(puzzle, size)[1]
            if self.config.climb:
                puzzle, guesses = climb(puzzle, solution, guesses, grids["swaps"][row].tolist(), size)
            puzzles[row], level[row] = puzzle, 1 + sum(guesses > most for most in _GUESSES)
        valid = (level >= lowest) & (level <= highest)
        return {"solution": grids["solution"], "puzzle": puzzles, "difficulty": level, "valid": valid}

    def _draw(self, draws: Draws, lowest: int, highest: int) -> Latents:
        return self._dig(self._grids(draws), lowest, highest)

    def _objects(self, split: Split, index: Integers, difficulty: int | None) -> Latents:
        """As the base class, with grids of other splits dropped before their puzzles are dug."""
        lowest = self.config.min_difficulty if difficulty is None else difficulty
        highest = self.config.max_difficulty if difficulty is None else difficulty
        key, wanted = self._series_key(split, difficulty), SPLITS.index(split)
        found: Latents = {}
        pending = np.arange(len(index))
        for attempt in range(self.attempts):
            grids = self._grids(Draws(key, index[pending], np.full(len(pending), attempt)))
            kept = np.arange(len(pending))
            if self._grid_decides:
                kept = np.flatnonzero(self._membership(*self._grid_words(grids["solution"])) == wanted)
            latents = self._dig({name: array[kept] for name, array in grids.items()}, lowest, highest)
            fits = latents["valid"].copy()
            if not self._grid_decides and fits.any():
                rows = np.flatnonzero(fits)
                fits[rows] = self._places(latents["solution"][rows], latents["puzzle"][rows]) == wanted
            for name, array in latents.items():
                if name not in found:
                    found[name] = np.zeros((len(index), *array.shape[1:]), dtype=array.dtype)
                found[name][pending[kept[fits]]] = array[fits]
            pending = np.delete(pending, kept[fits])
            if not len(pending):
                return found
        level = f"difficulty {lowest}" if lowest == highest else f"difficulties {lowest} to {highest}"
        raise NoSuchObject(
            f"split: no object of {level} in split {split!r} of {self!r} after {self.attempts} attempts (example "
            f"{index[pending[0]]}): choose another difficulty, fewer blanks, or climb > 0 for harder puzzles"
        )

    # -- splits ------------------------------------------------------------------------------------------------

    @property
    def _grid_decides(self) -> bool:
        return self.config.split_by == "grid" and self.config.size > 4

    def _grid_words(self, solutions: Integers) -> tuple[Words, Integers]:
        return _as_words([canonical_grid(grid, self.config.size) for grid in solutions.tolist()])

    def _canonical_words(self, latents: Latents) -> tuple[Words, Integers]:
        if self._grid_decides:
            return self._grid_words(latents["solution"])
        return _as_words([relabelled(puzzle) for puzzle in latents["puzzle"].tolist()])

    def _places(self, solutions: Integers, puzzles: Integers) -> Integers:
        """Number of the split of each puzzle."""
        place = self._membership(*self._canonical_words({"solution": solutions, "puzzle": puzzles}))
        if self.config.size > 4 or self.config.split_by == "pattern":
            return place
        train, val, test = range(3)
        seen = np.array([relabelled(grid) in self.training_classes for grid in solutions.tolist()])
        return np.where(seen, np.where(place == val, val, train), test)

    @cached_property
    def training_classes(self) -> frozenset[Grid]:
        """4x4 by grid: the 8 classes up to relabelling that training puzzles come from, by their representatives."""
        classes = sorted({relabelled(grid) for grid in all_small_grids()})
        ranks = sequence_hash(self._membership_key, *_as_words(classes))
        return frozenset(classes[i] for i in np.argsort(ranks, kind="stable")[:_TRAINING_CLASSES])

    def split_of(self, example: Example) -> Split:
        puzzle = self.clues(example)
        solution, _ = solve(puzzle, self.config.size)
        if solution is None:
            raise ValueError("example: its prompt is no puzzle with a solution")
        return SPLITS[int(self._places(np.array([solution]), np.array([puzzle]))[0])]

    # -- writing and reading -----------------------------------------------------------------------------------

    def _write(self, latents: Latents) -> Rows:
        puzzle, answer = latents["puzzle"], _BLANK + latents["solution"]
        n = len(puzzle)
        if self.config.form == "blanks":
            order = np.argsort(puzzle > 0, axis=1, kind="stable")[:, : self.config.most_blanks]
            answer = np.take_along_axis(np.where(puzzle > 0, -1, answer), order, axis=1)
        start = np.full((n, 1), SPECIAL.bos)
        steps = np.full((n, 0, 1), -1, dtype=np.int64)
        return Rows(prompt=np.concatenate((start, _BLANK + puzzle), axis=1), steps=steps, answer=answer)

    def clues(self, example: Example) -> Grid:
        """The puzzle of the prompt: digits, 0 for a blank."""
        return tuple(token - _BLANK for token in example.prompt_ids[1:])

    def oracle(self, example: Example) -> tuple[int, ...]:
        """Singles and guesses, from the clues alone."""
        puzzle = self.clues(example)
        solution, _ = solve(puzzle, self.config.size)
        assert solution is not None, "a generated puzzle has a solution"
        kept = zip(puzzle, solution, strict=True)
        return tuple(_BLANK + digit for clue, digit in kept if self.config.form == "grid" or not clue)

    def canonical(self, example: Example) -> tuple[int, ...]:
        """The canonical solution where grids decide the split, the relabelled puzzle otherwise."""
        puzzle = self.clues(example)
        if not self._grid_decides:
            return relabelled(puzzle)
        solution, _ = solve(puzzle, self.config.size)
        assert solution is not None, "a generated puzzle has a solution"
        return canonical_grid(solution, self.config.size)

    def grids(
        self, split: Split, indices: Sequence[int] | Tensor | NDArray[np.int64], difficulty: int | None = None
    ) -> GridBatch:
        """Examples ``indices`` of ``split`` in the equal-length form, whatever ``form`` says."""
        if difficulty is not None:
            check_integer("difficulty", difficulty, self.config.min_difficulty, self.config.max_difficulty)
        index = self._check_request(split, indices, difficulty)
        latents = self._objects(split, index, difficulty)
        parts = (1 + latents["puzzle"], 1 + latents["solution"], latents["difficulty"], index)
        return GridBatch(*(torch.from_numpy(np.asarray(part, dtype=np.int64)) for part in parts))

    def augment(self, batch: GridBatch, generator: torch.Generator) -> GridBatch:
        """A random symmetric image of every puzzle that belongs to the same split: digits are always renamed; bands, stacks and
        lines move (and square grids turn over) only where ``split_by="grid"`` with size 6 or 9."""
        game, n = rules(self.config.size), len(batch)
        names = torch.rand(n, game.size, generator=generator).argsort(1) + 2
        names = torch.cat((torch.arange(2).expand(n, 2), names), 1)
        places = torch.arange(game.cells).expand(n, -1)
        if self._grid_decides:
            lines = torch.from_numpy(game.column_orders)
            rows = torch.from_numpy(game.row_orders)
            row = rows[torch.randint(len(rows), (n,), generator=generator)]
            column = lines[torch.randint(len(lines), (n,), generator=generator)]
            places = row[:, :, None] * game.size + column[:, None, :]
            turn = torch.rand(n, generator=generator) < (0.5 if game.square_boxes else 0.0)
            places = torch.where(turn[:, None, None], places.transpose(1, 2), places).flatten(1)
        moved = (names.gather(1, grid.gather(1, places)) for grid in (batch.inputs, batch.targets))
        return replace(batch, **dict(zip(("inputs", "targets"), moved, strict=True)))

    # -- baselines ---------------------------------------------------------------------------------------------

    def chance(self, batch: TaskBatch) -> Tensor:
        """Every blank a digit at random."""
        blanks = (batch.prompts.ids == _BLANK).sum(1)
        return (1.0 / self.config.size) ** blanks.double()

    def guesses(self, batch: TaskBatch) -> dict[str, Tensor]:
        """``lookup``: the first solution among the first 1000 training examples that fits the clues after renaming its digits; where
        none fits, the first of them."""
        seen = self._seen_grids()
        answers = []
        for prompt in batch.prompts.ids[:, 1:].tolist():
            clues = [token - _BLANK for token in prompt]
            fitting = (named for grid in seen if (named := rename_to_fit(grid, clues, self.config.size)) is not None)
            grid = next(fitting, seen[0])
            kept = [_BLANK + d for d, clue in zip(grid, clues, strict=True) if self.config.form == "grid" or not clue]
            answers.append(kept + [SPECIAL.pad] * (batch.answer_ids.shape[1] - len(kept)))
        return {"lookup": torch.tensor(answers)}

    def _seen_grids(self) -> list[Grid]:
        if not hasattr(self, "_seen"):
            solutions = self._objects("train", np.arange(_SEEN_BY_LOOKUP), None)["solution"]
            self._seen = sorted({relabelled(grid) for grid in solutions.tolist()})
        return self._seen


def _as_words(grids: Sequence[Grid]) -> tuple[Words, Integers]:
    words = np.array(grids, dtype=np.uint64)
    return words, np.full(len(words), words.shape[1])


def climb(puzzle: Grid, solution: Grid, guesses: int, swaps: Sequence[Sequence[int]], size: int) -> tuple[Grid, int]:
    """A puzzle of the same solution and number of clues that needs no fewer guesses, and how many it needs.

    Each swap (two numbers) makes a blank a clue and a clue a blank; it is kept when the solution stays the only one and the guesses do
    not fall.
    """
    for give, take in swaps:
        blank = [cell for cell, digit in enumerate(puzzle) if not digit]
        given = [cell for cell, digit in enumerate(puzzle) if digit]
        changed = list(puzzle)
        cell = blank[give % len(blank)]
        changed[cell], changed[given[take % len(given)]] = solution[cell], 0
        if count_solutions(changed, size) == 1:
            harder = solve(changed, size)[1]
            if harder >= guesses:
                puzzle, guesses = tuple(changed), harder
    return puzzle, guesses


def rename_to_fit(grid: Sequence[int], clues: Sequence[int], size: int) -> Grid | None:
    """``grid`` with digits renamed so that it agrees with all ``clues`` (0 = blank), or ``None``; digits without a clue take the free
    names in ascending order."""
    names: dict[int, int] = {}
    for digit, clue in zip(grid, clues, strict=True):
        if clue and names.setdefault(digit, clue) != clue:
            return None
    if len(set(names.values())) < len(names):
        return None
    free = iter(sorted(set(range(1, size + 1)) - set(names.values())))
    names |= {digit: next(free) for digit in range(1, size + 1) if digit not in names}
    return tuple(names[digit] for digit in grid)


def grid_metrics(inputs: Tensor, targets: Tensor, outputs: Tensor, size: int) -> dict[str, Tensor]:
    """What a filled grid gets right, row by row, ids as in :class:`GridBatch`, all ``[B, N]``.

    Returns:
        ``exact`` (bool), ``blank_accuracy`` (share of blanks filled rightly), ``violations`` (digits missing from rows, columns and
        boxes, summed) and ``changed_clues``, each ``[B]``.

    Raises:
        ValueError: for shapes that differ or are no grids of ``size``.
    """
    game = rules(size)
    for name, ids in (("inputs", inputs), ("targets", targets), ("outputs", outputs)):
        if ids.ndim != 2 or ids.shape[1] != game.cells or len(ids) != len(inputs):
            raise ValueError(f"{name}: expected shape [{len(inputs)}, {game.cells}], got {list(ids.shape)}")
    right, blank = outputs == targets, inputs == 1
    units = outputs[:, torch.tensor(game.units, device=outputs.device)]  # [B, units, n]
    held = (units[..., None] == torch.arange(2, size + 2, device=outputs.device)).any(2)
    return {
        "exact": right.all(1),
        "blank_accuracy": (right & blank).sum(1) / blank.sum(1).clamp(min=1),
        "violations": (~held).sum((1, 2)),
        "changed_clues": (~blank & (outputs != inputs)).sum(1),
    }
