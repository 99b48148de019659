r"""What a model carries to the next token or segment: :class:`ModelState`, one :class:`LayerState` for each (block, recurrence).

States are values: every operation returns a new state and leaves the old one as it was, so a state can be kept, forked and
gone back to. Tensors have the batch first. ``generate`` uses a ModelState as its cache.

Two states join in two ways (:meth:`ModelState.merge`). ``"rows"`` puts their rows into one batch, whatever the mixers are.
``"sum"`` superposes what several documents wrote, each read from nothing: a state of a linear mixer is a sum over tokens,

.. math:: S = \sum_j \mathrm{diag}(\alpha_{j+1} \cdots \alpha_T)\, k_j^\top v_j,

so the sum of two states holds both documents, and each as though it had been read last: neither has faded under the other, and in
layers above the first neither has seen the other. It is defined where a write does not depend on what the state holds already.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from latentcot.files import write_tensors

if TYPE_CHECKING:
    from latentcot.backbone.context import SequenceContext

Place = tuple[int, int]
"""(block, recurrence): where in the network, and in which pass over it, a state belongs."""

ADDITIVE = {"gla": {"matrix"}, "hgrn": {"vector"}, "hgrn2": {"matrix"}, "retnet": {"matrix"}}
"""Mixers whose states may be summed, and the only tensor such a state may then have: windows of short convolutions, keys and values
are lists of inputs, and a delta rule's writes depend on what it holds."""
ROTATED = {"retnet"}  # keys in the state carry their positions


class ForeignStateError(ValueError):
    """A state of one model was given to another; neither was changed."""


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

    def select(self, rows: Tensor | slice | Sequence[int]) -> "ModelState":
        """The state of the given rows, in the given order (repeats allowed): sub-batches, beams, compaction.

        ``rows``: a slice, indices (negative ones count from the end), or a bool tensor ``[B]``. Indices outside the state raise
        ``ValueError``; they are not looked at on a GPU, where that would wait for the device.
        """
        if self.lengths is None or isinstance(rows, slice):
            return self.map(lambda tensor: tensor[rows])
        if not isinstance(rows, Tensor):
            rows = torch.tensor(rows, dtype=None if len(rows) else torch.long)
        count = len(self.lengths)
        if rows.dim() != 1 or rows.is_floating_point():
            raise ValueError(
                f"rows: shape {list(rows.shape)} of {rows.dtype} given, expected one axis of integers or bools"
            )
        if rows.dtype == torch.bool and len(rows) != count:
            raise ValueError(f"rows: a mask of {len(rows)} rows given, but the state holds {count} rows")
        if rows.dtype != torch.bool and rows.numel() and rows.device.type == "cpu":
            low, high = (int(v) for v in rows.aminmax())
            if low < -count or high >= count:
                raise ValueError(f"rows: indices within {low}..{high} given, but the state holds {count} rows")
        chosen = rows.to(self.lengths.device)
        return self.map(lambda tensor: tensor[chosen])

    def reorder(self, rows: Tensor) -> "ModelState":
        """``select`` under the name that beam search uses."""
        return self.select(rows)

    def expand(self, copies: int) -> "ModelState":
        """Each row ``copies`` times in a row (one prompt, several continuations)."""
        if copies < 1:
            raise ValueError(f"copies: expected at least 1, got {copies}")
        return self.map(lambda tensor: tensor.repeat_interleave(copies, dim=0))

    def detach(self) -> "ModelState":
        """The same values without gradient history: the border of truncated back-propagation."""
        return self.map(Tensor.detach)

    def fork(self) -> "ModelState":
        """An independent copy of every tensor (gradients still flow through it)."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str) -> "ModelState":
        return self.map(lambda tensor: tensor.to(device))

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> "ModelState":
        """A fresh state of the same model; or, with ``rows`` (indices or a bool mask), the same state with those rows as before their
        first token: zero states, position 0, nothing of the past to be seen."""
        if rows is None or self.lengths is None:
            return ModelState(self.fingerprint)
        kept = torch.ones_like(self.lengths, dtype=torch.bool)
        index = rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=None if len(rows) else torch.long)
        index = index.to(kept.device)
        try:
            kept[index] = False
        except IndexError as error:
            raise ValueError(f"rows: the state holds {len(kept)} rows ({error})") from error
        return self.map(lambda t: t.masked_fill(~kept.view(-1, *[1] * (t.dim() - 1)), 0))

    @staticmethod
    def merge(states: "Sequence[ModelState]", how: Literal["rows", "sum"] = "rows") -> "ModelState":
        """Join states of one model.

        Args:
            states: at least one; fresh ones are left out.
            how: ``"rows"``: the rows of all of them, in order, in one batch. Columns are padded on the left where histories differ
                in length, as padding that nothing sees. ``"sum"``: the superposition described at the top of this module, row by
                row; the next token's position is that behind the longest document.

        Raises:
            ForeignStateError: states of several models.
            ValueError: no state, different places; and for ``"sum"`` different batches, a mixer whose states are not additive, or
                rotated keys of documents of unequal lengths, whose positions would not agree.
        """
        if how not in ("rows", "sum"):
            raise ValueError(f"how: {how!r} given, expected 'rows' or 'sum'")
        if not states:
            raise ValueError("states: at least one is needed, got none")
        names = sorted({state.fingerprint for state in states})
        if len(names) > 1:
            raise ForeignStateError(f"states: they were made by different models (fingerprints {', '.join(names)})")
        filled = [state for state in states if not state.is_fresh]
        if len(filled) < 2:
            return filled[0] if filled else ModelState(names[0])
        first = filled[0]
        for state in filled[1:]:
            if state.entries.keys() != first.entries.keys():
                raise ValueError(
                    f"states: places differ: {sorted(first.entries)[:8]} and {sorted(state.entries)[:8]} hold entries"
                )
        return _merge_rows(filled) if how == "rows" else _merge_sum(filled)

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; it appears whole or not at all. ``ValueError`` when the folder is missing."""
        path = Path(path)
        if not path.parent.is_dir():
            raise ValueError(f"path: there is no folder {path.parent} to write {path.name} into")
        tensors, description = self.parts()
        write_tensors(path, tensors, {"latentcot_state": json.dumps(description)})

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file holds of the state: tensors by name, and the rest as plain JSON values."""
        tensors = {f"entry.{b}.{r}.{name}": t for (b, r), e in self.entries.items() for name, t in e.tensors.items()}
        for name in ("lengths", "valid"):
            if (tensor := getattr(self, name)) is not None:
                tensors[name] = tensor
        mixers = {f"{b}.{r}": entry.mixer for (b, r), entry in self.entries.items()}
        return tensors, {"fingerprint": self.fingerprint, "mixers": mixers}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> "ModelState":
        """The state whose :meth:`parts` these are. ``ValueError`` or ``KeyError`` when they do not make one."""
        entries: dict[Place, LayerState] = {}
        for key, mixer in dict(description["mixers"]).items():
            block, recurrence = key.split(".")
            prefix = f"entry.{key}."
            found = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            entries[int(block), int(recurrence)] = LayerState(mixer, found)
        state = cls(description["fingerprint"], entries, tensors.get("lengths"), tensors.get("valid"))
        rows = {t.shape[0] for entry in entries.values() for t in entry.tensors.values()}
        rows |= {t.shape[0] for t in (state.lengths, state.valid) if t is not None}
        whole = (state.lengths is None) == (state.valid is None) and all(entry.tensors for entry in entries.values())
        if not whole or len(rows) > 1:
            raise ValueError("parts are missing, or disagree about the batch")
        return state

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], fingerprint: str | None = None, device: torch.device | str = "cpu"
    ) -> "ModelState":
        """Read a saved state onto ``device``. Raises ``ValueError`` when the file is damaged or is no state, and
        :class:`ForeignStateError` when ``fingerprint`` is given and the state belongs to another model."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"path: no state file at {path}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                description = json.loads((file.metadata() or {})["latentcot_state"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            state = cls.from_parts(tensors, description)
        except Exception as error:  # safetensors, json and key errors alike mean: not a readable state
            raise ValueError(f"path: {path} is not a readable model state ({error})") from error
        if fingerprint is not None and state.fingerprint != fingerprint:
            raise ForeignStateError(
                f"path: {path} was saved by another model: fingerprint {state.fingerprint!r}, expected {fingerprint!r}"
            )
        return state


def _merge_rows(states: list[ModelState]) -> ModelState:
    columns = max(state.get_seq_length() for state in states)
    padded = [_pad_columns(state, columns) for state in states]

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors, 0)

    return replace(
        states[0],
        entries=_by_entry(padded, joined),
        lengths=joined([s.lengths for s in padded if s.lengths is not None]),
        valid=joined([s.valid for s in padded if s.valid is not None]),
    )


def _pad_columns(state: ModelState, columns: int) -> ModelState:
    """``state`` with empty columns in front, so that it has as many as ``columns``."""
    missing = columns - state.get_seq_length()
    if not missing:
        return state
    entries = {
        place: LayerState(
            entry.mixer,
            {
                name: F.pad(t, (0, 0, missing, 0)) if name in ("keys", "values") else t
                for name, t in entry.tensors.items()
            },
        )
        for place, entry in state.entries.items()
    }
    assert state.valid is not None
    return replace(state, entries=entries, valid=F.pad(state.valid, (missing, 0)))


def _merge_sum(states: list[ModelState]) -> ModelState:
    if len(batches := {state.batch_size for state in states}) > 1:
        raise ValueError(f"states: a sum needs equal batches, got {sorted(map(str, batches))} rows")
    for place, entry in states[0].entries.items():
        if entry.mixer not in ADDITIVE or set(entry.tensors) != ADDITIVE[entry.mixer]:
            raise ValueError(
                f"states: {entry.mixer} at (block, recurrence) = {place} holds {sorted(entry.tensors)}, which do not add up to "
                f"a state of both; additive are {', '.join(sorted(ADDITIVE))} without short convolutions. how='rows' joins any"
            )
    lengths = torch.stack([s.lengths for s in states if s.lengths is not None])
    rotated = sorted({entry.mixer for entry in states[0].entries.values()} & ROTATED)
    if rotated and bool((lengths != lengths[0]).any()):
        raise ValueError(
            f"states: {rotated[0]} rotates its keys, so documents must be equally long, got {lengths.tolist()}"
        )
    columns = max(state.get_seq_length() for state in states)
    longest = lengths.max(0).values
    return replace(
        states[0],
        entries=_by_entry(states, lambda tensors: torch.stack(tensors).sum(0)),
        lengths=longest,
        # as many real columns as the longest document has, at the end: no mixer that adds up looks at single columns
        valid=torch.arange(columns, device=longest.device) >= columns - longest[:, None],
    )


def _by_entry(states: list[ModelState], join: Callable[[list[Tensor]], Tensor]) -> dict[Place, LayerState]:
    return {
        place: LayerState(
            entry.mixer, {name: join([s.entries[place].tensors[name] for s in states]) for name in entry.tensors}
        )
        for place, entry in states[0].entries.items()
    }
