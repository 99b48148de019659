"""Multi-query associative recall: the published constants, both forms, splits, and what each filler may hold."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentcot.reasoner import SPECIAL
from latentcot.tasks import SPLITS, make_task
from latentcot.tasks.mqar import PROTOCOL_A, PROTOCOL_B_TEST, PROTOCOL_B_TRAIN, DenseBatch, MQARTask

IGNORED = -100


def task(**options) -> MQARTask:
    made = make_task("mqar", **options)
    assert isinstance(made, MQARTask)
    return made


SMALL = {"min_difficulty": 2, "max_difficulty": 6, "length": 40, "vocabulary": 64}


def looked_up(batch: DenseBatch, n: int) -> torch.Tensor:
    """Labels by a dictionary: every place behind the pairs that holds a key in the first half of a slot, first time only."""
    labels = torch.full_like(batch.ids, IGNORED)
    for row, ids in enumerate(batch.ids.tolist()):
        values = {ids[2 * i]: ids[2 * i + 1] for i in range(n)}
        for place in range(2 * n, len(ids), 2):
            if ids[place] in values:
                labels[row, place] = values.pop(ids[place])
    return labels


@pytest.mark.parametrize("setting", [*PROTOCOL_A[:3], PROTOCOL_B_TEST[2], PROTOCOL_B_TEST[-1]], ids=str)
def test_published_settings_follow_the_definition(setting):
    t, n = setting.task(), setting.pairs
    batch = t.dense("train", range(40))
    assert batch.ids.shape == batch.labels.shape == (40, setting.length)
    keys, values = batch.ids[:, : 2 * n : 2], batch.ids[:, 1 : 2 * n : 2]
    assert int(keys.min()) >= 1
    assert int(keys.max()) <= 4095
    assert int(values.min()) >= 4096
    assert int(values.max()) <= 8191
    for row in range(40):
        assert len(set(keys[row].tolist())) == len(set(values[row].tolist())) == n
    assert ((batch.labels != IGNORED).sum(1) == n).all()
    assert torch.equal(batch.labels, looked_up(batch, n))


def test_the_protocols_are_the_published_ones():
    assert [(s.length, s.pairs, s.train, s.test, s.batch_size) for s in PROTOCOL_A] == [
        (64, 4, 100_000, 3_000, 512),
        (128, 8, 100_000, 3_000, 512),
        (256, 16, 100_000, 3_000, 256),
        (512, 64, 100_000, 3_000, 128),
    ]
    assert sum(s.train for s in PROTOCOL_B_TRAIN) == 180_000
    assert all(s.test == 1_000 and 4 * s.pairs <= s.length for s in PROTOCOL_B_TEST)
    assert make_task("mqar").config == PROTOCOL_A[0].task().config


def test_slots_are_drawn_by_the_power_law_without_replacement():
    """First query of 40,000 examples against p(x) ~ x^(a - 1); the second against the law on what the first left."""
    t = task(length=32, min_difficulty=2, max_difficulty=2, vocabulary=8192)
    slots = t._objects("train", np.arange(40_000), None)["slot"]
    count = (32 - 4) // 2
    p = np.arange(1, count + 1) ** (0.01 - 1)
    p /= p.sum()
    first = np.bincount(slots[:, 0], minlength=count) / len(slots)
    assert np.abs(first - p).max() < 4 * np.sqrt(0.25 / len(slots))
    second = sum(p[a] * np.where(np.arange(count) == a, 0, p) / (1 - p[a]) for a in range(count))
    seen = np.bincount(slots[:, 1], minlength=count) / len(slots)
    assert np.abs(seen - second).max() < 4 * np.sqrt(0.25 / len(slots))
    assert (slots[:, 0] != slots[:, 1]).all()


def test_full_grids_ask_in_every_slot():
    """4 n = T: as many slots as queries."""
    t = task(length=64, min_difficulty=16, max_difficulty=16)
    slots = t._objects("train", np.arange(50), None)["slot"]
    assert (np.sort(slots, axis=1) == np.arange(16)).all()


def test_keys_and_values_are_uniform():
    t = task(length=16, min_difficulty=4, max_difficulty=4, vocabulary=32)
    drawn = t._objects("train", np.arange(20_000), None)
    for name, low, size in (("key", 1, 15), ("value", 16, 16)):
        shares = np.bincount(drawn[name].ravel() - low, minlength=size) / drawn[name].size
        assert np.abs(shares - 1 / size).max() < 0.005, name
        by_place = [np.bincount(drawn[name][:, i] - low, minlength=size) / 20_000 for i in range(4)]
        assert np.abs(np.array(by_place) - 1 / size).max() < 0.01, name


def test_fillers():
    numbers = range(300)
    zero, random, no_keys = (task(**SMALL, filler=f).dense("train", numbers) for f in ("zero", "random", "no_keys"))
    n = task(**SMALL).batch("train", numbers).difficulty
    place = torch.arange(40)
    free = (place >= 2 * n[:, None]) & (zero.labels == IGNORED)
    assert (zero.ids[free] == 0).all()
    for other in (random, no_keys):
        assert torch.equal(other.ids[~free], zero.ids[~free]), "a filler is a matter of layout"
        assert torch.equal(other.labels, zero.labels)
        assert set(other.ids[free].tolist()) == set(range(64))
    keys = [set(row[: 2 * int(k) : 2].tolist()) for row, k in zip(zero.ids, n, strict=True)]
    collisions = {
        name: sum(int(token) in keys[row] for row in range(300) for token in batch.ids[row][free[row]])
        for name, batch in (("random", random), ("no_keys", no_keys))
    }
    assert collisions["no_keys"] == 0
    assert collisions["random"] > 100
    share = torch.bincount(no_keys.ids[free], minlength=64).double()[32:] / int(free.sum())
    assert (share - share.mean()).abs().max() < 0.006, "values fill as often as one another"


@pytest.mark.parametrize("options", [SMALL, {}, {**SMALL, "filler": "zero"}], ids=["small", "default", "zero"])
def test_contract(options):
    t = task(**options)
    held = {}
    for split in SPLITS:
        examples = list(t.iterate(split, 0, 200))
        assert all(t.split_of(e) == split for e in examples)
        assert all(t.oracle(e) == e.answer_ids and t.verify(e, t.oracle(e)) for e in examples)
        held[split] = {t.canonical(e) for e in examples}
        batch = t.batch(split, range(200))
        dense = t.dense(split, range(200))
        assert torch.equal(batch.prompts.ids[:, 1:] - SPECIAL.count, dense.ids)
        assert (batch.prompts.ids[:, 0] == SPECIAL.bos).all()
        for row, example in enumerate(examples):
            labels = dense.labels[row]
            assert tuple((labels[labels != IGNORED] + SPECIAL.count).tolist()) == example.answer_ids
        assert batch.steps.shape[1] == 0
        assert t.score(batch, batch.answer_ids).all()
    assert not held["train"] & held["test"]
    assert not held["train"] & held["val"]
    assert not held["val"] & held["test"]
    example = t.example("train", 3)
    assert t.vocabulary.encode(t.vocabulary.render(example.prompt_ids)) == example.prompt_ids


def test_pinned_difficulty_is_the_same_in_wider_ranges_and_one_by_one():
    wide, narrow = task(**SMALL), task(**{**SMALL, "min_difficulty": 4, "max_difficulty": 4})
    for one, other in ((wide, narrow), (narrow, wide)):
        a, b = one.dense("test", range(50), 4), other.dense("test", range(50), 4)
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.labels, b.labels)
    numbers = [5, 0, 2**40, 7]
    together = wide.dense("train", numbers)
    for row, number in enumerate(numbers):
        assert torch.equal(wide.dense("train", [number]).ids[0], together.ids[row])


def fingerprint() -> str:
    """Of all settings and splits; test_other_processes.py compares it with another process."""
    digest = hashlib.sha256()
    for options in (SMALL, {}, {"length": 256, "min_difficulty": 16, "max_difficulty": 64}):
        for split in SPLITS:
            batch = task(**options).dense(split, range(32))
            digest.update(batch.ids.numpy().tobytes() + batch.labels.numpy().tobytes())
    return digest.hexdigest()[:10]


def test_baselines_are_what_they_say():
    t = task(length=16, min_difficulty=2, max_difficulty=2, vocabulary=64)
    found = t.baselines("test", 2000)
    assert found["chance"] == pytest.approx((1 / 32) ** 2)
    assert found["last_value"] == 0, "two different values are asked"
    p = np.arange(1, 7) ** -0.99
    p /= p.sum()
    ordered = sum(p[a] * p[b] / (1 - p[a]) for a in range(6) for b in range(a + 1, 6))
    assert found["in_order"] == pytest.approx(ordered, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 63}, "length: expected an even number, got 63"),
        ({"length": 12}, r"length: 4 pairs \(max_difficulty\) need at least 16 tokens, got 12"),
        ({"vocabulary": 8}, "vocabulary: 8 ids hold 3 keys, max_difficulty asks for 4"),
        ({"power": 0}, "power: expected a number above 0"),
        ({"filler": "noise"}, "filler: expected one of no_keys, random, zero, got 'noise'"),
        ({"lenght": 64}, "did you mean 'length'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="difficulty: expected an integer between 4"):
        task().dense("train", [0], 5)
    with pytest.raises(ValueError, match="split: expected one of"):
        task().dense("dev", [0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_difficulty: expected an integer between 4"):
        replace(task().config, max_difficulty=3)
