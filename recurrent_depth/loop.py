r"""The depth loop over a hybrid backbone: prelude, core (again and again), coda. :class:`DepthLoop`.

.. math::
    e   &= \mathrm{Prelude}(c\, E[x]) \\
    s_0 &\sim \text{initial state} \\
    s_i &= \mathrm{Core}(\mathrm{Inject}(s_{i-1}, e)), \quad i = 1 \dots r, \text{ the same weights at every } i \\
    z   &= n(s_r) \\
    p   &= \mathrm{softmax}(W\, n(\mathrm{Coda}(z)))

n is the backbone's final norm, one weight used twice and *outside* the loop; W its head; prelude, core and coda are
runs of its blocks (arXiv:2502.05171). Core block b of recurrence i (from 0) keeps its token state at place ``(b, i)``.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from latentcot.backbone import HybridForCausalLM, ModelState, SequenceContext
from latentcot.backbone.block import Block
from latentcot.reasoner import Reasoner
from latentcot.recurrent_depth.columns import closed, grows_in_place, opened
from latentcot.recurrent_depth.departures import Departures
from latentcot.recurrent_depth.exit_rule import NO_EXIT, ExitRule
from latentcot.recurrent_depth.gradient_window import FULL, GradientWindow
from latentcot.recurrent_depth.initial_state import InitialState
from latentcot.recurrent_depth.injection import Injection
from latentcot.recurrent_depth.readout import Readout
from latentcot.recurrent_depth.settings import check_count, check_flag, merge, read_value, write_value
from latentcot.recurrent_depth.step_cache import (
    MARK,
    StepCache,
    policy_of,
    stored_recurrences,
)
from latentcot.recurrent_depth.step_pass import run_pass
from latentcot.recurrent_depth.step_sampler import StepSampler
from latentcot.training.budget import FlopCounter

DEFAULTS: dict[str, Any] = {
    "prelude": 1,
    "core": 2,
    "coda": 1,
    "initial_state": "like_init",
    "injection": "linear",
    "sampler": "lognormal_poisson",
    "gradient_window": 8,
    "exit_rule": "none",
    "readout": "after_loop",
    "step_cache": "full",
    "embedding_scale": None,
    "recurrences": None,
    "warm_start": False,
    "monitor_every": 0,
    "gradient_checkpointing": False,
}

VALUES: dict[str, type] = {
    "initial_state": InitialState,
    "injection": Injection,
    "sampler": StepSampler,
    "gradient_window": GradientWindow,
    "exit_rule": ExitRule,
    "readout": Readout,
    "step_cache": StepCache,
}
"""Setting -> the value it is read as."""


@dataclass
class LoopOutput:
    """``hidden [B, S, D]``: the coda's output, before the last norm; ``logits [B, S or fewer, Vocab]``; ``final_state
    [B, S, D]``: each row's s_r; ``recurrences [B]``: its r; ``state``: for the next tokens, when it was kept;
    ``recorded``: see ``record``; ``filled [B]``: deeper recurrences whose linear states a row filled on leaving;
    ``previous [B, S, D]``: s_{r-1} without gradient, where all rows took the same r; ``reused [B]``: rows whose coda an exit rule's
    last check has run, so that it was not run again, ``None`` = no row."""

    hidden: Tensor
    logits: Tensor
    final_state: Tensor
    recurrences: Tensor
    state: ModelState | None = None
    recorded: list[list[Tensor]] | None = None
    filled: Tensor | None = None
    previous: Tensor | None = None
    reused: Tensor | None = None


class DepthLoop(Reasoner):
    """The architecture and its forward pass; :class:`~latentcot.recurrent_depth.DepthRecurrence` adds training and
    answering.

    Args:
        backbone: its blocks are used as prelude, core and coda.
        settings: see the README beside this file for every key; left-out keys take the values of ``DEFAULTS``.

            * ``prelude``, ``core``, ``coda``: blocks of each part; they must add up to the backbone's, core at least 1.
            * ``initial_state``, ``injection``, ``sampler``, ``gradient_window``, ``exit_rule``, ``readout``,
              ``step_cache``: the value of that name, written as its first field alone or as a dict of its fields.
            * ``embedding_scale``: factor c on token embeddings, ``"sqrt_width"`` for sqrt(D), ``None`` = the backbone's
              own.
            * ``recurrences``: r when answering; ``None`` = the sampler's mean, rounded.
            * ``warm_start``: when answering, the loop of each token after the first starts from the final state of the
              token before it instead of a draw.
            * ``monitor_every``: log the monitors every so many training steps, and warn in the last three quarters of
              training when they show a published failure; 0 = never. It costs one pass at r = 1 each time.
            * ``gradient_checkpointing``: keep s_i alone of each recurrence for the backward pass and compute the rest there once
              more: the same gradients, memory for one recurrence in place of k, about a third more time. For passes that keep
              no state.

    Raises:
        ValueError: unknown keys (close ones are named), sizes that do not fit, values out of range, and ``injection``
            "none" with an initial state that does not show the core its input either.
    """

    def __init__(self, backbone: HybridForCausalLM, settings: Mapping[str, Any] | None = None):
        merged = merge(type(self).__name__, DEFAULTS, settings)
        blocks = backbone.config.num_hidden_layers
        prelude = check_count("prelude", merged["prelude"])
        core = check_count("core", merged["core"], 1)
        coda = check_count("coda", merged["coda"])
        if prelude + core + coda != blocks:
            raise ValueError(
                f"prelude + core + coda: {prelude} + {core} + {coda} given, but the backbone has {blocks} blocks"
            )
        values = {name: read_value(name, kind, merged[name]) for name, kind in VALUES.items()}
        merged |= {name: write_value(value) for name, value in values.items()}
        super().__init__(backbone, merged)
        self.prelude, self.core = slice(0, prelude), slice(prelude, prelude + core)
        self.coda = slice(prelude + core, blocks)
        self.initial: InitialState = values["initial_state"]
        self.injection: Injection = values["injection"]
        self.sampler: StepSampler = values["sampler"]
        self.window: GradientWindow = values["gradient_window"]
        self.exit_rule: ExitRule = values["exit_rule"]
        self.readout: Readout = values["readout"]
        self.step_cache: StepCache = values["step_cache"]
        if self.injection.kind == "none" and self.initial.kind != "embedding":
            raise ValueError(
                f"injection: 'none' with initial_state {self.initial.kind!r} hides the input from the core; "
                "use initial_state 'embedding' or another injection"
            )
        width = backbone.config.hidden_size
        self.adapter = self.injection.build(width)
        scale = merged["embedding_scale"]
        own = backbone.config.embedding_scale
        if scale is None:
            scale = own
        elif scale == "sqrt_width":
            scale = width**0.5
        elif isinstance(scale, bool) or not isinstance(scale, int | float) or scale <= 0:
            raise ValueError(f"embedding_scale: {scale!r} given, expected a positive number, 'sqrt_width' or None")
        self.embedding_factor = scale / own
        self.monitor_every = check_count("monitor_every", merged["monitor_every"])
        self.gradient_checkpointing = check_flag("gradient_checkpointing", merged["gradient_checkpointing"])
        if merged["recurrences"] is not None:
            check_count("recurrences", merged["recurrences"], 1)
        self.default_recurrences: int = merged["recurrences"] or self.sampler.typical

    # -- the pieces --------------------------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings ``[B, S, D]`` with this method's scale."""
        embedded = self.backbone.embed(input_ids)
        return embedded if self.embedding_factor == 1 else embedded * self.embedding_factor

    def step(
        self,
        previous: Tensor,
        embedded: Tensor,
        context: SequenceContext,
        state: ModelState | None = None,
        recurrence: int = 0,
        record: tuple[int, ...] = (),
    ) -> tuple[Tensor, ModelState | None, list[Tensor]]:
        """One recurrence: :math:`s_{i-1}, e` to :math:`s_i`, all ``[B, S, D]``, and the token state with this
        recurrence's entries. ``record``: core blocks whose outputs are returned too."""
        if self.gradient_checkpointing and torch.is_grad_enabled() and not context.keep_state:
            # nothing in a block is drawn at random, so no generator's state is kept
            found = checkpoint(
                self._step, previous, embedded, context, None, 0, record, use_reentrant=False, preserve_rng_state=False
            )
            return cast(tuple[Tensor, ModelState | None, list[Tensor]], found)
        return self._step(previous, embedded, context, state, recurrence, record)

    def _step(
        self,
        previous: Tensor,
        embedded: Tensor,
        context: SequenceContext,
        state: ModelState | None,
        recurrence: int,
        record: tuple[int, ...],
    ) -> tuple[Tensor, ModelState | None, list[Tensor]]:
        hidden = self.adapter(previous, embedded)
        recorded = []
        for part in _parts(self.core, bool(record)):
            hidden, state = self.backbone.run(hidden, context, part, state, recurrence)
            if part.start in record:
                recorded.append(hidden)
        if self.readout.loop_norm == "every_recurrence":
            hidden = self.backbone.model.norm(hidden)
        return hidden, state, recorded

    def finish(
        self, final_state: Tensor, context: SequenceContext, state: ModelState | None = None
    ) -> tuple[Tensor, ModelState | None]:
        """Norm and coda behind the loop: s_r to the hidden state that the head (with its norm) reads."""
        z = self.backbone.model.norm(final_state) if self.readout.loop_norm == "after_loop" else final_state
        return self.backbone.run(z, context, self.coda, state)

    # -- the whole pass ------------------------------------------------------------------------------------------------

    def recur(
        self,
        input_ids: Tensor,
        recurrences: int | None = None,
        *,
        initial_state: Tensor | None = None,
        generator: torch.Generator | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        window: GradientWindow = FULL,
        exit_rule: ExitRule = NO_EXIT,
        state: ModelState | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        record: tuple[int, ...] = (),
        step_cache: StepCache | None = None,
    ) -> LoopOutput:
        r"""Read tokens with r recurrences.

        Args:
            input_ids: ``[B, S]``.
            recurrences: r, at least 1; the most a row takes when there is an exit rule. Default: that of the settings.
            initial_state: s_0 ``[B, S, D]``; drawn with ``generator`` when ``None``. Fix it and the pass is
                deterministic.
            attention_mask: ``[B, S]``, 1 = real token; padding may stand anywhere and changes nothing.
            cu_seqlens: offsets of packed sequences (B = 1).
            window: how many of the last recurrences carry gradient; all by default.
            exit_rule: rows stop when it says so and leave the computation; a row's result is that of the row alone.
            state: of the tokens before, made by the same ``step_cache``; with one that reads exact entries only, also with
                the same number of recurrences.
            use_cache: return a state to continue from.
            logits_to_keep: logits of the last so many positions only; 0 = all.
            record: core blocks whose outputs to keep, recurrence by recurrence.
            step_cache: what is read of tokens with other numbers of recurrences; default that of the settings. It counts
                only where a state is kept.

        Raises:
            ValueError: r below 1, a wrong shape, an exit rule together with packing or ``record``, or together with a
                state that can have no gaps (tokens that stop at different depths leave some).
        """
        r = check_count("recurrences", self.default_recurrences if recurrences is None else recurrences, 1)
        embedded = self.embed(input_ids)
        context = SequenceContext.build(
            input_ids.shape[0],
            input_ids.shape[1],
            input_ids.device,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            state=state,
            keep_state=use_cache or state is not None,
        )
        policy = self.step_cache if step_cache is None else step_cache
        ragged = context.keep_state and (not policy.plain or (state is not None and MARK in state.entries))
        if exit_rule.active and ((context.keep_state and policy.plain) or cu_seqlens is not None or record):
            raise ValueError(
                "exit_rule: rows that stop early leave gaps in a state; leave out state, use_cache, cu_seqlens and "
                "record, read with a fixed number of recurrences, or take a step_cache that allows gaps ('latest', 'skip')"
            )
        if ragged:
            self.check_policy(policy, state, cu_seqlens, record)
        if outside := [b for b in record if not self.core.start <= b < self.core.stop]:
            raise ValueError(
                f"record: blocks {outside} given, but the core is blocks {self.core.start}..{self.core.stop - 1}"
            )
        if not ragged:
            self._check_depth(state, r)
        if grows_in_place(state, input_ids.shape[1]):
            outside = [*range(self.prelude.stop), *range(self.coda.start, self.coda.stop)]
            state = opened(state, outside if ragged else None)  # type: ignore[arg-type]
        embedded, state = self.backbone.run(embedded, context, self.prelude, state)
        s = self._start(embedded, initial_state, generator)
        kept = filled = previous = hidden = None
        if ragged:
            assert state is not None or not self.prelude.stop
            before = self.backbone.new_state() if state is None else state
            found = run_pass(self, policy, exit_rule, s, embedded, context, before, r, window)  # type: ignore[arg-type]
            s, taken, state, filled = found.final, found.recurrences, found.state, found.filled
            previous, hidden = found.previous, found.hidden
        elif exit_rule.active:
            s, taken, hidden = self._loop_with_exits(s, embedded, context, r, exit_rule, window)
        else:
            without, _ = window.split(r)
            kept = []
            for i in range(r):
                previous = s.detach()
                with torch.no_grad() if i < without else nullcontext():
                    s, state, outputs = self.step(s, embedded, context, state, i, record)
                kept.append(outputs)
            taken = torch.full((len(s),), r, device=s.device)
        reused = None
        if hidden is None:
            hidden, state = self.finish(s, context, state)
        else:
            reused = taken < r
        logits = self.backbone.head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        state = None if state is None else closed(state).advance(context)
        return LoopOutput(hidden, logits, s, taken, state, kept if record else None, filled, previous, reused)

    def _start(self, embedded: Tensor, given: Tensor | None, generator: torch.Generator | None) -> Tensor:
        if given is None:
            return self.initial.draw(embedded, generator)
        if given.shape != embedded.shape:
            raise ValueError(
                f"initial_state: shape {list(given.shape)} given, expected [B, S, D] = {list(embedded.shape)}"
            )
        return given.to(embedded)

    def _check_depth(self, state: ModelState | None, recurrences: int) -> None:
        """A state made with another r has missing or outdated entries at some depth: both would be silently wrong."""
        if state is None or state.is_fresh:
            return
        stored = stored_recurrences(state, self.core.start)
        if stored != recurrences:
            raise ValueError(
                f"state: it was made with {stored} recurrences, so it can not be continued with {recurrences}"
            )

    def check_policy(
        self,
        policy: StepCache,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        record: tuple[int, ...] = (),
    ) -> None:
        """``ValueError`` where a look-up rule does not go together with this loop, a state or what else a pass is asked for."""
        if cu_seqlens is not None or record:
            raise ValueError(f"step_cache: {policy.kind!r} keeps no state of packed sequences and records no blocks")
        options = self.backbone.config.attention
        if (
            policy.hides
            and options["window_size"] is not None
            and "attention" in self.backbone.config.mixers[self.core]
        ):
            raise ValueError(
                f"step_cache: {policy.kind!r} hides single tokens, which a sliding window (attention window_size = "
                f"{options['window_size']}) would count as if they were not there; use 'latest'"
            )
        if state is None or state.is_fresh:
            return
        made = policy_of(state)
        if made != policy and not (made is None and policy.linear == "per_step" and not policy.compressed):
            raise ValueError(f"state: it was made by {made or StepCache()}, so it can not be continued by {policy}")

    def _loop_with_exits(
        self, s: Tensor, embedded: Tensor, context: SequenceContext, most: int, rule: ExitRule, window: GradientWindow
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loop on the rows still at work: ``(s_r [B, S, D], r [B], what the coda made of s_r)``. Rows that settle are taken out,
        not computed on. The last is ``None`` where no check decodes, or where it should carry gradient."""
        rows = torch.arange(len(s), device=s.device)
        without, _ = window.split(most)
        memory: Tensor | None = None
        decodes = rule.decoded and not torch.is_grad_enabled()
        done = Departures()
        for i in range(1, most + 1):
            with torch.no_grad() if i <= without else nullcontext():
                new, _, _ = self.step(s, embedded, context)
            if i == most:
                done.add(None, rows, i, new, hidden=self.finish(new, context)[0] if decodes else None)
                break
            before, s = s, new
            if not rule.due(i):
                continue
            leaving, memory, hidden = self.check_exit(before, s, context, rule, memory)
            gone = leaving.nonzero()[:, 0]
            if i < rule.min_steps or not len(gone):
                continue
            done.add(gone, rows, i, s, hidden=hidden if decodes else None)
            stay = (~leaving).nonzero()[:, 0]
            if not len(stay):
                break
            rows, s, embedded = (t.index_select(0, stay) for t in (rows, s, embedded))
            memory = None if memory is None else memory.index_select(0, stay)
            context = SequenceContext.build(
                *embedded.shape[:2], embedded.device, attention_mask=context.real_tokens[stay]
            )
        found = done.in_order()
        return found.final, found.recurrences, found.hidden

    def check_exit(
        self,
        previous: Tensor,
        state: Tensor,
        context: SequenceContext,
        rule: ExitRule,
        memory: Tensor | None,
        tokens: ModelState | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows that may stop ``[n]`` after :math:`s_{i-1}` became :math:`s_i`, the rule's memory, and what the coda made of
        :math:`s_i` (:meth:`finish`), without gradient. A decoded rule runs coda and head, from the token state ``tokens``; of a rule
        that does not the last is ``None``."""
        # entering no_grad costs as much as two operations on a token a row
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            mask = context.real_tokens
            hidden = self.finish(state, context, tokens)[0] if rule.decoded else None
            logits = None if hidden is None else self.backbone.head(rule.view(hidden, mask))
            value, memory = rule.measure(rule.view(previous, mask), rule.view(state, mask), logits, memory)
            return rule.settled(value, mask), memory, hidden

    # -- cost --------------------------------------------------------------------------------------------------------

    def flops(
        self,
        new: Tensor | int,
        past: Tensor | int = 0,
        *,
        recurrences: Tensor | int,
        head: Tensor | int = 0,
        checks: Tensor | int = 0,
        checked: Tensor | int = 1,
        reused: Tensor | int = 0,
    ) -> Tensor | float:
        """Forward FLOPs of ``new`` tokens after ``past`` ones, row by row: prelude, r times adapter and core, coda,
        head.

        ``checks``: how many times the coda ran besides, for an exit rule that decodes, with the head at ``checked``
        positions; ``reused``: 1 where the last of them was the answer's, so that the coda did not run once more.
        """
        prelude, core, coda = (FlopCounter(self.backbone, part) for part in (self.prelude, self.core, self.coda))
        loop = core(new, past) + self.adapter.flops_per_token * new
        price = prelude(new, past) + loop * recurrences + coda(new, past, head) + coda(new, past, checked) * checks
        return price - coda(new, past) * reused

    def fill_flops(self, new: Tensor | int, filled: Tensor | int) -> Tensor | float:
        """Forward FLOPs of filling gaps: each of ``new`` tokens goes through the core's linear mixers ``filled`` times."""
        mixers = [cast(Block, layer).attn for layer in self.backbone.model.layers[self.core]]  # type: ignore[union-attr]
        return sum(mixer.flops(1, 0.0) for mixer in mixers if mixer.name != "attention") * new * filled


def _parts(blocks: slice, one_by_one: bool) -> list[slice]:
    return [slice(b, b + 1) for b in range(blocks.start, blocks.stop)] if one_by_one else [blocks]
