"""Files of states that are made of several: :func:`save_states`, :func:`load_states`, one safetensors file each.

Tensors of state ``name`` are stored as ``name/...`` under the names that :meth:`ModelState.parts` gives them, tensors beside the states
under their own. Fingerprint, kind and options stand in the file's metadata, so that a file of another model, or of another kind of
state, is refused before anything is read from it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from latentcot.backbone import ForeignStateError, ModelState
from latentcot.files import write_tensors

KEY = "latentcot_states"


@dataclass(frozen=True)
class StateParts:
    """``states`` and ``tensors`` (all with the batch first) by name, and ``options`` in plain JSON."""

    states: Mapping[str, ModelState]
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]


def save_states(path: str | os.PathLike[str], kind: str, parts: StateParts) -> None:
    """Write one file; it appears whole or not at all.

    Args:
        kind: name of what is saved; :func:`load_states` asks for it.

    Raises:
        ValueError: the folder is missing.
        ForeignStateError: states of several models.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path: there is no folder {path.parent} to write {path.name} into")
    tensors, descriptions = dict(parts.tensors), {}
    for name, state in parts.states.items():
        own, descriptions[name] = state.parts()
        tensors |= {f"{name}/{key}": tensor for key, tensor in own.items()}
    makers = sorted({state.fingerprint for state in parts.states.values()})
    if len(makers) > 1:
        raise ForeignStateError(f"states: they were made by different models (fingerprints {', '.join(makers)})")
    seen: set[int] = set()
    for key, tensor in tensors.items():  # the format stores no tensor under two names
        if tensor.numel() and tensor.data_ptr() in seen:
            tensors[key] = tensor.clone()
        seen.add(tensor.data_ptr())
    about = {"kind": kind, "fingerprint": makers[0], "states": descriptions, "options": dict(parts.options)}
    write_tensors(path, tensors, {KEY: json.dumps(about)})


def load_states(
    path: str | os.PathLike[str], kind: str, fingerprint: str | None = None, device: torch.device | str = "cpu"
) -> StateParts:
    """Read what :func:`save_states` wrote, onto ``device``.

    Raises:
        ValueError: no such file, a damaged one, one of another kind, or one whose parts disagree about the batch.
        ForeignStateError: ``fingerprint`` is given and the states belong to another model.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path: no state file at {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {})[KEY])
            stored, maker = str(about["kind"]), str(about["fingerprint"])
            right = stored == kind and fingerprint in (None, maker)
            tensors = {key: file.get_tensor(key) for key in file.keys()} if right else {}  # noqa: SIM118 (not a mapping)
    except Exception as error:  # safetensors, json and key errors alike mean: not a readable state
        raise ValueError(f"path: {path} is not a readable file of states ({error})") from error
    if stored != kind:
        raise ValueError(f"path: {path} holds {stored}, expected {kind}")
    if not right:
        raise ForeignStateError(
            f"path: {path} was saved by another model: fingerprint {maker!r}, expected {fingerprint!r}"
        )
    try:
        states = {}
        for name, description in about["states"].items():
            own = {k.removeprefix(f"{name}/"): t for k, t in tensors.items() if k.startswith(f"{name}/")}
            states[name] = ModelState.from_parts(own, description)
        beside = {key: tensor for key, tensor in tensors.items() if "/" not in key}
        found = StateParts(states, beside, dict(about["options"]))
        rows = {state.batch_size for state in states.values() if not state.is_fresh} | {len(t) for t in beside.values()}
        if len(rows) > 1:
            raise ValueError(f"parts disagree about the batch: {sorted(map(str, rows))} rows")
    except Exception as error:
        raise ValueError(f"path: {path} is not a readable file of states ({error})") from error
    return found
