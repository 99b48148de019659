r"""The one loop behind every sampler of masked diffusion.

::

    while anything is masked:
        logits = network(z)                                  one pass (NFE) of the rows that are not finished
        y, c   = proposed tokens and their confidence        at masked positions of the current block only
        z[U]   = y[U]                                        U chosen by the quota
        z[R]   = mask                                        R chosen by the re-masking, if any

What is masked is a boolean state of its own, never read off ``z == mask``: a given token may be the mask token. A row's
result does not depend on the other rows: random numbers are drawn by address
(:mod:`~latentcot.diffusion_reasoning.noise`), counts are per row, finished rows leave the batch.

Per pass the loop waits for the device once, in front of it, whatever the number of rows: which of them go on, how much is
masked, and whether the pass before was in order. It waits once more in front of each function of a caller that is shown
what came of a pass (an order, quota or re-masking of one's own, a tokens hook), so that no such function ever sees what
is out of order, and where a step without a pass is recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from latentcot.diffusion_reasoning.block_plan import BlockPlan
from latentcot.diffusion_reasoning.confidence import BUILT_IN, Proposal, filter_logits, find_confidence
from latentcot.diffusion_reasoning.corruption import check_logits
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig
from latentcot.diffusion_reasoning.noise import Noise
from latentcot.diffusion_reasoning.quota import QUOTAS, Bernoulli, PassView, Quota
from latentcot.diffusion_reasoning.remasking import ReMDM, Revise
from latentcot.diffusion_reasoning.sampler_network import Request, SamplerNetwork
from latentcot.diffusion_reasoning.sampling_turn import Places, Questions, Selection, Turn, either
from latentcot.diffusion_reasoning.stopping import degenerate
from latentcot.diffusion_reasoning.trajectory import Recorder

Allowed = Tensor | Callable[[int, Tensor], Tensor]
Hook = Callable[[int, Tensor, Tensor], None]
LogitsHook = Callable[[int, Tensor, Tensor, Tensor], Tensor]
_LOWEST = torch.finfo(torch.float64).min
_PATIENCE = 16  # plans' worth of turns that a tokens hook may ask for by masking again
_OWN_CHOICES = (*QUOTAS.values(), ReMDM, Revise, type(None))


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
        self.closes = type(self.quota).closing is not Quota.closing
        self.foreign_order = not any(self.order is own for own in BUILT_IN)
        self.foreign_choice = type(self.quota) not in _OWN_CHOICES or type(remask) not in _OWN_CHOICES
        self.questions = Questions()
        self.everyone = Selection(torch.arange(batch, device=device), True)
        # the state is never written in place: what was handed to a caller, a network or the recorder stays as it was
        self.masked = canvas.maskable
        self.z = canvas.ids.masked_fill(self.masked, config.mask_id)
        self.block, self.step, self.extra, self.nfe = (
            torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.stopped = torch.zeros(batch, dtype=torch.bool, device=device)
        self.stale = ~self.stopped  # whether the row changed since the network saw it
        self.guess: Tensor | None = None  # the last full prediction, where the quota makes one
        self.reuse = self.quota.may_wait and not network.reads_time
        self.outputs: Tensor | None = None
        self.asked = 0  # turns that a tokens hook has made necessary
        self.lowest = float(config.schedule.alpha(torch.ones((), dtype=torch.float64)))  # alpha at t = 1

    # -- state of some samplers only ------------------------------------------------------------------------------------

    @cached_property
    def settled(self) -> Tensor:
        """Confidence of each token at its last reveal, ``[B, L]``."""
        return torch.full(self.z.shape, torch.inf, dtype=torch.float64, device=self.z.device)

    @cached_property
    def probability(self) -> Tensor:
        """Probability of each token at its last reveal, ``[B, L]``."""
        return torch.ones(self.z.shape, dtype=torch.float64, device=self.z.device)

    @cached_property
    def noisy(self) -> Tensor:
        """First hitting's clock, 1 - alpha, ``[B]``."""
        return torch.ones(self.z.shape[0], dtype=torch.float64, device=self.z.device)

    @cached_property
    def no_sigma(self) -> Tensor:
        return torch.zeros(self.z.shape[0], dtype=torch.float64, device=self.z.device)

    # -- the loop --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        number, most = 0, self._most_turns()
        while (turn := self._open(number)) is not None and number < most + self.asked:
            if number >= _PATIENCE * most:
                raise RuntimeError(
                    f"tokens_hook: it still masks tokens again after {number} denoising steps, where the plan has {most}; "
                    "let it come to an end, or bound the passes by max_nfe"
                )
            self._turn(turn)
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

    def _open(self, number: int) -> Turn | None:
        """The turn ahead, ``None`` when no row goes on. Raises what was wrong in the turn before."""
        working = self.block < self.plan.n_blocks
        here = self.plan.block_of == self.block[:, None]  # maskable positions of working rows: elsewhere it is -1
        candidates, ending = here if self.quota.repredicts else self.masked & here, None
        if self.config.max_nfe is not None:  # no further pass would fit behind this one
            cost = self.network.cost
            ending = (self.nfe + cost * self.stale.long() + cost > self.config.max_nfe) & working
            candidates = candidates | (self.masked & ending[:, None])
        asked = self.stale & candidates.any(1) if self.reuse else None
        recorded, shown = None, None
        if self.recorder is not None:
            recorded = (self.canvas.maskable if self.quota.repredicts else self.masked) & working[:, None]
        marks = [mask for mask in (working, candidates, asked, recorded) if mask is not None]
        counts = iter(self.questions.ask(marks))
        if not (rows := next(counts)):
            return None
        at = self._select(working, rows)
        assert at is not None
        candidates = at.of(candidates)
        places = Places.of(candidates, n_candidates := next(counts))
        seen = at if asked is None else self._select(asked, next(counts))
        if recorded is not None:  # the candidates and perhaps more
            n_recorded = next(counts)
            shown = places if n_recorded == n_candidates else Places.of(at.of(recorded), n_recorded)
        return Turn(
            number,
            at,
            here=at.of(here),
            size=self._of_block(self.plan.size, at),
            steps=(steps := self._of_block(self.plan.steps, at)),
            candidates=candidates,
            places=places,
            asked=seen,
            recorded=shown,
            closing=self.quota.closing(steps, at.of(self.step)) if self.closes else None,
            refilling=None if self.revise is None else at.of(self.extra) > 0,
            ending=None if ending is None else at.of(ending),
        )

    def _select(self, chosen: Tensor, count: int) -> Selection | None:
        """``count`` rows that are ``chosen [B]``; ``None`` where there are none."""
        if count == len(chosen):
            return self.everyone
        return Selection(chosen.nonzero_static(size=count)[:, 0], False) if count else None

    def _of_block(self, table: Tensor, at: Selection) -> Tensor:
        """What ``table [B, n]`` says about the block that each row is at, ``[R]``."""
        if table.shape[1] == 1:
            return at.of(table[:, 0])
        return at.of(table).gather(1, at.of(self.block)[:, None])[:, 0]

    def _turn(self, turn: Turn) -> None:
        at, number, place = turn.at, turn.number, turn.places.index
        if self.quota.one_a_pass:  # the next time at which a token is revealed
            self.noisy = at.into(self.noisy, at.of(self.noisy) * self._clock(turn))
        logits, passed = self._logits(turn)
        picked = logits[place]
        chosen, likeliest = self._chosen(picked, turn)
        proposal = self._propose(chosen, likeliest, turn)
        before, held = at.of(self.z), at.of(self.masked)
        y = before.index_put(place, proposal.tokens)
        values, shown = self._confidence(proposal, turn)

        # -- reveal ----------------------------------------------------------------------------------------------------
        if self.foreign_choice:
            self.questions.ask()
        sigma, alphas = self._sigma(turn)
        inside = turn.candidates if turn.ending is None else turn.candidates & turn.here
        view = PassView(
            shown if turn.ending is None else shown.masked_fill(~turn.here, -torch.inf),
            inside,
            turn.size,
            turn.steps,
            at.of(self.step),
            sigma,
            lambda: self.noise.positions(at.numbers, number, "reveal", at.of(self.canvas.positions)),
        )
        if alphas is None:
            revealed = self.quota.reveal(view)
        else:
            assert isinstance(self.quota, Bernoulli)
            revealed = self.quota.reveal_between(view, *alphas)
        if (at_once := either(turn.closing, turn.refilling)) is not None:
            revealed = revealed | at_once[:, None]
        reveal = inside & revealed
        if turn.ending is not None:
            forced = turn.candidates & turn.ending[:, None] & ~reveal
            self.stopped = at.into(self.stopped, at.of(self.stopped) | (forced & held).any(1))
            y = torch.where(forced, y.index_put(place, likeliest), y)
            reveal = reveal | forced
        after, left = torch.where(reveal, y, before), held & ~reveal
        if self.quota.repredicts:
            back = turn.here & ~reveal
            after, left = after.masked_fill(back, self.config.mask_id), left | back
        if self.revise is not None:
            of_reveal = _spread(values, turn, -torch.inf)
            self.settled = at.into(self.settled, torch.where(reveal, of_reveal, at.of(self.settled)))
        if self.remdm is not None and self.remdm.variant == "conf":
            of_token = _spread(proposal.of_token(proposal.filtered_probs), turn, 0.0)
            self.probability = at.into(self.probability, torch.where(reveal, of_token, at.of(self.probability)))

        # -- re-mask, hook, finish blocks, stop ------------------------------------------------------------------------
        if self.remdm is not None:
            chance = sigma if sigma.dim() == 2 else sigma[:, None]
            draws = self.noise.positions(at.numbers, number, "remask", at.of(self.canvas.positions))
            back = turn.here & ~held & (draws < chance)
            if turn.ending is not None:
                back = back & ~turn.ending[:, None]
            after, left = after.masked_fill(back, self.config.mask_id), left | back
        if self.hooks.tokens is not None:
            self.questions.ask()
            # what is used again, or recorded, must stay as it is
            handed = logits.clone() if self.reuse or self.recorder is not None else logits
            found = self.hooks.tokens(number, at.numbers, after.clone(), handed)
            written, masks = self._rewritten(found, turn, after, left)
            self.asked += int((masks & ~left).sum(1).max())
            if turn.ending is not None:
                again = masks & turn.ending[:, None]  # no pass is left to fill them
                written, masks = torch.where(again, y, written), masks & ~again
            after, left = written, masks
        done = ~(left & turn.here).any(1)
        if self.remdm is not None:  # until then a revealed token may still go back
            assert turn.closing is not None
            done = done & turn.closing if turn.ending is None else (done & turn.closing) | turn.ending
        if self.config.stop == "fixed_point":
            after, left, fixed = self._at_fixed_point(turn, y, after, left)
            self.stopped = at.into(self.stopped, at.of(self.stopped) | (fixed & ~done))
            done = done | fixed
        if self.revise is not None:
            extra = at.of(self.extra)
            again = done & (extra < self.revise.passes)
            if turn.ending is not None:
                again = again & ~turn.ending
            low = self.revise.pick(at.of(self.settled), turn.here) & again[:, None]
            after, left = after.masked_fill(low, self.config.mask_id), left | low
            self.extra = at.into(self.extra, torch.where(done & ~again, 0, extra + again))
            done = done & ~again
        after, left, finished = self._stop(turn, done, after, left)
        self._go_on(turn, after, left, done, finished)
        if self.reuse:  # what the network has not seen
            changed = (after != before).any(1) | (left != held).any(1)
            self.stale = at.into(self.stale, at.of(self.stale) | changed)
            passed = passed or (self.recorder is not None and bool(changed.any()))
        if self.recorder is not None and passed:
            assert turn.recorded is not None
            r, column = turn.recorded.index
            shown_logits = picked if turn.recorded is turn.places else logits[r, column]
            self.recorder.record(at.numbers_of(r), column, shown_logits, self.z, self.masked, self.nfe)

    def _go_on(self, turn: Turn, after: Tensor, left: Tensor, done: Tensor, finished: Tensor | None) -> None:
        """Write down what the rows hold; on to the next block where one is ``done``, to the end where all is."""
        at, block = turn.at, self.block
        self.z, self.masked = at.into(self.z, after), at.into(self.masked, left)
        self.step = at.into(self.step, (at.of(self.step) + 1).masked_fill_(done, 0))
        moved = at.of(block) + done
        if finished is not None:
            moved = torch.where(finished, at.of(self.plan.n_blocks), moved)
        self.block = at.into(block, moved)
        if self.hooks.tokens is not None:
            self._reopen(at, left)

    # -- network and proposals ---------------------------------------------------------------------------------------

    def _logits(self, turn: Turn) -> tuple[Tensor, bool]:
        """``[R, L, V]`` of the turn's rows, and whether the network was asked for any of them."""
        asked, canvas = turn.asked, self.canvas
        if asked is not None:
            if self.hooks.before is not None:
                self.hooks.before(turn.number, asked.numbers, asked.copy(self.z))
            z = asked.copy(self.z)
            fresh = self.network(
                Request(
                    turn.number,
                    asked.numbers,
                    z,
                    asked.of(canvas.real),
                    asked.of(self.masked),
                    asked.of(canvas.maskable),
                    self._noise_level(asked) if self.network.reads_time else None,
                )
            )
            check_logits(fresh, z, self.config.mask_id)
            if self.hooks.logits is not None:
                fresh = self.hooks.logits(turn.number, asked.numbers, asked.copy(self.z), fresh)
                check_logits(fresh, z, self.config.mask_id)
            self.nfe = asked.into(self.nfe, asked.of(self.nfe) + self.network.cost)
            if not self.reuse:
                return fresh, True
            self.stale = asked.into(self.stale, torch.zeros_like(asked.numbers, dtype=torch.bool))
            if self.outputs is None:
                self.outputs = fresh.new_zeros(self.z.shape[0], *fresh.shape[1:])
            asked.write(self.outputs, fresh)  # a table of our own: the network may write over its last one
        assert self.outputs is not None
        return turn.at.of(self.outputs), asked is not None

    def _chosen(self, picked: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """fp64 logits ``[n, V]`` of the candidates, constraints applied, and the likeliest token of each ``[n]``, from
        logits ``picked [n, V]``."""
        config = self.config
        # written into below, which saves a table of n V each time; the recorder wants them as they were
        chosen = picked.to(torch.float64, copy=self.recorder is not None)
        if config.forbid_mask_token:
            chosen[:, config.mask_id] = -torch.inf
        best = chosen.max(-1)
        highest = best.values  # NaN and +inf come through, -inf only when nothing else is there
        self.questions.leave_sum(highest, lambda: _check_finite(highest, turn))
        if config.logits_eos_inf:
            chosen[:, config.eos_id] = -torch.inf
        if self.allowed is not None:
            chosen = _constrain(chosen, self.allowed, turn, self.z)
        if config.logits_eos_inf or self.allowed is not None:
            best = chosen.max(-1)
        if self.allowed is not None:
            kept = best.values
            self.questions.leave_sum(kept, lambda: _check_allowed(kept, turn))
        return chosen, best.indices

    def _propose(self, chosen: Tensor, likeliest: Tensor, turn: Turn) -> Proposal:
        """A token for each of n candidates: the likeliest, or a draw from the tempered and filtered distribution by the
        Gumbel trick.

        Written with logarithms: the published form exp(logits) / (-log u)^T is the same number until it overflows.
        """
        config, number, (r, column) = self.config, turn.number, turn.places.index
        rows = turn.at.numbers_of(r)

        @cache
        def positions() -> Tensor:
            return turn.at.of(self.canvas.positions)[r, column]

        filtered = chosen / config.temperature if config.temperature not in (0.0, 1.0) else chosen
        filtered = filter_logits(filtered, config.top_k, config.top_p, config.top_p_rule)
        tokens = likeliest
        if config.temperature > 0:
            u = self.noise.tokens(rows, number, "token", positions(), chosen.shape[-1])
            if config.gumbel_dtype == "float32":  # 24 bits, as torch.rand gives them
                u = (u * 2**24).floor().clamp(min=1).float() / 2**24
            gumbel = u.log_().neg_().log_().double()  # minus it
            tokens = torch.sub(filtered, gumbel, out=gumbel).argmax(-1)
            if turn.closing is not None:
                tokens = torch.where(turn.closing[r], likeliest, tokens)
        if not config.forbid_mask_token:
            self.questions.leave(
                (tokens == config.mask_id).sum(dtype=torch.float64),
                lambda wrong: wrong == 0,
                lambda: _refuse_mask_token(tokens, config.mask_id, turn),
            )
        return Proposal(
            chosen,
            filtered,
            tokens,
            positions,
            # [n, 1] positions of rows [n]: one number a candidate
            lambda: self.noise.positions(rows, number, "order", positions()[:, None])[:, 0],
        )

    def _confidence(self, proposal: Proposal, turn: Turn) -> tuple[Tensor, Tensor]:
        """Confidences of the candidates ``[n]``, and ``[R, L]`` as the quota is shown them."""
        config, expected = self.config, proposal.tokens.shape
        if self.foreign_order:
            self.questions.ask()
        values = self.order(proposal).double()

        def refuse() -> None:
            if values.shape != expected or bool(values.isnan().any()):
                raise ValueError(
                    f"order: {config.order!r} gave {list(values.shape)} values, NaN among them or not; expected a number "
                    f"for each of {list(expected)} candidates"
                )

        if values.shape != expected:
            refuse()
        self.questions.leave_sum(values, refuse)
        values = values.clamp(min=_LOWEST)
        ordered = values
        if config.order_temperature > 0:
            rows = turn.at.numbers_of(turn.places.r)
            u = self.noise.positions(rows, turn.number, "selection", proposal.positions[:, None])[:, 0]
            ordered = values / config.order_temperature - torch.log(-torch.log(u))
        if config.confidence_eos_eot_inf:
            last = proposal.tokens == config.eos_id
            if config.eot_id is not None:
                last = last | (proposal.tokens == config.eot_id)
            ordered = ordered.masked_fill(last, _LOWEST)
        return values, _spread(ordered, turn, -torch.inf)

    # -- time ---------------------------------------------------------------------------------------------------------

    def _sigma(self, turn: Turn) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """ReMDM's re-masking probability ``[R]`` or ``[R, L]``, and the shares of clean tokens it goes with."""
        at = turn.at
        if self.remdm is None:
            return at.of(self.no_sigma), None
        assert isinstance(self.quota, Bernoulli)
        assert turn.closing is not None
        before, after = self.quota.times(turn.steps, at.of(self.step))
        alpha_t, alpha_s = (self.remdm.alpha(t, self.quota.schedule) for t in (before, after))
        revealed = turn.here & ~at.of(self.masked)
        sigma = self.remdm.sigma(alpha_t, alpha_s, before, at.of(self.probability), revealed)
        return sigma.masked_fill(turn.closing if sigma.dim() == 1 else turn.closing[:, None], 0.0), (alpha_t, alpha_s)

    def _noise_level(self, at: Selection) -> Tensor:
        """sigma = -log alpha of each row ``[R]`` for a network that reads it: from the grid of the ancestral sampler,
        first hitting's clock, or the share that is masked."""
        if isinstance(self.quota, Bernoulli):
            t, _ = self.quota.times(self._of_block(self.plan.steps, at), at.of(self.step))
            alpha = self.quota.schedule.alpha(t) if self.remdm is None else self.remdm.alpha(t, self.quota.schedule)
        elif self.quota.one_a_pass:
            alpha = 1 - at.of(self.noisy)
        else:
            alpha = 1 - at.of(self.masked).sum(1).double() / at.of(self.canvas.maskable).sum(1)
        return -alpha.clamp(min=max(self.lowest, 1e-9), max=1.0).log()

    def _clock(self, turn: Turn) -> Tensor:
        at = turn.at
        n = at.of(self.masked).sum(1).clamp(min=1)
        first = torch.zeros(len(n), 1, dtype=torch.int64, device=n.device)
        return self.noise.positions(at.numbers, turn.number, "clock", first)[:, 0] ** (1 / n)

    # -- stopping -----------------------------------------------------------------------------------------------------

    def _rewritten(self, z: Tensor, turn: Turn, after: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """What a tokens hook made of the rows: it may write tokens, or the mask, at maskable positions."""
        maskable = turn.at.of(self.canvas.maskable)
        if z.shape != after.shape or z.dtype != after.dtype:
            raise ValueError(
                f"tokens_hook: shape {list(z.shape)} of {z.dtype} returned, expected {list(after.shape)} of {after.dtype}"
            )
        changed = z != after
        if bool((changed & ~maskable).any()):
            at = (changed & ~maskable).nonzero()[0].tolist()
            row = int(turn.at.numbers[at[0]])
            raise ValueError(f"tokens_hook: it changed position {at[1]} of row {row}, which is given")
        return z.clone(), torch.where(changed, z == self.config.mask_id, left)

    def _reopen(self, at: Selection, left: Tensor) -> None:
        """Go back to the first block in which a tokens hook has masked something after it was finished."""
        first = torch.where(left, at.of(self.plan.block_of), at.of(self.plan.n_blocks)[:, None]).amin(1)
        block, step = at.of(self.block), at.of(self.step)
        back = first < block
        self.block = at.into(self.block, torch.where(back, first, block))
        self.step = at.into(self.step, torch.where(back, 0, step))
        self.asked += int(back.any()) * int(self.plan.n_blocks.max())  # the blocks between are passed once more

    def _at_fixed_point(self, turn: Turn, y: Tensor, after: Tensor, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows whose whole block is predicted as in the pass before are filled with that prediction."""
        if self.guess is None:
            self.guess = torch.full_like(self.z, -1)
        guess = turn.at.of(self.guess)
        same = ((guess == y) | ~turn.here).all(1)
        self.guess = turn.at.into(self.guess, torch.where(turn.here, y, guess))
        fill = same[:, None] & turn.here
        return torch.where(fill, y, after), left & ~fill, same

    def _stop(self, turn: Turn, done: Tensor, after: Tensor, left: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(z, masked, rows that are finished altogether)`` after the stopping rule was applied to finished blocks."""
        config, at, finished = self.config, turn.at, turn.ending
        if config.stop not in ("eos_block", "eos_or_degenerate"):
            return after, left, finished
        ended = done & ((after == config.eos_id) & turn.here).any(1)
        if config.stop == "eos_or_degenerate":
            ended = ended | (done & degenerate(after, at.of(self.canvas.real) & ~left))
        self.stopped = at.into(self.stopped, at.of(self.stopped) | (ended & left.any(1)))
        after = torch.where(left & ended[:, None], config.eos_id, after)
        return after, left & ~ended[:, None], either(finished, ended)

    def _most_turns(self) -> int:
        """No row can need more turns of the loop than this."""
        maskable, n_blocks = self.canvas.maskable, self.plan.n_blocks
        if not len(n_blocks):
            return 0
        tokens, blocks = torch.stack([maskable.sum(1).amax(), n_blocks.amax()]).tolist()
        return max(tokens, self.config.steps or 0) + blocks * (1 + (self.revise.passes if self.revise else 0))


def _spread(values: Tensor, turn: Turn, elsewhere: float) -> Tensor:
    """``values [n]`` of the candidates at their places in ``[R, L]``."""
    empty = torch.full(turn.candidates.shape, elsewhere, dtype=torch.float64, device=values.device)
    return empty.index_put_(turn.places.index, values)


# -- what may be wrong -----------------------------------------------------------------------------------------------------


def _where(wrong: Tensor, turn: Turn) -> tuple[int, int, int]:
    """The first ``wrong [n]`` candidate with its row and position."""
    at = int(wrong.nonzero()[0])
    return at, int(turn.at.numbers[turn.places.r[at]]), int(turn.places.column[at])


def _check_finite(highest: Tensor, turn: Turn) -> None:
    wrong = ~highest.isfinite()
    if bool(wrong.any()):
        at, row, position = _where(wrong, turn)
        value = "NaN or +inf" if not bool(highest[at] == -torch.inf) else "-inf for every token"
        raise FloatingPointError(f"logits: {value} in pass {turn.number + 1}, row {row}, position {position}")


def _check_allowed(highest: Tensor, turn: Turn) -> None:
    wrong = highest == -torch.inf
    if bool(wrong.any()):
        _, row, position = _where(wrong, turn)
        raise ValueError(f"allowed: no token is left for row {row}, position {position} in pass {turn.number + 1}")


def _refuse_mask_token(tokens: Tensor, mask_id: int, turn: Turn) -> None:
    _, row, _ = _where(tokens == mask_id, turn)
    raise ValueError(
        f"logits: the network predicted the mask token {mask_id} in pass {turn.number + 1}, row {row}; "
        "forbid_mask_token=True keeps it out"
    )


def _constrain(chosen: Tensor, allowed: Allowed, turn: Turn, z: Tensor) -> Tensor:
    table = allowed if isinstance(allowed, Tensor) else allowed(turn.number, z)
    expected = [*z.shape, chosen.shape[-1]]
    if list(table.shape) != expected or table.dtype != torch.bool:
        raise ValueError(f"allowed: shape {list(table.shape)} of {table.dtype} given, expected {expected} of bool")
    r, column = turn.places.index
    return chosen.masked_fill_(~table[turn.at.numbers_of(r), column], -torch.inf)
