r"""The one loop behind every sampler of masked diffusion.

::

    while anything is masked:
        logits = network(z)                                  one pass (NFE) of the rows that are not finished
        y, c   = proposed tokens and their confidence        at masked positions of the current block only
        z[U]   = y[U]                                        U chosen by the quota
        z[R]   = mask                                        R chosen by the re-masking, if any

What is masked is a boolean state of its own, never read off ``z == mask``: a given token may be the mask token. A row's
result does not depend on the other rows: random numbers are drawn by address
(:mod:`~latentcot.diffusion_reasoning.noise`), counts are per row, finished rows leave the batch. Per pass the loop
waits for the device a fixed number of times, whatever the number of rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentcot.diffusion_reasoning.block_plan import BlockPlan
from latentcot.diffusion_reasoning.confidence import Proposal, filter_logits, find_confidence
from latentcot.diffusion_reasoning.corruption import check_logits
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig
from latentcot.diffusion_reasoning.noise import Noise
from latentcot.diffusion_reasoning.quota import Bernoulli, PassView
from latentcot.diffusion_reasoning.remasking import ReMDM, Revise
from latentcot.diffusion_reasoning.sampler_network import Request, SamplerNetwork
from latentcot.diffusion_reasoning.stopping import degenerate
from latentcot.diffusion_reasoning.trajectory import Recorder

Allowed = Tensor | Callable[[int, Tensor], Tensor]
Hook = Callable[[int, Tensor, Tensor], None]
LogitsHook = Callable[[int, Tensor, Tensor, Tensor], Tensor]
_LOWEST = torch.finfo(torch.float64).min
_PATIENCE = 16  # plans' worth of turns that a tokens hook may ask for by masking again


@dataclass(frozen=True)
class Canvas:
    """``ids``, ``real``, ``maskable``, ``positions`` (number of real tokens before), each ``[B, L]``."""

    ids: Tensor
    real: Tensor
    maskable: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Hooks:
    """What a caller may look at or change in a pass, see :func:`~latentcot.diffusion_reasoning.samplers.diffusion_generate`."""

    before: Hook | None = None
    logits: LogitsHook | None = None
    tokens: LogitsHook | None = None


@dataclass
class _Turn:
    """Rows of one turn of the loop, their current block ``here [R, L]`` with its size and steps, and which of their
    positions may be revealed."""

    number: int
    rows: Tensor
    here: Tensor
    size: Tensor
    steps: Tensor
    closing: Tensor
    refilling: Tensor
    ending: Tensor
    candidates: Tensor


class SamplerLoop:
    """The loop's state and its turns; see the module. :meth:`run` once."""

    def __init__(
        self,
        network: SamplerNetwork,
        canvas: Canvas,
        config: DiffusionGenerationConfig,
        plan: BlockPlan,
        noise: Noise,
        allowed: Allowed | None = None,
        hooks: Hooks = Hooks(),
        recorder: Recorder | None = None,
    ):
        self.network, self.canvas, self.config, self.plan, self.noise = network, canvas, config, plan, noise
        self.allowed, self.hooks, self.recorder = allowed, hooks, recorder
        self.quota, self.order = config.make_quota(), find_confidence(config.order)
        remask = config.make_remask()
        self.revise = remask if isinstance(remask, Revise) else None
        self.remdm = remask if isinstance(remask, ReMDM) else None
        batch, device = canvas.ids.shape[0], canvas.ids.device
        self.masked = canvas.maskable.clone()
        self.z = canvas.ids.masked_fill(self.masked, config.mask_id)
        # confidence and probability of each token at its last reveal
        self.settled = torch.full(self.z.shape, torch.inf, dtype=torch.float64, device=device)
        self.probability = torch.ones(self.z.shape, dtype=torch.float64, device=device)
        self.block, self.step, self.extra, self.nfe = (
            torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.stopped = torch.zeros(batch, dtype=torch.bool, device=device)
        self.stale = ~self.stopped  # whether the row changed since the network saw it
        self.noisy = torch.ones(batch, dtype=torch.float64, device=device)  # first hitting's clock, 1 - alpha
        self.guess: Tensor | None = None  # the last full prediction, where the quota makes one
        self.reuse = self.quota.may_wait and not network.reads_time
        self.outputs: Tensor | None = None
        self.asked = 0  # turns that a tokens hook has made necessary

    def run(self) -> None:
        number, most = 0, self._most_turns()
        while number < most + self.asked:
            rows = (self.block < self.plan.n_blocks).nonzero().squeeze(1)
            if not rows.numel():
                break
            if number >= _PATIENCE * most:
                raise RuntimeError(
                    f"tokens_hook: it still masks tokens again after {number} denoising steps, where the plan has {most}; "
                    "let it come to an end, or bound the passes by max_nfe"
                )
            self._turn(self._open(number, rows))
            number += 1
        if bool(self.masked.any()):
            raise RuntimeError(
                f"quota: {self.quota} revealed too little; masks are left in rows "
                f"{self.masked.any(1).nonzero().squeeze(1).tolist()[:8]}"
            )
        if self.config.stop == "eos_truncate":
            maskable = self.canvas.maskable
            behind = (((self.z == self.config.eos_id) & maskable).long().cumsum(1) > 0) & maskable
            self.z = self.z.masked_fill(behind, self.config.eos_id)

    # -- one turn ----------------------------------------------------------------------------------------------------

    def _open(self, number: int, rows: Tensor) -> _Turn:
        here = (self.plan.block_of[rows] == self.block[rows, None]) & self.canvas.maskable[rows]
        size, steps = self.plan.size[rows, self.block[rows]], self.plan.steps[rows, self.block[rows]]
        closing = self.quota.closing(steps, self.step[rows])
        ending = torch.zeros_like(closing)
        if self.config.max_nfe is not None:  # no further pass would fit behind this one
            cost = self.network.cost
            ending = self.nfe[rows] + cost * self.stale[rows].long() + cost > self.config.max_nfe
        candidates = here if self.quota.repredicts else self.masked[rows] & here
        candidates = candidates | (self.masked[rows] & ending[:, None])
        return _Turn(number, rows, here, size, steps, closing, self.extra[rows] > 0, ending, candidates)

    def _turn(self, turn: _Turn) -> None:
        if self.quota.one_a_pass:  # the next time at which a token is revealed
            self.noisy[turn.rows] *= self._clock(turn)
        logits, passed = self._logits(turn)
        r, column = turn.candidates.nonzero(as_tuple=True)
        rows, number = turn.rows, turn.number
        chosen = self._chosen(logits, turn, r, column)
        where = self.canvas.positions[rows[r], column]
        proposal = self._propose(chosen, turn.closing[r], rows[r], where, number)
        y = self.z[rows].index_put((r, column), proposal.tokens)
        confidence, shown = self._confidence(proposal, turn, r, column)
        before, held = self.z[rows], self.masked[rows]

        # -- reveal ----------------------------------------------------------------------------------------------------
        sigma, alphas = self._sigma(turn)
        view = PassView(
            shown.masked_fill(~turn.here, -torch.inf),
            turn.candidates & turn.here,
            turn.size,
            turn.steps,
            self.step[rows],
            sigma,
            lambda: self.noise.positions(rows, number, "reveal", self.canvas.positions[rows]),
        )
        if alphas is None:
            revealed = self.quota.reveal(view)
        else:
            assert isinstance(self.quota, Bernoulli)
            revealed = self.quota.reveal_between(view, *alphas)
        reveal = turn.candidates & turn.here & (revealed | (turn.closing | turn.refilling)[:, None])
        forced = turn.candidates & turn.ending[:, None] & ~reveal
        self.stopped[rows] |= (forced & held).any(1)
        y = torch.where(forced, y.index_put((r, column), chosen.argmax(-1)), y)
        reveal = reveal | forced
        after, left = torch.where(reveal, y, before), held & ~reveal
        if self.quota.repredicts:
            back = turn.here & ~reveal
            after, left = after.masked_fill(back, self.config.mask_id), left | back
        self.settled[rows] = torch.where(reveal, confidence, self.settled[rows])
        if self.remdm is not None and self.remdm.variant == "conf":
            of_token = torch.zeros_like(confidence)
            of_token[r, column] = proposal.of_token(proposal.filtered_probs)
            self.probability[rows] = torch.where(reveal, of_token, self.probability[rows])

        # -- re-mask, hook, finish blocks, stop ------------------------------------------------------------------------
        if self.remdm is not None:
            chance = sigma if sigma.dim() == 2 else sigma[:, None]
            draws = self.noise.positions(rows, number, "remask", self.canvas.positions[rows])
            back = turn.here & ~held & (draws < chance) & ~turn.ending[:, None]
            after, left = after.masked_fill(back, self.config.mask_id), left | back
        if self.hooks.tokens is not None:
            written, masks = self._rewritten(self.hooks.tokens(number, rows, after.clone(), logits), turn, after, left)
            self.asked += int((masks & ~left).sum(1).max())
            again = masks & turn.ending[:, None]  # no pass is left to fill them
            after, left = torch.where(again, y, written), masks & ~again
        done = ~(left & turn.here).any(1)
        if self.remdm is not None:
            done = (done & turn.closing) | turn.ending  # until then a revealed token may still go back
        if self.config.stop == "fixed_point":
            after, left, fixed = self._at_fixed_point(turn, y, after, left)
            self.stopped[rows] |= fixed & ~done
            done = done | fixed
        if self.revise is not None:
            again = done & (self.extra[rows] < self.revise.passes) & ~turn.ending
            low = self.revise.pick(self.settled[rows], turn.here) & again[:, None]
            after, left = after.masked_fill(low, self.config.mask_id), left | low
            self.extra[rows] = torch.where(done & ~again, 0, self.extra[rows] + again)
            done = done & ~again
        after, left, finished = self._stop(turn, done, after, left)
        changed = (after != before).any(1) | (left != held).any(1)
        self.z[rows], self.masked[rows] = after, left
        self.stale[rows] |= changed
        self.step[rows] = torch.where(done, 0, self.step[rows] + 1)
        self.block[rows] = torch.where(finished, self.plan.n_blocks[rows], self.block[rows] + done)
        if self.hooks.tokens is not None:
            self._reopen(rows, left)
        if self.recorder is not None and (passed or bool(changed.any())):
            seen = held | (self.canvas.maskable[rows] if self.quota.repredicts else False)
            self.recorder.record(rows, logits, seen, held, self.z, self.masked, self.nfe)

    # -- network and proposals ---------------------------------------------------------------------------------------

    def _logits(self, turn: _Turn) -> tuple[Tensor, bool]:
        """``[R, L, V]`` of the turn's rows, and whether the network was asked for any of them."""
        rows = turn.rows
        seen = rows
        if self.reuse:
            seen = rows[self.stale[rows] & turn.candidates.any(1)]
        if seen.numel():
            if self.hooks.before is not None:
                self.hooks.before(turn.number, seen, self.z[seen])
            fresh = self.network(
                Request(
                    turn.number,
                    seen,
                    self.z[seen],
                    self.canvas.real[seen],
                    self.masked[seen],
                    self.canvas.maskable[seen],
                    self._noise_level(seen) if self.network.reads_time else None,
                )
            )
            check_logits(fresh, self.z[seen], self.config.mask_id)
            if self.hooks.logits is not None:
                fresh = self.hooks.logits(turn.number, seen, self.z[seen], fresh)
                check_logits(fresh, self.z[seen], self.config.mask_id)
            self.nfe[seen] += self.network.cost
            if self.reuse:
                self.stale[seen] = False
                if self.outputs is None:
                    self.outputs = fresh.new_zeros(self.z.shape[0], *fresh.shape[1:])
                self.outputs[seen] = fresh
            else:
                self.outputs = fresh
        assert self.outputs is not None
        return (self.outputs[rows] if self.reuse else self.outputs), bool(seen.numel())

    def _chosen(self, logits: Tensor, turn: _Turn, r: Tensor, column: Tensor) -> Tensor:
        """fp64 logits ``[n, V]`` of the candidates alone, constraints applied."""
        config, rows = self.config, turn.rows
        chosen = logits[r, column].double()  # a copy: written into below, which saves a table of n V each time
        if config.forbid_mask_token:
            chosen[:, config.mask_id] = -torch.inf
        _check_finite(chosen, turn.number, rows[r], column)
        if config.logits_eos_inf:
            chosen[:, config.eos_id] = -torch.inf
        if self.allowed is not None:
            chosen = _constrain(chosen, self.allowed, turn.number, self.z, rows[r], column)
        return chosen

    def _propose(self, chosen: Tensor, greedy: Tensor, rows: Tensor, positions: Tensor, number: int) -> Proposal:
        """A token for each of n candidates: argmax, or a draw from the tempered and filtered distribution by the Gumbel
        trick.

        Written with logarithms: the published form exp(logits) / (-log u)^T is the same number until it overflows.
        """
        config = self.config
        filtered = chosen / config.temperature if config.temperature > 0 else chosen
        filtered = filter_logits(filtered, config.top_k, config.top_p, config.top_p_rule)
        tokens = chosen.argmax(-1)
        if config.temperature > 0:
            u = self.noise.tokens(rows, number, "token", positions, chosen.shape[-1])
            if config.gumbel_dtype == "float32":  # 24 bits, as torch.rand gives them
                u = (u * 2**24).floor().clamp(min=1).float() / 2**24
            drawn = (filtered - torch.log(-torch.log(u)).double()).argmax(-1)
            tokens = torch.where(greedy, tokens, drawn)
        if not config.forbid_mask_token and bool((wrong := tokens == config.mask_id).any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"logits: the network predicted the mask token {config.mask_id} in pass {number + 1}, row {int(rows[at])}; "
                "forbid_mask_token=True keeps it out"
            )
        # [n, 1] positions of rows [n]: one number a candidate
        uniform = self.noise.positions(rows, number, "order", positions[:, None])[:, 0]
        return Proposal(chosen, filtered, tokens, positions, uniform)

    def _confidence(self, proposal: Proposal, turn: _Turn, r: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Confidences ``[R, L]`` as they are, and as the quota is shown them."""
        config = self.config
        values = self.order(proposal).double()
        if values.shape != proposal.tokens.shape or bool(values.isnan().any()):
            raise ValueError(
                f"order: {config.order!r} gave {list(values.shape)} values, NaN among them or not; expected a number for "
                f"each of {list(proposal.tokens.shape)} candidates"
            )
        values = values.clamp(min=_LOWEST)
        ordered = values
        if config.order_temperature > 0:
            u = self.noise.positions(turn.rows[r], turn.number, "selection", proposal.positions[:, None])[:, 0]
            ordered = values / config.order_temperature - torch.log(-torch.log(u))
        if config.confidence_eos_eot_inf:
            last = proposal.tokens == config.eos_id
            if config.eot_id is not None:
                last = last | (proposal.tokens == config.eot_id)
            ordered = ordered.masked_fill(last, _LOWEST)
        shape, device = turn.candidates.shape, values.device
        empty = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        return empty.index_put((r, column), values), empty.index_put((r, column), ordered)

    # -- time ---------------------------------------------------------------------------------------------------------

    def _sigma(self, turn: _Turn) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """ReMDM's re-masking probability ``[R]`` or ``[R, L]``, and the shares of clean tokens it goes with."""
        none = torch.zeros(len(turn.rows), dtype=torch.float64, device=self.z.device)
        if self.remdm is None:
            return none, None
        assert isinstance(self.quota, Bernoulli)
        before, after = self.quota.times(turn.steps, self.step[turn.rows])
        alpha_t, alpha_s = (self.remdm.alpha(t, self.quota.schedule) for t in (before, after))
        revealed = turn.here & ~self.masked[turn.rows]
        sigma = self.remdm.sigma(alpha_t, alpha_s, before, self.probability[turn.rows], revealed)
        return sigma.masked_fill(turn.closing if sigma.dim() == 1 else turn.closing[:, None], 0.0), (alpha_t, alpha_s)

    def _noise_level(self, rows: Tensor) -> Tensor:
        """sigma = -log alpha of each row ``[R]`` for a network that reads it: from the grid of the ancestral sampler,
        first hitting's clock, or the share that is masked."""
        if isinstance(self.quota, Bernoulli):
            steps = self.plan.steps[rows, self.block[rows]]
            t, _ = self.quota.times(steps, self.step[rows])
            alpha = self.quota.schedule.alpha(t) if self.remdm is None else self.remdm.alpha(t, self.quota.schedule)
        elif self.quota.one_a_pass:
            alpha = 1 - self.noisy[rows]
        else:
            alpha = 1 - self.masked[rows].sum(1).double() / self.canvas.maskable[rows].sum(1)
        lowest = float(self.config.schedule.alpha(torch.ones((), dtype=torch.float64)))
        return -alpha.clamp(min=max(lowest, 1e-9), max=1.0).log()

    def _clock(self, turn: _Turn) -> Tensor:
        n = self.masked[turn.rows].sum(1).clamp(min=1)
        first = torch.zeros(len(turn.rows), 1, dtype=torch.int64, device=self.z.device)
        return self.noise.positions(turn.rows, turn.number, "clock", first)[:, 0] ** (1 / n)

    # -- stopping -----------------------------------------------------------------------------------------------------

    def _rewritten(self, z: Tensor, turn: _Turn, after: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """What a tokens hook made of the rows: it may write tokens, or the mask, at maskable positions."""
        maskable = self.canvas.maskable[turn.rows]
        if z.shape != after.shape or z.dtype != after.dtype:
            raise ValueError(
                f"tokens_hook: shape {list(z.shape)} of {z.dtype} returned, expected {list(after.shape)} of {after.dtype}"
            )
        changed = z != after
        if bool((changed & ~maskable).any()):
            at = (changed & ~maskable).nonzero()[0].tolist()
            raise ValueError(f"tokens_hook: it changed position {at[1]} of row {int(turn.rows[at[0]])}, which is given")
        return z, torch.where(changed, z == self.config.mask_id, left)

    def _reopen(self, rows: Tensor, left: Tensor) -> None:
        """Go back to the first block in which a tokens hook has masked something after it was finished."""
        first = torch.where(left, self.plan.block_of[rows], self.plan.n_blocks[rows, None]).amin(1)
        back = first < self.block[rows]
        self.block[rows] = torch.where(back, first, self.block[rows])
        self.step[rows] = torch.where(back, 0, self.step[rows])
        self.asked += int(back.any()) * int(self.plan.n_blocks.max())  # the blocks between are passed once more

    def _at_fixed_point(self, turn: _Turn, y: Tensor, after: Tensor, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows whose whole block is predicted as in the pass before are filled with that prediction."""
        if self.guess is None:
            self.guess = torch.full_like(self.z, -1)
        same = ((self.guess[turn.rows] == y) | ~turn.here).all(1)
        self.guess[turn.rows] = torch.where(turn.here, y, self.guess[turn.rows])
        fill = same[:, None] & turn.here
        return torch.where(fill, y, after), left & ~fill, same

    def _stop(self, turn: _Turn, done: Tensor, after: Tensor, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(z, masked, rows that are finished altogether)`` after the stopping rule was applied to finished blocks."""
        config, finished = self.config, turn.ending
        if config.stop not in ("eos_block", "eos_or_degenerate"):
            return after, left, finished
        ended = done & ((after == config.eos_id) & turn.here).any(1)
        if config.stop == "eos_or_degenerate":
            ended = ended | (done & degenerate(after, self.canvas.real[turn.rows] & ~left))
        self.stopped[turn.rows] |= ended & left.any(1)
        after = torch.where(left & ended[:, None], config.eos_id, after)
        return after, left & ~ended[:, None], finished | ended

    def _most_turns(self) -> int:
        """No row can need more turns of the loop than this."""
        maskable, n_blocks = self.canvas.maskable, self.plan.n_blocks
        tokens, blocks = (int(n.max()) if n.numel() else 0 for n in (maskable.sum(1), n_blocks))
        return max(tokens, self.config.steps or 0) + blocks * (1 + (self.revise.passes if self.revise else 0))


def _check_finite(chosen: Tensor, number: int, rows: Tensor, columns: Tensor) -> None:
    highest = (
        chosen.amax(-1) if chosen.shape[0] else chosen[:, 0]
    )  # NaN and +inf come through, -inf only when nothing else is there
    if bool(highest.isfinite().all()):
        return
    at = int((~highest.isfinite()).nonzero()[0])
    value = "NaN or +inf" if not bool(highest[at] == -torch.inf) else "-inf for every token"
    raise FloatingPointError(f"logits: {value} in pass {number + 1}, row {int(rows[at])}, position {int(columns[at])}")


def _constrain(chosen: Tensor, allowed: Allowed, number: int, z: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    table = allowed if isinstance(allowed, Tensor) else allowed(number, z)
    expected = [*z.shape, chosen.shape[-1]]
    if list(table.shape) != expected or table.dtype != torch.bool:
        raise ValueError(f"allowed: shape {list(table.shape)} of {table.dtype} given, expected {expected} of bool")
    chosen = chosen.masked_fill(~table[rows, columns], -torch.inf)
    if bool((none := (chosen == -torch.inf).all(-1)).any()):
        at = int(none.nonzero()[0])
        raise ValueError(
            f"allowed: no token is left for row {int(rows[at])}, position {int(columns[at])} in pass {number + 1}"
        )
    return chosen
