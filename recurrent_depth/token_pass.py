"""One token of each row through a looped stack whose rows leave at different steps: :class:`TokenPass`.

Keys and values go to the column behind those of the state (:mod:`~latentcot.recurrent_depth.columns`); rows that left are not computed.
What deeper steps hold for them is filled in at the end, see :mod:`~latentcot.recurrent_depth.ragged_state`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latentcot.backbone import HybridForCausalLM, ModelState, SequenceContext
from latentcot.backbone.mixers.base import LOWER_BOUNDS
from latentcot.backbone.state import LayerState, Place
from latentcot.recurrent_depth.columns import ATTENTION, OpenColumns, Tail, runs_of
from latentcot.recurrent_depth.ragged_state import LoopStates


@dataclass
class _Left:
    """Rows that left together, after ``steps`` of them, and what each linear mixer read last."""

    rows: Tensor
    steps: int
    inputs: dict[int, Tensor]


class TokenPass:
    """Reads and writes of one token.

    Args:
        backbone: the stack.
        states: before the token; none of them fresh.
        total: steps T.
    """

    def __init__(self, backbone: HybridForCausalLM, states: LoopStates, total: int):
        self.backbone, self.states, self.total = backbone, states, total
        self.own = states.sharing == "own"
        self.batch = states.batch_size
        self.linear = [b for b, name in enumerate(backbone.config.mixers) if name != ATTENTION]
        self.copies = states.gaps == "copy" or not self.own
        self.fills = bool(self.linear) and states.gaps == "copy" and self.own
        self.tails: dict[Place, Tail] = {}
        self.matrices: dict[Place, LayerState] = {}
        self.columns: dict[int, list[tuple[Tensor, ...]]] = {}  # of a shared state, step by step
        self.left: list[_Left] = []
        self.rows = torch.arange(self.batch, device=states.lengths.device)
        self.runs: list[slice] | None = None
        self._inputs: dict[int, Tensor] = {}
        self.tables: dict[Any, Any] = {}  # rotary angles and the like: they change with the rows, not with the step
        self.bounds: dict[Any, Any] = {}
        self.took: dict[int, Tensor] = {}

    def _place(self, block: int, step: int) -> Place:
        return block, step if self.own else 0

    def _tail(self, block: int, step: int) -> Tail:
        place = self._place(block, step)
        if place not in self.tails:
            self.tails[place] = Tail(self.states.at(step).entries[place])
        return self.tails[place]

    def _of(self, tensor: Tensor, rows: Tensor) -> Tensor:
        return tensor if len(rows) == self.batch else tensor[rows]

    def _context(self, step: int, rows: Tensor, tables: dict[Any, Any]) -> SequenceContext:
        valid = self.states.at(step).valid
        assert valid is not None
        positions = self._of(self.states.lengths, rows)[:, None]
        return SequenceContext(positions, past_valid=self._of(valid, rows), keep_state=True, tables=tables)

    # -- the rows at work ----------------------------------------------------------------------------------------------

    def step(self, number: int, hidden: Tensor) -> Tensor:
        """All blocks on the rows at work, ``[n, 1, D]`` to the same."""
        everyone = len(self.rows) == self.batch
        before = self.states.at(number)
        entries: dict[Place, LayerState] = {}
        for place, entry in before.entries.items():
            if entry.mixer == ATTENTION:
                tail = self._tail(place[0], number)
                entries[place] = OpenColumns(ATTENTION, {}, tail, None if everyone else self.rows, self.runs)
            else:
                entries[place] = entry.map(lambda t: self._of(t, self.rows))
        state = replace(before, entries=entries)
        context = self._context(number, self.rows, self.tables)
        blocks = len(self.backbone.model.layers)
        self.took[number] = self.rows
        recurrence = number if self.own else 0
        self._inputs = {}
        for part in [slice(b, b + 1) for b in range(blocks)] if self.fills else [slice(0, blocks)]:
            if self.fills and part.start in self.linear:
                layer: Any = self.backbone.model.layers[part.start]
                self._inputs[part.start] = hidden if layer.norm_placement == "post" else layer.attn_norm(hidden)
            hidden, new = self.backbone.run(hidden, context, part, state, recurrence)
            assert new is not None
            state = new
        self.bounds = {k: v for k, v in self.tables.items() if k == LOWER_BOUNDS}
        for block in self.linear:
            self._write(block, number, self.rows, state.entries[self._place(block, number)])
        if not self.own:
            self._remember()
        return hidden

    def leave(self, leaving: Tensor, steps: int) -> None:
        """Those of the rows at work ``[n]`` bool that took ``steps`` and are done."""
        if self.fills:
            inputs = {block: x[leaving] for block, x in self._inputs.items()}
            self.left.append(_Left(self.rows[leaving], steps, inputs))
        self.rows = self.rows[~leaving]
        self.runs, self.tables = runs_of(self.rows), {}

    def _write(self, block: int, step: int, rows: Tensor, new: LayerState) -> None:
        """A linear state of some rows; the others keep what they have, in a shared state what they wrote last."""
        if len(rows) < self.batch:
            place = self._place(block, step)
            old = self.matrices.get(place, self.states.at(step).entries[place])
            new = LayerState(new.mixer, {n: old[n].index_copy(0, rows, t.to(old[n])) for n, t in new.tensors.items()})
        self.matrices[self._place(block, step)] = new

    def _remember(self) -> None:
        """What a shared state would be after this step."""
        for place, tail in self.tails.items():
            self.columns.setdefault(place[0], []).append(tuple(t.clone() for t in tail.column))
        for place, entry in self.matrices.items():
            self.columns.setdefault(place[0], []).append(tuple(entry.tensors.values()))

    # -- after the last step -------------------------------------------------------------------------------------------

    def finish(self) -> tuple[ModelState, ...]:
        """The states after the token."""
        return tuple(self._own(i) for i in range(self.total)) if self.own else (self._shared(),)

    def _own(self, step: int) -> ModelState:
        before = self.states.at(step)
        assert before.valid is not None
        assert before.lengths is not None
        if self.fills:
            self._fill(step)
        entries: dict[Place, LayerState] = {}
        took = torch.zeros_like(before.valid[:, 0])
        if step in self.took:
            took[self.took[step]] = True
        left = (~took).nonzero()[:, 0]
        seen = torch.ones_like(took) if self.copies else took
        for place, entry in before.entries.items():
            if entry.mixer == ATTENTION:
                tail = self._tail(place[0], step)
                # a closed tail still shows its column
                tail.fill(left, self._tail(place[0], step - 1) if self.copies and step else None)
                entries[place] = tail.close()
            else:
                entries[place] = self.matrices.get(place, entry)
        return ModelState(
            before.fingerprint, entries, before.lengths + seen, torch.cat([before.valid, seen[:, None]], 1)
        )

    def _fill(self, step: int) -> None:
        """Rows that left before this step: its linear mixers read once more what they read last."""
        gone = [part for part in self.left if part.steps <= step]
        if not gone:
            return
        rows, order = torch.cat([part.rows for part in gone]).sort()
        context = self._context(step, rows, dict(self.bounds))
        for block in self.linear:
            layer: Any = self.backbone.model.layers[block]
            hidden = torch.cat([part.inputs[block] for part in gone])[order]
            before = self.states.at(step).entries[block, step].map(lambda t, rows=rows: self._of(t, rows))
            self._write(block, step, rows, layer.attn(hidden, context, before)[1])

    def _shared(self) -> ModelState:
        before = self.states.at(0)
        assert before.valid is not None
        assert before.lengths is not None
        entries: dict[Place, LayerState] = {}
        for place, entry in before.entries.items():
            steps = self.columns[place[0]]
            # rows that left have written what they wrote last, also for the steps that nobody took
            steps = steps + [steps[-1]] * (self.total - len(steps))
            if self.states.sharing == "mean":
                kept = tuple(torch.stack(each).mean(0).to(each[0]) for each in zip(*steps, strict=True))
            else:
                kept = steps[-1 if self.states.sharing == "last" else 0]
            if entry.mixer == ATTENTION:
                self.tails[place].put(*kept)
                entries[place] = self.tails[place].close()
            else:
                entries[place] = LayerState(entry.mixer, dict(zip(entry.tensors, kept, strict=True)))
        seen = torch.ones_like(before.valid[:, :1])
        return ModelState(before.fingerprint, entries, before.lengths + 1, torch.cat([before.valid, seen], 1))
