"""Expression trees: values by an independent evaluation, shapes of trees, division."""

from collections import Counter

import pytest

from latentcot.reasoner import SPECIAL
from latentcot.tasks import make_task

OPERATORS = "+−×÷"


def infix(names: list[str]) -> tuple[str, list[str]]:
    """The first expression of a prefix list, with brackets, and what is left of the list."""
    head, *rest = names
    if head not in OPERATORS:
        return head, rest
    a, rest = infix(rest)
    b, rest = infix(rest)
    return f"({a} {head} {b})", rest


def value(expression: str, m: int) -> int:
    """Python's own evaluation, with × and − as its operators and ÷ as a product with the inverse."""

    class Residue:
        def __init__(self, n):
            self.n = n % m

        def __add__(self, other):
            return Residue(self.n + other.n)

        def __sub__(self, other):
            return Residue(self.n - other.n)

        def __mul__(self, other):
            return Residue(self.n * other.n)

        def __truediv__(self, other):
            (inverse,) = [k for k in range(m) if k * other.n % m == 1]
            return Residue(self.n * inverse)

    tokens = expression.replace("(", "( ").replace(")", " )").split()
    code = " ".join(f"R({t})" if t.isdigit() else t for t in tokens)
    code = code.replace("×", "*").replace("−", "-").replace("÷", "/")
    return eval(code, {"R": Residue}).n


@pytest.mark.parametrize(
    ("options", "m"),
    [({}, 23), ({"max_difficulty": 24, "min_difficulty": 20}, 23), ({"modulus": 12, "division": True}, 12)],
    ids=["23", "long", "division modulo 12"],
)
def test_answers_and_steps_are_the_values(options, m):
    task = make_task("mano", **options)
    seen = Counter()
    for example in task.iterate("train", 0, 200):
        names = list(task.vocabulary.decode(example.prompt_ids[1:]))
        d = example.meta["difficulty"]
        assert len(names) == 2 * d + 1
        assert sum(name in OPERATORS for name in names) == d
        seen.update(name for name in names if name in OPERATORS)
        whole, rest = infix(names)
        assert not rest
        assert example.answer_ids == (SPECIAL.count + value(whole, m),)
        inner = [infix(names[i:])[0] for i in range(len(names) - 1, 0, -1) if names[i] in OPERATORS]
        assert [s - SPECIAL.count for (s,) in example.steps] == [value(e, m) for e in inner]
    assert set(seen) == set(OPERATORS if "division" in options else OPERATORS[:3])


def test_trees_are_split_evenly_at_the_root():
    task = make_task("mano", min_difficulty=4, max_difficulty=4)
    sizes = Counter()
    for example in task.iterate("train", 0, 2000):
        names = list(task.vocabulary.decode(example.prompt_ids[2:]))
        left = len(names) - len(infix(names)[1])
        sizes[(left - 1) // 2] += 1
    assert set(sizes) == {0, 1, 2, 3}
    assert max(abs(n / 2000 - 0.25) for n in sizes.values()) < 0.04


def test_zero_is_the_only_answer_that_is_favoured():
    table = make_task("mano", max_difficulty=6).baselines_by_difficulty("test", 1000)
    for d in range(2, 7):
        assert table[d]["heuristic"] < 1 / 23 + 0.08


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"modulus": 1}, ValueError, "modulus: expected an integer between 2"),
        ({"division": 1}, TypeError, "division: expected True or False, got 1"),
    ],
    ids=["modulus", "division"],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make_task("mano", **options)
