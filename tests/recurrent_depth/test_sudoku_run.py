"""The Sudoku runs of recursive solvers: batches, report, what is counted."""

import json

import pytest
import torch

from latentcot.recurrent_depth.recursive_solvers import DeepSupervision, SegmentOutput, SupervisionConfig
from latentcot.recurrent_depth.recursive_solvers.sudoku_run import PRESETS, AugmentedPuzzles, evaluate, main, run
from latentcot.tasks.sudoku import SudokuConfig, SudokuTask, grid_metrics
from latentcot.tasks.sudoku_rules import relabelled

SMALL = {
    "solver": {"hidden_size": 16, "num_heads": 2, "multiple_of": 16, "prefix": 1, "cycles": 1, "latent_updates": 1},
    "training": {"warmup_steps": 1},
    "supervision": {"segments": 2},
    "puzzles": 20,
    "test": 10,
    "batch": 4,
}


class Peeker(torch.nn.Module):
    """Knows the targets of the puzzles it is shown; needs two segments for them and never halts."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor):
        super().__init__()
        self.known = {tuple(i): t for i, t in zip(inputs.tolist(), targets, strict=True)}

    def start(self, inputs):
        return torch.zeros(len(inputs["grid"]))

    def forward(self, state, inputs):
        answers = torch.stack([self.known[tuple(row)] for row in inputs["grid"].tolist()])
        answers = torch.where(state[:, None] > 0, answers, inputs["grid"])
        return state + 1, SegmentOutput(torch.nn.functional.one_hot(answers, 6).float(), state - 9)


def test_evaluation_counts_what_is_solved():
    task = SudokuTask(SudokuConfig())
    batch = task.grids("test", range(12))
    model = DeepSupervision(Peeker(batch.inputs, batch.targets), SupervisionConfig(segments=3))
    found = evaluate(model, task, "test", 12)
    assert found["exact"] == found["exact_d1"] == found["blank_accuracy"] == 1.0
    assert found["violations"] == found["changed_clues"] == 0.0
    assert found["segments"] == 3.0
    assert evaluate(model, task, "test", 12, segments=1)["exact"] == 0.0
    assert evaluate(model, task, "test", 12, segments=1)["blank_accuracy"] == 0.0


@pytest.mark.parametrize("name", ["sanity4", "classes4", "grids6"])
def test_batches_are_images_of_the_training_puzzles(name):
    task = SudokuTask(SudokuConfig(**PRESETS[name].task))
    draw = AugmentedPuzzles(task, 10, 32)
    inputs, targets = draw(3)
    assert torch.equal(draw(3)[0]["grid"], inputs["grid"])
    assert not torch.equal(draw(4)[0]["grid"], inputs["grid"])
    figures = grid_metrics(inputs["grid"], targets, targets, task.config.size)
    assert (figures["violations"] == 0).all()
    assert (figures["changed_clues"] == 0).all()
    if task.config.size == 4:  # digits are renamed and nothing moves
        held = {relabelled((row - 1).tolist()) for row in draw.held.inputs}
        assert {relabelled((row - 1).tolist()) for row in inputs["grid"]} <= held


@pytest.mark.parametrize("method", ["trm", "hrm"])
def test_a_run_reports_its_configuration_and_figures(method, tmp_path):
    result, report = run("sanity4", method=method, steps=3, out=tmp_path, quiet=True, **SMALL)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["steps"] == result.steps == 3
    assert saved["solver"]["networks"] == ("two" if method == "hrm" else "one")
    assert saved["parameters"] == sum(p.numel() for p in result.model.parameters())
    assert 0 <= saved["test"]["exact"] <= 1
    assert saved["test_without_halting"]["segments"] == 2
    assert saved["test"] == report["test"]
    assert "lookup" in saved["baselines"]


def test_the_published_sizes_are_a_preset():
    preset = PRESETS["extreme9"]
    assert (preset.puzzles, preset.batch) == (1000, 768)
    assert preset.solver == {"mixing": "mlp"}  # all else is the method's own


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"preset: 'sanity' given, .* did you mean 'sanity4'"):
        run("sanity", steps=1)
    with pytest.raises(ValueError, match="method: 'tmr' given"):
        run("sanity4", method="tmr", steps=1)
    with pytest.raises(ValueError, match="seconds, steps: give one of them"):
        run("sanity4")
    with pytest.raises(SystemExit):
        main(["--preset", "sudoku"])
