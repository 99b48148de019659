"""One file that training can go on from: weights, optimiser moments, averages and the place in the run.

Everything is a tensor or JSON inside one safetensors file, so nothing is ever unpickled, and the file is renamed into place whole.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from latentcot.files import write_tensors
from latentcot.reasoner import unique_tensors

FORMAT = 1


@dataclass
class Progress:
    """Where a run stands: optimiser steps done, examples seen, training FLOPs, seconds spent, the logged losses, and how many of the
    steps were passed over because gradients were not finite."""

    step: int = 0
    examples: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor] | None,
    progress: Progress,
    run: str,
) -> None:
    """Write everything; ``run`` names the run's configuration, so that another run refuses to go on from it."""
    tensors = {f"model.{k}": v for k, v in unique_tensors(model.state_dict()).items()}
    for index, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    for name, value in (average or {}).items():
        tensors[f"average.{name}"] = value
    description = {"format": FORMAT, "run": run, "progress": vars(progress)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"latentcot_checkpoint": json.dumps(description)})


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: str
) -> tuple[Progress, dict[str, Tensor] | None]:
    """Put weights and moments back; returns the progress and the averages.

    Raises:
        ValueError: the file is damaged, or was written by a run with another configuration. Model and optimiser are untouched then.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description: dict[str, Any] = json.loads((file.metadata() or {})["latentcot_checkpoint"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        progress = Progress(**description["progress"])
        stored_run, stored_format = description["run"], description["format"]
    except Exception as error:  # safetensors, json, key and type errors alike mean: not a readable checkpoint
        raise ValueError(
            f"checkpoint {path} is damaged ({error}); delete it to start this run from the beginning"
        ) from error
    if stored_format != FORMAT:
        raise ValueError(f"checkpoint {path} has format {stored_format}, this version reads format {FORMAT}")
    if stored_run != run:
        raise ValueError(
            f"checkpoint {path} belongs to a run with another configuration; delete it or choose another output folder"
        )
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    expected = unique_tensors(model.state_dict())
    if set(weights) != set(expected) or any(weights[k].shape != expected[k].shape for k in weights):
        raise ValueError(f"checkpoint {path} does not fit the model; delete it to start this run from the beginning")
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    model.load_state_dict(weights, strict=False)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    average = {k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")}
    return progress, average or None
