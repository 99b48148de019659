"""Needles in a haystack: each kind follows its rule, whatever the length and depth."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from latentcot.reasoner import SPECIAL
from latentcot.tasks import SPLITS, make_task
from latentcot.tasks.needle import DEPTHS, Kind, NeedleTask

KINDS = get_args(Kind)


def task(kind: str, **options) -> NeedleTask:
    lengths = {"min_difficulty": 4, "max_difficulty": 6} if kind == "common_words" else {}
    made = make_task("needle", kind=kind, **{**lengths, **options})
    assert isinstance(made, NeedleTask)
    return made


def symbols(t: NeedleTask, split, index: int) -> tuple[list[str], list[str], list[str]]:
    """Context, what is asked, answer."""
    example = t.example(split, index)
    words = t.vocabulary.decode(example.prompt_ids[1:])
    place = words.index("?")
    return list(words[:place]), list(words[place + 1 :]), list(t.vocabulary.decode(example.answer_ids))


def statements(context: list[str]) -> list[tuple[str, str]]:
    places = [i for i, word in enumerate(context) if word == "="]
    assert all(context[i + 2] == ";" and (i - 1) % 4 == 0 for i in places)
    return [(context[i - 1], context[i + 1]) for i in places]


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind):
    t = task(kind)
    held = {}
    for split in SPLITS:
        examples = list(t.iterate(split, 0, 150))
        assert all(t.oracle(e) == e.answer_ids and t.verify(e, t.oracle(e)) for e in examples)
        assert all(t.split_of(e) == split for e in examples)
        held[split] = {t.canonical(e) for e in examples}
        batch = t.batch(split, range(150))
        for row, example in enumerate(examples):
            assert tuple(batch.prompts.ids[row][batch.prompts.mask[row]].tolist()) == example.prompt_ids
        assert (batch.prompts.ids[:, 0] == SPECIAL.bos).all()
        assert batch.prompts.ids.shape[1] <= t.limits.prompt_tokens
        assert batch.answer_ids.shape[1] == t.limits.answer_tokens
        assert int(batch.prompts.ids.max()) < t.limits.vocab_size == len(t.vocabulary)
    if kind != "single":  # 65,536 statements: repeats are possible inside a split, and never across
        assert len(held["train"]) == 150
    assert not held["train"] & held["test"]
    assert not held["train"] & held["val"]
    assert not held["val"] & held["test"]


@pytest.mark.parametrize("kind", KINDS)
def test_pinned_length_is_the_same_in_wider_ranges(kind):
    wide = task(kind)
    d = wide.config.max_difficulty - 1
    narrow = NeedleTask(replace(wide.config, min_difficulty=d, max_difficulty=d))
    one, other = (t.difficulty_batch("test", d, range(20)) for t in (wide, narrow))
    assert torch.equal(one.prompts.ids, other.prompts.ids)
    assert torch.equal(one.answer_ids, other.answer_ids)
    context, _, _ = symbols(narrow, "test", 0)
    assert len(context) == d * narrow.config.block


@pytest.mark.parametrize("index", range(8))
def test_single_and_multi_key(index):
    for kind, count in (("single", 1), ("multi_key", 5)):
        context, asked, answer = symbols(task(kind), "train", index)
        found = statements(context)
        assert len(found) == len({k for k, _ in found}) == len({v for _, v in found}) == count
        assert answer == [dict(found)[asked[0]]]
        assert sum(word[0] == "w" for word in context) == len(context) - 4 * count


@pytest.mark.parametrize("index", range(8))
def test_multi_value_and_multi_query(index):
    context, asked, answer = symbols(task("multi_value"), "train", index)
    found = statements(context)
    assert {k for k, _ in found} == set(asked)
    assert answer == [v for _, v in found]
    assert len(set(answer)) == 4
    context, asked, answer = symbols(task("multi_query"), "train", index)
    known = dict(statements(context))
    assert len(set(asked)) == len(known) == 4
    assert answer == [known[key] for key in asked]


@pytest.mark.parametrize("index", range(8))
def test_variable_tracking_is_one_chain(index):
    context, asked, answer = symbols(task("variable_tracking"), "train", index)
    found = statements(context)
    assert len(found) == 5
    assert found[0] == (answer[0], asked[0])
    assert found[1:] == list(zip(answer[1:], answer[:-1], strict=True))


@pytest.mark.parametrize("index", range(8))
def test_words_are_counted(index):
    context, asked, answer = symbols(task("common_words"), "train", index)
    counts = {word: context.count(word) for word in set(context)}
    assert not asked
    assert answer == sorted(answer, key=lambda word: int(word[1:]))
    assert {counts[word] for word in answer} == {len(context) // 2 // 10}
    others = [count for word, count in counts.items() if word not in answer]
    assert max(others) == 3 < len(context) // 2 // 10
    assert sum(count != 3 for count in others) <= 1, "the last one fills up"
    context, _, answer = symbols(task("frequent_words"), "train", index)
    ranked = sorted({context.count(word) for word in set(context)}, reverse=True)
    assert [context.count(word) for word in answer] == ranked[:3]
    assert sum(context.count(word) >= ranked[2] for word in set(context)) == 3


def test_depths_are_uniform_and_can_be_fixed():
    length = {"min_difficulty": 5, "max_difficulty": 5}  # 160 tokens: 40 slots, one a depth
    batch = task("single", **length).batch("train", range(4000))
    equals = task("single").vocabulary.id("=")
    depth = ((batch.prompts.ids == equals).long().argmax(1) - 2) // 4
    share = torch.bincount(depth, minlength=DEPTHS).double() / 4000
    assert len(share) == DEPTHS
    assert (share - 1 / DEPTHS).abs().max() < 0.011
    for fixed in (0, 17, 39):
        batch = task("single", **length, depth=fixed).batch("train", range(5))
        assert (((batch.prompts.ids == equals).long().argmax(1) - 2) // 4 == fixed).all()


def test_baselines_are_what_they_say():
    assert task("single").baselines("test", 200)["last_value"] == 1.0, "one statement: no key needs to be known"
    found = task("multi_key").baselines("test", 1000)
    assert found["last_value"] == pytest.approx(0.2, abs=0.05)
    assert found["chance"] == pytest.approx(1 / 256)
    for kind in KINDS[2:]:
        assert task(kind).baselines("test", 200)["heuristic"] < 0.05, kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "needles"}, "kind: expected one of single, multi_key"),
        ({"block": 30}, "block: expected a multiple of 4, got 30"),
        (
            {"kind": "multi_key", "needles": 40},
            "contexts of 64 tokens are too short for kind 'multi_key', which needs 164",
        ),
        ({"kind": "common_words"}, "contexts of 64 tokens are too short for kind 'common_words', which needs 120"),
        ({"kind": "multi_key", "needles": 200}, "symbols: 256 are too few for 201 statements"),
        ({"kind": "common_words", "min_difficulty": 4, "symbols": 20}, "symbols: 20 words do not fill contexts"),
        ({"depth": 40}, "depth: expected an integer between 0 and 39, got 40"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("needle", **options)
