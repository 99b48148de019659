"""Sudoku: one solution by an independent solver, symmetries, difficulty, splits, the look-up baseline."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from latentcot.reasoner import SPECIAL
from latentcot.tasks import SPLITS, make_task
from latentcot.tasks.sudoku import SudokuTask, all_small_grids, climb, grid_metrics, rename_to_fit
from latentcot.tasks.sudoku_rules import canonical_grid, count_solutions, dig, relabelled, rules, solve


def make(**options) -> SudokuTask:
    return make_task("sudoku", **options)  # pyright: ignore


def exact_covers(clues, size: int) -> list[dict[int, int]]:
    """All solutions by exact cover (Knuth's Algorithm X on sets), which shares nothing with the library's solver."""
    height, width = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size]
    options = {}
    for cell, clue in enumerate(clues):
        r, c = divmod(cell, size)
        box = (r // height, c // width)
        for digit in [clue] if clue else range(1, size + 1):
            options[cell, digit] = [("cell", cell), ("row", r, digit), ("column", c, digit), ("box", box, digit)]
    columns: dict = {}
    for option, constraints in options.items():
        for constraint in constraints:
            columns.setdefault(constraint, set()).add(option)
    found = []

    def search(open_columns: dict, chosen: list) -> None:
        if not open_columns:
            found.append(dict(chosen))
            return
        constraint = min(open_columns, key=lambda k: len(open_columns[k]))
        for option in list(open_columns[constraint]):
            covered = set(options[option])
            clash = {other for k in covered for other in open_columns[k]}
            search({k: v - clash for k, v in open_columns.items() if k not in covered}, [*chosen, option])

    search(columns, [])
    return found


@pytest.mark.parametrize(
    ("options", "n"),
    [
        ({"size": 4, "blanks": 12}, 40),
        ({"size": 6}, 25),
        ({"size": 9, "blanks": 52}, 8),
        ({"size": 9, "blanks": 50, "climb": 5}, 3),
    ],
    ids=["4", "6", "9", "9 climbed"],
)
def test_there_is_exactly_one_solution_by_an_independent_solver(options, n):
    task = make(**options)
    for example in task.iterate("train", 0, n):
        clues = task.clues(example)
        assert clues.count(0) == task.config.most_blanks
        (cover,) = exact_covers(clues, task.config.size)
        assert example.answer_ids == tuple(SPECIAL.count + cover[cell] for cell in range(len(clues)))
        assert task.oracle(example) == example.answer_ids
        assert task.verify(example, example.answer_ids)
        assert not task.verify(example, example.answer_ids[::-1][:-1])


def test_counting_finds_every_solution():
    assert count_solutions([0] * 16, 4, limit=1000) == len(all_small_grids()) == 288
    assert count_solutions([0] * 16, 4) == 2
    clues = list(all_small_grids()[0])
    clues[:6] = [0] * 6
    assert count_solutions(clues, 4, 99) == len(exact_covers(clues, 4))
    clues[0], clues[1] = 1, 1
    assert count_solutions(clues, 4) == 0
    assert solve(clues, 4)[0] is None


def test_classes_of_small_grids():
    """12 up to relabelling and 2 up to all symmetries."""
    assert len({relabelled(grid) for grid in all_small_grids()}) == 12
    assert len({canonical_grid(grid, 4) for grid in all_small_grids()}) == 2


@pytest.mark.parametrize("size", [4, 6, 9])
def test_canonical_form_is_that_of_every_symmetric_grid(size):
    game, random = rules(size), np.random.default_rng(0)
    examples = make(size=size, blanks=size).grids("train", range(4)).targets.numpy() - 1
    for grid in examples:
        form = canonical_grid(grid.tolist(), size)
        square = grid.reshape(size, size)
        for _ in range(6):
            image = square[random.choice(game.row_orders)][:, random.choice(game.column_orders)]
            image = (random.permutation(size) + 1)[image - 1]
            if game.square_boxes and random.random() < 0.5:
                image = image.T
            assert canonical_grid(image.ravel().tolist(), size) == form
        assert canonical_grid(form, size) == form
        assert form[:size] == tuple(range(1, size + 1))
        assert form <= relabelled(grid.tolist())


def test_digging_stops_at_minimal_puzzles():
    grid, order = all_small_grids()[5], list(range(16))
    assert dig(grid, order, 13, 4) is None  # three clues never do
    puzzle = dig(grid, order, 8, 4)
    assert puzzle is not None
    assert sum(d > 0 for d in puzzle) == 8


def test_difficulty_is_the_class_of_guesses():
    task = make(size=9, blanks=54)
    batch = task.grids("train", range(40))
    assert set(batch.difficulty.tolist()) >= {1, 2}
    for puzzle, target, d in zip(batch.inputs - 1, batch.targets - 1, batch.difficulty.tolist(), strict=True):
        solution, guesses = solve(puzzle.tolist(), 9)
        assert solution == tuple(target.tolist())
        assert d == (1 if guesses == 0 else 2 if guesses <= 5 else 3 if guesses <= 20 else 4)
    assert task.grids("train", [0, 1], difficulty=2).difficulty.tolist() == [2, 2]


def test_climbing_makes_puzzles_harder():
    batch, random = make(size=9, blanks=52).grids("train", range(8)), np.random.default_rng(0)
    before, after = [], []
    for clues, target in zip((batch.inputs - 1).tolist(), (batch.targets - 1).tolist(), strict=True):
        before.append(solve(clues, 9)[1])
        harder, guesses = climb(
            tuple(clues), tuple(target), before[-1], random.integers(2**31, size=(30, 2)).tolist(), 9
        )
        after.append(guesses)
        assert solve(harder, 9) == (tuple(target), guesses)
        assert count_solutions(harder, 9) == 1
        assert harder.count(0) == 52
    assert all(h >= e for e, h in zip(before, after, strict=True))
    assert sum(after) > sum(before)


def test_small_grids_split_into_eight_classes_and_four():
    task = make()
    held = {
        split: {relabelled((row - 1).tolist()) for row in task.grids(split, range(300)).targets} for split in SPLITS
    }
    assert held["train"] == held["val"] == task.training_classes
    assert len(held["train"]) == 8
    assert len(held["test"]) == 4
    assert not held["train"] & held["test"]
    patterns = {split: {task.canonical(e) for e in task.iterate(split, 0, 300)} for split in SPLITS}
    assert not patterns["train"] & patterns["val"]
    assert make(data_seed=1).training_classes != task.training_classes


@pytest.mark.parametrize(
    "options",
    [{}, {"size": 6}, {"size": 9}, {"split_by": "pattern", "blanks": 12}, {"size": 6, "split_by": "pattern"}],
    ids=str,
)
def test_splits_hold_different_objects_and_augmentation_stays_inside(options):
    task = make(**options)
    n = 8 if options.get("size") == 9 else 60
    held = {}
    generator = torch.Generator().manual_seed(0)
    for split in SPLITS:
        examples = list(task.iterate(split, 0, n))
        assert all(task.split_of(e) == split for e in examples)
        held[split] = {task.canonical(e) for e in examples}
        batch = task.grids(split, range(n))
        image = task.augment(batch, generator)
        assert not torch.equal(image.inputs, batch.inputs)
        assert torch.equal(image.inputs == 1, image.inputs != image.targets)
        assert (grid_metrics(image.inputs, image.targets, image.targets, task.config.size)["violations"] == 0).all()
        for example, row in zip(examples, image.inputs.tolist(), strict=True):
            moved = replace(example, prompt_ids=(SPECIAL.bos, *(SPECIAL.count + i - 1 for i in row)))
            assert task.split_of(moved) == split
    assert not held["train"] & held["test"]
    assert not held["train"] & held["val"]
    assert not held["val"] & held["test"]


def test_lookup_solves_the_sanity_split_and_nothing_of_the_other():
    sanity = make(split_by="pattern", blanks=12).baselines("test", 60)
    assert sanity["lookup"] == 1.0
    assert sanity.heuristic_name == "lookup"
    other = make(blanks=12).baselines("test", 60)
    assert other["lookup"] == 0.0
    assert other["chance"] == pytest.approx(4.0**-12)


def test_renaming_fits_clues_or_says_no():
    grid = (1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1)
    clues = [4, 0, 2, 0, *[0] * 12]
    named = rename_to_fit(grid, clues, 4)
    assert named is not None
    assert named[:4] == (4, 1, 2, 3)
    assert rename_to_fit(grid, [1, 0, 0, 0, 0, 0, 2, *[0] * 9], 4) is None  # one digit, two names
    assert rename_to_fit(grid, [1, 1, *[0] * 14], 4) is None  # two digits, one name


def test_forms_share_their_examples():
    grid, blanks = make(size=6), make(size=6, form="blanks")
    a, b = grid.batch("test", range(30)), blanks.batch("test", range(30))
    assert torch.equal(a.prompts.ids, b.prompts.ids)
    blank = a.prompts.ids[:, 1:] == SPECIAL.count
    assert torch.equal(a.answer_ids[blank], b.answer_ids[b.answer_mask])
    assert b.answer_ids.shape[1] == blanks.limits.answer_tokens == 22
    assert a.steps.shape == (30, 0, 1)
    assert grid.score(a, a.answer_ids).all()
    dense = grid.grids("test", range(30))
    assert torch.equal(dense.inputs, a.prompts.ids[:, 1:] - SPECIAL.count + 1)
    assert torch.equal(dense.targets, a.answer_ids - SPECIAL.count + 1)


def test_blanks_are_drawn_from_a_range():
    counts = (make(fewest_blanks=6, blanks=10).grids("train", range(400)).inputs == 1).sum(1)
    share = torch.bincount(counts, minlength=11)[6:] / 400
    assert len(share) == 5
    assert (share - 0.2).abs().max() < 0.08


def test_batches_are_the_examples_one_by_one():
    task = make(size=6)
    batch = task.grids("val", [3, 0, 2**40])
    assert torch.equal(batch.inputs[1:2], task.grids("val", [0]).inputs)
    assert torch.equal(batch.inputs[2:], task.grids("val", [2**40]).inputs)


def test_metrics_of_a_grid_with_faults():
    batch = make().grids("train", range(3))
    output = batch.targets.clone()
    place = int((batch.inputs[1] == 1).nonzero()[0])
    output[1, place] = 2 + (output[1, place] - 1) % 4
    given = int((batch.inputs[2] != 1).nonzero()[0])
    output[2, given] = 2 + (output[2, given] - 1) % 4
    found = grid_metrics(batch.inputs, batch.targets, output, 4)
    assert found["exact"].tolist() == [True, False, False]
    assert found["violations"].tolist() == [0, 3, 3]  # one digit is missing from a row, a column and a box
    assert found["changed_clues"].tolist() == [0, 0, 1]
    assert found["blank_accuracy"].tolist() == pytest.approx([1.0, 0.9, 1.0])
    with pytest.raises(ValueError, match=r"outputs: expected shape \[3, 16\], got \[3, 15\]"):
        grid_metrics(batch.inputs, batch.targets, output[:, 1:], 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 5}, ValueError, "size: expected one of 4, 6, 9, got 5"),
        ({"size": "9"}, TypeError, "size: expected an integer"),
        ({"blanks": 14}, ValueError, "blanks: expected an integer between 1 and 13"),
        ({"blanks": 8, "fewest_blanks": 9}, ValueError, "fewest_blanks: expected an integer between 1 and 8"),
        ({"split_by": "row"}, ValueError, "split_by: expected 'grid' or 'pattern', got 'row'"),
        ({"form": "cells"}, ValueError, "form: expected 'grid' or 'blanks', got 'cells'"),
        ({"max_difficulty": 5}, ValueError, "max_difficulty: expected an integer between 1 and 4"),
        ({"climb": -1}, ValueError, "climb: expected an integer"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_a_level_without_objects_is_named():
    with pytest.raises(ValueError, match=r"no object of difficulty 4 in split 'test' .* after 1000 attempts"):
        make().grids("test", [0], difficulty=4)
    assert make().levels("test") == (1,)
