r"""The one training loop of every method, on accelerate.

Each optimiser step n draws from generators seeded by (seed, n) and reads batch n of the data, so that a run which was killed and
resumed is the run that was not. Learning rate: linear warm-up, then cosine to ``final_rate`` of the peak, over the whole budget.

Started by ``accelerate launch`` or ``torchrun`` in several processes, each reads its share of batch n and gradients are averaged.
What is reported (loss, FLOPs) is of all of them; the first process alone writes checkpoints and is watched. A checkpoint does not
know how many processes there were: a run may go on with another number if its source deals out global batches.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import cos, inf, isfinite, pi
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor

from latentcot.reasoner import Phase, Reasoner, StepContext, TaskBatch
from latentcot.training.budget import TRAINING_FACTOR, count_parameters
from latentcot.training.checkpoint import Progress, load_checkpoint, save_checkpoint


class BatchSource(Protocol):
    """Training data: batch number n depends on n alone, whoever asks and whenever."""

    def stream(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[TaskBatch]: ...

    def describe(self) -> dict[str, Any]:
        """JSON that names the data; part of a run's identity."""
        ...


@dataclass(frozen=True)
class TrainConfig:
    """
    Args:
        steps: optimiser steps in all.
        learning_rate: peak; ``final_rate`` is the share of it left at the end.
        warmup_steps: linear warm-up from 0.
        weight_decay: decoupled, on matrices only (vectors, norms and scalars are left alone).
        betas, eps, grad_clip: of AdamW; global gradient norm. ``grad_clip=None`` switches clipping off.
        seed: of initialisation and of every draw in training; never of the data.
        checkpoint_every: steps between checkpoints; 0 = only at the end.
        log_every: steps between entries of the loss history.
        mixed_precision: accelerate's ``no`` or ``bf16`` (``fp16`` needs a loss scale, which checkpoints do not hold).
    """

    steps: int
    learning_rate: float = 2e-3
    final_rate: float = 0.1
    warmup_steps: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    grad_clip: float | None = 1.0
    seed: int = 0
    checkpoint_every: int = 200
    log_every: int = 20
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup_steps", 0), ("checkpoint_every", 0), ("log_every", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        for name, low, high in (
            ("learning_rate", 0.0, 1.0),
            ("final_rate", 0.0, 1.0),
            ("weight_decay", 0.0, float("inf")),
            ("eps", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name}: expected a number within [{low}, {high}], got {value!r}")
        if self.learning_rate == 0:
            raise ValueError("learning_rate: 0 would train nothing")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision: {self.mixed_precision!r} given, expected 'no' or 'bf16'")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"grad_clip: expected a positive number or None, got {self.grad_clip}")


@dataclass(frozen=True)
class TrainReport:
    """What a finished run used: steps, examples, training FLOPs, seconds in the loop, parameters, the loss history, and how many of
    the steps moved nothing because gradients were not finite."""

    steps: int
    examples: int
    flops: float
    seconds: float
    parameters: int
    history: list[dict[str, float]]
    skipped: int = 0


Watcher = Callable[[int, int, float, str], None]
"""Called after each step with (step, of how many, loss, phase name)."""


def train(
    reasoner: Reasoner,
    data: BatchSource,
    config: TrainConfig,
    folder: Path | None = None,
    watch: Watcher | None = None,
    skip_nonfinite: bool = False,
) -> TrainReport:
    """Train in place; go on from ``folder/checkpoint.safetensors`` when it is there.

    Args:
        folder: where checkpoints go; ``None`` = nothing is saved.
        watch: sees every step; :func:`~latentcot.training.progress_bar` makes one that shows it.
        skip_nonfinite: a step whose gradients have no finite norm moves neither weights nor moments, is counted in
            ``TrainReport.skipped``, and the run goes on (the hybrid study's recipe). By default it stops the run. In several processes
            gradients are averaged first, so all skip or none.

    Raises:
        ValueError: a damaged checkpoint, one of another configuration, or a folder for a method whose carry it can not hold.
        FloatingPointError: the loss is not finite, or gradients are not and ``skip_nonfinite`` is off (step and phase named). The
            weights are those of the step before.
    """
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.mixed_precision:
        AcceleratorState._reset_state()  # accelerate keeps the first precision of a process for good; a notebook may ask for two
    # Methods leave parameters out of a pass (frozen phases, gates of another direction): gradients must not be waited for.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[unused])
    phases = tuple(reasoner.phases())
    borders = phase_borders(phases, config.steps)
    optimizer = torch.optim.AdamW(
        _parameter_groups(reasoner, config.weight_decay), lr=config.learning_rate, betas=config.betas, eps=config.eps
    )
    model, optimizer = accelerator.prepare(reasoner, optimizer)
    run = _run_name(reasoner, data, config, skip_nonfinite)
    path = None if folder is None else folder / "checkpoint.safetensors"
    progress, average = Progress(), None
    if path is not None and path.is_file():
        progress, average = load_checkpoint(path, accelerator.unwrap_model(model), optimizer, run)
    batches = data.stream(progress.step, accelerator.process_index, accelerator.num_processes)
    carry: Any = None
    model.train()
    entered: Phase | None = None
    started, before = time.perf_counter(), progress.seconds
    try:
        for step in range(progress.step, config.steps):
            phase = phases[sum(step >= border for border in borders) - 1]
            if phase is not entered:
                _enter(reasoner, phase)
                if step in borders[1:] and phase.reset_optimizer:
                    optimizer.state.clear()
                if phase.ema is None:
                    average = None
                entered, carry = phase, None
            batch = next(batches).to(accelerator.device)
            seed = (config.seed * 1_000_003 + step) * 1_009 + 2 * accelerator.process_index
            torch.manual_seed(seed)
            context = StepContext(
                step=step,
                total_steps=config.steps,
                phase=phase,
                generator=torch.Generator().manual_seed(seed + 1),
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
            if carry is None:
                carry = reasoner.begin(batch, context)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate(step, config)
            output = model(batch, context, carry)
            value, flops = _over_processes(accelerator, float(output.loss.detach()), output.flops)
            if not isfinite(value):  # in all processes at once: none is left waiting for the others
                raise FloatingPointError(f"loss is {value} at step {step} (phase {phase.name!r}) of {reasoner.method}")
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(output.loss)
            # without a bound every gradient is multiplied by exactly 1
            norm = accelerator.clip_grad_norm_(
                model.parameters(), inf if config.grad_clip is None else config.grad_clip
            )
            assert norm is not None  # it is for the back ends that clip by themselves, which are not used here
            if isfinite(float(norm)):
                optimizer.step()
            elif skip_nonfinite:
                progress.skipped += 1
            else:
                raise FloatingPointError(
                    f"gradients have the norm {float(norm)} at step {step} (phase {phase.name!r}) of {reasoner.method}; "
                    "skip_nonfinite=True passes over such steps"
                )
            carry = output.carry
            if carry is not None and path is not None:
                raise ValueError(
                    f"folder: {reasoner.method!r} carries rows over optimiser steps, and checkpoints hold no carry: a resumed run "
                    "would not be the same; train with folder=None"
                )
            if phase.ema is not None:
                average = _moved_average(average, accelerator.unwrap_model(model), phase.ema)
            progress.step = step + 1
            progress.examples += len(batch) * accelerator.num_processes
            progress.flops += TRAINING_FACTOR * flops
            progress.seconds = before + time.perf_counter() - started
            if progress.step % config.log_every == 0 or progress.step == config.steps:
                progress.history.append({"step": progress.step, "loss": value, **output.parts})
            if watch is not None and accelerator.is_main_process:
                watch(progress.step, config.steps, value, phase.name)
            due = config.checkpoint_every and progress.step % config.checkpoint_every == 0
            if path is not None and accelerator.is_main_process and (due or progress.step == config.steps):
                save_checkpoint(path, accelerator.unwrap_model(model), optimizer, average, progress, run)
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
        reasoner.requires_grad_(True)
    accelerator.wait_for_everyone()  # no process leaves before the last checkpoint is whole
    if average is not None:
        accelerator.unwrap_model(model).load_state_dict(average, strict=False)
    model.eval()
    return TrainReport(
        progress.step,
        progress.examples,
        progress.flops,
        progress.seconds,
        count_parameters(reasoner),
        progress.history,
        progress.skipped,
    )


def _over_processes(accelerator: Accelerator, loss: float, flops: float) -> tuple[float, float]:
    """Mean loss and sum of FLOPs over all processes."""
    if accelerator.num_processes == 1:
        return loss, flops
    both = torch.tensor([loss, flops], dtype=torch.float64, device=accelerator.device)
    total = accelerator.reduce(both, reduction="sum")
    assert isinstance(total, Tensor)
    return float(total[0]) / accelerator.num_processes, float(total[1])


def phase_borders(phases: Sequence[Phase], steps: int) -> list[int]:
    """First step of each phase, shares normalised: ``[0, ...]``."""
    if not phases:
        raise ValueError("phases: a method needs at least one")
    whole = sum(p.share for p in phases)
    if whole <= 0 or any(p.share < 0 for p in phases):
        raise ValueError(f"phases: shares must not be negative and not all zero, got {[p.share for p in phases]}")
    return [round(steps * sum(p.share for p in phases[:i]) / whole) for i in range(len(phases))]


def rate(step: int, config: TrainConfig) -> float:
    """Learning-rate factor of a step, within (0, 1]."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.final_rate + (1 - config.final_rate) * (1 + cos(pi * done)) / 2


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def _enter(reasoner: Reasoner, phase: Phase) -> None:
    for name, parameter in reasoner.named_parameters():
        parameter.requires_grad_(phase.trainable is None or name.startswith(phase.trainable))
    if phase.trainable is not None and not any(p.requires_grad for p in reasoner.parameters()):
        raise ValueError(f"phase {phase.name!r}: no parameter name begins with one of {phase.trainable}")


@torch.no_grad()
def _moved_average(average: dict[str, Tensor] | None, model: torch.nn.Module, decay: float) -> dict[str, Tensor]:
    current = {k: v.detach() for k, v in model.named_parameters()}
    if average is None:
        return {k: v.clone() for k, v in current.items()}
    return {k: average[k].to(v.device).lerp(v, 1 - decay) for k, v in current.items()}


def _run_name(reasoner: Reasoner, data: BatchSource, config: TrainConfig, skip_nonfinite: bool) -> str:
    """Hash of everything that decides a run; a checkpoint is refused when it differs. How often is saved or logged does not."""
    identity = {
        "method": reasoner.method,
        "settings": reasoner.settings,
        "backbone": reasoner.backbone.config.to_diff_dict(),
        "data": data.describe(),
        "train": {k: v for k, v in asdict(config).items() if k not in ("checkpoint_every", "log_every")},
        **({"skip_nonfinite": True} if skip_nonfinite else {}),  # checkpoints from before the switch go on
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
