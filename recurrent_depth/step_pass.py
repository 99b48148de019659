"""One pass of the loop over tokens of different depths: :func:`run_pass`, on the look-up rules of
:class:`~latentcot.recurrent_depth.StepCache`.

Rows that settle are taken out of the computation; their keys, values and linear states are kept as far as they went. The
state before the pass is never touched: every read sees it, every write is collected and joined at the end.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone import ModelState, SequenceContext
from latentcot.backbone.state import LayerState, Place
from latentcot.recurrent_depth.exit_rule import ExitRule
from latentcot.recurrent_depth.gradient_window import FULL, GradientWindow
from latentcot.recurrent_depth.step_cache import SLOT_BLOCK, StepCache, depth_of, first_writer, mark

if TYPE_CHECKING:
    from latentcot.recurrent_depth.loop import DepthLoop

ATTENTION = "attention"


@dataclass
class PassResult:
    """``final [B, S, D]`` s_r; ``recurrences [B]``; ``state`` with the core's entries and the rule, not yet advanced;
    ``filled [B]``: recurrences whose gaps were filled."""

    final: Tensor
    recurrences: Tensor
    state: ModelState
    filled: Tensor


class StepPass:
    """Reads and writes of one pass.

    Args:
        loop: whose core runs.
        policy: the rule.
        past: the state before the pass, as far as the core goes.
        context: of the whole batch.
    """

    def __init__(self, loop: "DepthLoop", policy: StepCache, past: ModelState, context: SequenceContext):
        self.loop, self.policy, self.past, self.context = loop, policy, past, context
        self.batch, self.new = context.positions.shape
        self.columns = past.get_seq_length()
        self.core = loop.core.stop - loop.core.start
        mixers = loop.backbone.config.mixers[loop.core]
        self.attention = tuple(j for j, name in enumerate(mixers) if name == ATTENTION)
        self.linear = tuple(j for j, name in enumerate(mixers) if name != ATTENTION)
        if not past.is_fresh:
            assert past.valid is not None
            self.depth = depth_of(past, loop.core.start)
            self.position = past.valid.long().cumsum(1) - 1
            self.deepest = int(self.depth.max()) if self.depth.numel() else 0
            self.shallowest = int(self.depth.masked_fill(~past.valid, self.deepest).min()) if self.depth.numel() else 0
        else:
            self.deepest = self.shallowest = 0
        self.writes: dict[Place, list[tuple[Tensor, LayerState]]] = {}
        self.taken = torch.zeros(self.batch, dtype=torch.int64, device=context.positions.device)
        self.filled = torch.zeros_like(self.taken)
        self._latest = (self.taken, context)
        self.left: list[tuple[Tensor, int, dict[int, Tensor], SequenceContext]] = []

    def context_of(self, rows: Tensor) -> SequenceContext:
        """The context of some rows; all of them when none has left."""
        if len(rows) == self.batch:
            return self.context
        if rows is self._latest[0]:  # rotary tables and masks are worked out once for each set of rows
            return self._latest[1]
        made = SequenceContext.build(
            len(rows),
            self.new,
            rows.device,
            attention_mask=self.context.real_tokens[rows],
            state=self.state_of(rows, {}),
            keep_state=True,
        )
        self._latest = (rows, made)
        return made

    def state_of(self, rows: Tensor, entries: dict[Place, LayerState]) -> ModelState:
        """A state of these rows with nothing in it but ``entries``."""
        if self.past.is_fresh:
            return ModelState(self.past.fingerprint)
        assert self.past.lengths is not None
        assert self.past.valid is not None
        return ModelState(
            self.past.fingerprint, entries, self._of(self.past.lengths, rows), self._of(self.past.valid, rows)
        )

    def _of(self, tensor: Tensor, rows: Tensor) -> Tensor:
        return tensor if len(rows) == self.batch else tensor[rows]

    def coda(self, state: ModelState, rows: Tensor) -> ModelState:
        """What a check of an exit rule that decodes starts from: these rows' entries of the coda."""
        blocks = range(self.loop.coda.start, self.loop.coda.stop)
        return self.state_of(rows, {(b, 0): self._rows((b, 0), state, rows) for b in blocks if (b, 0) in state.entries})

    def _rows(self, place: Place, state: ModelState, rows: Tensor) -> LayerState:
        return state.entries[place].map(lambda t: self._of(t, rows))

    # -- reading -------------------------------------------------------------------------------------------------------

    def view(self, block: int, recurrence: int, rows: Tensor) -> tuple[LayerState | None, Tensor | None]:
        """What ``block`` reads at ``recurrence``, and which earlier columns it sees ``[n, T]`` (``None`` = all real ones)."""
        if self.past.is_fresh:
            return None, None
        j = block - self.loop.core.start
        depth = self._of(self.depth, rows)
        if (
            self.policy.kind == "full"
            and recurrence >= self.shallowest
            and (self.policy.linear == "per_step" or j in self.attention)
        ):
            self._refuse_gaps(depth, recurrence, block, rows)
        if j in self.linear:
            entry = self._linear(block, recurrence)
            return (None if entry is None else entry.map(lambda t: self._of(t, rows))), None
        step = recurrence * self.core + j
        if self.policy.compressed:
            return self._slot(step, depth, rows)
        if self.policy.kind in ("full", "skip"):
            hidden = self.policy.hides and recurrence >= self.shallowest
            entry = self.past.entries.get((block, recurrence))
            found = self._empty(rows) if entry is None else self._rows((block, recurrence), self.past, rows)
            return found, (depth > recurrence if hidden else None)
        if self.policy.copies:  # each place holds every column, copies included
            return self._rows((block, min(recurrence, self.deepest - 1)), self.past, rows), None
        return self._gathered(
            block, self.policy.source(recurrence, step, depth, self._of(self.position, rows)), rows
        ), None

    def _gathered(self, block: int, source: Tensor, rows: Tensor) -> LayerState:
        """Each column from a recurrence of its own, ``source [n, T]``."""
        found = self._empty(rows)
        for number in source.unique().tolist():
            if number >= 0:
                entry = self._rows((block, number), self.past, rows)
                chosen = (source == number)[:, None, :, None]
                tensors = {name: torch.where(chosen, t, found[name]) for name, t in entry.tensors.items()}
                found = LayerState(entry.mixer, tensors)
        return found

    def _refuse_gaps(self, depth: Tensor, recurrence: int, block: int, rows: Tensor) -> None:
        assert self.past.valid is not None
        missing = (depth <= recurrence) & self._of(self.past.valid, rows)
        if bool(missing.any()):
            row, column = missing.nonzero()[0].tolist()
            raise ValueError(
                f"state: block {block} has nothing at recurrence {recurrence + 1} of token {column} in row "
                f"{int(rows[row])}, which took {int(depth[row, column])}; step_cache 'full' reads exact entries only, "
                "'latest' and 'skip' allow gaps"
            )

    def _slot(self, step: int, depth: Tensor, rows: Tensor) -> tuple[LayerState, Tensor]:
        slot = self.policy.slot(step, self.core)
        # Slots are re-used, so that a token shallower than the first writer never wrote this one.
        seen = depth * self.core > first_writer(self.policy, slot, self.core, self.attention)
        entry = self.past.entries.get((SLOT_BLOCK, slot))
        return (self._empty(rows) if entry is None else entry.map(lambda t: self._of(t, rows))), seen

    def _empty(self, rows: Tensor) -> LayerState:
        """Keys and values of no token: zeros, which nobody sees."""
        entry = next(e for p, e in self.past.entries.items() if e.mixer == ATTENTION and self._in_core(p))
        return entry.map(lambda t: torch.zeros_like(self._of(t, rows)))

    def _linear(self, block: int, recurrence: int) -> LayerState | None:
        """State of a linear block before this pass, for all rows."""
        if self.past.is_fresh:
            return None
        if self.policy.linear != "per_step":
            return self.past.entries[block, 0]
        if (entry := self.past.entries.get((block, recurrence))) is not None:
            return entry
        deepest = max(i for b, i in self.past.entries if b == block)
        entry = self.past.entries[block, deepest]
        # No token ever came this deep. Copies would all have written what is in the deepest state there is.
        return entry if self.policy.fills else entry.map(torch.zeros_like)

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, block: int, recurrence: int, rows: Tensor, entry: LayerState) -> None:
        j = block - self.loop.core.start
        place = (block, recurrence)
        if j in self.attention:
            entry = entry.map(lambda t: t[:, :, -self.new :])
            if self.policy.compressed:
                place = (SLOT_BLOCK, self.policy.slot(recurrence * self.core + j, self.core))
        elif self.policy.linear != "per_step":
            place = (block, 0)
            if self.policy.linear == "first" and recurrence:
                return
        self.writes.setdefault(place, []).append((rows, entry))

    def leave(self, rows: Tensor, recurrences: int, inputs: dict[int, Tensor]) -> None:
        """Rows that are done; ``inputs``: what each linear block of theirs read in the last recurrence."""
        self.taken[rows] = recurrences
        if self.policy.fills and self.linear:
            self.left.append((rows, recurrences, inputs, self.context_of(rows)))

    def _fill(self) -> Iterator[tuple[int, int, Tensor, LayerState]]:
        """Writes of rows that left into the deeper linear states: the mixer reads once more what it read last."""
        deepest = max(self.deepest, int(self.taken.max()))
        for rows, done, inputs, context in self.left:
            for recurrence in range(done, deepest):
                for block, hidden in inputs.items():
                    layer: Any = self.loop.backbone.model.layers[block]
                    before = self._linear(block, recurrence)
                    before = None if before is None else before.map(lambda t, rows=rows: self._of(t, rows))
                    _, after = layer.attn(hidden, context, before)
                    yield block, recurrence, rows, after
            self.filled[rows] = max(0, deepest - done)

    def finish(self, state: ModelState) -> ModelState:
        """``state`` with the core's new entries and the rule."""
        for block, recurrence, rows, entry in self._fill():
            self.writes.setdefault((block, recurrence), []).append((rows, entry))
        entries = dict(state.entries)
        for place in [p for p in entries if self._in_core(p)]:
            if entries[place].mixer == ATTENTION:  # deeper than this pass went: nobody wrote, the columns stay in step
                entries[place] = entries[place].map(lambda t: F.pad(t, (0, 0, 0, self.new)))
        if self.policy.copies:
            entries |= self._copied()
        for place, writes in self.writes.items():
            if not (self.policy.copies and writes[0][1].mixer == ATTENTION):  # those are joined above
                entries[place] = self._joined(place, writes)
        old = self.taken.new_zeros(self.batch, 0) if self.past.is_fresh else self.depth
        depth = torch.cat([old, self.taken[:, None] * self.context.real_tokens], 1)
        return mark(replace(state, entries=entries), self.policy, depth)

    def _copied(self) -> dict[Place, LayerState]:
        """Keys and values of every recurrence, those of tokens that stopped before it copied from where they stopped."""
        found = {}
        for block in (self.loop.core.start + j for j in self.attention):
            new: LayerState | None = None
            for recurrence in range(max(self.deepest, int(self.taken.max()))):
                new = self._new_columns(self.writes.get((block, recurrence), []), new)
                if self.columns:
                    past = self.past.entries[block, min(recurrence, self.deepest - 1)]
                    joined = {name: torch.cat([past[name], t], -2) for name, t in new.tensors.items()}
                    found[block, recurrence] = LayerState(ATTENTION, joined)
                else:
                    found[block, recurrence] = new
        return found

    def _new_columns(self, writes: list[tuple[Tensor, LayerState]], before: LayerState | None) -> LayerState:
        """This pass's columns for all rows: what was written, else ``before``, else zeros."""
        if not writes:
            assert before is not None
            return before
        tensors = {}
        for name, like in writes[0][1].tensors.items():
            value = like.new_zeros(self.batch, *like.shape[1:]) if before is None else before[name]
            for rows, entry in writes:
                value = entry[name] if len(rows) == self.batch else value.index_copy(0, rows, entry[name])
            tensors[name] = value
        return LayerState(writes[0][1].mixer, tensors)

    def _in_core(self, place: Place) -> bool:
        return place[0] == SLOT_BLOCK or self.loop.core.start <= place[0] < self.loop.core.stop

    def _joined(self, place: Place, writes: list[tuple[Tensor, LayerState]]) -> LayerState:
        if writes[0][1].mixer != ATTENTION:
            return self._new_columns(writes, self._linear(place[0], place[1]))
        new = self._new_columns(writes, None)
        if not self.columns:
            return new
        old = self.past.entries.get(place)
        tensors = {}
        for name, t in new.tensors.items():
            shape = (*t.shape[:-2], self.columns, t.shape[-1])
            tensors[name] = torch.cat([t.new_zeros(shape) if old is None else old[name], t], -2)
        return LayerState(ATTENTION, tensors)


def run_pass(
    loop: "DepthLoop",
    policy: StepCache,
    rule: ExitRule,
    start: Tensor,
    embedded: Tensor,
    context: SequenceContext,
    state: ModelState,
    most: int,
    window: GradientWindow = FULL,
) -> PassResult:
    """The core, at most ``most`` times, on the rows still at work.

    Args:
        start, embedded: s_0 and e, ``[B, S, D]``.
        state: after the prelude; its columns are those before these tokens.
        window: which of the ``most`` recurrences carry gradient.
    """
    passing = StepPass(loop, policy, state, context)
    rows = torch.arange(len(start), device=start.device)
    s, memory = start, None
    without, _ = window.split(most)
    done_rows, done_states = [], []
    for i in range(most):
        part = passing.context_of(rows)
        with torch.no_grad() if i < without else nullcontext():
            new, inputs = _recurrence(loop, passing, s, embedded, part, rows, i)
        leaving = torch.full_like(rows, i + 1 == most, dtype=torch.bool)
        if i + 1 < most and rule.due(i + 1):
            leaving, memory = loop.check_exit(s, new, part, rule, memory, passing.coda(state, rows))
            leaving = leaving & (i + 1 >= rule.min_steps)
        s = new
        if bool(leaving.any()):
            done_rows.append(rows[leaving])
            done_states.append(s[leaving])
            passing.leave(rows[leaving], i + 1, {block: x[leaving] for block, x in inputs.items()})
            stay = ~leaving
            rows, s, embedded = rows[stay], s[stay], embedded[stay]
            memory = None if memory is None else memory[stay]
            if not len(rows):
                break
    order = torch.cat(done_rows).argsort()
    final = torch.cat(done_states)[order]
    kept = passing.finish(state)
    return PassResult(final, passing.taken, kept, passing.filled)


def _recurrence(
    loop: "DepthLoop",
    passing: StepPass,
    s: Tensor,
    embedded: Tensor,
    context: SequenceContext,
    rows: Tensor,
    number: int,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The next state of ``rows``, and what each linear block's mixer read."""
    hidden = loop.adapter(s, embedded)
    inputs = {}
    for block in range(loop.core.start, loop.core.stop):
        view, seen = passing.view(block, number, rows)
        before = passing.state_of(rows, {} if view is None else {(block, number): view})
        local = context
        if seen is not None:
            assert context.past_valid is not None
            local = replace(context, past_valid=context.past_valid & seen)
        if block - loop.core.start in passing.linear:
            layer: Any = loop.backbone.model.layers[block]
            inputs[block] = hidden if layer.norm_placement == "post" else layer.attn_norm(hidden)
        hidden, after = loop.backbone.run(hidden, local, slice(block, block + 1), before, number)
        assert after is not None
        passing.write(block, number, rows, after.entries[block, number])
    return (loop.backbone.model.norm(hidden) if loop.readout.loop_norm == "every_recurrence" else hidden), inputs
