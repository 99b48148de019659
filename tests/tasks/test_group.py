"""Word problems: the groups themselves, the product's convention, steps and labels."""

import itertools

import numpy as np
import pytest
import torch

from latentcot.reasoner import SPECIAL
from latentcot.tasks import make_task
from latentcot.tasks.group import compose, is_even, make_group

GROUPS = {"S3": 6, "S4": 24, "S5": 120, "A4": 12, "A5": 60, "Z2": 2, "Z7": 7, "Z60": 60}


@pytest.mark.parametrize(("name", "order"), GROUPS.items(), ids=GROUPS)
def test_group_axioms(name, order):
    group = make_group(name)
    table = group.table
    assert len(group) == order == len(set(group.names))
    assert table.shape == (order, order)
    assert table.min() >= 0
    assert table.max() < order  # closed
    a, b, c = np.random.default_rng(0).integers(order, size=(3, 1000))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (table[0] == np.arange(order)).all()  # element 0 is the identity, from both sides
    assert (table[:, 0] == np.arange(order)).all()
    assert (np.sort(table, axis=1) == np.arange(order)).all()  # every element has an inverse
    assert (np.sort(table, axis=0) == np.arange(order)[:, None]).all()


@pytest.mark.parametrize("name", GROUPS)
def test_generators_generate(name):
    group = make_group(name)
    reached, fresh = {0}, {0}
    while fresh:
        fresh = {int(group.table[a, g]) for a in fresh for g in group.generators} - reached
        reached |= fresh
    assert len(reached) == len(group)


def test_left_factor_acts_first():
    group = make_group("S3")
    number = {name: i for i, name in enumerate(group.names)}

    def product(g: str, h: str) -> str:
        return group.names[group.table[number[g], number[h]]]

    # 213 swaps places 1 and 2, 132 swaps 2 and 3. 1 -> 2 -> 3, 2 -> 1 -> 1, 3 -> 3 -> 2 in this order:
    assert product("213", "132") == "312"
    assert product("132", "213") == "231"
    assert compose((1, 0, 2), (0, 2, 1)) == (2, 0, 1)


def test_alternating_groups_are_the_even_permutations():
    even = {"".join(str(x + 1) for x in g) for g in itertools.permutations(range(5)) if is_even(g)}
    assert set(make_group("A5").names) == even
    assert not is_even((1, 0, 2))
    assert is_even((1, 2, 0))


@pytest.mark.parametrize("form", ["final", "tag"])
@pytest.mark.parametrize("name", ["S3", "A5", "Z7"])
def test_steps_and_answer_are_the_running_products(name, form):
    task = make_task("group", group=name, form=form, min_difficulty=1, max_difficulty=12)
    for example in task.iterate("train", 0, 200):
        elements = [token - SPECIAL.count for token in example.prompt_ids[1:]]
        assert len(elements) == example.meta["difficulty"]
        running = list(itertools.accumulate(elements, lambda a, b: int(task.group.table[a, b])))  # pyright: ignore
        labels = [SPECIAL.count + p for p in running]
        assert example.steps == tuple((label,) for label in labels[1:])
        assert example.answer_ids == tuple(labels if form == "tag" else labels[-1:])


def test_labels_are_balanced():
    for options in ({"group": "S3", "min_difficulty": 6}, {"group": "Z2", "min_difficulty": 12, "max_difficulty": 20}):
        task = make_task("group", **options)
        for split in ("train", "test"):
            answers = task.batch(split, range(6000)).answer_ids[:, 0] - SPECIAL.count
            share = torch.bincount(answers, minlength=len(task.group)) / 6000  # pyright: ignore
            assert (share - 1 / len(task.group)).abs().max() < 0.02  # pyright: ignore


def test_generators_only_draws_no_other():
    task = make_task("group", group="S5", generators_only=True)
    swaps = {SPECIAL.count + g for g in make_group("S5").generators}
    assert len(swaps) == 10
    assert set(task.batch("train", range(500)).prompts.ids.unique().tolist()) == {SPECIAL.pad, SPECIAL.bos, *swaps}


def test_difficulties_are_drawn_evenly():
    counts = torch.bincount(make_task("group").batch("train", range(8000)).difficulty)[2:]
    assert len(counts) == 8
    assert (counts / 8000 - 1 / 8).abs().max() < 0.02


def test_ranges_agree_about_every_object():
    short, long = make_task("group", max_difficulty=9), make_task("group", min_difficulty=4, max_difficulty=16)
    for split in ("train", "val", "test"):
        for example in long.iterate(split, 0, 200):
            assert short.split_of(example) == split


def test_final_and_tag_share_their_splits():
    final, tag = make_task("group"), make_task("group", form="tag")
    assert all(tag.split_of(example) == "test" for example in final.iterate("test", 0, 100))


def test_default_levels_all_have_test_examples():
    assert make_task("group", max_difficulty=16).levels("test") == tuple(range(2, 17))


def test_a_level_without_objects_is_named():
    task = make_task("group", group="Z2", min_difficulty=1, max_difficulty=12)
    missing = sorted(set(range(1, 13)) - set(task.levels("test")))
    assert 1 in missing  # two sequences of one element
    with pytest.raises(ValueError, match=r"no object of difficulty 1 in split 'test' .* after 1000 attempts"):
        task.difficulty_batch("test", 1, [0])


def test_trivial_shortcuts_end_at_two_elements():
    table = make_task("group", max_difficulty=8).baselines_by_difficulty("test", 1000)
    assert table[2]["last_two"] == 1.0
    assert max(table[d]["heuristic"] for d in range(6, 9)) < 1 / 6 + 0.05


@pytest.mark.parametrize("name", ["S2", "S6", "A3", "Z1", "Z0", "Z2048", "D4", "s3", "", "Z"])
def test_unknown_groups_are_refused(name):
    with pytest.raises(ValueError, match="group: "):
        make_task("group", group=name)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"form": "last"}, ValueError, "form: expected 'final' or 'tag', got 'last'"),
        ({"generators_only": 1}, TypeError, "generators_only: expected True or False, got 1"),
        ({"group": "Z2", "generators_only": True}, ValueError, "generators_only: Z2 has one generator"),
        ({"min_difficulty": 0}, ValueError, "min_difficulty: expected an integer >= 1, got 0"),
    ],
    ids=["form", "flag", "parity with generators", "no elements"],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make_task("group", **options)


def test_filled_prompts_hold_the_same_examples_at_fixed_places():
    plain, filled = (make_task("group", width=w) for w in (0, 7))
    for split in ("train", "test"):
        a, b = plain.batch(split, range(40)), filled.batch(split, range(40))
        assert torch.equal(a.answer_ids, b.answer_ids)
        assert torch.equal(a.steps, b.steps)
        for row in range(40):
            short, long = plain.example(split, row).prompt_ids, filled.example(split, row).prompt_ids
            assert long == short + (SPECIAL.sep,) * (8 - len(short))
        assert b.prompts.mask[:, :8].all()
    assert filled.limits.prompt_tokens == plain.limits.prompt_tokens == 10
    assert make_task("group", max_difficulty=4, width=7).limits.prompt_tokens == 8
