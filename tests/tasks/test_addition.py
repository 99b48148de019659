"""Addition: sums by Python's integers, layouts, carries, uniform numbers, what the shortcuts miss."""

import numpy as np
import pytest
import torch

from latentcot.reasoner import SPECIAL
from latentcot.tasks import make_task
from latentcot.tasks.addition import AdditionTask


def task(**options) -> AdditionTask:
    made = make_task("addition", **options)
    assert isinstance(made, AdditionTask)
    return made


def number(names: tuple[str, ...], base: int) -> int:
    """The value of digits, the greatest first."""
    return sum(int(name) * base**i for i, name in enumerate(reversed(names)))


@pytest.mark.parametrize(
    "options",
    [{}, {"base": 2, "min_difficulty": 3, "max_difficulty": 12}, {"base": 60}, {"reverse": True}, {"carries": True}],
    ids=str,
)
def test_answers_and_carries_are_those_of_integers(options):
    made = task(**options)
    base, words = made.config.base, made.vocabulary.decode
    for example in made.iterate("train", 0, 200):
        d, names = example.meta["difficulty"], words(example.prompt_ids)
        assert names[0] == "<bos>"
        assert names[d + 1] == "+"
        x, y = names[1 : d + 1], names[d + 2 :]
        assert len(x) == len(y) == d
        assert d == 1 or "0" not in (x[0], y[0])
        total = number(x, base) + number(y, base)
        answer = words(example.answer_ids)
        assert number(answer[::-1] if options.get("reverse") else answer, base) == total
        assert len(answer) == (1 if total < base else d + (total >= base**d))
        carries = [(number(x[d - i :], base) + number(y[d - i :], base)) // base**i for i in range(1, d + 1)]
        assert [words(step) for step in example.steps] == [(str(c),) for c in carries if options.get("carries")]


def test_the_order_of_the_answer_and_the_carries_are_a_matter_of_layout():
    plain, reverse = task(), task(reverse=True, carries=True)
    for one, other in zip(plain.iterate("test", 0, 100), reverse.iterate("test", 0, 100), strict=True):
        assert one.prompt_ids == other.prompt_ids
        assert one.answer_ids == other.answer_ids[::-1]
        assert one.steps == ()


def test_the_order_of_the_numbers_does_not_make_another_object():
    made = task(min_difficulty=3, max_difficulty=3)
    for split in ("train", "test"):
        for example in made.iterate(split, 0, 50):
            bos, *digits = example.prompt_ids
            swapped = type(example)((bos, *digits[4:], digits[3], *digits[:3]), example.steps, example.answer_ids)
            assert made.canonical(swapped) == made.canonical(example)
            assert made.split_of(swapped) == split
            assert made.oracle(swapped) == example.answer_ids


@pytest.mark.parametrize("d", [1, 2, 3])
def test_digits_are_uniform(d):
    drawn = task(min_difficulty=d, max_difficulty=d)._draw(_draws(20_000), d, d)
    for name in ("x", "y"):
        for place in range(d):
            counts = np.bincount(drawn[name][:, place], minlength=10)
            allowed = 9 if place == d - 1 and d > 1 else 10
            wanted = np.where(np.arange(10) >= 10 - allowed, 20_000 / allowed, 0)
            assert np.abs(counts - wanted).max() < 5 * np.sqrt(2000), (name, place)
    assert abs(np.corrcoef(drawn["x"][:, 0], drawn["y"][:, 0])[0, 1]) < 0.03


def _draws(rows: int):
    from latentcot.tasks.counter import Draws

    return Draws(5, np.arange(rows), np.zeros(rows, dtype=np.int64))


def test_shortcuts_are_right_where_they_should_be():
    made = task(min_difficulty=4, max_difficulty=4)
    examples = list(made.iterate("val", 0, 400))
    batch = made.batch("val", range(400))
    right = {name: made.score(batch, ids) for name, ids in made.guesses(batch).items()}
    for row, example in enumerate(examples):
        digits = [int(name) for name in made.vocabulary.decode(example.prompt_ids[1:]) if name != "+"]
        sums = [digits[3 - i] + digits[7 - i] for i in range(4)]
        carries = [0]
        for s in sums:
            carries.append((s + carries[-1]) // 10)
        assert bool(right["no_carry"][row]) == (not any(carries))
        assert bool(right["near_carry"][row]) == (carries[1:] == [s // 10 for s in sums])
    assert right["no_carry"].any()
    assert not right["near_carry"].all()


def test_long_numbers_need_no_long_integers():
    made = task(min_difficulty=400, max_difficulty=400)
    batch = made.batch("train", range(4))
    assert torch.equal(made.chance(batch), torch.zeros(4, dtype=torch.float64))
    example = made.example("train", 0)
    assert made.oracle(example) == example.answer_ids
    assert example.prompt_ids[401] == made.vocabulary.id("+")
    assert len(example.prompt_ids) == 802 == made.limits.prompt_tokens
    assert SPECIAL.pad not in example.answer_ids


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base": 1}, ValueError, "base: expected an integer between 2"),
        ({"base": 10.0}, TypeError, "base: expected an integer, got 10.0"),
        ({"reverse": 1}, TypeError, "reverse: expected True or False, got 1"),
        ({"carries": "yes"}, TypeError, "carries: expected True or False, got 'yes'"),
        ({"digits": 3}, ValueError, "unknown option of task 'addition'"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        task(**options)
