"""``depth_recurrence``: answer at once, but think with the same blocks again and again (arXiv:2502.05171).

Layout, learned tokens in capitals, as for ``direct``::

    prompt <ans> ANSWER <EOS>
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentcot.backbone import HybridOutput, ModelState
from latentcot.reasoner import (
    SPECIAL,
    AnswerLimits,
    AnswerOutput,
    LossOutput,
    PromptBatch,
    Sites,
    StepContext,
    TaskBatch,
    Trace,
    register_method,
)
from latentcot.recurrent_depth.exit_rule import ExitRule
from latentcot.recurrent_depth.loop import DepthLoop, LoopOutput
from latentcot.recurrent_depth.monitors import diagnose, relative_residual, state_rms, token_correlation
from latentcot.recurrent_depth.settings import check_count, check_keys, read_value
from latentcot.recurrent_depth.step_cache import StepCache
from latentcot.sequences import Joined, constant, greedy_decode, join, label_loss, prompt, training_rows, until_stop

ANSWER_SEED = 0
_NO_LIMITS, _EVERYWHERE = AnswerLimits(), Sites()


@register_method("depth_recurrence")
class DepthRecurrence(DepthLoop):
    """Depth recurrence as a method; settings and architecture: :class:`~latentcot.recurrent_depth.loop.DepthLoop`.

    Training draws one r a step (the same on every worker) and lets gradient through the last k recurrences. Answering
    takes ``recurrences``, ``exit_rule``, ``step_cache`` and ``warm_start`` from the settings or, overriding them, from
    ``limits.knobs`` under the same names.
    """

    def loss(self, batch: TaskBatch, ctx: StepContext, carry: object = None) -> LossOutput:
        """Next-token loss on answer and ``<eos>``. ``parts`` also says how many recurrences were drawn and, every
        ``monitor_every`` steps, token correlation, relative residual and RMS of the final state and the loss at r = 1."""
        row = training_rows(batch)
        progress = ctx.step / max(1, ctx.total_steps)
        r = self.sampler.at_step(ctx.step, progress=progress)
        window = self.window.at_progress(progress)
        output = self.recur(row.ids, r, attention_mask=row.mask, generator=ctx.generator, window=window)
        loss = label_loss(output.logits, row.labels)
        lengths = row.mask.sum(1).double()
        flops = self.flops(lengths, recurrences=r, head=lengths)  # type: ignore[arg-type]
        parts = {"loss": float(loss.detach()), "recurrences": float(r)}
        if self.monitor_every and (ctx.step + 1) % self.monitor_every == 0:  # as training counts the steps it logs
            parts |= self._monitor(row, output, ctx, parts["loss"])
            flops = flops + self.flops(lengths, recurrences=1, head=lengths)  # type: ignore[arg-type]
        return LossOutput(loss, parts, float(flops.sum()))  # type: ignore[union-attr]

    @torch.no_grad()
    def _monitor(self, row: Joined, output: LoopOutput, ctx: StepContext, loss: float) -> dict[str, float]:
        state = output.final_state.detach()
        assert output.previous is not None
        # a generator of its own: looking must not change what training draws
        generator = torch.Generator(ctx.generator.device).manual_seed(ctx.step)
        once = self.recur(row.ids, 1, attention_mask=row.mask, generator=generator)
        parts = {
            "token_correlation": float(token_correlation(state, row.mask).nanmean()),
            "relative_residual": float(relative_residual(output.previous, state)[row.mask].mean()),
            "state_rms": float(state_rms(state, row.mask).mean()),
            "loss_at_one": float(label_loss(once.logits, row.labels)),
        }
        if 4 * ctx.step >= ctx.total_steps:
            comparable = parts["loss_at_one"] if output.recurrences[0] > 1 else None
            for words in diagnose(parts["token_correlation"], comparable, loss):
                warnings.warn(f"step {ctx.step}: {words}", stacklevel=2)
        return parts

    @torch.no_grad()
    def answer(
        self, prompts: PromptBatch, limits: AnswerLimits = _NO_LIMITS, generator: torch.Generator | None = None
    ) -> AnswerOutput:
        """Greedy answers.

        The random initial state is one draw for each position, the same for every row of the batch and of a size that
        the task's limits set: a row's answer depends neither on its neighbours nor on padding. Without ``generator``
        the draw is a fixed one.

        ``sequential_passes``: r + 1 a token (each recurrence of the core waits for the one before; prelude and coda
        together are one more). Tokens after the first continue from the state, each with an r of its own under an exit
        rule. Only with an exit rule and a ``step_cache`` that allows no gaps ("full") does each token read its whole row
        again. ``info["recurrences"] [B]``: r of the answer's first token; ``info["steps"] [B, n]``: of every token, 0
        behind a row's end, where tokens have an r of their own.
        """
        r, rule, policy, warm = self._depth(limits.knobs)
        if limits.sequential_passes is not None:
            r = min(r, check_count("limits.sequential_passes", limits.sequential_passes, 2) - 1)
        most = prompts.limits.answer_tokens
        if limits.new_tokens is not None:
            most = min(most, limits.new_tokens)
        if limits.sequential_passes is not None:
            most = min(most, limits.sequential_passes // (r + 1))
        start = join([prompt(prompts), constant(prompts.ids, SPECIAL.ans)], side="left")
        noise = self._noise(prompts, generator)
        if rule.active and policy.plain:
            if warm:
                raise ValueError(
                    "warm_start: with an exit rule it needs a step_cache that allows gaps ('latest', 'skip'), because "
                    "'full' reads the whole row again for each token"
                )
            return self._answer_with_exits(start.ids, start.mask, r, rule, noise, most)
        if warm or not policy.plain:
            return self._answer_from_state(start, r, rule, policy, warm, noise, most)
        first = self.recur(
            start.ids,
            r,
            attention_mask=start.mask,
            initial_state=_at(noise, start.mask),
            use_cache=True,
            logits_to_keep=1,
        )
        assert first.state is not None
        decoded = greedy_decode(_FixedDepth(self, r, noise), first.logits[:, -1], first.state, most)  # type: ignore[arg-type]
        given, later = start.mask.sum(1).double(), decoded.emitted.double() - 1
        flops = self.flops(given, recurrences=r, head=1) + self.flops(later, given, recurrences=r, head=later)  # type: ignore[arg-type]
        info = {"text": decoded.ids, "recurrences": first.recurrences}
        return AnswerOutput(until_stop(decoded.ids), decoded.emitted, decoded.emitted * (r + 1), flops, info)  # type: ignore[arg-type]

    def _answer_with_exits(
        self, ids: Tensor, mask: Tensor, most_steps: int, rule: ExitRule, noise: Tensor | None, most_tokens: int
    ) -> AnswerOutput:
        batch = len(ids)
        out = torch.full((batch, most_tokens), SPECIAL.pad, dtype=torch.int64, device=ids.device)
        emitted, passes = torch.zeros_like(out[:, 0]), torch.zeros_like(out[:, 0])
        flops = torch.zeros(batch, dtype=torch.float64, device=ids.device)
        active = torch.arange(batch, device=ids.device)
        first_steps = torch.zeros_like(emitted)
        for position in range(most_tokens):
            output = self.recur(
                ids, most_steps, attention_mask=mask, initial_state=_at(noise, mask), exit_rule=rule, logits_to_keep=1
            )
            token, steps = output.logits[:, -1].argmax(-1), output.recurrences
            if position == 0:
                first_steps = steps
            out[active, position] = token
            emitted[active] += 1
            passes[active] += steps + 1
            flops[active] += self._price(output, mask.sum(1).double(), 0, rule, most_steps)
            going = token != SPECIAL.eos
            active, ids, mask = active[going], torch.cat([ids, token[:, None]], 1)[going], mask[going]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if not len(active):
                break
        return AnswerOutput(until_stop(out), emitted, passes, flops, {"text": out, "recurrences": first_steps})

    def _answer_from_state(
        self,
        start: Joined,
        most_steps: int,
        rule: ExitRule,
        policy: StepCache,
        warm: bool,
        noise: Tensor | None,
        most_tokens: int,
    ) -> AnswerOutput:
        """One token a pass, each row with its own r; rows that ended leave the batch and its state."""
        batch, device = len(start.ids), start.ids.device
        out = torch.full((batch, most_tokens), SPECIAL.pad, dtype=torch.int64, device=device)
        steps = torch.zeros_like(out)
        flops = torch.zeros(batch, dtype=torch.float64, device=device)
        active = torch.arange(batch, device=device)
        ids, mask, state, s = start.ids, start.mask, None, _at(noise, start.mask)
        past = torch.zeros(batch, dtype=torch.float64, device=device)
        for position in range(most_tokens):
            output = self.recur(
                ids,
                most_steps,
                attention_mask=mask,
                initial_state=s,
                exit_rule=rule,
                state=state,
                use_cache=True,
                logits_to_keep=1,
                step_cache=policy,
            )
            token, taken = output.logits[:, -1].argmax(-1), output.recurrences
            out[active, position], steps[active, position] = token, taken
            read = mask.sum(1).double()
            flops[active] += self._price(output, read, past, rule, most_steps)
            going = token != SPECIAL.eos
            active, past, ids = active[going], (past + read)[going], token[going][:, None]
            mask = torch.ones_like(ids, dtype=torch.bool)
            if not len(active) or position + 1 == most_tokens:
                break
            assert output.state is not None
            state = output.state if bool(going.all()) else output.state.select(going)
            assert state.lengths is not None
            if warm:
                s = output.final_state[going, -1:]
            else:
                s = None if noise is None else noise[state.lengths][:, None]
        emitted = (steps > 0).sum(1)
        passes = (steps + (steps > 0)).sum(1)
        info = {"text": out, "recurrences": steps[:, 0], "steps": steps}
        return AnswerOutput(until_stop(out), emitted, passes, flops, info)

    def _price(self, output: LoopOutput, read: Tensor, past: Tensor | int, rule: ExitRule, most_steps: int) -> Tensor:
        """FLOPs of each row of a pass over ``read`` tokens ``[B]`` after ``past`` ones."""
        taken = output.recurrences
        # The last recurrence of a row that never settled is not looked at.
        checks = rule.checks(taken.clamp(max=most_steps - 1)) if rule.decoded else 0
        checked = 1 if rule.positions == "last" else read
        reused = 0 if output.reused is None else output.reused.double()
        filled = 0 if output.filled is None else output.filled
        price = self.flops(read, past, recurrences=taken, head=1, checks=checks, checked=checked, reused=reused)  # type: ignore[arg-type]
        return price + self.fill_flops(read, filled)  # type: ignore[return-value]

    @torch.no_grad()
    def trace(self, prompts: PromptBatch, sites: Sites = _EVERYWHERE) -> Trace:
        """Output of each chosen core block after each recurrence, prompt and ``<ans>`` read once: ``hidden [R, layers,
        B, S, D]``.

        ``sites.blocks`` must lie in the core; ``sites.steps``: the first so many recurrences.
        """
        blocks = tuple(range(self.core.start, self.core.stop)) if sites.blocks is None else tuple(sites.blocks)
        r = self.default_recurrences if sites.steps is None else min(sites.steps, self.default_recurrences)
        start = join([prompt(prompts), constant(prompts.ids, SPECIAL.ans)])
        noise = self._noise(prompts, None)
        output = self.recur(
            start.ids, r, attention_mask=start.mask, initial_state=_at(noise, start.mask), record=blocks
        )
        assert output.recorded is not None
        hidden = torch.stack([torch.stack(step) for step in output.recorded])
        return Trace(hidden, start.mask.expand(r, *start.mask.shape), tuple(f"block {b}" for b in sorted(blocks)))

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _depth(self, knobs: Mapping[str, Any]) -> tuple[int, ExitRule, StepCache, bool]:
        check_keys("limits.knobs", knobs, ("recurrences", "exit_rule", "step_cache", "warm_start"))
        r = check_count("limits.knobs: recurrences", knobs.get("recurrences", self.default_recurrences), 1)
        rule = read_value("limits.knobs: exit_rule", ExitRule, knobs.get("exit_rule", self.exit_rule))
        policy = read_value("limits.knobs: step_cache", StepCache, knobs.get("step_cache", self.step_cache))
        return r, rule, policy, bool(knobs.get("warm_start", self.settings["warm_start"]))

    def _noise(self, prompts: PromptBatch, generator: torch.Generator | None) -> Tensor | None:
        """Initial states by position ``[positions, D]``; ``None`` where nothing is drawn."""
        if not self.initial.random:
            return None
        size = prompts.limits
        positions = max(size.prompt_tokens, prompts.ids.shape[1]) + 1 + size.answer_tokens
        weight = self.backbone.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        generator = torch.Generator().manual_seed(ANSWER_SEED) if generator is None else generator
        return self.initial.draw(weight.new_empty(positions, weight.shape[1]), generator)


def _at(noise: Tensor | None, mask: Tensor) -> Tensor | None:
    """The initial state of each token by its position in its row, padding not counted: ``[B, S, D]``."""
    return None if noise is None else noise[(mask.long().cumsum(1) - 1).clamp(min=0)]


@dataclass(frozen=True)
class _FixedDepth:
    """A loop at fixed r as what :func:`greedy_decode` calls: one token in, its logits and the next state out."""

    loop: DepthLoop
    recurrences: int
    noise: Tensor | None

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, state: ModelState) -> HybridOutput:
        assert state.lengths is not None
        start = None if self.noise is None else self.noise[state.lengths][:, None]
        output = self.loop.recur(
            input_ids,
            self.recurrences,
            attention_mask=attention_mask,
            initial_state=start,
            state=state,
            logits_to_keep=1,
        )
        return HybridOutput(logits=output.logits, cache=output.state)
