r"""A whole stack looped, with a halting gate: :class:`StackLoop`, the architecture of Ouro (arXiv:2510.25741).

.. math::
    h^{(0)} = c\, E[x], \qquad h^{(t)} = n(M(h^{(t-1)})), \ t = 1 \dots T, \qquad \text{logits}^{(t)} = W h^{(t)}

M is all blocks of the backbone, n its final norm *inside* the loop: what head, gate and next step read is normalised. The gate
is one linear map D to 1 with bias. Block b of step t (from 0) keeps its token state at place ``(b, t)``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentcot.backbone import HybridForCausalLM, SequenceContext
from latentcot.reasoner import SPECIAL, PromptBatch, Sites, Trace
from latentcot.recurrent_depth.exit_law import check_quantile, exit_law
from latentcot.recurrent_depth.ragged_state import (
    LoopStates,
    next_positions,
    resolve_gaps,
    token_context,
)
from latentcot.recurrent_depth.reading import Reading, ReadingReasoner, token_losses
from latentcot.recurrent_depth.settings import check_choice, check_count, check_flag, check_keys
from latentcot.recurrent_depth.token_pass import TokenPass
from latentcot.sequences import constant, join, prompt
from latentcot.training.budget import FlopCounter

READOUTS = ("step", "mixture")
KNOBS = ("steps", "q", "readout", "sharing", "gaps")


@dataclass(frozen=True)
class DepthOptions:
    """How deep to go: see the settings of :class:`StackLoop`."""

    steps: int
    q: float
    readout: str
    sharing: str
    gaps: str


@dataclass
class Unrolled:
    """``hidden``: :math:`h^{(1)} \\dots h^{(T)}`, each ``[B, S, D]``; ``gate [T, B, S]``: logits of :math:`\\lambda_t`; ``states``
    when they were kept; ``recorded``: outputs of the chosen blocks, step by step."""

    hidden: list[Tensor]
    gate: Tensor
    states: LoopStates | None = None
    recorded: list[list[Tensor]] | None = None


@dataclass
class Exited:
    """``hidden [B, S, D]``: each row's last step; ``logits [B, S or fewer, Vocab]``; ``steps [B]``: how many it took;
    ``block_passes``: rows times steps that were computed, over the whole batch."""

    hidden: Tensor
    logits: Tensor
    steps: Tensor
    block_passes: int


class StackLoop(ReadingReasoner):
    """The loop, its exits and its cached decoding; :class:`~latentcot.recurrent_depth.ouro.Ouro` and
    :class:`~latentcot.recurrent_depth.ponder_net.PonderNet` add their losses.

    Args:
        backbone: all of it is looped. Ouro's blocks are ``norm_placement="sandwich_pre_residual"``.
        settings: the sub-class's, with

            * ``steps``: T, 4.
            * ``q``: leave at the first step m with p(1) + … + p(m) >= q; 1 = never early.
            * ``readout``: ``step`` (the step left at) or ``mixture``: logits weighted by p(t), for which every step is computed.
            * ``sharing``: whose keys and values are read behind the prompt: each step's ``own``, those of the ``last`` or the
              ``first`` step, or their ``mean``. Only ``own`` equals the pass over the whole sequence.
            * ``gaps``: what steps that a token did not take hold for it, ``copy`` or ``hold``
              (:mod:`~latentcot.recurrent_depth.ragged_state`); ``None`` = ``copy`` where all mixers are attention, which is free there.
            * ``gradient_checkpointing``: keep h^(t) alone of each step for the backward pass and compute the rest there once more;
              for passes that keep no state and record no blocks.

    Raises:
        ValueError: values out of range or that do not go together.
    """

    def __init__(self, backbone: HybridForCausalLM, settings: Mapping[str, Any]):
        super().__init__(backbone, settings)
        like = backbone.lm_head.weight
        self.gate = nn.Linear(backbone.config.hidden_size, 1, device=like.device, dtype=like.dtype)
        if not self.gate.weight.is_meta:
            nn.init.normal_(self.gate.weight, 0.0, backbone.config.initializer_range)
            nn.init.zeros_(self.gate.bias)
        self.options({})
        self.gradient_checkpointing = check_flag("gradient_checkpointing", settings["gradient_checkpointing"])

    def options(self, knobs: Mapping[str, Any]) -> DepthOptions:
        """Settings overridden by ``knobs`` (``steps``, ``q``, ``readout``, ``sharing``, ``gaps``)."""
        check_keys("limits.knobs", knobs, KNOBS)
        value = {name: knobs.get(name, self.settings[name]) for name in KNOBS}
        steps = check_count("steps", value["steps"], 1)
        q = check_quantile(value["q"])
        check_choice("readout", value["readout"], READOUTS)
        check_choice("sharing", value["sharing"], ("own", "last", "first", "mean"))
        if value["readout"] == "mixture" and q < 1:
            raise ValueError(f"q: {q} given, but readout 'mixture' reads every step; use q = 1")
        gaps = resolve_gaps(value["gaps"], self.backbone.config)
        if value["readout"] == "mixture" and value["sharing"] != "own":
            raise ValueError(f"readout: 'mixture' needs each step's own state, but sharing is {value['sharing']!r}")
        return DepthOptions(steps, q, value["readout"], value["sharing"], gaps)

    # -- whole sequences ---------------------------------------------------------------------------------------------

    def step(self, hidden: Tensor, context: SequenceContext) -> Tensor:
        """One step without a state: ``[B, S, D]`` to the same."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # nothing in a block is drawn at random, so no generator's state is kept
            found = checkpoint(self._step, hidden, context, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(found, Tensor)
            return found
        return self._step(hidden, context)

    def _step(self, hidden: Tensor, context: SequenceContext) -> Tensor:
        return self.backbone.model.norm(self.backbone.run(hidden, context)[0])

    def unroll(
        self,
        input_ids: Tensor,
        steps: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        states: LoopStates | None = None,
        use_cache: bool = False,
        record: tuple[int, ...] = (),
    ) -> Unrolled:
        """Every step over ``input_ids [B, S]``.

        Args:
            steps: T; default that of the settings.
            states: of the tokens before, made with the same T and not shared.
            use_cache: return states to go on from.
            record: blocks whose outputs to keep.

        Raises:
            ValueError: T below 1, states of another T or of another batch, shared states.
        """
        total = check_count("steps", self.settings["steps"] if steps is None else steps, 1)
        if states is not None and (states.sharing != "own" or len(states.steps) != total):
            raise ValueError(
                f"states: made for {len(states.steps)} steps, sharing {states.sharing!r}; "
                f"they can not be continued with {total} steps of their own"
            )
        keep = use_cache or states is not None
        if keep and cu_seqlens is not None:
            raise ValueError("cu_seqlens: packed sequences carry no state; leave out states and use_cache")
        if states is not None and states.batch_size != len(input_ids):
            raise ValueError(f"states: they hold {states.batch_size} rows, the input has {len(input_ids)}")
        hidden = self.backbone.embed(input_ids)
        shape, device = input_ids.shape, input_ids.device
        if not keep:
            context = SequenceContext.build(
                shape[0], shape[1], device, attention_mask=attention_mask, cu_seqlens=cu_seqlens
            )
        else:
            positions = next_positions(attention_mask, shape, None if states is None else states.lengths, device)
        outputs, kept, recorded = [], [], []
        for i in range(total):
            before = None
            if not keep and not record:
                hidden = self.step(hidden, context)
                outputs.append(hidden)
                continue
            if keep:
                before = self.backbone.new_state() if states is None else states.steps[i]
                context = token_context(before, hidden, attention_mask, positions)
            places = []
            for part in _parts(len(self.backbone.model.layers), bool(record)):
                hidden, before = self.backbone.run(hidden, context, part, before, i if keep else 0)
                if part.start in record:
                    places.append(hidden)
            recorded.append(places)
            hidden = self.backbone.model.norm(hidden)
            outputs.append(hidden)
            if before is not None:
                kept.append(before.advance(context))
        gate = torch.stack([self.gate(h)[..., 0] for h in outputs])
        new = None
        if keep:
            gaps = states.gaps if states is not None else resolve_gaps(self.settings["gaps"], self.backbone.config)
            added = context.real_tokens.sum(1)
            new = LoopStates(tuple(kept), added if states is None else states.lengths + added, gaps)
        return Unrolled(outputs, gate, new, recorded if record else None)

    def logits(self, unrolled: Unrolled, readout: str = "step", logits_to_keep: int = 0) -> Tensor:
        """Logits of a full-depth pass: of the last step, or the mixture of all weighted by p(t)."""
        check_choice("readout", readout, READOUTS)
        cut = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        if readout == "step":
            return self.backbone.lm_head(unrolled.hidden[-1][:, cut])
        p = exit_law(unrolled.gate).exp().to(unrolled.hidden[-1].dtype)[:, :, cut, None]
        # The head is linear and has no bias: mixing what it reads is mixing what it says, at the price of one head.
        mixed = sum(weight * h[:, cut] for weight, h in zip(p, unrolled.hidden, strict=True))
        assert isinstance(mixed, Tensor)
        return self.backbone.lm_head(mixed)

    def recur(
        self,
        input_ids: Tensor,
        q: float = 1.0,
        steps: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Exited:
        """A pass over whole sequences in which rows leave: a row's steps follow the gate at its last real position, and what leaves
        is no longer computed. A row's result is that of the row alone. No state is kept: rows of different depths leave gaps.
        """
        total = check_count("steps", self.settings["steps"] if steps is None else steps, 1)
        check_quantile(q)
        hidden = self.backbone.embed(input_ids)
        context = SequenceContext.build(
            len(input_ids), input_ids.shape[1], input_ids.device, attention_mask=attention_mask
        )
        rows = torch.arange(len(input_ids), device=input_ids.device)
        stay_log = hidden.new_zeros(len(rows), dtype=torch.promote_types(hidden.dtype, torch.float32))
        done: list[tuple[Tensor, Tensor, int]] = []
        computed = 0
        for t in range(1, total + 1):
            hidden = self.step(hidden, context)
            computed += len(rows)
            if t == total:
                done.append((rows, hidden, t))
                break
            if q == 1:
                continue
            gate = self.gate(_last_real(hidden, context.real_tokens))[:, 0].to(stay_log)
            stay_log = stay_log + F.logsigmoid(-gate)
            leaving = 1 - stay_log.exp() >= q
            if bool(leaving.any()):
                done.append((rows[leaving], hidden[leaving], t))
                stay = ~leaving
                rows, hidden, stay_log = rows[stay], hidden[stay], stay_log[stay]
                if not len(rows):
                    break
                context = SequenceContext.build(
                    len(hidden), hidden.shape[1], hidden.device, attention_mask=context.real_tokens[stay]
                )
        order = torch.cat([r for r, _, _ in done]).argsort()
        last = torch.cat([h for _, h, _ in done])[order]
        taken = torch.cat([torch.full_like(r, t) for r, _, t in done])[order]
        logits = self.backbone.lm_head(last[:, -logits_to_keep:] if logits_to_keep else last)
        return Exited(last, logits, taken, computed)

    # -- training ------------------------------------------------------------------------------------------------------

    def step_losses(self, unrolled: Unrolled, chosen: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every step at the scored positions, ``[T, P]``."""
        head = self.backbone.lm_head
        return torch.stack([token_losses(head(h[:, :-1][chosen]), targets) for h in unrolled.hidden])

    def training_flops(self, mask: Tensor, chosen: Tensor) -> float:
        """Forward FLOPs of one pass at full depth, the head at scored positions only."""
        tokens, heads = mask.sum(1).double(), chosen.sum(1).double()
        one = FlopCounter(self.backbone)(tokens, 0, heads) + self.gate_flops * tokens
        return float(self.settings["steps"] * one.sum())  # type: ignore[union-attr]

    # -- token by token ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read_token(
        self, input_ids: Tensor, states: LoopStates, q: float = 1.0, steps: int | None = None
    ) -> tuple[Tensor, LoopStates, Tensor]:
        """One token of each row, ``[B, 1]``, all real, after ``states``: ``(hidden [B, D], new states, steps taken [B])``.

        A row leaves by its own gate and is not computed any further; what the deeper steps hold for its token says
        ``states.gaps``. No gradient: the new states grow out of the old ones in place, which stay what they were.
        """
        total = check_count("steps", self.settings["steps"] if steps is None else steps, 1)
        check_quantile(q)
        if input_ids.shape != (states.batch_size, 1):
            raise ValueError(f"input_ids: shape {list(input_ids.shape)} given, expected {[states.batch_size, 1]}")
        if states.sharing == "own" and len(states.steps) != total:
            raise ValueError(f"states: made for {len(states.steps)} steps, so they can not be continued with {total}")
        if any(s.is_fresh for s in states.steps):
            raise ValueError("states: they hold no token yet; read the first ones with unroll(..., use_cache=True)")
        batch, device = len(input_ids), input_ids.device
        hidden = self.backbone.embed(input_ids)
        result = torch.zeros_like(hidden[:, 0])
        taken = torch.zeros(batch, dtype=torch.int64, device=device)
        stay_log = hidden.new_zeros(batch, dtype=torch.promote_types(hidden.dtype, torch.float32))
        passing = TokenPass(self.backbone, states, total)
        for i in range(total):
            hidden = self.backbone.model.norm(passing.step(i, hidden))
            rows = passing.rows
            leaving = torch.full_like(rows, i + 1 == total, dtype=torch.bool)
            if q < 1:
                stay_log = stay_log + F.logsigmoid(-self.gate(hidden)[:, 0, 0].to(stay_log))
                leaving = leaving | (1 - stay_log.exp() >= q)
            if not bool(leaving.any()):
                continue
            result[rows[leaving]] = hidden[leaving, 0]
            taken[rows[leaving]] = i + 1
            passing.leave(leaving, i + 1)
            hidden, stay_log = hidden[~leaving], stay_log[~leaving]
            if not len(passing.rows):
                break
        return result, replace(states, steps=passing.finish(), lengths=states.lengths + 1), taken

    # -- answers -----------------------------------------------------------------------------------------------------

    def most_passes(self, options: DepthOptions) -> int:
        return options.steps * (1 if options.q == 1 else 2)  # prompt at full depth, then <ans> with exits

    def read(self, ids: Tensor, mask: Tensor | None, state: LoopStates | None, options: DepthOptions) -> Reading:
        """The prompt at full depth, its last token and later ones with exits: deeper steps need all of the prompt's entries."""
        device, passes = ids.device, torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        flops = torch.zeros(len(ids), dtype=torch.float64, device=device)
        count = FlopCounter(self.backbone)
        full_depth = options.q == 1 and options.sharing == "own"
        if state is None and not full_depth and ids.shape[1] < 2:
            raise ValueError(
                "ids: one token given, but exits and shared states need a prompt before the token they begin with"
            )
        if state is None or full_depth:
            now = ids if full_depth else ids[:, :-1]
            seen = None if mask is None else mask[:, : now.shape[1]]
            past = 0 if state is None else state.lengths.double()
            out = self.unroll(now, options.steps, attention_mask=seen, states=state, use_cache=True)
            assert out.states is not None
            state = replace(out.states, gaps=options.gaps)
            new = torch.full_like(flops, now.shape[1]) if seen is None else seen.sum(1).double()
            passes += options.steps
            flops += options.steps * (count(new, past) + self.gate_flops * new)
            if full_depth:
                logits = self.logits(out, options.readout, logits_to_keep=1)[:, 0]
                flops += count.head
                return Reading(logits, state, passes, flops, torch.full_like(passes, options.steps))
            state = state.shared(options.sharing)
            ids = ids[:, -1:]
        past = state.lengths.double()
        hidden, state, taken = self.read_token(ids, state, options.q, options.steps)
        flops += taken * (count(torch.ones_like(past), past) + self.gate_flops) + count.head
        if state.gaps == "copy" and state.sharing == "own":
            flops += (options.steps - taken) * self.fill_flops
        return Reading(self.backbone.lm_head(hidden), state, passes + taken, flops, taken)

    @property
    def gate_flops(self) -> float:
        """FLOPs of the gate for a token and step."""
        return 2.0 * self.gate.weight.numel()

    @property
    def fill_flops(self) -> float:
        """FLOPs of what a step that a token did not take writes for it: ``copy`` runs the linear mixers once more."""
        mixers: list[Any] = [layer.attn for layer in self.backbone.model.layers]  # type: ignore[union-attr]
        return sum(mixer.flops(1, 0.0) for mixer in mixers if mixer.name != "attention")

    @torch.no_grad()
    def trace(self, prompts: PromptBatch, sites: Sites = Sites()) -> Trace:
        """Output of each chosen block at each step, prompt and ``<ans>`` read once: ``hidden [T, layers, B, S, D]``."""
        blocks = tuple(range(len(self.backbone.model.layers))) if sites.blocks is None else tuple(sorted(sites.blocks))
        steps = self.settings["steps"] if sites.steps is None else min(sites.steps, self.settings["steps"])
        start = join([prompt(prompts), constant(prompts.ids, SPECIAL.ans)])
        out = self.unroll(start.ids, steps, attention_mask=start.mask, record=blocks)
        assert out.recorded is not None
        hidden = torch.stack([torch.stack(step) for step in out.recorded])
        return Trace(hidden, start.mask.expand(steps, *start.mask.shape), tuple(f"block {b}" for b in blocks))


def _parts(blocks: int, one_by_one: bool) -> list[slice]:
    return [slice(b, b + 1) for b in range(blocks)] if one_by_one else [slice(0, blocks)]


def _last_real(hidden: Tensor, mask: Tensor) -> Tensor:
    """Each row's last real position, ``[B, D]``."""
    last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
