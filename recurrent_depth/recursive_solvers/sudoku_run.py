"""Train a recursive solver on procedural Sudoku and report what it solves, beside the look-up baseline.

``python -m latentcot.recurrent_depth.recursive_solvers.sudoku_run --preset sanity4 --seconds 600 --out FOLDER``

========= ==================================================================================================================
preset    puzzles
========= ==================================================================================================================
sanity4   4x4, 12 blanks, unseen clue patterns of grids that training has seen: a check that training works, not of reasoning
classes4  4x4, 12 blanks, test grids of the 4 classes (up to relabelling) that training does not hold
grids6    6x6, test grids of other classes up to all symmetries
grids9    9x9, 1000 puzzles, each seen under fresh symmetries; test grids of other classes up to all symmetries; width 256, batch 512,
          larger steps: for half an hour of a GPU
extreme9  the same puzzles in the published sizes (width 512, batch 768, 1e-4): for many hours of a GPU
========= ==================================================================================================================

On a GPU::

    python -m latentcot.recurrent_depth.recursive_solvers.sudoku_run --preset grids9 --device cuda --precision bfloat16 \\
        --compile --average 0.99 --seconds 1500 --pause-after 520 --out out/sudoku9

Making 2000 puzzles of 9x9 takes minutes of a processor before that; ``--prepare`` does it alone, on any machine, and the folder can
be carried over. The command shows a progress bar, keeps a checkpoint in the folder and, started again, goes on; with ``--pause-after``
it leaves by itself after so long (then with ``"finished": false``). ``result.json`` holds the configuration, the history and the
accuracies, with halting, without, and with twice the segments of training; ``test_last_weights`` is what the weights answer
without their average, which trails a short training (decay 0.999 remembers a thousand steps; ``--average`` sets another).
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from latentcot.files import write_text
from latentcot.recurrent_depth.recursive_solvers.config import hrm, trm
from latentcot.recurrent_depth.recursive_solvers.solver import RecursiveSolver
from latentcot.recurrent_depth.recursive_solvers.sudoku_puzzles import look_up, pick, puzzle_sets
from latentcot.recurrent_depth.recursive_solvers.supervision import DeepSupervision, SupervisionConfig
from latentcot.recurrent_depth.recursive_solvers.training import (
    PRECISIONS,
    SolverTraining,
    TrainingResult,
    train_solver,
)
from latentcot.recurrent_depth.settings import check_choice
from latentcot.tasks.base import Split
from latentcot.tasks.sudoku import GridBatch, SudokuConfig, SudokuTask, grid_metrics
from latentcot.training import training_progress

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
    "grids9": SudokuPreset(
        {"size": 9, "blanks": 54},
        {"hidden_size": 256, "num_heads": 4, "mixing": "mlp"},
        {"learning_rate": 5e-4, "warmup_steps": 500, "weight_decay": 1.0, "grad_clip": 1.0},
        {"segments": 16},
        puzzles=1000,
        batch=512,
    ),
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
        puzzles: how many, or the puzzles themselves.
        batch: rows a step.
        device: where batches go.
        seed: of rows and symmetries; step number and seed alone decide a batch.
    """

    def __init__(self, task: SudokuTask, puzzles: int | GridBatch, batch: int, device: str = "cpu", seed: int = 0):
        self.task, self.batch, self.device, self.seed = task, batch, device, seed
        self.held = task.grids("train", range(puzzles)) if isinstance(puzzles, int) else puzzles

    def __call__(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = torch.randint(len(self.held), (self.batch,), generator=generator)
        image = self.task.augment(pick(self.held, rows), generator)
        return {"grid": image.inputs.to(self.device)}, image.targets.to(self.device)


def evaluate(
    model: DeepSupervision,
    task: SudokuTask,
    split: Split,
    n: int | GridBatch,
    *,
    segments: int | None = None,
    halt: bool = True,
    device: str = "cpu",
    rows: int = 1000,
) -> dict[str, float]:
    """Means over ``n`` puzzles of ``split`` (or over given ones): the figures of :func:`~latentcot.tasks.sudoku.grid_metrics`,
    ``segments`` taken, and accuracy by difficulty as ``exact_d1`` ... with their numbers ``puzzles_d1`` ... for levels that occur.
    ``rows`` at a time."""
    batch = task.grids(split, range(n)) if isinstance(n, int) else n
    answers, taken = [], []
    for part in batch.inputs.split(rows):
        solution = model.solve({"grid": part.to(device)}, segments, halt=halt)
        answers.append(solution.answers.cpu())
        taken.append(solution.segments.cpu())
    figures = grid_metrics(batch.inputs, batch.targets, torch.cat(answers), task.config.size)
    found = {name: values.double().mean().item() for name, values in figures.items()}
    found["segments"] = torch.cat(taken).double().mean().item()
    for d in sorted(set(batch.difficulty.tolist())):
        found[f"exact_d{d}"] = figures["exact"][batch.difficulty == d].double().mean().item()
        found[f"puzzles_d{d}"] = int((batch.difficulty == d).sum())
    return found


def run(
    name: str,
    *,
    method: str = "trm",
    seconds: float | None = None,
    steps: int = 1_000_000,
    pause_after: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "float32",
    average: float | None = None,
    compiled: bool = False,
    out: Path | None = None,
    workers: int | None = None,
    quiet: bool = False,
    **changes: Any,
) -> tuple[TrainingResult, dict[str, Any]]:
    """Train on a preset and measure: the trained model and the report that ``out / result.json`` gets.

    Args:
        name: of :data:`PRESETS`.
        method: ``trm`` or ``hrm``; the preset's sizes apply to both, where ``hrm`` keeps its own cycles and layers.
        seconds, steps: when training stops, whichever is first; over all calls with the same ``out``.
        pause_after: leave after so many seconds of training in this call; the same call again goes on.
        seed: of weights, batches and halting; not of the puzzles.
        device, precision: ``cpu`` or ``cuda``; ``float32`` or ``bfloat16`` (of matrix products in training).
        average: decay of the weight average instead of the preset's.
        compiled: blocks through ``torch.compile``, see :meth:`RecursiveSolver.compile_blocks`.
        out: folder of the report, of ``puzzles.safetensors`` and of ``checkpoint.safetensors``, which training goes on from; ``None`` =
            nothing is written.
        workers: processes that make puzzles; default one a core for 9x9, none otherwise.
        changes: fields of :class:`SudokuPreset` to replace.
    """
    check_choice("preset", name, PRESETS)
    check_choice("method", method, ("trm", "hrm"))
    if seconds is None and steps == 1_000_000:
        raise ValueError("seconds, steps: give one of them, so that training ends")
    if pause_after is not None and (pause_after <= 0 or out is None):
        raise ValueError(f"pause_after: {pause_after!r} given, expected a positive number, and a folder to go on from")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} given, but torch {torch.__version__} finds no CUDA device")
    preset = SudokuPreset(**{**vars(PRESETS[name]), **changes})
    task = SudokuTask(SudokuConfig(**preset.task))
    sizes = dict(preset.solver)
    if method == "hrm":
        sizes = {k: v for k, v in sizes.items() if k not in ("cycles", "latent_updates", "mixing")}
    config = (hrm if method == "hrm" else trm)(task.config.size + 2, task.config.size**2, **sizes)
    torch.manual_seed(seed)
    solver = RecursiveSolver(config)
    model = DeepSupervision(solver, SupervisionConfig(**preset.supervision)).to(device)
    if compiled:
        solver.compile_blocks()
    decay = {} if average is None else {"average": average}
    training = SolverTraining(
        steps=steps, seconds=seconds, seed=seed, precision=precision, **{**preset.training, **decay}
    )
    if out is not None:
        if out.exists() and not out.is_dir():
            raise ValueError(f"out: {out} is a file, expected a folder")
        out.mkdir(parents=True, exist_ok=True)
    console = Console(quiet=quiet)
    made = _puzzles(task, preset, out, workers, console)
    train, test = made["train"], made["test"]
    draw = AugmentedPuzzles(task, train, preset.batch, device, seed)
    decided = {
        "solver": asdict(config),
        "supervision": asdict(model.config),
        "preset": asdict(preset),
        "method": method,
    }
    with _Bar(f"{method} {name}", training, console) as bar:
        result = train_solver(
            model,
            draw,
            training,
            watch=bar.row,
            each_step=bar.step,
            checkpoint=None if out is None else out / "checkpoint.safetensors",
            pause_after=pause_after,
            run=hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16],
        )
    longer = 2 * model.config.segments
    report = {
        "preset": name,
        "method": method,
        "task": asdict(task.config),
        "solver": asdict(config),
        "training": asdict(training),
        "supervision": asdict(model.config),
        "batch": preset.batch,
        "puzzles": preset.puzzles,
        "test_puzzles": preset.test,
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": {**_machine(device), "compiled": compiled},
        "finished": result.finished,
        "steps": result.steps,
        "seconds": result.seconds,
        "test": evaluate(result.model, task, "test", test, device=device),
        "test_last_weights": evaluate(model, task, "test", test, device=device),
        "test_without_halting": evaluate(result.model, task, "test", test, halt=False, device=device),
        "test_longer": evaluate(result.model, task, "test", test, segments=longer, halt=False, device=device),
        "train": evaluate(result.model, task, "train", pick(train, slice(preset.test)), device=device),
        "baselines": {"lookup": look_up(train, test, task.config.size)},
        "history": result.history,
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if out is not None:
        write_text(out / "result.json", json.dumps(report, indent=2) + "\n")
    return result, report


def prepare(name: str, out: Path, workers: int | None = None, quiet: bool = False, **changes: Any) -> dict[Split, int]:
    """Make the puzzles of a preset and leave (see :func:`run`); returns how many there are."""
    check_choice("preset", name, PRESETS)
    preset = SudokuPreset(**{**vars(PRESETS[name]), **changes})
    made = _puzzles(SudokuTask(SudokuConfig(**preset.task)), preset, out, workers, Console(quiet=quiet))
    return {split: len(batch) for split, batch in made.items()}


def _puzzles(
    task: SudokuTask, preset: SudokuPreset, out: Path | None, workers: int | None, console: Console
) -> dict[Split, GridBatch]:
    file = None if out is None else out / "puzzles.safetensors"
    return puzzle_sets(task, {"train": preset.puzzles, "test": preset.test}, file, workers, console)


def _machine(device: str) -> dict[str, Any]:
    cuda = torch.device(device).type == "cuda"
    return {"torch": torch.__version__, "device": torch.cuda.get_device_name(device) if cuda else "cpu"}


class _Bar:
    """A progress bar by steps or, where training ends by the clock, by seconds; a line every hundred steps where no terminal is."""

    def __init__(self, name: str, training: SolverTraining, console: Console):
        self.console = console
        self.seconds = training.seconds
        self.progress = training_progress(console)
        self.bar = self.progress.add_task(name, total=training.seconds or training.steps, what="", start=False)

    def __enter__(self) -> "_Bar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, step: int, seconds: float, loss: float) -> None:
        done = step if self.seconds is None else seconds
        if not self.progress.tasks[0].started:  # what a checkpoint brought must not count as speed
            self.progress.update(self.bar, completed=done)
            self.progress.start_task(self.bar)
        self.progress.update(self.bar, completed=done, what=f"step {step}, loss {loss:.3f}")

    def row(self, row: dict[str, float]) -> None:
        if not self.console.is_terminal:
            self.console.print(" ".join(f"{name} {value:.4g}" for name, value in row.items()), highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description="Train a recursive solver on procedural Sudoku.")
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True)
    parser.add_argument("--method", choices=("trm", "hrm"), default="trm")
    parser.add_argument("--seconds", type=float, help="stop training after so long, over all calls")
    parser.add_argument("--steps", type=int, default=1_000_000, help="stop training after so many optimiser steps")
    parser.add_argument("--pause-after", type=float, help="leave after so many seconds; the same command goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--average", type=float, help="decay of the weight average that answers")
    parser.add_argument("--compile", dest="compiled", action="store_true", help="blocks through torch.compile")
    parser.add_argument("--puzzles", type=int, help="distinct training puzzles instead of the preset's")
    parser.add_argument("--test", type=int, help="test puzzles instead of the preset's")
    parser.add_argument("--batch", type=int, help="rows a step instead of the preset's")
    parser.add_argument("--out", type=Path, help="folder of result.json, the puzzles and the checkpoint")
    parser.add_argument("--prepare", action="store_true", help="only make the puzzles and leave")
    parser.add_argument("--workers", type=int, help="processes that make puzzles; default one a core for 9x9")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    name, only_puzzles = given.pop("preset"), given.pop("prepare")
    try:
        if only_puzzles:
            if "out" not in given:
                raise ValueError("--prepare: puzzles need a folder to go to; give --out")
            kept = ("out", "workers", "puzzles", "test", "batch")
            print(json.dumps(prepare(name, **{k: v for k, v in given.items() if k in kept})))
            return
        _, report = run(name, **given)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    shown = ("finished", "steps", "seconds", "test", "test_without_halting", "test_longer", "train", "baselines")
    print(json.dumps({k: report[k] for k in shown}, indent=2))


if __name__ == "__main__":
    main()
