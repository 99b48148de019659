"""Equation chains: every step follows from the prompt, exactly the needed operations appear, no distractor does."""

import itertools
import re

import pytest
import torch

from latentcot.tasks import make_task
from latentcot.tasks.chain import variable_names

COMPUTE = {"+": lambda a, b: a + b, "−": lambda a, b: a - b, "×": lambda a, b: a * b}


def parsed(task, example):
    *lines, question = task.vocabulary.render(example.prompt_ids[1:]).split(" ; ")
    return dict(line.split(" = ") for line in lines), question.removeprefix("? "), len(lines)


@pytest.mark.parametrize("options", [{}, {"modulus": 7, "distractors": 0}, {"max_difficulty": 16}], ids=str)
def test_steps_evaluate_what_is_needed_in_order(options):
    task = make_task("chain", **options)
    m = task.config.modulus  # pyright: ignore
    for example in task.iterate("train", 0, 300):
        sides, asked, lines = parsed(task, example)
        d = example.meta["difficulty"]
        assert len(sides) == lines == d + 1 + task.config.distractors  # pyright: ignore
        known = {name: int(side) for name, side in sides.items() if side.isdigit()}
        assert len(known) == 1
        done = []
        for step in example.steps:
            name, equals, value = task.vocabulary.decode(step)
            left, operation, right = sides[name].split()
            a, b = (known[s] if s in known else int(s) for s in (left, right))  # raises when a step comes too early
            assert equals == "="
            assert int(value) == COMPUTE[operation](a, b) % m
            known[name] = int(value)
            done.append(name)
        assert len(done) == d
        assert done[-1] == asked
        assert task.vocabulary.decode(example.answer_ids) == (str(known[asked]),)
        # Every step is needed: each variable but the last appears in the next equation.
        for name, following in itertools.pairwise(done):
            assert name in sides[following].split()


def test_lines_and_options_are_shuffled():
    task = make_task("chain", min_difficulty=6, max_difficulty=6)
    places = []
    for example in task.iterate("train", 0, 2000):
        sides, _, _ = parsed(task, example)
        places.append([side.isdigit() for side in sides.values()].index(True))
    counts = torch.bincount(torch.tensor(places), minlength=9) / 2000
    assert (counts - 1 / 9).abs().max() < 0.03


@pytest.mark.parametrize("modulus", [7, 23])
def test_answers_are_balanced(modulus):
    task = make_task("chain", modulus=modulus)
    answers = task.batch("train", range(10000)).answer_ids[:, 0]
    share = torch.bincount(answers - task.vocabulary.id("0"), minlength=modulus) / 10000
    assert (share - 1 / modulus).abs().max() < 0.02


def test_shortcuts_stay_near_chance():
    found = make_task("chain").baselines("test", 3000)
    assert found["heuristic"] < found["chance"] + 0.05


def test_canonical_form_sees_through_presentation():
    task = make_task("chain", distractors=1)
    encode = task.vocabulary.encode
    original = task.example("train", 0)

    def form(text: str):
        return task.canonical(type(original)(encode(text), (), ()))

    base = form("<bos> a = 5 ; b = a + 3 ; c = b × a ; z = c − b ; ? c")
    assert (
        form("<bos> c = a × b ; b = 3 + a ; z = a + a ; a = 5 ; ? c") == base
    )  # order of lines and operands, distractor
    assert form("<bos> p = 5 ; q = p + 3 ; r = q × p ; a = r − 1 ; ? r") == base  # names
    assert form("<bos> a = 5 ; b = a + 3 ; c = b − a ; z = c − b ; ? c") != base
    assert form("<bos> a = 5 ; b = a − 3 ; c = b − a ; z = c − b ; ? c") != form(
        "<bos> a = 5 ; b = a − 3 ; c = a − b ; z = c − b ; ? c"
    )


def test_variable_names_are_distinct_and_no_numbers():
    names = variable_names(26 * 26)
    assert len(set(names)) == 26 * 26
    assert all(re.fullmatch(r"[a-z]\d*", name) for name in names)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"variables": 5},
            ValueError,
            "variables: 5 names are too few for max_difficulty 8 and 2 distractors, which use 11",
        ),
        ({"modulus": 1}, ValueError, "modulus: expected an integer between 2 and 1000, got 1"),
        ({"modulus": "23"}, TypeError, "modulus: expected an integer, got '23'"),
        ({"distractors": -1}, ValueError, "distractors: expected an integer between 0"),
    ],
    ids=["names", "modulus", "text", "negative"],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make_task("chain", **options)
