"""Weight names of the hybrid study's checkpoint format (arXiv:2507.06457), matched with a model's.

The names are ours already, except in older files:

============================================ ===================================================================================
in the file                                  becomes
============================================ ===================================================================================
``model.layers.i.attn.D``                    dropped: a parameter of early Gated DeltaNet without effect on the output
``mlp.gate_proj.weight [2I, D]``, no ``up``  split: gate half first
``attn.g_norm.weight`` (gate not fused)      ``attn.g_norm_swish_gate.weight`` where the mixer gates, and the other way round
``lm_head.weight`` of a tied model           dropped when it equals the embedding; used as the embedding when that is not stored
============================================ ===================================================================================

No file is touched here; :mod:`latentcot.backbone.checkpoint` reads and writes them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentcot.backbone.checkpoint_config import CheckpointError


class CheckpointMismatchError(CheckpointError):
    """A checkpoint that does not fit the model.

    Args:
        missing: tensors that the model has and the checkpoint has not.
        unexpected: tensors that the checkpoint has and the model has not.
        shapes: ``name: (shape in the checkpoint, shape in the model)``.
        fields: ``name: (value in the checkpoint, value in the model)`` of a configuration that makes another function of the same
            tensors.
    """

    def __init__(
        self,
        missing: list[str],
        unexpected: list[str],
        shapes: Mapping[str, tuple[list[int], list[int]]],
        fields: Mapping[str, tuple[Any, Any]] | None = None,
    ):
        self.missing, self.unexpected, self.shapes = missing, unexpected, dict(shapes)
        self.fields = dict(fields or {})
        lines = [
            *(f"  missing: {name}" for name in missing),
            *(f"  unexpected: {name}" for name in unexpected),
            *(f"  shape of {name}: {there} in the checkpoint, {here} in the model" for name, (there, here) in shapes.items()),
            *(f"  {name}: {there!r} in the checkpoint, {here!r} in the model" for name, (there, here) in self.fields.items()),
        ]  # fmt: skip
        super().__init__("checkpoint: it does not fit the model, which was left as it was\n" + "\n".join(lines))


@dataclass(frozen=True)
class Piece:
    """Rows ``start:stop`` of a stored tensor (all of them by default)."""

    source: str
    start: int | None = None
    stop: int | None = None


@dataclass
class KeyPlan:
    """Where each tensor of the model comes from, and what was changed on the way.

    Args:
        pieces: by name in the model.
        renamed: name in the checkpoint to name in the model.
        split: name in the checkpoint to the two names in the model.
        dropped: name in the checkpoint and the reason.
        equal: pairs of stored tensors that must hold the same numbers, else dropping one would lose something.
    """

    pieces: dict[str, Piece] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    split: dict[str, tuple[str, str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    equal: list[tuple[str, str]] = field(default_factory=list)


Shapes = Mapping[str, tuple[int, ...]]
HEAD, EMBEDDING = "lm_head.weight", "model.embeddings.weight"
OTHER_NAMES = {"attn.g_norm.weight": "attn.g_norm_swish_gate.weight"}
OTHER_NAMES |= {new: old for old, new in OTHER_NAMES.items()}


def plan_keys(stored: Shapes, wanted: Shapes) -> KeyPlan:
    """Match stored tensors with the model's (``wanted`` has no ``lm_head.weight`` when it is tied).

    Raises:
        CheckpointMismatchError: with every name and shape that differs.
    """
    plan, unexpected = KeyPlan(), []
    shapes: dict[str, tuple[list[int], list[int]]] = {}
    for key, shape in stored.items():
        target = _target(key, stored, wanted)
        up = key.replace("gate_proj", "up_proj")
        if re.fullmatch(r"model\.layers\.\d+\.attn\.D", key) and key not in wanted:
            plan.dropped[key] = "a parameter of older models without effect on the output"
        elif key == HEAD and target is None and EMBEDDING in wanted and EMBEDDING in stored:
            plan.dropped[key] = "tied to the embedding"
            plan.equal.append((key, EMBEDDING))
        elif target is None:
            unexpected.append(key)
        elif (
            key.endswith(".mlp.gate_proj.weight")
            and up in wanted
            and up not in stored
            and shape == (wanted[key][0] + wanted[up][0], *wanted[key][1:])
        ):
            rows = wanted[key][0]
            plan.pieces |= {key: Piece(key, 0, rows), up: Piece(key, rows, shape[0])}
            plan.split[key] = (key, up)
        elif shape != wanted[target]:
            shapes[target] = (list(shape), list(wanted[target]))
        else:
            plan.pieces[target] = Piece(key)
            if target != key:
                plan.renamed[key] = target
    missing = [key for key in wanted if key not in plan.pieces and key not in shapes]
    if missing or unexpected or shapes:
        raise CheckpointMismatchError(missing, unexpected, shapes)
    return plan


def _target(key: str, stored: Shapes, wanted: Shapes) -> str | None:
    """Name of a stored tensor in the model, or ``None``."""
    if key in wanted:
        return key
    for old, new in OTHER_NAMES.items():
        renamed = key.removesuffix(old) + new
        if key.endswith(f".{old}") and renamed in wanted and renamed not in stored:
            return renamed
    if key == HEAD and EMBEDDING in wanted and EMBEDDING not in stored:
        return EMBEDDING
    return None


def keeps_precision(key: str) -> bool:
    """True for tensors that stay fp32 when the others are cast to 16 bits: norm weights, ``A_log`` and ``dt_bias``."""
    owner, _, name = key.rpartition(".")
    return name in ("A_log", "dt_bias") or "norm" in owner.rpartition(".")[2]
