"""Countdown: problems that can be solved, expressions that are checked, disjoint splits, honest chance."""

import random
from itertools import permutations, product

import pytest
import torch

from latentcot.reasoner import SPECIAL
from latentcot.tasks import SPLITS, make_task
from latentcot.tasks.countdown import OPERATIONS, CountdownTask, combine


def task(**options) -> CountdownTask:
    made = make_task("countdown", **options)
    assert isinstance(made, CountdownTask)
    return made


@pytest.fixture(scope="module")
def made() -> CountdownTask:
    return task(min_difficulty=2, max_difficulty=5)


def by_python(text: list[str]) -> float:
    """The value of a prefix expression by Python's own arithmetic."""
    symbol = text.pop(0)
    if symbol not in OPERATIONS:
        return int(symbol)
    a = by_python(text)
    b = by_python(text)
    return {"+": a + b, "−": a - b, "×": a * b, "÷": a / b}[symbol]


def test_steps_and_answer_reach_the_target(made):
    seen = set()
    for example in made.iterate("train", 0, 300):
        words = made.vocabulary.decode
        numbers, target = made.problem(example.prompt_ids)
        d = example.meta["difficulty"]
        seen.add(d)
        assert len(numbers) == d
        assert len(example.steps) == d - 1
        assert len(example.answer_ids) == 2 * d - 1
        pool = list(numbers)
        for step in example.steps:
            a, op, b, _, c = words(step)
            assert by_python([op, a, b]) == int(c)
            assert int(a) >= int(b)
            pool.remove(int(a))
            pool.remove(int(b))
            pool.append(int(c))
        assert pool == [target]
        assert by_python(list(words(example.answer_ids))) == target
        assert 1 <= target <= made.config.bound
    assert seen == {2, 3, 4, 5}


def test_oracle_and_answer_are_right_and_may_differ(made):
    examples = list(made.iterate("test", 0, 60))
    assert all(made.verify(e, made.oracle(e)) and made.verify(e, e.answer_ids) for e in examples)
    assert any(made.oracle(e) != e.answer_ids for e in examples)


def test_splits_hold_different_problems(made):
    held = {}
    for split in SPLITS:
        examples = list(made.iterate(split, 0, 200))
        assert all(made.split_of(example) == split for example in examples)
        held[split] = {made.canonical(example) for example in examples}
    assert not held["train"] & held["test"]
    assert not held["train"] & held["val"]


def test_order_of_the_numbers_does_not_change_the_problem():
    t = task()
    one, other = (t.vocabulary.encode(text) for text in ("<bos> 3 12 4 = 40", "<bos> 4 3 12 = 40"))
    example = t.example("train", 0)
    assert t.canonical(type(example)(one, (), ())) == t.canonical(type(example)(other, (), ())) == (40, 12, 4, 3)


@pytest.mark.parametrize(
    ("expression", "right"),
    [
        ("− × 12 4 8", True),
        ("− × 4 12 8", True),
        ("− 8 × 12 4", False),
        ("× 12 4", False),
        ("+ × 12 4 8", False),
        ("− × 12 4 8 8", False),
        ("−", False),
        ("= × 12 4 8", False),
        ("− × 12 4 4", False),
        ("", False),
    ],
)
def test_verify_reads_expressions(expression, right):
    t = task()
    example = type(t.example("train", 0))(t.vocabulary.encode("<bos> 12 8 4 = 40"), (), ())
    ids = t.vocabulary.encode(expression)
    assert t.verify(example, ids) is right
    assert t.verify(example, torch.tensor([*ids, SPECIAL.eos, 30])) is right


def test_parts_must_be_whole_numbers_within_the_bound():
    assert combine(3, 12, 5, 100) is None
    assert combine(3, 12, 4, 100) == 3
    assert combine(1, 4, 4, 100) is None
    assert combine(1, 4, 5, 100) is None
    assert combine(2, 20, 6, 100) is None
    t = task()
    for text, value in (("÷ 12 5", None), ("× 20 6", None), ("+ 20 6", (26, (6, 20)))):
        assert t.evaluate(t.vocabulary.encode(text)) == value


def test_chance_is_that_of_drawing_an_expression():
    t = task(min_difficulty=3, max_difficulty=3)
    batch = t.batch("test", range(20))
    for prompt, chance in zip(batch.prompts.ids.tolist(), t.chance(batch).tolist(), strict=True):
        numbers, target = t.problem(prompt)
        right = 0
        for c, a, b in {(c, *sorted(p)) for c, *p in permutations(range(3))}:  # which number is taken in last
            for one, two in product(range(4), repeat=2):
                x, y = numbers[a], numbers[b]
                first = combine(one, max(x, y), min(x, y), 100)
                if first is not None:
                    z = numbers[c]
                    right += combine(two, max(first, z), min(first, z), 100) == target
        assert chance == pytest.approx(right / 48)
        assert chance > 0


def test_score_is_verify_row_by_row(made):
    batch = made.batch("val", range(40))
    examples = list(made.iterate("val", 0, 40))
    draw = random.Random(0)
    ids = batch.answer_ids.clone()
    for row in range(0, 40, 2):
        ids[row, draw.randrange(ids.shape[1])] = draw.randrange(len(made.vocabulary))
    expected = [made.verify(example, ids[row]) for row, example in enumerate(examples)]
    assert made.score(batch, ids).tolist() == expected
    assert made.score(batch, batch.answer_ids).all()
    with pytest.raises(ValueError, match=r"ids: expected shape \[40, A\]"):
        made.score(batch, ids[:3])


def test_shortcuts_are_expressions_of_the_numbers(made):
    batch = made.batch("test", range(200))
    for name, ids in made.guesses(batch).items():
        right = made.score(batch, ids)
        assert 0 < float(right.double().mean()) < 0.9, name
        for prompt, row in zip(batch.prompts.ids.tolist(), ids.tolist(), strict=True):
            text = [t for t in row if t != SPECIAL.pad]
            assert len(text) == 2 * len(made.problem(prompt)[0]) - 1


def test_limits_hold(made):
    batch = made.batch("train", range(500))
    limits = batch.prompts.limits
    assert batch.prompts.ids.shape[1] == limits.prompt_tokens == 8
    assert batch.steps.shape[1:] == (limits.steps, limits.step_tokens)
    assert batch.answer_ids.shape[1] == limits.answer_tokens
    assert (batch.prompts.ids[:, 0] == SPECIAL.bos).all()
    example = made.example("train", 3)
    assert made.vocabulary.encode(made.vocabulary.render(example.prompt_ids)) == example.prompt_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_difficulty": 7}, "max_difficulty: expected an integer between 3 and 6, got 7"),
        ({"min_difficulty": 1}, "min_difficulty: expected an integer between 2 and 6, got 1"),
        ({"largest": 200}, "bound: expected an integer between 200 and 10000, got 100"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)
