"""Keys and values that grow in place: :class:`StoredColumns`, the entry of a state, and :class:`Tail`, its next column while a pass
writes it; :class:`LateTensors` where a column is to be what another entry has, and nobody has asked for it yet.

States are values, but copying every key of every recurrence for each new token costs more than computing the token. So an entry may
be a view of the first T columns of a buffer with room behind them. A later state takes the next column of the same buffer; the older
one does not see it. Who comes second, because a state is continued twice, finds the column taken and copies. Everything that makes a
new state of an old one (select, merge, load) makes plain entries.

For passes without gradient, one token a row.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone import ModelState
from latentcot.backbone.mixers.attention import AttendedState
from latentcot.backbone.state import LayerState

ATTENTION = "attention"
ROOM = 32  # fewest columns behind those of a new buffer
GROWTH = 4  # else a quarter of them
WORTH_A_CALL = 1 << 16
"""Bytes of keys and values from which reading a run of rows where it lies is faster than copying it, on a CPU: a call of attention
takes about as long as copying 64 KB (EPYC, torch 2.13)."""


class Buffer:
    """``keys``, ``values [B, G, capacity, K]``; the first ``filled`` columns belong to states."""

    def __init__(self, entry: LayerState):
        columns = entry["keys"].shape[2]
        capacity = columns + max(ROOM, columns // GROWTH)
        self.filled = columns
        self.keys, self.values = (_roomy(entry[name], capacity) for name in ("keys", "values"))

    def takes(self, written: int, column: int) -> bool:
        """Whether the columns up to ``column`` are free for the state that has written those before ``written``."""
        fits = self.filled == written and column < self.keys.shape[2]
        return fits and self.keys.is_inference() == torch.is_inference_mode_enabled()


@dataclass(frozen=True)
class StoredColumns(LayerState):
    """An entry of attention whose tensors are views of ``buffer``."""

    buffer: Buffer


class LateTensors(Mapping[str, Tensor]):
    """``keys`` and ``values`` of an entry whose last columns are those of another one, put together when they are asked for. An entry so
    deep that hardly a token comes there costs nothing until one does.

    Args:
        own: the entry as far as its own columns go.
        donor: an entry with all columns, late or not; ``None`` = the others are zeros.
        columns: how many there are.
    """

    def __init__(self, own: LayerState, donor: LayerState | None, columns: int):
        if isinstance(own.tensors, LateTensors):
            own = own.tensors.own
        self.own, self.donor, self.columns = own, donor, columns
        self.first = own["keys"].shape[2]  # of the late ones

    def since(self, name: str, first: int) -> Tensor:
        """Columns ``first`` (a late one) to the last, ``[B, G, n, K]``."""
        if self.donor is None:
            like = self.own[name]
            return like.new_zeros(*like.shape[:2], self.columns - first, like.shape[3])
        given = self.donor.tensors
        if isinstance(given, LateTensors) and given.first <= first:
            return given.since(name, first)
        return given[name][:, :, first : self.columns]

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat([self.own[name], self.since(name, self.first)], 2)

    def __iter__(self) -> Iterator[str]:
        return iter(self.own.tensors)

    def __len__(self) -> int:
        return len(self.own.tensors)


class Tail:
    """The column behind an entry.

    Args:
        entry: what came before; its buffer is used on if it has one with room.
    """

    def __init__(self, entry: LayerState):
        late = entry.tensors if isinstance(entry.tensors, LateTensors) else None
        held = entry if late is None else late.own
        written = held["keys"].shape[2]
        self.at = written if late is None else late.columns
        given = held.buffer if isinstance(held, StoredColumns) else None
        if given is None or not given.takes(written, self.at):
            self.buffer = Buffer(entry)
            return
        self.buffer = given
        if late is not None:
            for name, store in (("keys", given.keys), ("values", given.values)):
                store[:, :, written : self.at] = late.since(name, written)
            given.filled = self.at

    def put(self, k: Tensor, v: Tensor, rows: Tensor | None = None) -> None:
        """The column of ``rows`` (``None`` = all), ``[n, G, 1, K]`` each; a second write replaces the first."""
        for store, new in ((self.buffer.keys, k), (self.buffer.values, v)):
            if rows is None:
                store[:, :, self.at] = new[:, :, 0]
            else:
                store[:, :, self.at].index_copy_(0, rows, new[:, :, 0])

    def fill(self, rows: Tensor, donor: "Tail | None" = None) -> None:
        """The column of rows that nobody wrote: that of ``donor``, or zeros."""
        if not len(rows):
            return
        for name in ("keys", "values"):
            column = getattr(self.buffer, name)[:, :, self.at]
            given = None if donor is None else getattr(donor.buffer, name)[:, :, donor.at]
            if given is None:
                column.index_fill_(0, rows, 0)
            elif len(rows) == len(column):
                column.copy_(given)
            else:
                column.index_copy_(0, rows, given.index_select(0, rows))

    @property
    def column(self) -> tuple[Tensor, Tensor]:
        """Keys and values of this column alone ``[B, G, 1, K]``, as views."""
        behind = slice(self.at, self.at + 1)
        return self.buffer.keys[:, :, behind], self.buffer.values[:, :, behind]

    def close(self) -> StoredColumns:
        """The entry with this column, which nobody writes any more."""
        self.buffer.filled = self.at + 1
        upto = slice(0, self.at + 1)
        views = {"keys": self.buffer.keys[:, :, upto], "values": self.buffer.values[:, :, upto]}
        return StoredColumns(ATTENTION, views, self.buffer)


@dataclass(frozen=True)
class OpenColumns(AttendedState):
    """What attention is given in place of keys and values: the tail of some rows.

    ``rows [n]``: which, rising; ``None`` = all. ``runs``: the same as slices, on a CPU.
    """

    tail: Tail
    rows: Tensor | None = None
    runs: Sequence[slice] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        self.tail.put(k, v, self.rows)
        upto = slice(0, self.tail.at + 1)
        keys, values = self.tail.buffer.keys[:, :, upto], self.tail.buffer.values[:, :, upto]
        shared = q.shape[1] != keys.shape[1]
        if self.rows is None:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=shared)
        size = len(self.rows) * 2 * keys[0].numel() * keys.element_size()
        if self.runs is None or size < WORTH_A_CALL * len(self.runs):
            keys, values = keys.index_select(0, self.rows), values.index_select(0, self.rows)
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=shared)
        found, done = [], 0
        for run in self.runs:
            last = done + len(range(run.start, run.stop, run.step))
            here, done = slice(done, last), last
            mask = seen if seen is None or len(seen) == 1 else seen[here]
            found.append(
                F.scaled_dot_product_attention(q[here], keys[run], values[run], attn_mask=mask, enable_gqa=shared)
            )
        return torch.cat(found)


def runs_of(rows: Tensor) -> list[slice] | None:
    """Rising row numbers as the fewest slices, with steps, that hold them in their order; ``None`` away from the CPU, where many small
    calls do not pay."""
    if rows.device.type != "cpu":
        return None
    found: list[list[int]] = []
    for row in rows.tolist():
        run = found[-1] if found else []
        # two rows always lie in one slice; what belongs to it can be decided from the left, because a part of a slice is one too
        if run and (len(run) < 2 or row - run[-1] == run[1] - run[0]):
            run.append(row)
        else:
            found.append([row])
    return [slice(run[0], run[-1] + 1, run[1] - run[0] if len(run) > 1 else 1) for run in found]


def grows_in_place(state: ModelState | None, new: int) -> bool:
    """Whether a pass over ``new`` tokens a row behind ``state`` may write columns in place."""
    return new == 1 and not torch.is_grad_enabled() and state is not None and not state.is_fresh


def opened(state: ModelState, blocks: Collection[int] | None = None) -> ModelState:
    """``state`` with the attention entries (of ``blocks``) ready for one more column of all rows."""
    entries = {
        place: OpenColumns(ATTENTION, {}, Tail(entry))
        if entry.mixer == ATTENTION and (blocks is None or place[0] in blocks)
        else entry
        for place, entry in state.entries.items()
    }
    return replace(state, entries=entries)


def closed(state: ModelState) -> ModelState:
    """``state`` with the columns that were written."""
    entries = {
        place: entry.tail.close() if isinstance(entry, OpenColumns) else entry for place, entry in state.entries.items()
    }
    return replace(state, entries=entries)


def _roomy(tensor: Tensor, capacity: int) -> Tensor:
    wide = tensor.new_empty(*tensor.shape[:2], capacity, tensor.shape[3])
    wide[:, :, : tensor.shape[2]] = tensor
    return wide
