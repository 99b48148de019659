"""What a solver's training goes on from: weights, moments, average, the rows at work with their states, and the place in the run.

One safetensors file; nothing is unpickled, and the file is renamed into place whole.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from latentcot.files import write_tensors
from latentcot.reasoner import unique_tensors
from latentcot.recurrent_depth.recursive_solvers.supervision import SupervisionCarry

FORMAT = 1


@dataclass
class SolverProgress:
    """Optimiser steps and seconds spent, the logged rows, the steps behind the last of them, and the examples taken from a queue."""

    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    recent: list[dict[str, float]] = field(default_factory=list)
    given: int = 0


def save_solver(
    path: Path,
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    average: nn.Module | None,
    carry: SupervisionCarry,
    generator: torch.Generator,
    progress: SolverProgress,
    run: str,
) -> None:
    """Write everything; ``run`` names the configuration, so that another run refuses to go on from it."""
    tensors = {f"model.{k}": v for k, v in unique_tensors(model.state_dict()).items()}
    numbers: dict[str, float] = {}
    for place, optimiser in enumerate(optimisers):
        for index, moments in optimiser.state_dict()["state"].items():
            for name, value in moments.items():
                key = f"optimiser.{place}.{index}.{name}"
                if isinstance(value, Tensor):
                    tensors[key] = value
                else:  # a step count stays the Python number that it is
                    numbers[key] = value
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in unique_tensors(average.state_dict()).items()}
    tensors |= {f"carry.{i}": leaf for i, leaf in enumerate(tree_flatten(vars(carry))[0])}
    tensors["generator"] = generator.get_state()
    description = {"format": FORMAT, "run": run, "progress": vars(progress), "numbers": numbers}
    path.parent.mkdir(parents=True, exist_ok=True)
    # copies: two of these tensors may share memory, which the format refuses
    write_tensors(path, {k: v.detach().clone() for k, v in tensors.items()}, {"solver": json.dumps(description)})


def load_solver(
    path: Path,
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    average: nn.Module | None,
    fresh: SupervisionCarry,
    generator: torch.Generator,
    run: str,
) -> tuple[SolverProgress, SupervisionCarry]:
    """Put everything back; returns progress and carry, on the device of ``fresh`` (a carry of the same shapes).

    Raises:
        ValueError: the file is damaged, or of a run with another configuration. Nothing is changed then.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description: dict[str, Any] = json.loads((file.metadata() or {})["solver"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        progress, stored = SolverProgress(**description["progress"]), description["run"]
        numbers, written = dict(description["numbers"]), description["format"]
    except Exception as error:  # safetensors, json, key and type errors alike mean: not a readable checkpoint
        raise ValueError(
            f"checkpoint {path} is damaged ({error}); delete it to start this run from the beginning"
        ) from error
    if written != FORMAT or stored != run:
        raise ValueError(
            f"checkpoint {path} belongs to a run with another configuration; delete it or choose another output folder"
        )
    leaves, shape = tree_flatten(vars(fresh))
    kept = [tensors.get(f"carry.{i}") for i in range(len(leaves))]
    fits = all(a is not None and a.shape == b.shape for a, b in zip(kept, leaves, strict=True))
    if not fits or not _fits(model, _under(tensors, "model.")):
        raise ValueError(f"checkpoint {path} does not fit the model; delete it to start this run from the beginning")
    model.load_state_dict(_under(tensors, "model."), strict=False)  # shared tensors are stored once
    if average is not None:
        average.load_state_dict(_under(tensors, "average."), strict=False)
    for place, optimiser in enumerate(optimisers):
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**_under(tensors, f"optimiser.{place}."), **_under(numbers, f"optimiser.{place}.")}.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    generator.set_state(tensors["generator"])
    moved = [a.to(b.device) for a, b in zip(kept, leaves, strict=True) if a is not None]
    return progress, SupervisionCarry(**tree_unflatten(moved, shape))


def _under(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _fits(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    expected = unique_tensors(model.state_dict())
    return set(weights) == set(expected) and all(weights[k].shape == expected[k].shape for k in expected)
