"""Some seconds of training on 4x4 Sudoku, and what the samplers make of one and the same network."""

import math
from itertools import pairwise

import pytest

from latentcot.compare.diffusion_arms import Sizes
from latentcot.compare.diffusion_problems import SudokuProblem
from latentcot.compare.diffusion_run import run_arm
from latentcot.training import TrainConfig


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    problem = SudokuProblem({"size": 4, "blanks": 8, "split_by": "pattern"}, puzzles=400, test=200)
    config = TrainConfig(steps=220, learning_rate=3e-3, final_rate=0.0, warmup_steps=20, checkpoint_every=0)
    sizes = Sizes(layers=3, width=48, heads=4, mlp_width=96)
    _, report = run_arm(problem, "masked-softmax", sizes, config, 24, tmp_path_factory.mktemp("run"))
    return report["solved"]["8 blanks"]


def test_confidence_beats_a_random_order(solved):
    assert solved["confidence"]["exact"] >= solved["random order"]["exact"] + 0.03


def test_a_threshold_saves_passes_and_few_points(solved):
    assert solved["threshold 0.9"]["nfe"] <= 0.7 * solved["confidence"]["nfe"]
    # two points were hoped for, see docs/log.md
    assert solved["threshold 0.9"]["exact"] >= solved["confidence"]["exact"] - 0.1


def test_all_at_once_is_far_behind(solved):
    assert solved["all at once"]["exact"] <= solved["confidence"]["exact"] - 0.2


def test_more_passes_do_not_hurt(solved):
    by_passes = [solved[name]["exact"] for name in ("all at once", "2 a pass", "confidence")]
    noise = 2 * math.sqrt(0.25 / 200)
    assert all(more >= fewer - noise for fewer, more in pairwise(by_passes))
