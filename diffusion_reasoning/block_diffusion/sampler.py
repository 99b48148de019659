"""Sampling block by block: the common loop inside a block, a carried state from block to block.

Blocks are counted from the first real token of a row, as in training, so a prompt's last tokens may share a block with the first
new ones; they are given there and seen from both sides. What comes before the first block with something to fill is read in one
pass. A row's passes (NFE) are that reading, its denoising passes and one commit of every block that another one follows.

Rows do not know each other: each has its own blocks, steps and random numbers, a finished row leaves the batch, and a denoising pass
of some rows reads the states of these rows alone.
"""

import time
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentcot.backbone import LayerState
from latentcot.diffusion_reasoning.block_diffusion.model import BlockDiffusionModel, BlockState
from latentcot.diffusion_reasoning.block_diffusion.recording import BlockRecorder
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig
from latentcot.diffusion_reasoning.samplers import (
    Allowed,
    DiffusionOutput,
    Hook,
    LogitsFn,
    fill_block,
    lay_out,
    seeds_of_rows,
)
from latentcot.diffusion_reasoning.stopping import degenerate


@torch.no_grad()
def block_generate(
    model: BlockDiffusionModel,
    input_ids: Tensor,
    config: DiffusionGenerationConfig,
    attention_mask: Tensor | None = None,
    maskable: Tensor | None = None,
    allowed: Allowed | None = None,
    row_seeds: Tensor | None = None,
    hook: Hook | None = None,
) -> DiffusionOutput:
    """Fill the masked positions of a sequence from left to right, a block at a time.

    Args:
        input_ids: ``[B, P]``; ``config.max_new_tokens`` masked positions are put behind it.
        config: of the sampler inside a block; with ``record`` the output has a trajectory, in which step k of a row is its k-th denoising
            step, and FLOPs are not counted. ``steps`` are shared out over a row's blocks that have something to fill, the first ones
            one more. ``max_nfe`` bounds all passes of a row. ``block_length`` is the model's: leave it ``None``.
        attention_mask: ``[B, P]``, True = real; padding may stand anywhere.
        maskable: ``[B, P]`` or ``[B, P + n]``: positions to fill; all others are given. Given tokens of a later block are not seen.
        allowed: ``[B, P + n, V]`` bool, or a callable ``(pass within a block, z [B, P + n]) -> [B, P + n, V]``: tokens that may be
            proposed.
        row_seeds: ``[B]`` int64; default: from ``config.seed`` and the row's number.
        hook: called as ``hook(pass, rows, z)`` in front of every denoising pass with the numbers ``[R]`` of its rows and their blocks.

    Returns:
        :class:`~latentcot.diffusion_reasoning.samplers.DiffusionOutput`; ``exact`` is the model's.

    Raises:
        ValueError: as :func:`~latentcot.diffusion_reasoning.samplers.diffusion_generate`; the first token of a row is to be filled by a
            shifted model; guidance or carry asked for; fewer passes than the blocks need.
    """
    ids, real, maskable = lay_out(input_ids, config.max_new_tokens, attention_mask, maskable)
    _check(model, config, real, maskable)
    if not len(ids):
        nothing = torch.zeros(0, dtype=torch.long, device=ids.device)
        return DiffusionOutput(ids, nothing, nothing.bool(), exact=model.exact)
    run = _Run(
        model, config, ids, real, maskable, allowed, hook, seeds_of_rows(row_seeds, config.seed, len(ids), ids.device)
    )
    run.read_what_is_given()
    while run.next_block():
        pass
    return run.finish()


@dataclass
class _Plan:
    """Blocks of each row that have something to fill: ``numbers [B, m]`` ascending (-1 behind the last), ``steps [B, m]``."""

    numbers: Tensor
    steps: Tensor
    clamped: bool


class _Run:
    """One call. Rows are held with their real tokens in front (``z``), and put back at the end."""

    def __init__(
        self,
        model: BlockDiffusionModel,
        config: DiffusionGenerationConfig,
        ids: Tensor,
        real: Tensor,
        maskable: Tensor,
        allowed: Allowed | None,
        hook: Hook | None,
        seeds: Tensor,
    ):
        self.model, self.config, self.hook, self.seeds = model, config, hook, seeds
        self.order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
        self.real, self.maskable = real.gather(1, self.order), maskable.gather(1, self.order)
        self.z = ids.gather(1, self.order).masked_fill(self.maskable, config.mask_id)
        self.given = ids
        if allowed is not None and not isinstance(allowed, Tensor) and not callable(allowed):
            raise TypeError(f"allowed: a tensor or a callable is needed, got {type(allowed).__name__}")
        self.allowed = self._in_order(allowed) if isinstance(allowed, Tensor) else allowed
        self.plan = self._plan()
        if self.plan.clamped:
            warnings.warn(
                f"steps: {config.steps} passes are more than there are tokens to reveal; each block takes one a token",
                stacklevel=4,
            )
        batch = ids.shape[0]
        self.nfe, self.turn = (torch.zeros(batch, dtype=torch.long, device=ids.device) for _ in range(2))
        self.stopped = torch.zeros(batch, dtype=torch.bool, device=ids.device)
        self.rows = (self.plan.numbers[:, 0] >= 0).nonzero()[:, 0]  # those that go on
        self.read = torch.zeros(batch, dtype=torch.long, device=ids.device)  # blocks committed
        self.state: BlockState | None = model.init_state(len(self.rows)) if len(self.rows) else None  # of these rows
        self._check_passes()
        self.recorder, self.started = None, time.perf_counter()
        if config.record is not None:
            held = self._as_given(self.z), real, maskable
            self.recorder = BlockRecorder(*held, config.mask_id, len(model.backbone.model.layers))

    # -- layout -----------------------------------------------------------------------------------------------------

    def _in_order(self, allowed: Tensor) -> Tensor:
        """A table ``[B, L, V]`` of what is allowed, real tokens of each row in front."""
        expected = [*self.given.shape, self.model.backbone.config.vocab_size]
        if list(allowed.shape) != expected or allowed.dtype != torch.bool:
            raise ValueError(
                f"allowed: shape {list(allowed.shape)} of {allowed.dtype} given, expected {expected} of bool"
            )
        return allowed.take_along_dim(self.order[..., None], 1)

    def _as_given(self, z: Tensor) -> Tensor:
        """Rows ``[B, L]`` with padding back where it was."""
        held = torch.zeros_like(self.maskable).scatter(1, self.order, self.maskable)
        return torch.where(held, torch.zeros_like(z).scatter(1, self.order, z), self.given)

    def _allowed_in(self, rows: Tensor, column: Tensor, inside: Tensor) -> Allowed | None:
        """What ``allowed`` says about one block of each of these rows: ``column [R, b]``, those behind the end of a row not ``inside``."""
        if self.allowed is None or isinstance(self.allowed, Tensor):
            return None if self.allowed is None else self.allowed[rows].take_along_dim(column[..., None], 1)
        ask = self.allowed

        def asked(number: int, block: Tensor) -> Tensor:
            z = self.z.clone()
            r, c = inside.nonzero(as_tuple=True)
            z[rows[r], column[r, c]] = block[r, c]
            return self._in_order(ask(number, self._as_given(z)))[rows].take_along_dim(column[..., None], 1)

        return asked

    # -- what there is to do -----------------------------------------------------------------------------------------

    def _plan(self) -> _Plan:
        b, steps, quota = self.model.block_length, self.config.steps, self.config.make_quota()
        batch, length = self.z.shape
        blocks = -(-length // b)
        block = (torch.arange(length, device=self.z.device) // b).expand(batch, -1)
        sizes = torch.zeros(batch, blocks, dtype=torch.long, device=self.z.device)
        sizes = sizes.scatter_add(1, block, self.maskable.long())
        to_fill = sizes > 0
        most = max(1, int(to_fill.sum(1).max()))
        order = torch.argsort((~to_fill).to(torch.uint8), dim=1, stable=True)[:, :most]
        numbers = torch.where(to_fill.gather(1, order), order, -1)
        sizes = sizes.gather(1, order)
        if steps is None:
            return _Plan(numbers, sizes, False)
        count = to_fill.sum(1, keepdim=True)
        if steps < int(count.max()):
            raise ValueError(f"steps: {steps} given for {int(count.max())} blocks; every block needs at least one pass")
        turn = torch.arange(most, device=self.z.device)
        count = count.clamp(min=1)
        shared = torch.where(numbers >= 0, steps // count + (turn < steps % count), 0)
        taken = torch.minimum(shared, sizes) if quota.counted else shared
        return _Plan(numbers, taken, bool((taken < shared).any()))

    def _reads_first(self) -> Tensor:
        """Whether a row has blocks in front of its first one with something to fill, ``[B]``."""
        return self.plan.numbers[:, 0] > 0

    def _commits(self) -> Tensor:
        """Whether a pass reads something between each block to fill and the next one, ``[B, m - 1]``: the block itself or, where its last
        denoising pass stands for that, blocks between the two in which everything is given."""
        before, behind = self.plan.numbers[:, :-1], self.plan.numbers[:, 1:]
        return (behind >= 0) & ((behind > before + 1) | self.model.exact)

    def _check_passes(self) -> None:
        most = self.config.max_nfe
        if most is None:
            return
        count = (self.plan.numbers >= 0).sum(1)
        needed = count + self._commits().sum(1) + self._reads_first()
        needed = torch.where(count > 0, needed, 0)
        if bool((needed > most).any()):
            row = int(needed.argmax())
            raise ValueError(
                f"max_nfe: {most} given, but row {row} needs at least {int(needed[row])} passes: {int(count[row])} blocks, and the "
                f"reading of what stands in front of them and between two of them"
            )

    # -- passes ------------------------------------------------------------------------------------------------------

    def read_what_is_given(self) -> None:
        self._commit_up_to(self.plan.numbers[:, 0])

    def _commit_up_to(self, block: Tensor) -> None:
        """Commit the blocks of every going row in front of ``block [B]`` that are not yet; one pass where there are any."""
        if self.state is None:
            return
        b, rows = self.model.block_length, self.rows
        start, end = self.read[rows] * b, block[rows] * b
        most = int((end - start).max())
        if most <= 0:
            return
        column = start[:, None] + torch.arange(most, device=self.z.device)
        wanted = column < end[:, None]
        tokens = self.z[rows].gather(1, column.clamp(max=self.z.shape[1] - 1))
        self.state = self.model.commit(tokens, self.state, None if bool(wanted.all()) else wanted)
        self.nfe[rows] += wanted.any(1).long()
        self.read[rows] = block[rows].clamp(min=self.read[rows])

    def next_block(self) -> bool:
        """Fill one block of every row that goes on; False when none is left."""
        if self.state is None:
            return False
        rows, b = self.rows, self.model.block_length
        turn = self.turn[rows]
        number = self.plan.numbers[rows].gather(1, turn[:, None])[:, 0]
        column = number[:, None] * b + torch.arange(b, device=self.z.device)
        inside = column < self.z.shape[1]
        column, inside = column[:, inside.any(0)], inside[:, inside.any(0)]
        column = column.clamp(max=self.z.shape[1] - 1)
        real = self.real[rows].gather(1, column) & inside
        maskable = self.maskable[rows].gather(1, column) & inside
        block = self.z[rows].gather(1, column)
        steps = self.plan.steps[rows].gather(1, turn[:, None])[:, 0]
        budget = self._budget(rows, turn)
        kept = _KeptStates(self.state.rows) if not self.model.exact else None
        filled = block.clone()
        for chosen in _groups(steps if self.config.steps is not None else torch.zeros_like(steps), budget):
            began = time.perf_counter() - self.started
            out = fill_block(
                self._logits_fn(chosen, real, kept),
                block[chosen],
                self._inside(int(steps[chosen[0]]), int(budget[chosen[0]])),
                maskable=maskable[chosen],
                first_position=number[chosen] * b,
                allowed=self._allowed_in(rows[chosen], column[chosen], inside[chosen]),
                row_seeds=self.seeds[rows[chosen]],
                hook=self._hook(rows[chosen]),
            )
            filled[chosen] = out.sequences
            if self.recorder is not None:
                assert out.trajectory is not None
                at = self.order[rows[chosen]].gather(1, column[chosen]).masked_fill(~inside[chosen], -1)
                self.recorder.add(rows[chosen], at, out.trajectory, self.nfe[rows[chosen]], began)
            self.nfe[rows[chosen]] += out.nfe
            self.stopped[rows[chosen]] |= out.stopped
        r, c = (real & maskable).nonzero(as_tuple=True)
        self.z[rows[r], column[r, c]] = filled[r, c]
        self._go_on(rows, number, filled, maskable, kept)
        return self.state is not None

    def _go_on(
        self, rows: Tensor, number: Tensor, filled: Tensor, maskable: Tensor, kept: "_KeptStates | None"
    ) -> None:
        """Stop rows, commit the block of the others and move them to their next one."""
        eos = self.config.eos_id
        ended = torch.zeros_like(rows, dtype=torch.bool)
        if self.config.stop in ("eos_block", "eos_or_degenerate"):
            ended = ((filled == eos) & maskable).any(1)
        if self.config.stop == "eos_or_degenerate":
            held = self.real[rows] & (
                torch.arange(self.z.shape[1], device=rows.device) < (number[:, None] + 1) * self.model.block_length
            )
            ended = ended | degenerate(self.z[rows], held)
        self.turn[rows] += 1
        last = self.turn[rows] >= (self.plan.numbers[rows] >= 0).sum(1)
        early = ended & ~last
        self.stopped[rows] |= early
        if bool(early.any()):
            behind = (
                torch.arange(self.z.shape[1], device=rows.device) >= (number[:, None] + 1) * self.model.block_length
            )
            rest = behind & self.maskable[rows] & early[:, None]
            self.z[rows] = self.z[rows].masked_fill(rest, eos)
        going = ~(ended | last)
        assert self.state is not None
        state = self.state
        if kept is not None:  # the last denoising pass stands for the commit
            state, self.read[rows] = kept.result(), number + 1
        if not bool(going.any()):
            self.rows, self.state = rows[:0], None
            return
        self.rows = rows[going]
        self.state = state if bool(going.all()) else state.select(going.nonzero()[:, 0])
        turn = self.turn.clamp(max=self.plan.numbers.shape[1] - 1)
        self._commit_up_to(self.plan.numbers.gather(1, turn[:, None])[:, 0])

    def _logits_fn(self, chosen: Tensor, real: Tensor, kept: "_KeptStates | None") -> LogitsFn:
        assert self.state is not None
        state, batch = self.state, len(real)
        held: dict[
            tuple[int, ...], BlockState
        ] = {}  # of the latest rows: they change when one has ended, not in every pass

        def logits(z: Tensor, _: int, rows: Tensor) -> Tensor:
            rows = chosen[rows]
            key = tuple(rows.tolist())
            if key not in held:
                held.clear()
                held[key] = state if len(rows) == batch else state.select(rows)
            mask = None if bool(real[rows].all()) else real[rows]
            found, after = self.model.peek(z, held[key], mask, keep=kept is not None)
            if kept is not None:
                assert after is not None
                kept.put(rows, after)
            return found

        return logits

    def _inside(self, steps: int, budget: int) -> DiffusionGenerationConfig:
        """The sampler of one block."""
        return replace(
            self.config,
            max_new_tokens=0,
            steps=None if self.config.steps is None else steps,
            block_length=None,
            max_nfe=budget if budget > 0 else None,
            stop=self.config.stop if self.config.stop == "fixed_point" else "canvas",
            parity=None,
        )

    def _budget(self, rows: Tensor, turn: Tensor) -> Tensor:
        """Denoising passes that each row may spend on this block so that every later one gets one and its commit; 0 = no bound."""
        if self.config.max_nfe is None:
            return torch.zeros_like(turn)
        later = (self.plan.numbers[rows] >= 0).sum(1) - turn - 1
        commits = self._commits()[rows]
        coming = torch.arange(commits.shape[1], device=rows.device) >= turn[:, None]
        return self.config.max_nfe - self.nfe[rows] - later - (commits & coming).sum(1)

    def _hook(self, rows: Tensor) -> Hook | None:
        hook = self.hook
        return None if hook is None else lambda number, inner, z: hook(number, rows[inner], z)

    def finish(self) -> DiffusionOutput:
        if self.config.stop == "eos_truncate":
            behind = ((self.z == self.config.eos_id) & self.maskable).long().cumsum(1) > 0
            self.z = self.z.masked_fill(behind & self.maskable, self.config.eos_id)
        filled = self._as_given(self.z)
        trajectory = None if self.recorder is None else self.recorder.finish(filled, self.nfe)
        return DiffusionOutput(filled, self.nfe, self.stopped, self.model.exact, trajectory)


class _KeptStates:
    """For every row the state that its latest denoising pass would leave."""

    def __init__(self, rows: int):
        self.rows = rows
        self.after: BlockState | None = None

    def put(self, rows: Tensor, after: BlockState) -> None:
        if self.after is None:
            empty = after.memory.map(lambda t: t.new_zeros(self.rows, *t.shape[1:]))
            last = None if after.last is None else after.last.new_zeros(self.rows, after.last.shape[1])
            self.after = replace(after, memory=empty, last=last, rows=self.rows)
        self.after = _with_rows(self.after, rows, after)

    def result(self) -> BlockState:
        assert self.after is not None  # every row of a block has at least one pass
        return self.after


def _with_rows(state: BlockState, rows: Tensor, part: BlockState) -> BlockState:
    """``state`` with the given rows replaced."""

    def put(t: Tensor | None, new: Tensor | None) -> Tensor | None:
        return None if t is None or new is None else t.index_copy(0, rows, new)

    memory, new = state.memory, part.memory
    entries = {
        place: LayerState(e.mixer, {n: t.index_copy(0, rows, new.entries[place][n]) for n, t in e.tensors.items()})
        for place, e in memory.entries.items()
    }
    memory = replace(
        memory, entries=entries, lengths=put(memory.lengths, new.lengths), valid=put(memory.valid, new.valid)
    )
    return replace(state, memory=memory, last=put(state.last, part.last))


def _groups(*keys: Tensor) -> list[Tensor]:
    """Row numbers by equal keys: rows of one group run the same sampler."""
    _, which = torch.unique(torch.stack(keys, 1), dim=0, return_inverse=True)
    return [(which == g).nonzero()[:, 0] for g in range(int(which.max()) + 1)]


def _check(model: BlockDiffusionModel, config: DiffusionGenerationConfig, real: Tensor, maskable: Tensor) -> None:
    if not isinstance(model, BlockDiffusionModel):
        raise TypeError(f"model: expected a BlockDiffusionModel, got {type(model).__name__}")
    if config.mask_id != model.mask_id:
        raise ValueError(f"mask_id: the sampler's is {config.mask_id}, the model's {model.mask_id}")
    if config.block_length not in (None, model.block_length):
        raise ValueError(
            f"block_length: {config.block_length} given, but the model's blocks have {model.block_length} tokens; leave it None"
        )
    if config.guidance > 0 or config.carry != "none":
        raise ValueError(
            f"config: guidance = {config.guidance} and carry = {config.carry!r} given; both belong to a sampler over the whole canvas"
        )
    if config.parity is not None:
        raise ValueError(f"parity: {config.parity!r} belongs to a sampler over the whole canvas")
    first = real & (real.long().cumsum(1) == 1)
    if model.shift and bool((maskable & first).any()):
        raise ValueError(
            "maskable: the first token of a row is to be filled, but nothing speaks about it in a shifted model; give one, such as bos"
        )
