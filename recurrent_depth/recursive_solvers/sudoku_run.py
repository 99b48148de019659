"""Train a recursive solver on procedural Sudoku and report what it solves, beside the look-up baseline.

``python -m latentcot.recurrent_depth.recursive_solvers.sudoku_run --preset sanity4 --seconds 600 --out FOLDER``

========= ==================================================================================================================
preset    puzzles
========= ==================================================================================================================
sanity4   4x4, 12 blanks, unseen clue patterns of grids that training has seen: a check that training works, not of reasoning
classes4  4x4, 12 blanks, test grids of the 4 classes (up to relabelling) that training does not hold
grids6    6x6, test grids of other classes up to all symmetries
extreme9  9x9 in the published sizes (width 512, batch 768): 1000 puzzles, each seen under fresh symmetries; for a GPU
========= ==================================================================================================================

``result.json`` holds the configuration, the history and the accuracies, with halting and without.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentcot.files import write_text
from latentcot.recurrent_depth.recursive_solvers.config import hrm, trm
from latentcot.recurrent_depth.recursive_solvers.solver import RecursiveSolver
from latentcot.recurrent_depth.recursive_solvers.supervision import DeepSupervision, SupervisionConfig
from latentcot.recurrent_depth.recursive_solvers.training import SolverTraining, TrainingResult, train_solver
from latentcot.recurrent_depth.settings import check_choice
from latentcot.tasks.base import Split
from latentcot.tasks.sudoku import GridBatch, SudokuConfig, SudokuTask, grid_metrics

_TINY = {
    "hidden_size": 96,
    "num_heads": 4,
    "multiple_of": 64,
    "mixing": "mlp",
    "prefix": 1,
    "cycles": 2,
    "latent_updates": 3,
}
_SHORT = {"learning_rate": 2e-3, "warmup_steps": 100, "weight_decay": 0.1, "average": 0.99, "grad_clip": 1.0}


@dataclass(frozen=True)
class SudokuPreset:
    """Options of :class:`SudokuConfig`, changes of the solver's configuration, of :class:`SolverTraining` and of
    :class:`SupervisionConfig`; ``puzzles``: distinct training puzzles; ``test``: test puzzles; ``batch``: rows."""

    task: Mapping[str, Any]
    solver: Mapping[str, Any] = field(default_factory=lambda: _TINY)
    training: Mapping[str, Any] = field(default_factory=lambda: _SHORT)
    supervision: Mapping[str, Any] = field(default_factory=lambda: {"segments": 8})
    puzzles: int = 4000
    test: int = 1000
    batch: int = 96


PRESETS = {
    "sanity4": SudokuPreset({"size": 4, "blanks": 12, "split_by": "pattern"}),
    "classes4": SudokuPreset({"size": 4, "blanks": 12, "split_by": "grid"}),
    "grids6": SudokuPreset({"size": 6, "blanks": 22}, puzzles=10_000),
    "extreme9": SudokuPreset(
        {"size": 9, "blanks": 54},
        {"mixing": "mlp"},
        {"weight_decay": 1.0},
        {"segments": 16},
        puzzles=1000,
        batch=768,
    ),
}


class AugmentedPuzzles:
    """Batches for training: a fixed set of puzzles, each time under a random symmetry that stays in its split.

    Args:
        task: whose training puzzles are taken.
        puzzles: how many.
        batch: rows a step.
        device: where batches go.
        seed: of rows and symmetries; step number and seed alone decide a batch.
    """

    def __init__(self, task: SudokuTask, puzzles: int, batch: int, device: str = "cpu", seed: int = 0):
        self.task, self.batch, self.device, self.seed = task, batch, device, seed
        self.held = task.grids("train", range(puzzles))

    def __call__(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = torch.randint(len(self.held), (self.batch,), generator=generator)
        drawn = GridBatch(*(getattr(self.held, name)[rows] for name in ("inputs", "targets", "difficulty", "index")))
        image = self.task.augment(drawn, generator)
        return {"grid": image.inputs.to(self.device)}, image.targets.to(self.device)


def evaluate(
    model: DeepSupervision,
    task: SudokuTask,
    split: Split,
    n: int,
    *,
    segments: int | None = None,
    halt: bool = True,
    device: str = "cpu",
) -> dict[str, float]:
    """Means over ``n`` puzzles of ``split``: the figures of :func:`~latentcot.tasks.sudoku.grid_metrics`, ``segments`` taken, and
    accuracy by difficulty as ``exact_d1`` ... for levels that occur."""
    batch = task.grids(split, range(n))
    solution = model.solve({"grid": batch.inputs.to(device)}, segments, halt=halt)
    figures = grid_metrics(batch.inputs, batch.targets, solution.answers.cpu(), task.config.size)
    found = {name: values.double().mean().item() for name, values in figures.items()}
    found["segments"] = solution.segments.double().mean().item()
    for d in sorted(set(batch.difficulty.tolist())):
        found[f"exact_d{d}"] = figures["exact"][batch.difficulty == d].double().mean().item()
    return found


def run(
    name: str,
    *,
    method: str = "trm",
    seconds: float | None = None,
    steps: int = 1_000_000,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    quiet: bool = False,
    **changes: Any,
) -> tuple[TrainingResult, dict[str, Any]]:
    """Train on a preset and measure: the trained model and the report that ``out / result.json`` gets.

    Args:
        name: of :data:`PRESETS`.
        method: ``trm`` or ``hrm``; the preset's sizes apply to both, where ``hrm`` keeps its own cycles and layers.
        seconds, steps: when training stops, whichever is first.
        seed: of weights, batches and halting; not of the puzzles.
        changes: fields of :class:`SudokuPreset` to replace.
    """
    check_choice("preset", name, PRESETS)
    check_choice("method", method, ("trm", "hrm"))
    if seconds is None and steps == 1_000_000:
        raise ValueError("seconds, steps: give one of them, so that training ends")
    preset = SudokuPreset(**{**vars(PRESETS[name]), **changes})
    task = SudokuTask(SudokuConfig(**preset.task))
    sizes = dict(preset.solver)
    if method == "hrm":
        sizes = {k: v for k, v in sizes.items() if k not in ("cycles", "latent_updates", "mixing")}
    config = (hrm if method == "hrm" else trm)(task.config.size + 2, task.config.size**2, **sizes)
    torch.manual_seed(seed)
    model = DeepSupervision(RecursiveSolver(config), SupervisionConfig(**preset.supervision)).to(device)
    training = SolverTraining(steps=steps, seconds=seconds, seed=seed, **preset.training)
    draw = AugmentedPuzzles(task, preset.puzzles, preset.batch, device, seed)
    result = train_solver(model, draw, training, watch=None if quiet else _show)
    baselines = task.baselines("test", preset.test)
    report = {
        "preset": name,
        "method": method,
        "task": asdict(task.config),
        "solver": asdict(config),
        "training": asdict(training),
        "supervision": asdict(model.config),
        "batch": preset.batch,
        "puzzles": preset.puzzles,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": result.steps,
        "seconds": result.seconds,
        "test": evaluate(result.model, task, "test", preset.test, device=device),
        "test_without_halting": evaluate(result.model, task, "test", preset.test, halt=False, device=device),
        "train": evaluate(result.model, task, "train", preset.test, device=device),
        "baselines": dict(baselines),
        "history": result.history,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "result.json", json.dumps(report, indent=2) + "\n")
    return result, report


def _show(row: dict[str, float]) -> None:
    print(" ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description="Train a recursive solver on procedural Sudoku.")
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True)
    parser.add_argument("--method", choices=("trm", "hrm"), default="trm")
    parser.add_argument("--seconds", type=float, help="stop training after so long")
    parser.add_argument("--steps", type=int, default=1_000_000, help="stop training after so many optimiser steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder of result.json")
    given = vars(parser.parse_args(arguments))
    _, report = run(given.pop("preset"), **given)
    print(json.dumps({k: report[k] for k in ("test", "test_without_halting", "train", "baselines")}, indent=2))


if __name__ == "__main__":
    main()
