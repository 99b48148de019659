"""What a model carries to the next token or segment: :class:`ModelState`, one :class:`LayerState` for each (block, recurrence).

States are values: every operation returns a new state and leaves the old one as it was, so a state can be kept, forked and
gone back to. Tensors have the batch first. ``generate`` uses a ModelState as its cache.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from latentcot.files import write_tensors

if TYPE_CHECKING:
    from latentcot.backbone.context import SequenceContext

Place = tuple[int, int]
"""(block, recurrence): where in the network, and in which pass over it, a state belongs."""


@dataclass(frozen=True)
class LayerState:
    """State of one mixer. ``tensors``: named, batch first; for a linear mixer ``matrix [B, H, K, V]`` in fp32 and
    ``conv [B, D, W-1]``, for attention ``keys`` and ``values [B, H, T, K]``."""

    mixer: str
    tensors: Mapping[str, Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> "LayerState":
        return LayerState(self.mixer, {name: change(tensor) for name, tensor in self.tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass
class ModelState:
    """Everything a model carries.

    Args:
        fingerprint: names the architecture that made the state; a state of another model is refused.
        entries: ``LayerState`` by place.
        lengths: real tokens seen by each row, ``[B]``: the rotary position of the next token.
        valid: which of the columns seen so far hold a real token, ``[B, T]``; attention hides the others.
    """

    fingerprint: str
    entries: dict[Place, LayerState] = field(default_factory=dict)
    lengths: Tensor | None = None
    valid: Tensor | None = None

    # What transformers' generate asks of a cache.
    is_compileable = False
    is_linear = (False,)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included (``generate`` slices its input by it)."""
        return 0 if self.valid is None else self.valid.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """In place, as ``generate`` expects of a cache: row b becomes old row ``beam_idx[b]``."""
        other = self.select(beam_idx)
        self.entries, self.lengths, self.valid = other.entries, other.lengths, other.valid

    # -- reading and writing ---------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int | None:
        return None if self.lengths is None else self.lengths.shape[0]

    @property
    def is_fresh(self) -> bool:
        """True before the first token."""
        return self.valid is None

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def read(self, place: Place) -> LayerState | None:
        """State at ``place``; ``None`` while the state is fresh. Raises ``ValueError`` for a missing entry afterwards: starting from
        zero in the middle of a sequence would be silently wrong."""
        if place in self.entries:
            return self.entries[place]
        if self.is_fresh:
            return None
        known = sorted(self.entries)
        raise ValueError(
            f"state: nothing is stored for (block, recurrence) = {place}, though {self.get_seq_length()} tokens were seen; "
            f"stored places: {known[:8]}{' ...' if len(known) > 8 else ''}"
        )

    def with_entry(self, place: Place, entry: LayerState) -> "ModelState":
        return replace(self, entries={**self.entries, place: entry})

    def advance(self, context: "SequenceContext") -> "ModelState":
        """The state after the tokens of ``context`` went through every block that will be read again."""
        new_valid = context.real_tokens
        lengths = new_valid.sum(1) + (0 if self.lengths is None else self.lengths)
        valid = new_valid if self.valid is None else torch.cat([self.valid, new_valid], 1)
        return replace(self, lengths=lengths, valid=valid)

    # -- values from values ------------------------------------------------------------------------------------------

    def map(self, change: Callable[[Tensor], Tensor]) -> "ModelState":
        """Apply ``change`` to every tensor (entries, lengths, validity)."""
        return replace(
            self,
            entries={place: entry.map(change) for place, entry in self.entries.items()},
            lengths=None if self.lengths is None else change(self.lengths),
            valid=None if self.valid is None else change(self.valid),
        )

    def select(self, rows: Tensor | slice | list[int]) -> "ModelState":
        """The state of the given rows, in the given order (repeats allowed): sub-batches, beams, compaction."""
        if isinstance(rows, list):
            rows = torch.tensor(rows)
        if isinstance(rows, Tensor) and self.lengths is not None:
            rows = rows.to(self.lengths.device)
            if rows.dtype != torch.bool and rows.numel() and int(rows.max()) >= len(self.lengths):
                raise ValueError(f"rows: index {int(rows.max())} given, but the state holds {len(self.lengths)} rows")
        return self.map(lambda tensor: tensor[rows])

    def reorder(self, rows: Tensor) -> "ModelState":
        """``select`` under the name that beam search uses."""
        return self.select(rows)

    def expand(self, copies: int) -> "ModelState":
        """Each row ``copies`` times in a row (one prompt, several continuations)."""
        return self.map(lambda tensor: tensor.repeat_interleave(copies, dim=0))

    def detach(self) -> "ModelState":
        """The same values without gradient history: the border of truncated back-propagation."""
        return self.map(Tensor.detach)

    def fork(self) -> "ModelState":
        """An independent copy of every tensor (gradients still flow through it)."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str) -> "ModelState":
        return self.map(lambda tensor: tensor.to(device))

    def reset(self) -> "ModelState":
        """A fresh state of the same model."""
        return ModelState(self.fingerprint)

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        path = Path(path)
        tensors = {f"entry.{b}.{r}.{name}": t for (b, r), e in self.entries.items() for name, t in e.tensors.items()}
        for name in ("lengths", "valid"):
            if (tensor := getattr(self, name)) is not None:
                tensors[name] = tensor
        description: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "mixers": {f"{b}.{r}": entry.mixer for (b, r), entry in self.entries.items()},
        }
        write_tensors(path, tensors, {"latentcot_state": json.dumps(description)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str | None = None) -> "ModelState":
        """Read a saved state. Raises ``ValueError`` when the file is damaged, is no state, or belongs to another model."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"path: no state file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                description = json.loads((file.metadata() or {})["latentcot_state"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            maker, mixers = description["fingerprint"], dict(description["mixers"])
        except Exception as error:  # safetensors, json and key errors alike mean: not a readable state
            raise ValueError(f"path: {path} is not a readable model state ({error})") from error
        if fingerprint is not None and maker != fingerprint:
            raise ValueError(
                f"path: {path} was saved by another model: fingerprint {maker!r}, expected {fingerprint!r}"
            )
        entries: dict[Place, LayerState] = {}
        for key, mixer in mixers.items():
            block, recurrence = map(int, key.split("."))
            prefix = f"entry.{key}."
            entries[block, recurrence] = LayerState(
                mixer, {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            )
        return cls(maker, entries, tensors.get("lengths"), tensors.get("valid"))
