r"""Training a recursive solver on grids: one optimiser step a segment, a warm-up, and an average of the weights.

The published recipe: arctangent Adam, betas (0.9, 0.95), rate 1e-4 after 2000 warm-up steps, decay 0.1 (1.0 for Sudoku), batch 768; TRM
answers with an exponential average of its weights (0.999), HRM with the last ones. Puzzle embeddings learn by sign descent.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from latentcot.recurrent_depth.recursive_solvers.optimisers import ArctangentAdam, SignDescent
from latentcot.recurrent_depth.recursive_solvers.supervision import DeepSupervision
from latentcot.recurrent_depth.settings import check_choice, check_count

Examples = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class SolverTraining:
    """
    Args:
        steps: the most optimiser steps.
        seconds: stop after so long; ``None`` = not by the clock.
        optimiser: ``arctangent_adam`` or ``adamw``.
        learning_rate, warmup_steps, betas, weight_decay: of all but puzzle embeddings.
        puzzle_rate, puzzle_decay: of the puzzle embeddings.
        average: decay of the weight average that answers; ``None`` = the last weights.
        grad_clip: bound of the gradient's norm, or ``None``.
        seed: of the minimum numbers of segments.
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

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        check_count("warmup_steps", self.warmup_steps)
        check_choice("optimiser", self.optimiser, ("arctangent_adam", "adamw"))
        if self.average is not None and not 0 <= self.average < 1:
            raise ValueError(f"average: {self.average!r} given, expected a number in [0, 1) or None")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"seconds: {self.seconds!r} given, expected a positive number or None")


@dataclass
class TrainingResult:
    """``model``: the one to answer with (averaged weights, where an average was kept); ``steps``, ``seconds``; ``history``: a row of
    ``SegmentLoss.parts`` with ``step`` every ``log_every`` steps, averaged over them."""

    model: DeepSupervision
    steps: int
    seconds: float
    history: list[dict[str, float]]


def train_solver(
    model: DeepSupervision,
    draw: Callable[[int], Examples],
    training: SolverTraining,
    *,
    log_every: int = 100,
    watch: Callable[[dict[str, float]], None] | None = None,
) -> TrainingResult:
    """Train ``model`` in place.

    Args:
        draw: step number -> fresh inputs and targets, always of the same shapes; rows still at work ignore theirs.
        training: see :class:`SolverTraining`.
        watch: called with every row of the history.

    Raises:
        FloatingPointError: the loss is not finite; the weights are those of the step before.
    """
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
    base = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
    average = None
    if training.average is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(training.average))
    generator = torch.Generator().manual_seed(training.seed)
    history: list[dict[str, float]] = []
    recent: list[dict[str, float]] = []
    carry, step, started = None, 0, time.perf_counter()
    model.train()
    while step < training.steps:
        if training.seconds is not None and time.perf_counter() - started >= training.seconds:
            break
        inputs, targets = draw(step)
        carry = model.begin(inputs, targets) if carry is None else carry
        share = min(1.0, (step + 1) / max(1, training.warmup_steps))
        groups = [group for optimiser in optimisers for group in optimiser.param_groups]
        for group, full in zip(groups, base, strict=True):
            group["lr"] = full * share
        result, carry = model(carry, inputs, targets, generator)
        if not bool(torch.isfinite(result.loss.detach())):
            raise FloatingPointError(f"loss is {float(result.loss.detach())} at step {step}")
        model.zero_grad(set_to_none=True)
        result.loss.backward()
        if training.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        for optimiser in optimisers:
            optimiser.step()
        if average is not None:
            average.update_parameters(model)
        step += 1
        recent.append({"loss": float(result.loss.detach()), **result.parts})
        if step % log_every == 0 or step == training.steps:
            row = {"step": float(step), "seconds": time.perf_counter() - started, **_means(recent)}
            history.append(row)
            recent = []
            if watch is not None:
                watch(row)
    answering = model if average is None else average.module
    assert isinstance(answering, DeepSupervision)
    return TrainingResult(answering.eval(), step, time.perf_counter() - started, history)


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the rows; accuracies are weighted by how many examples finished, and NaN when none did."""
    found = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name not in ("exact", "cells")}
    finished = sum(row["finished"] for row in rows)
    for name in ("exact", "cells"):
        total = sum(row[name] * row["finished"] for row in rows if row["finished"])
        found[name] = total / finished if finished else float("nan")
    return found
