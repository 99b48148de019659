"""Train one arm of the diffusion study on Sudoku and report what it solves, by sampler and number of passes.

``python -m latentcot.compare.diffusion_sudoku --preset grids9 --arm masked-softmax --device cuda --seconds 200 --out FOLDER``

========= ==================================================================================================================
preset    puzzles
========= ==================================================================================================================
sanity4   4x4, 12 blanks, unseen clue patterns of grids that training has seen: a check that training works, not of reasoning
classes4  4x4, 6 to 12 blanks, test grids of the 4 classes (up to relabelling) that training does not hold
grids9    9x9, 54 blanks, 1000 puzzles, each seen under fresh symmetries; test grids of other classes up to all symmetries; for
          some minutes of a GPU an arm
========= ==================================================================================================================

Arms: ``autoregressive-softmax``, ``masked-softmax``, ``block-softmax``, and each of them with ``-hybrid``, of equal parameters.

Making 2000 puzzles of 9x9 takes minutes of a processor; ``--prepare`` does it alone, and ``--puzzles FILE`` reads what it wrote (or
what ``recursive_solvers.sudoku_run --preset grids9 --prepare`` did) on any machine. Started again with the same folder, a run goes on
from its checkpoint; with ``--pause-after`` it leaves by itself after so many seconds. ``result.json`` holds configuration, history and
accuracies.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from latentcot.compare.diffusion_arms import ARMS, Sizes, split_arm
from latentcot.compare.diffusion_problems import SudokuProblem
from latentcot.compare.diffusion_run import Paused, run_arm
from latentcot.compare.worker import write_json
from latentcot.training import TrainConfig, progress_bar


@dataclass(frozen=True)
class GridPreset:
    """``problem``: arguments of :class:`~latentcot.compare.diffusion_problems.SudokuProblem`; ``rows``: of a batch."""

    problem: dict[str, Any]
    sizes: Sizes = field(default_factory=Sizes)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=1000, learning_rate=2e-3, final_rate=0.0, warmup_steps=100)
    )
    rows: int = 64


PRESETS = {
    "sanity4": GridPreset({"task": {"size": 4, "blanks": 12, "split_by": "pattern"}}),
    "classes4": GridPreset(
        {
            "task": {"size": 4, "blanks": 12, "fewest_blanks": 6, "split_by": "grid"},
            "test": 250,
            "test_blanks": (6, 8, 10, 12),
        }
    ),
    "grids9": GridPreset(
        {"task": {"size": 9, "blanks": 54}, "puzzles": 1000},
        Sizes(layers=6, width=256, heads=4, mlp_width=768, period=3, average=0.999),
        TrainConfig(
            steps=10_000,
            learning_rate=1e-3,
            final_rate=0.0,
            warmup_steps=300,
            checkpoint_every=500,
            log_every=100,
            mixed_precision="bf16",
        ),
        rows=256,
    ),
}


def run(
    name: str,
    arm: str,
    out: Path,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    pause_after: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    precision: str | None = None,
    puzzles: Path | None = None,
    limit: int | None = None,
    test: int | None = None,
    rows: int | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train an arm on a preset and measure it: the report that ``out / result.json`` gets.

    Args:
        seconds, steps: of training, instead of the preset's steps; see :func:`~latentcot.compare.diffusion_run.run_arm`.
        pause_after: leave after so many seconds of training in this call.
        device: ``cpu`` or ``cuda``.
        precision: ``no`` (fp32) or ``bf16`` of matrix products in training, instead of the preset's; always fp32 on a CPU unless given.
        puzzles: file of the puzzles; default ``out / "puzzles.safetensors"``.
        limit, test, rows: training puzzles, test puzzles and rows of a batch, instead of the preset's.

    Raises:
        Paused: after a pause; the same call goes on.
        ValueError: unknown names, a device that is not there, both ``seconds`` and ``steps``, a folder or file of another run.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: {name!r} given, expected one of {', '.join(PRESETS)}")
    split_arm(arm)
    if seconds is not None and steps is not None:
        raise ValueError("seconds, steps: give one of them")
    for option, value in (("seconds", seconds), ("pause_after", pause_after)):
        if value is not None and value <= 0:
            raise ValueError(f"{option}: {value} given, expected a positive number")
    cuda = torch.device(device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} given, but torch {torch.__version__} finds no CUDA device")
    if not cuda:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_float32_matmul_precision("high")
    console = Console(quiet=quiet)
    preset = PRESETS[name]
    problem = _problem(preset, out, puzzles, limit, test, workers, console)
    config = replace(
        preset.train,
        seed=seed,
        steps=preset.train.steps if steps is None else steps,
        mixed_precision=precision or (preset.train.mixed_precision if cuda else "no"),
    )
    with progress_bar(f"{arm} {name}", console) as bar:
        trained, report = run_arm(
            problem,
            arm,
            preset.sizes,
            config,
            preset.rows if rows is None else rows,
            out,
            seconds=seconds,
            pause_after=pause_after,
            device=device,
            watch=bar,
        )
    report |= {
        "preset": name,
        "machine": {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if cuda else "cpu",
            "python": sys.version.split()[0],
        },
        "baselines": problem.baselines(),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    trained.save_pretrained(out / "model")
    write_json(out / "result.json", report)
    return report


def _problem(
    preset: GridPreset,
    out: Path,
    puzzles: Path | None,
    limit: int | None,
    test: int | None,
    workers: int | None,
    console: Console,
) -> SudokuProblem:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder")
    changed = {k: v for k, v in (("puzzles", limit), ("test", test)) if v is not None}
    file = out / "puzzles.safetensors" if puzzles is None else puzzles
    return SudokuProblem(**{**preset.problem, **changed}, file=file, workers=workers, console=console)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description="Train one arm of the diffusion study on Sudoku.")
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True)
    parser.add_argument("--arm", choices=ARMS, default="masked-softmax")
    parser.add_argument("--out", type=Path, required=True, help="folder of result.json, the checkpoint and the model")
    parser.add_argument("--seconds", type=float, help="train for about so long, over all calls")
    parser.add_argument("--steps", type=int, help="optimiser steps instead of the preset's")
    parser.add_argument("--pause-after", type=float, help="leave after so many seconds; the same command goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("no", "bf16"), help="of matrix products in training")
    parser.add_argument("--puzzles", type=Path, help="file of prepared puzzles; written if it is not there")
    parser.add_argument("--limit", type=int, help="training puzzles instead of the preset's")
    parser.add_argument("--test", type=int, help="test puzzles instead of the preset's")
    parser.add_argument("--rows", type=int, help="rows of a batch instead of the preset's")
    parser.add_argument("--workers", type=int, help="processes that make puzzles; default one a core for 9x9")
    parser.add_argument("--prepare", action="store_true", help="only make the puzzles and leave")
    given = vars(parser.parse_args(arguments))
    name, arm, only_puzzles = given.pop("preset"), given.pop("arm"), given.pop("prepare")
    try:
        if only_puzzles:
            kept = {key: given[key] for key in ("out", "puzzles", "limit", "test", "workers")}
            problem = _problem(PRESETS[name], **kept, console=Console())
            print(json.dumps(problem.describe()))
            return
        report = run(name, arm, **given)
    except Paused as pause:
        print(json.dumps({"finished": False, "because": str(pause)}))
        return
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    shown = {
        test: {s: [round(v["exact"], 4), v["nfe"]] for s, v in rows.items()} for test, rows in report["solved"].items()
    }
    print(json.dumps({"finished": True, "steps": report["training"]["steps"], "exact and nfe": shown}, indent=1))


if __name__ == "__main__":
    main()
