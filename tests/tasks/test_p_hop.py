"""p-hop induction: the definition by brute force, sequences, steps, shortcuts."""

import itertools

import numpy as np
import pytest
import torch

from latentcot.reasoner import SPECIAL
from latentcot.tasks import make_task
from latentcot.tasks.p_hop import next_places


def hops(sequence: list[int], p: int) -> list[int]:
    """Symbols reached after 1 ... p hops, straight from the definition with places counted from 1."""
    x = dict(enumerate(sequence, start=1))
    place, reached = len(sequence), []
    for _ in range(p):
        place = max(j for j in x if j < place and j - 1 in x and x[j - 1] == x[place])
        reached.append(x[place])
    return reached


@pytest.mark.parametrize("options", [{}, {"alphabet": 4, "length": 256, "max_difficulty": 32}, {"alphabet": 7}])
def test_answers_and_steps_are_the_definition(options):
    task = make_task("p_hop", **options)
    alphabet, length = task.config.alphabet, task.config.length  # pyright: ignore
    for example in task.iterate("train", 0, 150):
        sequence = [t - SPECIAL.count for t in example.prompt_ids[1 : 1 + length]]
        assert len(example.prompt_ids) == length + 3
        assert set(sequence) <= set(range(alphabet))
        assert all(a != b for a, b in itertools.pairwise(sequence))
        p = example.meta["difficulty"]
        assert task.vocabulary.decode(example.prompt_ids[-2:]) == ("<sep>", str(p))
        *steps, answer = hops(sequence, p)
        assert [s - SPECIAL.count for (s,) in example.steps] == steps
        assert example.answer_ids == (SPECIAL.count + answer,)


def test_one_hop_is_induction():
    assert hops([0, 1, 2, 0, 2, 1, 0], 1) == [2]
    assert next_places(np.array([[0, 1, 2, 0, 2, 1, 0]]), 3).tolist() == [[-1, -1, -1, 1, 3, 2, 4]]


def test_symbols_are_balanced_and_plain_induction_solves_one_hop_alone():
    task = make_task("p_hop")
    answers = task.batch("test", range(4000)).answer_ids[:, 0] - SPECIAL.count
    assert (torch.bincount(answers, minlength=4) / 4000 - 0.25).abs().max() < 0.02
    table = task.baselines_by_difficulty("test", 1000)
    assert table[1]["one_hop"] == 1.0
    assert max(table[d]["heuristic"] for d in (6, 8)) < 0.25 + 0.1


def test_renaming_symbols_does_not_make_another_object():
    task = make_task("p_hop")
    example = task.example("test", 0)
    renamed = tuple(
        SPECIAL.count + (t - SPECIAL.count + 1) % 4 if SPECIAL.count <= t < SPECIAL.count + 4 else t
        for t in example.prompt_ids
    )
    moved = type(example)(renamed, example.steps, example.answer_ids)
    assert renamed != example.prompt_ids
    assert task.canonical(moved) == task.canonical(example)
    assert task.split_of(moved) == "test"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphabet": 2}, "alphabet: expected an integer between 3"),
        ({"length": 2}, "length: expected an integer between 3"),
        ({"length": 10, "max_difficulty": 9}, "max_difficulty: expected an integer between 1 and 8"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("p_hop", **options)
