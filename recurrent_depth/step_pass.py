"""One pass of the loop over tokens of different depths: :func:`run_pass`, on the look-up rules of
:class:`~latentcot.recurrent_depth.StepCache`.

Rows that settle are taken out of the computation; their keys, values and linear states are kept as far as they went. The
state before the pass is never touched: every read sees it, every write is collected and joined at the end. One token a row without
gradient, keys and values are neither copied nor joined: they go to the column behind those of the state
(:mod:`~latentcot.recurrent_depth.columns`), and the rows still at work read theirs where they lie.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone import ModelState, SequenceContext
from latentcot.backbone.mixers.base import LOWER_BOUNDS
from latentcot.backbone.state import LayerState, Place
from latentcot.recurrent_depth.columns import ATTENTION, LateTensors, OpenColumns, Tail, grows_in_place, runs_of
from latentcot.recurrent_depth.departures import Departures
from latentcot.recurrent_depth.exit_rule import ExitRule
from latentcot.recurrent_depth.gradient_window import FULL, GradientWindow
from latentcot.recurrent_depth.step_cache import SLOT_BLOCK, StepCache, depth_of, first_writer, mark

if TYPE_CHECKING:
    from latentcot.recurrent_depth.loop import DepthLoop


@dataclass
class PassResult:
    """``final [B, S, D]`` s_r; ``recurrences [B]``; ``state`` with the core's entries and the rule, not yet advanced;
    ``filled [B]``: recurrences whose gaps were filled; ``previous [B, S, D]``: s_{r-1} of each row, without gradient; ``hidden [B, S,
    D]``: what the coda made of s_r, where checks of the exit rule ran it in place (its columns are then written); else ``None``."""

    final: Tensor
    recurrences: Tensor
    state: ModelState
    filled: Tensor
    previous: Tensor
    hidden: Tensor | None


@dataclass
class Chosen:
    """Rows at work, and what is worked out once for each set of them: ``context``, and ``lengths`` and ``valid`` of the state."""

    rows: Tensor
    context: SequenceContext
    lengths: Tensor | None
    valid: Tensor | None
    runs: list[slice] | None = None
    hidden: dict[int, SequenceContext] = field(default_factory=dict)


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
        self.in_place = grows_in_place(past, self.new) and policy.kind not in ("always_last", "random")
        self.tails: dict[Place, Tail] = {}
        self.everyone = torch.arange(self.batch, device=context.positions.device)
        self._latest = Chosen(self.everyone, context, past.lengths, past.valid)
        self.left: list[tuple[Tensor, int, dict[int, Tensor]]] = []

    # -- rows ----------------------------------------------------------------------------------------------------------

    def chosen(self, rows: Tensor) -> Chosen:
        """Those rows; rotary tables and masks are worked out once for each set."""
        last = self._latest.rows
        if rows is last or (len(rows) == len(last) and torch.equal(rows, last)):
            return self._latest
        mask = self.context.mask
        mask = None if mask is None or bool(mask[rows].all()) else mask[rows]
        lengths = None if self.past.lengths is None else self.past.lengths[rows]
        valid = None if self.past.valid is None else self.past.valid[rows]
        context = SequenceContext(self.context.positions[rows], mask, valid, keep_state=True)
        self._latest = Chosen(rows, context, lengths, valid, runs_of(rows))
        return self._latest

    def context_of(self, rows: Tensor, needed: int = 0) -> SequenceContext:
        """The context of some rows. Attention sees earlier tokens of at least ``needed`` recurrences."""
        chosen = self.chosen(rows)
        if needed <= self.shallowest:
            return chosen.context
        if needed not in chosen.hidden:
            assert chosen.valid is not None
            seen = chosen.valid & (self._of(self.depth, rows) >= needed)
            chosen.hidden[needed] = replace(chosen.context, past_valid=seen)
        return chosen.hidden[needed]

    def state_of(self, rows: Tensor, entries: dict[Place, LayerState]) -> ModelState:
        """A state of these rows with nothing in it but ``entries``."""
        if self.past.is_fresh:
            return ModelState(self.past.fingerprint)
        chosen = self.chosen(rows)
        return ModelState(self.past.fingerprint, entries, chosen.lengths, chosen.valid)

    def _of(self, tensor: Tensor, rows: Tensor) -> Tensor:
        return tensor if len(rows) == self.batch else tensor[rows]

    def coda(self, state: ModelState, rows: Tensor) -> ModelState:
        """What a check of an exit rule that decodes starts from: these rows' entries of the coda."""
        blocks = range(self.loop.coda.start, self.loop.coda.stop)
        return self.state_of(rows, {(b, 0): self._rows((b, 0), state, rows) for b in blocks if (b, 0) in state.entries})

    def coda_in_place(self, state: ModelState) -> bool:
        """Whether the coda leaves what it writes where it belongs, so that it need not run again for rows that a check has decoded."""
        blocks = range(self.loop.coda.start, self.loop.coda.stop)
        open_ones = all(isinstance(state.entries.get((b, 0)), OpenColumns) for b in blocks)
        return open_ones and not self.past.is_fresh and not torch.is_grad_enabled()

    def _rows(self, place: Place, state: ModelState, rows: Tensor) -> LayerState:
        entry = state.entries[place]
        return (
            self._open(entry.tail, rows) if isinstance(entry, OpenColumns) else entry.map(lambda t: self._of(t, rows))
        )

    def _open(self, tail: Tail, rows: Tensor) -> OpenColumns:
        if len(rows) == self.batch:
            return OpenColumns(ATTENTION, {}, tail)
        return OpenColumns(ATTENTION, {}, tail, rows, self.chosen(rows).runs)

    # -- reading -------------------------------------------------------------------------------------------------------

    def view(self, block: int, recurrence: int, rows: Tensor) -> tuple[LayerState | None, int]:
        """What ``block`` reads at ``recurrence``, and how many recurrences an earlier token needs to be seen."""
        if self.past.is_fresh:
            return None, 0
        j = block - self.loop.core.start
        if (
            self.policy.kind == "full"
            and recurrence >= self.shallowest
            and (self.policy.linear == "per_step" or j in self.attention)
        ):
            self._refuse_gaps(self._of(self.depth, rows), recurrence, block, rows)
        if j in self.linear:
            entry = self._linear(block, recurrence)
            return (None if entry is None else entry.map(lambda t: self._of(t, rows))), 0
        step = recurrence * self.core + j
        place = self._place(block, recurrence)
        needed = self._needed(place) if self.policy.hides else 0
        if self.in_place:
            return self._open(self._tail(place), rows), needed
        if self.policy.copies:  # each place holds every column, copies included
            return self._rows((block, min(recurrence, self.deepest - 1)), self.past, rows), 0
        if self.policy.compressed or self.policy.kind in ("full", "skip"):
            return self._rows(place, self.past, rows) if place in self.past.entries else self._empty(rows), needed
        source = self.policy.source(recurrence, step, self._of(self.depth, rows), self._of(self.position, rows))
        return self._gathered(block, source, rows), 0

    def _place(self, block: int, recurrence: int) -> Place:
        """Where an attention block keeps its keys and values."""
        if not self.policy.compressed:
            return block, recurrence
        step = recurrence * self.core + block - self.loop.core.start
        return SLOT_BLOCK, self.policy.slot(step, self.core)

    def _needed(self, place: Place) -> int:
        """Fewest recurrences of a token that has written at ``place``."""
        block, number = place
        # Slots are re-used, so that a token shallower than the first writer never wrote this one.
        return 1 + (
            first_writer(self.policy, number, self.core, self.attention) // self.core if block == SLOT_BLOCK else number
        )

    def _tail(self, place: Place) -> Tail:
        """The column that this pass writes at ``place``; earlier tokens that were never there have zeros, or copies."""
        if place not in self.tails:
            entry = self.past.entries.get(place)
            if entry is None and self.policy.copies:
                deepest = self.past.entries[place[0], self.deepest - 1]
                entry = LayerState(ATTENTION, dict(deepest.tensors))  # not its buffer, which goes on where it is
            self.tails[place] = Tail(self._empty() if entry is None else entry)
        return self.tails[place]

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

    def _empty(self, rows: Tensor | None = None) -> LayerState:
        """Keys and values of no token, for ``rows`` or all: zeros, which nobody sees."""
        entry = next(e for p, e in self.past.entries.items() if e.mixer == ATTENTION and self._in_core(p))
        count = self.batch if rows is None else len(rows)
        return entry.map(lambda t: t.new_zeros(count, *t.shape[1:]))

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
        if isinstance(entry, OpenColumns):
            return  # it is where it belongs
        place = (block, recurrence)
        if block - self.loop.core.start in self.attention:
            entry = entry.map(lambda t: t[:, :, -self.new :])
            place = self._place(block, recurrence)
        elif self.policy.linear != "per_step":
            place = (block, 0)
            if self.policy.linear == "first" and recurrence:
                return
        self.writes.setdefault(place, []).append((rows, entry))

    def leave(self, rows: Tensor, recurrences: int, inputs: dict[int, Tensor]) -> None:
        """Rows that are done; ``inputs``: what each linear block of theirs read in the last recurrence."""
        self.taken[rows] = recurrences
        if self.policy.fills and self.linear:
            self.left.append((rows, recurrences, inputs))

    def _fill(self) -> Iterator[tuple[int, int, Tensor, LayerState]]:
        """Writes of rows that left into the deeper linear states: the mixer reads once more what it read last. All rows that
        have left before a recurrence are written to it together."""
        deepest = max(self.deepest, int(self.taken.max()))
        for rows, done, _ in self.left:
            self.filled[rows] = max(0, deepest - done)
        for recurrence in range(min((done for _, done, _ in self.left), default=deepest), deepest):
            gone = [(rows, inputs) for rows, done, inputs in self.left if done <= recurrence]
            rows, order = torch.cat([rows for rows, _ in gone]).sort()
            context = self.context_of(rows)
            context.tables.update({k: v for k, v in self.context.tables.items() if k == LOWER_BOUNDS})
            for block in gone[0][1]:
                layer: Any = self.loop.backbone.model.layers[block]
                before = self._linear(block, recurrence)
                before = None if before is None else before.map(lambda t, rows=rows: self._of(t, rows))
                hidden = torch.cat([inputs[block] for _, inputs in gone])[order]
                _, after = layer.attn(hidden, context, before)
                yield block, recurrence, rows, after

    def finish(self, state: ModelState) -> ModelState:
        """``state`` with the core's new entries and the rule."""
        for block, recurrence, rows, entry in self._fill():
            self.writes.setdefault((block, recurrence), []).append((rows, entry))
        entries = dict(state.entries)
        inside = [p for p in entries if self._in_core(p) and entries[p].mixer == ATTENTION]
        if self.in_place:
            entries |= self._grown(inside)
        else:
            for place in inside:  # deeper than this pass went: nobody wrote, the columns stay in step
                entries[place] = entries[place].map(lambda t: F.pad(t, (0, 0, 0, self.new)))
        if self.policy.copies and not self.in_place:
            entries |= self._copied()
        for place, writes in self.writes.items():
            if not (self.policy.copies and writes[0][1].mixer == ATTENTION):  # those are joined above
                entries[place] = self._joined(place, writes)
        old = self.taken.new_zeros(self.batch, 0) if self.past.is_fresh else self.depth
        depth = torch.cat([old, self.taken[:, None] * self.context.real_tokens], 1)
        return mark(replace(state, entries=entries), self.policy, depth)

    def _grown(self, before: list[Place]) -> dict[Place, LayerState]:
        """Every place with the new column, in which rows that did not come so far have zeros, or copies."""
        untouched = sorted(place for place in before if place not in self.tails)
        missing: dict[int, Tensor] = {}
        for place in sorted(self.tails):
            needed = self._needed(place)
            if needed not in missing:
                missing[needed] = (self.taken < needed).nonzero()[:, 0]
            tail = self.tails[place]
            tail.fill(missing[needed], self.tails[place[0], place[1] - 1] if self.policy.copies and place[1] else None)
        found: dict[Place, LayerState] = {place: tail.close() for place, tail in self.tails.items()}
        for place in untouched:  # no row came here: nothing is written before one does
            donor = found[place[0], place[1] - 1] if self.policy.copies else None
            found[place] = LayerState(ATTENTION, LateTensors(self.past.entries[place], donor, self.columns + 1))
        return found

    def _copied(self) -> dict[Place, LayerState]:
        """Keys and values of every recurrence, those of tokens that stopped before it copied from where they stopped."""
        found = {}
        for block in (self.loop.core.start + j for j in self.attention):
            new: LayerState | None = None
            # places may be deeper than every row here: those of rows that are no longer in the batch
            stored = max((i + 1 for b, i in self.past.entries if b == block), default=0)
            for recurrence in range(max(self.deepest, int(self.taken.max()), stored)):
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
    rows, s, memory = passing.everyone, start, None
    without, _ = window.split(most)
    decodes = rule.decoded and passing.coda_in_place(state)
    done = Departures()
    for i in range(1, most + 1):
        with torch.no_grad() if i <= without else nullcontext():
            new, inputs = _recurrence(loop, passing, s, embedded, rows, i - 1)
        before, s = s, new
        part = passing.context_of(rows)
        gone = stay = hidden = None
        if i == most:
            hidden = loop.finish(s, part, passing.coda(state, rows))[0] if decodes else None
        elif rule.due(i):
            tokens = passing.coda(state, rows) if rule.decoded else None
            leaving, memory, hidden = loop.check_exit(before, s, part, rule, memory, tokens)
            gone = leaving.nonzero()[:, 0]
            if i < rule.min_steps or not len(gone):
                continue
            stay = (~leaving).nonzero()[:, 0] if len(gone) < len(rows) else None
        else:
            continue
        # what a check has decoded of rows that leave is what they would be decoded to; their coda's columns are written
        left = done.add(gone, rows, i, s, before.detach(), hidden if decodes else None)
        passing.leave(left, i, {b: x if gone is None else x.index_select(0, gone) for b, x in inputs.items()})
        if stay is None:
            break
        rows, s, embedded = (t.index_select(0, stay) for t in (rows, s, embedded))
        memory = None if memory is None else memory.index_select(0, stay)
    found = done.in_order()
    assert found.before is not None
    kept = passing.finish(state)
    return PassResult(found.final, passing.taken, kept, passing.filled, found.before, found.hidden)


def _recurrence(
    loop: "DepthLoop",
    passing: StepPass,
    s: Tensor,
    embedded: Tensor,
    rows: Tensor,
    number: int,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The next state of ``rows``, and what each linear block's mixer read."""
    hidden = loop.adapter(s, embedded)
    inputs = {}
    blocks = range(loop.core.start, loop.core.stop)
    views = {block: passing.view(block, number, rows) for block in blocks}

    def together(block: int) -> Any:
        """Attention blocks in a row that see the same tokens run in one call; what a linear one reads must be kept."""
        return (block, None) if block - loop.core.start in passing.linear else (None, views[block][1])

    for (linear, _), group in groupby(blocks, together):
        part = list(group)
        entries = {(block, number): view for block in part if (view := views[block][0]) is not None}
        if linear is not None:
            layer: Any = loop.backbone.model.layers[linear]
            inputs[linear] = hidden if layer.norm_placement == "post" else layer.attn_norm(hidden)
        context = passing.context_of(rows, views[part[0]][1])
        here = slice(part[0], part[-1] + 1)
        hidden, after = loop.backbone.run(hidden, context, here, passing.state_of(rows, entries), number)
        assert after is not None
        for block in part:
            passing.write(block, number, rows, after.entries[block, number])
    return (loop.backbone.model.norm(hidden) if loop.readout.loop_norm == "every_recurrence" else hidden), inputs
