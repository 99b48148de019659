r"""Training a recursive solver on grids: one optimiser step a segment, a warm-up, and an average of the weights.

The published recipe: arctangent Adam, betas (0.9, 0.95), rate 1e-4 after 2000 warm-up steps, decay 0.1 (1.0 for Sudoku), batch 768; TRM
answers with an exponential average of its weights (0.999), HRM with the last ones. Puzzle embeddings learn by sign descent.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from latentcot.recurrent_depth.example_queue import ExampleQueue
from latentcot.recurrent_depth.recursive_solvers.checkpoint import SolverProgress, load_solver, save_solver
from latentcot.recurrent_depth.recursive_solvers.optimisers import ArctangentAdam, SignDescent
from latentcot.recurrent_depth.recursive_solvers.supervision import DeepSupervision, SupervisionCarry
from latentcot.recurrent_depth.settings import check_choice, check_count

Examples = tuple[dict[str, Tensor], Tensor]
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class SolverTraining:
    """
    Args:
        steps: the most optimiser steps.
        seconds: stop after so long, interruptions not counted; ``None`` = not by the clock.
        optimiser: ``arctangent_adam`` or ``adamw``.
        learning_rate, warmup_steps, betas, weight_decay: of all but puzzle embeddings.
        puzzle_rate, puzzle_decay: of the puzzle embeddings.
        average: decay of the weight average that answers; ``None`` = the last weights.
        grad_clip: bound of the gradient's norm, or ``None``.
        seed: of the minimum numbers of segments.
        precision: ``float32``, or ``bfloat16`` for the matrix products of a segment (as the published runs); weights, moments and
            losses stay as they are.
    """

    steps: int
    seconds: float | None = None
    optimiser: str = "arctangent_adam"
    learning_rate: float = 1e-4
    warmup_steps: int = 2000
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    puzzle_rate: float = 1e-2
    puzzle_decay: float = 0.1
    average: float | None = 0.999
    grad_clip: float | None = None
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        check_count("warmup_steps", self.warmup_steps)
        check_choice("optimiser", self.optimiser, ("arctangent_adam", "adamw"))
        check_choice("precision", self.precision, PRECISIONS)
        if self.average is not None and not 0 <= self.average < 1:
            raise ValueError(f"average: {self.average!r} given, expected a number in [0, 1) or None")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"seconds: {self.seconds!r} given, expected a positive number or None")


@dataclass
class TrainingResult:
    """``model``: the one to answer with (averaged weights, where an average was kept); ``steps``, ``seconds``; ``history``: a row of
    ``SegmentLoss.parts`` with ``step`` every ``log_every`` steps, averaged over them; ``finished``: ``False`` when a pause came before
    the end."""

    model: DeepSupervision
    steps: int
    seconds: float
    history: list[dict[str, float]]
    finished: bool = True


def train_solver(
    model: DeepSupervision,
    draw: Callable[[int], Examples] | ExampleQueue,
    training: SolverTraining,
    *,
    rows: int | None = None,
    log_every: int = 100,
    watch: Callable[[dict[str, float]], None] | None = None,
    each_step: Callable[[int, float, float], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: float = 60.0,
    pause_after: float | None = None,
    run: str = "",
) -> TrainingResult:
    """Train ``model`` in place.

    Args:
        draw: step number -> fresh inputs and targets, always of the same shapes; rows still at work ignore theirs, which a stream
            without end can afford. Or an :class:`~latentcot.recurrent_depth.ExampleQueue` of ``(inputs, targets)``: it is asked for
            as many examples as rows are free, so that every epoch is the data set once.
        training: see :class:`SolverTraining`.
        rows: of a batch; with a queue alone.
        watch: called with every row of the history.
        each_step: called with (step, seconds, loss) after every step.
        checkpoint: file to go on from when it is there, written every ``checkpoint_every`` seconds and at the end. A run that goes on
            takes the steps that it would have taken.
        pause_after: leave after so many seconds of this call; called again with the same file, training goes on.
        run: names what else decides the run (its data); a file of another name or another ``training`` is refused, where ``steps``
            and ``seconds`` do not count, so that a run can be made longer.

    Raises:
        FloatingPointError: the loss is not finite; the weights are those of the step before.
        ValueError: a damaged or foreign checkpoint; ``rows`` without a queue, or a queue without.
    """
    queue = draw if isinstance(draw, ExampleQueue) else None
    if (queue is None) != (rows is None):
        raise ValueError(f"rows: {rows!r} given; a queue needs it, and a function brings its own")
    nobody = torch.zeros(check_count("rows", 1 if rows is None else rows, 1), dtype=torch.bool)

    def examples(step: int, carry: SupervisionCarry | None) -> Examples:
        if queue is not None:
            return queue.take(nobody if carry is None else carry.halted.cpu())
        assert not isinstance(draw, ExampleQueue)
        return draw(step)

    optimisers = _optimisers(model, training)
    base = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
    average = None
    if training.average is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(training.average))
    generator = torch.Generator().manual_seed(training.seed)
    progress, carry = SolverProgress(), None
    identity = _identity(training, run)
    if checkpoint is not None and checkpoint.is_file():
        fresh = model.begin(*examples(0, None))
        progress, carry = load_solver(checkpoint, model, optimisers, average, fresh, generator, identity)
        if queue is not None:
            queue.given = progress.given

    def save() -> None:
        if checkpoint is not None and carry is not None:
            progress.given = 0 if queue is None else queue.given
            save_solver(checkpoint, model, optimisers, average, carry, generator, progress, identity)

    before, started = progress.seconds, time.perf_counter()
    saved, finished = started, True
    model.train()
    while progress.step < training.steps:
        now = time.perf_counter()
        progress.seconds = before + now - started
        if training.seconds is not None and progress.seconds >= training.seconds:
            break
        if pause_after is not None and now - started >= pause_after:
            finished = False
            break
        if now - saved >= checkpoint_every:
            save()
            saved = now
        inputs, targets = examples(progress.step, carry)
        if carry is None:
            carry = model.begin(inputs, targets)
            if queue is not None:  # what it gave set shapes alone, now every row is free
                inputs, targets = examples(progress.step, carry)
        share = min(1.0, (progress.step + 1) / max(1, training.warmup_steps))
        groups = [group for optimiser in optimisers for group in optimiser.param_groups]
        for group, full in zip(groups, base, strict=True):
            group["lr"] = full * share
        with _precision(training.precision, targets.device):
            result, carry = model(carry, inputs, targets, generator)
        loss = float(result.loss.detach())
        if not bool(torch.isfinite(result.loss.detach())):
            raise FloatingPointError(f"loss is {loss} at step {progress.step}")
        model.zero_grad(set_to_none=True)
        result.loss.backward()
        if training.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        for optimiser in optimisers:
            optimiser.step()
        if average is not None:
            average.update_parameters(model)
        progress.step += 1
        progress.seconds = before + time.perf_counter() - started
        progress.recent.append({"loss": loss, **result.parts})
        if progress.step % log_every == 0 or progress.step == training.steps:
            row = {"step": float(progress.step), "seconds": progress.seconds, **_means(progress.recent)}
            progress.history.append(row)
            progress.recent = []
            if watch is not None:
                watch(row)
        if each_step is not None:
            each_step(progress.step, progress.seconds, loss)
    save()
    answering = model if average is None else average.module
    assert isinstance(answering, DeepSupervision)
    return TrainingResult(answering.eval(), progress.step, progress.seconds, progress.history, finished)


def _optimisers(model: DeepSupervision, training: SolverTraining) -> list[torch.optim.Optimizer]:
    puzzles = getattr(model.module, "puzzle_embedding", None)
    apart = set() if puzzles is None else {id(p) for p in puzzles.parameters()}
    kept = [p for p in model.parameters() if id(p) not in apart]
    rate, betas, decay = training.learning_rate, training.betas, training.weight_decay
    optimisers: list[torch.optim.Optimizer] = [
        ArctangentAdam(kept, rate, betas, decay)
        if training.optimiser == "arctangent_adam"
        else torch.optim.AdamW(kept, rate, betas, weight_decay=decay)
    ]
    if puzzles is not None:
        optimisers.append(SignDescent(puzzles.parameters(), training.puzzle_rate, training.puzzle_decay))
    return optimisers


def _precision(name: str, device: torch.device) -> Any:
    # The cache of autocast would hand the casts made in updates without gradient to those with gradient, and weights would not learn.
    return (
        nullcontext() if name == "float32" else torch.autocast(device.type, getattr(torch, name), cache_enabled=False)
    )


def _identity(training: SolverTraining, run: str) -> str:
    counted = {name: value for name, value in vars(training).items() if name not in ("steps", "seconds")}
    return f"{run} {sorted(counted.items())}"


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the rows; accuracies are weighted by how many examples finished, and NaN when none did."""
    found = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name not in ("exact", "cells")}
    finished = sum(row["finished"] for row in rows)
    for name in ("exact", "cells"):
        total = sum(row[name] * row["finished"] for row in rows if row["finished"])
        found[name] = total / finished if finished else float("nan")
    return found
