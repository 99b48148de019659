"""The Sudoku runs of recursive solvers: batches, report, what is counted."""

import json

import pytest
import torch

from latentcot.recurrent_depth.recursive_solvers import (
    DeepSupervision,
    RecursiveSolver,
    SegmentOutput,
    SolverTraining,
    SupervisionConfig,
    train_solver,
    trm,
)
from latentcot.recurrent_depth.recursive_solvers.sudoku_puzzles import look_up, pick, puzzle_sets
from latentcot.recurrent_depth.recursive_solvers.sudoku_run import (
    PRESETS,
    AugmentedPuzzles,
    evaluate,
    main,
    prepare,
    run,
)
from latentcot.tasks.base import Split
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


def tiny_solver(**changes) -> DeepSupervision:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 2, "multiple_of": 16, "prefix": 1, "cycles": 2, "latent_updates": 1}
    return DeepSupervision(RecursiveSolver(trm(6, 16, **sizes)), SupervisionConfig(segments=3, explore=0.5), **changes)


@pytest.mark.parametrize("optimiser", ["arctangent_adam", "adamw"])
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(optimiser, tmp_path):
    task = SudokuTask(SudokuConfig())
    draw = AugmentedPuzzles(task, 10, 4)
    training = SolverTraining(steps=7, optimiser=optimiser, warmup_steps=3, average=0.5)
    whole = train_solver(tiny_solver(), draw, training, log_every=1)
    file = tmp_path / "checkpoint.safetensors"
    calls = 0
    while True:  # a pause after no time at all, then a few steps at a time
        steps = (
            SolverTraining(steps=min(7, 3 * calls), optimiser=optimiser, warmup_steps=3, average=0.5)
            if calls
            else training
        )
        cut = train_solver(
            tiny_solver(), draw, steps, log_every=1, checkpoint=file, pause_after=None if calls else 1e-9, run="a"
        )
        assert cut.finished == bool(calls)
        calls += 1
        if cut.steps == 7:
            break
    assert calls == 4
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, cut.model.state_dict()[name]), name
    losses = {row["step"]: row["loss"] for row in cut.history}
    assert [losses[row["step"]] for row in whole.history] == [row["loss"] for row in whole.history]
    with pytest.raises(ValueError, match="another configuration"):
        train_solver(tiny_solver(), draw, training, checkpoint=file, run="b")
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        train_solver(tiny_solver(), draw, training, checkpoint=file, run="a")


def test_sixteen_bits_train_every_weight():
    """Casts made in updates without gradient must not be handed to those with gradient."""
    task = SudokuTask(SudokuConfig())
    inputs, targets = AugmentedPuzzles(task, 10, 8)(0)
    gradients = {}
    for precision in ("float32", "bfloat16"):
        model = tiny_solver()

        def kept(step: int):
            return inputs, targets

        train_solver(model, kept, SolverTraining(steps=1, precision=precision, average=None, learning_rate=0.0))
        gradients[precision] = {name: p.grad for name, p in model.named_parameters()}
    for name, exact in gradients["float32"].items():
        rounded = gradients["bfloat16"][name]
        assert torch.linalg.vector_norm(rounded - exact) <= 0.1 * torch.linalg.vector_norm(exact) + 1e-6, name


def test_puzzles_are_made_once_and_are_those_of_the_task(tmp_path):
    task, file = SudokuTask(SudokuConfig(size=6, blanks=20)), tmp_path / "puzzles.safetensors"
    made = puzzle_sets(task, {"train": 25, "test": 3}, file)
    again = puzzle_sets(task, {"train": 25, "test": 3}, file)
    counts: dict[Split, int] = {"train": 25, "test": 3}
    for split, n in counts.items():
        whole = task.grids(split, range(n))
        for name in ("inputs", "targets", "difficulty", "index"):
            assert torch.equal(getattr(made[split], name), getattr(whole, name))
            assert torch.equal(getattr(again[split], name), getattr(whole, name))
    assert torch.equal(pick(made["train"], slice(2)).index, torch.arange(2))
    with pytest.raises(ValueError, match="holds other puzzles"):
        puzzle_sets(task, {"train": 25, "test": 4}, file)
    file.write_bytes(b"{")
    with pytest.raises(ValueError, match="is damaged"):
        puzzle_sets(task, {"train": 25, "test": 3}, file)
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        puzzle_sets(task, {"train": 0})


def test_looking_up_solves_what_was_seen_and_nothing_else():
    task = SudokuTask(SudokuConfig(size=6, blanks=20))
    train, test = task.grids("train", range(8)), task.grids("test", range(8))
    renamed = task.augment(train, torch.Generator().manual_seed(0))
    assert look_up(train, train, 6) == 1.0
    assert look_up(train, test, 6) == 0.0
    assert 0.0 <= look_up(train, renamed, 6) <= 1.0


def test_a_pause_leaves_a_report_and_the_same_call_goes_on(tmp_path):
    assert prepare("sanity4", tmp_path, quiet=True, **SMALL) == {"train": 20, "test": 10}
    _, first = run("sanity4", steps=4, pause_after=1e-9, out=tmp_path, quiet=True, **SMALL)
    assert (first["finished"], first["steps"]) == (False, 0)
    assert json.loads((tmp_path / "result.json").read_text())["finished"] is False
    _, done = run("sanity4", steps=4, pause_after=600.0, out=tmp_path, quiet=True, **SMALL)
    assert (done["finished"], done["steps"]) == (True, 4)
    assert done["test_longer"]["segments"] == 4
    with pytest.raises(ValueError, match="another configuration"):
        run("sanity4", steps=4, seed=1, out=tmp_path, quiet=True, **SMALL)


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "1", "--device", "cuda"], "error: device: 'cuda' given, but torch"),
        (["--prepare"], "error: --prepare: puzzles need a folder"),
        (["--steps", "1", "--pause-after", "3"], "error: pause_after: 3.0 given"),
        (["--steps", "0"], "error: steps: 0 given"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(given, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["--preset", "sanity4", *given])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1
