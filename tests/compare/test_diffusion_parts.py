"""Addition, recall and copying in the diffusion study: their canvases, and every arm on them for a few steps."""

from dataclasses import replace

import pytest
import torch

from latentcot.compare.diffusion import Part, default_diffusion
from latentcot.compare.diffusion_arms import SAMPLERS, Sizes, make_arm, sampler_names
from latentcot.compare.diffusion_problems import RecallProblem, TextProblem
from latentcot.compare.diffusion_run import run_arm
from latentcot.reasoner import SPECIAL
from latentcot.training import count_parameters

PARTS = {part.name: part for part in default_diffusion().parts}
NEW = ("addition", "addition-reverse", "mqar", "copy")


def small(name: str, tmp_path) -> Part:
    """A part with few test examples, tiny networks and three steps."""
    part = PARTS[name]
    return replace(
        part,
        problem={**part.problem, "test": 4, "examples": 50},
        train=replace(part.train, steps=3, warmup_steps=1, checkpoint_every=0),
        sizes=Sizes(layers=2, width=16, heads=2, mlp_width=64),
    )


@pytest.mark.parametrize("name", NEW)
def test_every_arm_of_the_part_is_trained_and_measured(name, tmp_path):
    part = small(name, tmp_path)
    problem = part.build(tmp_path)
    for arm in part.arms:
        _, found = run_arm(problem, arm, part.sizes, part.train, 4, tmp_path / arm)
        assert found["training"]["steps"] == 3
        assert set(found["solved"]) == set(problem.tests)
        for rows in found["solved"].values():
            assert set(rows) == set(sampler_names(found["way"]))
            assert all(0 <= row["exact"] <= 1 and row["items"] == 4 for row in rows.values())
    assert all({"chance"} < figures.keys() for figures in problem.baselines().values())


@pytest.mark.parametrize("name", NEW)
def test_arms_of_a_part_have_equal_parameters_and_time(name, tmp_path):
    part = PARTS[name]
    assert part.seconds == PARTS["countdown"].seconds
    problem = small(name, tmp_path).build(tmp_path)
    counts = [
        count_parameters(make_arm(arm, part.sizes, problem.vocab_size, problem.length, problem.block))
        for arm in part.arms
    ]
    assert (max(counts) - min(counts)) / max(counts) < 0.02


def test_sums_keep_their_places_only_with_the_least_digit_first(tmp_path):
    """What sets both parts apart: where the least digit stands hangs on the last carry in one, and not in the other."""
    for name, places in (("addition", 2), ("addition-reverse", 1)):
        problem = PARTS[name].build(tmp_path)
        assert isinstance(problem, TextProblem)
        text = problem.training(0, 64, 0, True).ids[:, -problem.text :]
        ends = (text == SPECIAL.eos).long().argmax(1)
        assert (text[:, 0] == SPECIAL.ans).all()
        assert len(ends.unique()) == 2
        least = ends - 1 if name == "addition" else torch.ones_like(ends)
        assert len(least.unique()) == places


@pytest.fixture(scope="module")
def recall():
    return RecallProblem({"min_difficulty": 2, "max_difficulty": 3, "length": 16, "vocabulary": 16}, 50, 6, block=4)


def test_recall_writes_values_behind_their_queries_and_gives_the_rest(recall):
    canvas = recall.training(0, 40, 0, True)
    assert canvas.ids.shape == canvas.maskable.shape == (40, 16)
    assert canvas.real is None
    for ids, open_ in zip(canvas.ids.tolist(), canvas.maskable.tolist(), strict=True):
        n = sum(open_)
        pairs = dict(zip(ids[: 2 * n : 2], ids[1 : 2 * n : 2], strict=True))
        assert n in (2, 3)
        assert not any(open_[: 2 * n])
        for place in range(16):
            if open_[place]:
                assert ids[place] == pairs.pop(ids[place - 1])
        assert not pairs
    assert torch.equal(canvas.ids, recall.training(0, 40, 0, False).ids)
    assert not torch.equal(canvas.ids, recall.training(1, 40, 0, True).ids)


def test_recall_is_scored_by_row_and_by_query(recall):
    assert recall.tests == ("difficulty 2", "difficulty 3")
    for name, n in (("difficulty 2", 2), ("difficulty 3", 3)):
        canvas = recall.test(name, True)
        assert recall.score(name, canvas.ids, True) == {"exact": 1.0, "queries": 1.0}
        wrong = canvas.ids.clone()
        wrong[0, int(canvas.maskable[0].long().argmax())] = SPECIAL.count
        found = recall.score(name, wrong, True)
        assert found["exact"] == pytest.approx(5 / 6)
        assert found["queries"] == pytest.approx(1 - 1 / (6 * n))
        elsewhere = canvas.ids.masked_fill(~canvas.maskable, SPECIAL.pad)
        assert recall.score(name, elsewhere, True)["exact"] == 1.0, "what is given does not count"
        assert recall.baselines()[name]["chance"] == pytest.approx((1 / 8) ** n)


def test_recall_counts_passes(recall):
    canvas = recall.test("difficulty 3", False)
    causal, block = (
        make_arm(arm, Sizes(layers=2, width=16, heads=2, mlp_width=64), recall.vocab_size, 16, 4).eval()
        for arm in ("autoregressive-softmax", "block-softmax")
    )
    filled, nfe = causal.fill(canvas, SAMPLERS["left to right"])
    assert (nfe == 3).all()
    assert torch.equal(filled[~canvas.maskable], canvas.ids[~canvas.maskable])
    blind = replace(canvas, ids=canvas.ids.masked_fill(canvas.maskable, SPECIAL.pad))
    for sampler in sampler_names("block"):
        one, other = (block.fill(c, SAMPLERS[sampler])[0] for c in (canvas, blind))
        assert torch.equal(one, other), "the answer does not leak"
