"""One run of a depth study: train a stack, ask it at every number of recurrences, and look when it would stop by itself."""

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from latentcot.compare.depth import SCHEMA, DepthJob, SudokuPart, TokenPart
from latentcot.compare.evaluate import evaluate
from latentcot.compare.jobs import finish_job
from latentcot.compare.worker import Report, TaskData
from latentcot.reasoner import AnswerLimits, Reasoner
from latentcot.recurrent_depth.recursive_solvers import DeepSupervision, RecursiveSolver, train_solver
from latentcot.recurrent_depth.recursive_solvers.sudoku_puzzles import look_up, pick, puzzle_sets
from latentcot.recurrent_depth.recursive_solvers.sudoku_run import AugmentedPuzzles
from latentcot.tasks.base import Task
from latentcot.tasks.sudoku import GridBatch
from latentcot.training import count_parameters, train
from latentcot.training.loop import Watcher

ROWS = 500  # puzzles that are solved together


def run_depth_job(job: DepthJob, report: Report | None = None) -> dict[str, Any]:
    """Train (or go on training), measure, write and return the result."""
    return finish_job(job, SCHEMA, report, lambda watch: _work(job, watch))


def _work(job: DepthJob, watch: Watcher) -> dict[str, Any]:
    job.folder.mkdir(parents=True, exist_ok=True)
    found = _run_tokens(job, job.part, watch) if isinstance(job.part, TokenPart) else _run_sudoku(job, job.part, watch)
    about = {"name": job.name, "task": job.part.task, "stack": job.stack, "seed": job.seed}
    return without_nan({**about, **found})


def without_nan(value: Any) -> Any:
    """``value`` with ``None`` in place of numbers that are none (accuracy over no example)."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- answers of tokens -------------------------------------------------------------------------------------------------


def _run_tokens(job: DepthJob, part: TokenPart, watch: Watcher) -> dict[str, Any]:
    task = part.make_task()
    reasoner = part.reasoner(job.stack, task, job.seed).to(job.device)
    data = TaskData(task, task.limits, part.batch)
    training = train(reasoner, data, replace(part.train, seed=job.seed), job.folder, watch)
    levels, began = task.levels("test"), time.perf_counter()
    if job.stack == "looped":
        dial = {str(r): _scores(reasoner, task, levels, part.items, r) for r in part.dial}
        measured = {"by_level": dial[str(part.recurrences)], "dial": dial}
        measured["exit"] = exit_statistics(reasoner, task, levels, part.items, part.exit_rule, max(part.dial))
    else:
        measured = {"by_level": _scores(reasoner, task, levels, part.items, None)}
    return {
        "parameters": training.parameters,
        "training": asdict(training),
        "measured": {**measured, "seconds": time.perf_counter() - began},
    }


def _scores(
    reasoner: Reasoner, task: Task, levels: Sequence[int], items: int, recurrences: int | None
) -> dict[str, Any]:
    """Accuracy and cost by difficulty."""
    knobs = None if recurrences is None else {"recurrences": recurrences}
    scores = evaluate(reasoner, task, levels, items, knobs=knobs)
    return {
        str(s.difficulty): {
            "items": s.items,
            "accuracy": s.accuracy,
            "flops": s.flops,
            "passes": s.sequential_passes,
        }
        for s in scores
    }


def exit_statistics(
    reasoner: Reasoner, task: Task, levels: Sequence[int], items: int, rule: Any, most: int
) -> dict[str, Any]:
    """By difficulty: mean number of recurrences under an exit rule, how often each number was taken, and the accuracy then."""
    found = {}
    limits = AnswerLimits(knobs={"recurrences": most, "exit_rule": dict(rule)})
    for level in levels:
        batch = task.difficulty_batch("test", level, range(items)).to(next(reasoner.parameters()).device)
        output = reasoner.answer(batch.prompts, limits)
        taken = output.info["recurrences"]
        found[str(level)] = {
            "mean": float(taken.double().mean()),
            "counts": {str(n): count for n, count in sorted(Counter(taken.tolist()).items())},
            "accuracy": float(task.score(batch, output.ids).double().mean()),
            "flops": float(output.flops.double().mean()),
        }
    return found


# -- Sudoku ------------------------------------------------------------------------------------------------------------


def _run_sudoku(job: DepthJob, part: SudokuPart, watch: Watcher) -> dict[str, Any]:
    task = part.make_task()
    sets = puzzle_sets(task, {"train": part.puzzles, "test": part.test}, job.shared)
    model = part.model(job.stack, job.seed).to(job.device)
    draw = AugmentedPuzzles(task, sets["train"], part.batch, job.device, job.seed)
    training = part.train(job.stack, job.seed)

    def each_step(step: int, _: float, loss: float) -> None:
        watch(step, training.steps, loss, "")

    result = train_solver(
        model,
        draw,
        training,
        log_every=20,
        each_step=each_step,
        checkpoint=job.folder / "checkpoint.safetensors",
        run=json.dumps(job.identity(), sort_keys=True),
    )
    solver, began = result.model.module, time.perf_counter()
    assert isinstance(solver, RecursiveSolver)
    segments = part.segments if job.stack == "looped" else 1
    price, cells = solver.flops(task.config.size**2), part.batch * result.steps
    c = solver.config
    updates = c.cycles * (c.latent_updates + 1)
    share = (2 if c.gradient == "last_updates" else c.latent_updates + 1) / updates
    measured = measure_puzzles(result.model, sets["test"], part, segments, price, job.device)
    if job.stack != "looped":
        measured = {"by_level": measured["by_level"]}
    return {
        "parameters": count_parameters(model),
        "training": {
            "steps": result.steps,
            "examples": cells,
            # every update forward, and the last ones twice that backward
            "flops": price * cells * (1 + 2 * share),
            "seconds": result.seconds,
            "history": result.history,
        },
        "measured": {**measured, "seconds": time.perf_counter() - began},
    }


def puzzle_levels(batch: GridBatch, part: SudokuPart) -> Tensor:
    """The difficulty of each puzzle ``[B]``: its blanks, or its class of guesses."""
    return (batch.inputs == 1).sum(1) if part.level == "blanks" else batch.difficulty


def measure_puzzles(
    model: DeepSupervision, test: GridBatch, part: SudokuPart, segments: int, price: float, device: str
) -> dict[str, Any]:
    """Whole grids that are right, by difficulty: after each number of segments of the dial, and where the model stops by itself."""
    levels, most = puzzle_levels(test, part), max(*part.dial, segments)
    right: dict[int, list[Tensor]] = {n: [] for n in {*part.dial, segments}}
    stopped, taken = [], []
    for rows in torch.arange(len(test)).split(ROWS):
        some = pick(test, rows)
        inputs = {"grid": some.inputs.to(device)}
        solution = model.solve(inputs, most, halt=False, record=True)
        for n, found in right.items():
            found.append((solution.history[n - 1].cpu() == some.targets).all(1))
        halting = model.solve(inputs, segments)
        stopped.append((halting.answers.cpu() == some.targets).all(1))
        taken.append(halting.segments.cpu())
    hits = {n: torch.cat(found).double() for n, found in right.items()}
    by_dial = {
        str(n): {
            str(level): {
                "items": int((levels == level).sum()),
                "accuracy": float(hits[n][levels == level].mean()),
                "flops": n * price,
                "passes": float(n),
            }
            for level in sorted(set(levels.tolist()))
        }
        for n in sorted(hits)
    }
    right_there, counts = torch.cat(stopped).double(), torch.cat(taken)
    leaving = {
        str(level): {
            "mean": float(counts[levels == level].double().mean()),
            "counts": {str(n): c for n, c in sorted(Counter(counts[levels == level].tolist()).items())},
            "accuracy": float(right_there[levels == level].mean()),
            "flops": float(counts[levels == level].double().mean()) * price,
        }
        for level in sorted(set(levels.tolist()))
    }
    dial = {n: found for n, found in by_dial.items() if int(n) in part.dial}
    return {"by_level": by_dial[str(segments)], "dial": dial, "exit": leaving}


def baselines(part: TokenPart | SudokuPart, file: Path, console: Console) -> dict[str, dict[str, float]]:
    """What can be had without thinking, by difficulty: chance and the best shortcut, or the look-up in the training puzzles."""
    task = part.make_task()
    if isinstance(part, TokenPart):
        found = task.baselines_by_difficulty("test", part.items)
        return {str(d): {"chance": b["chance"], "heuristic": b["heuristic"]} for d, b in found.items()}
    sets = puzzle_sets(task, {"train": part.puzzles, "test": part.test}, file, None, console)  # type: ignore[arg-type]
    levels = puzzle_levels(sets["test"], part)
    size = task.config.size  # type: ignore[attr-defined]
    return {
        str(level): {"heuristic": look_up(sets["train"], pick(sets["test"], levels == level), size)}
        for level in sorted(set(levels.tolist()))
    }
