r"""Coconut: the last hidden state becomes the next input (arXiv:2412.06769), with its two controls.

Layout at a stage with n latents, learned tokens in capitals::

    prompt <bot> latent_1 ... latent_n <eot> REMAINING STEPS <ANS> ANSWER <EOS>

Without latents (stage 0, and every stage of ``coconut_no_latents``) there are no markers either: stage 0 is ``cot``,
the last stage of that control ``direct``. The input of latent j is the hidden state, after the final norm, of the
position before it.

n latents take n + 1 passes, each continuing from the state of the one before: prompt and ``<bot>``; latents 1 to n - 1
one by one; latent n and everything behind it. Prompts are padded on the left, so that the slots of all rows align.
Gradient flows through all passes.

Where no steps remain (the last stage) ``<ans>`` is certain; it is learned, and given when answering, as for ``direct``.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from latentcot.backbone import HybridForCausalLM, ModelState, SequenceContext
from latentcot.reasoner import (
    SPECIAL,
    AnswerLimits,
    AnswerOutput,
    LossOutput,
    Phase,
    PromptBatch,
    Reasoner,
    Sites,
    StepContext,
    TaskBatch,
    Trace,
    register_method,
)
from latentcot.recurrent_depth.latent_thoughts.ablation import SlotAblation
from latentcot.recurrent_depth.latent_thoughts.curriculum import Curriculum
from latentcot.recurrent_depth.latent_thoughts.slot_writer import SlotWriter
from latentcot.recurrent_depth.settings import check_count, check_keys, merge, read_value
from latentcot.sequences import (
    IGNORED,
    Segment,
    answer,
    answer_after_marker,
    constant,
    greedy_decode,
    join,
    label_loss,
    prompt,
    steps,
    until_stop,
    written_step_tokens,
)
from latentcot.training.budget import FlopCounter

ANSWER_SEED = 0
_NO_LIMITS, _EVERYWHERE = AnswerLimits(), Sites()
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Curriculum)}


@dataclass
class Thoughts:
    """Where thinking stands before the last latent is read.

    ``latents [B, n, D]``: input vectors of all n slots; ``state``: after the prompt, ``<bot>`` and latents 1 .. n - 1;
    ``lengths [B]``: real tokens of prompt and ``<bot>``.
    """

    latents: Tensor
    state: ModelState
    lengths: Tensor


class LatentReasoner(Reasoner):
    """A decoder that thinks in slots before it writes; sub-classes differ in who writes the slots.

    Args:
        backbone: the decoder; its vocabulary holds the special tokens.
        settings: the fields of :class:`Curriculum`, with its defaults; unknown keys raise ``ValueError`` naming close
            ones.
    """

    writer: ClassVar[SlotWriter]

    def __init__(self, backbone: HybridForCausalLM, settings: Mapping[str, Any] | None = None):
        curriculum = Curriculum(**merge(type(self).__name__, DEFAULTS, settings))
        super().__init__(backbone, asdict(curriculum))
        self.curriculum = curriculum
        if backbone.config.vocab_size < SPECIAL.count:
            raise ValueError(
                f"backbone: vocab_size {backbone.config.vocab_size} has no room for the {SPECIAL.count} special tokens"
            )

    def phases(self) -> tuple[Phase, ...]:
        return self.curriculum.phases()

    # -- thinking ----------------------------------------------------------------------------------------------------

    def think(self, prompts: PromptBatch, latents: int) -> Thoughts:
        """Passes 1 .. n of a sequential writer: read prompt and ``<bot>``, then one slot a pass; latent n itself is not
        read yet.

        Raises ``ValueError`` for n below 1.
        """
        check_count("latents", latents, 1)
        start = join([prompt(prompts), constant(prompts.ids, SPECIAL.bot)], side="left")
        model = self.backbone.model
        hidden, state = model(input_ids=start.ids, attention_mask=start.mask, use_cache=True)
        written = [hidden[:, -1:]]
        for _ in range(latents - 1):
            hidden, state = model(inputs_embeds=written[-1], state=state)
            written.append(hidden)
        return Thoughts(torch.cat(written, 1), state, start.mask.sum(1))

    def read_on(self, thoughts: Thoughts, ids: Tensor, mask: Tensor) -> tuple[Tensor, ModelState]:
        """The last pass: latent n and the tokens ``ids [B, S]`` behind it (``mask``: real ones). Hidden states ``[B, 1
        + S, D]`` after the final norm, the first at latent n, and the state."""
        embeds = torch.cat([thoughts.latents[:, -1:], self.backbone.embed(ids)], 1)
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
        return self.backbone.model(inputs_embeds=embeds, attention_mask=mask, state=thoughts.state)

    # -- training ------------------------------------------------------------------------------------------------------

    def loss(self, batch: TaskBatch, ctx: StepContext, carry: object = None) -> LossOutput:
        """Next-token loss on remaining steps, ``<ans>``, answer and ``<eos>`` at the stage of
        ``ctx.phase.knobs["stage"]``."""
        if "stage" not in ctx.phase.knobs:
            raise ValueError(
                f"phase.knobs: {dict(ctx.phase.knobs)} given, expected a 'stage'; train through this method's phases()"
            )
        stage = self.curriculum.check_stage(ctx.phase.knobs["stage"])
        groups = self._by_stage(batch, stage, ctx)
        losses, flops, weights = zip(*(self._stage_loss(rows, k) for k, rows in groups), strict=True)
        loss = sum(x * w for x, w in zip(losses, weights, strict=True)) / sum(weights)
        assert isinstance(loss, Tensor)
        parts = {"loss": float(loss.detach()), "stage": float(stage), "latents": float(self._slots(stage))}
        return LossOutput(loss, parts, sum(flops))

    def _by_stage(self, batch: TaskBatch, stage: int, ctx: StepContext) -> list[tuple[int, TaskBatch]]:
        """The batch cut by the stage that each row trains at."""
        p = self.curriculum.mix_probability
        if p == 0 or stage == 0:
            return [(stage, batch)]
        draws = torch.rand(2, len(batch), generator=ctx.generator, device=ctx.generator.device).to(batch.index.device)
        own = torch.where(draws[0] < p, (draws[1] * (stage + 1)).long(), stage)
        return [(int(k), batch.rows((own == k).nonzero()[:, 0])) for k in own.unique()]

    def _stage_loss(self, batch: TaskBatch, stage: int) -> tuple[Tensor, float, int]:
        """Mean loss of rows that all train at ``stage``, its forward FLOPs, and how many tokens it scores."""
        slots, removed = self._slots(stage), self.curriculum.steps_removed(stage)
        written = [
            *([] if removed is None else [steps(batch, first=removed)]),
            constant(batch.answer_ids, SPECIAL.ans, learn=True),
            answer(batch),
            constant(batch.answer_ids, SPECIAL.eos, learn=True),
        ]
        opening = self._opening(batch.prompts, slots)
        count = FlopCounter(self.backbone)
        if opening is not None:
            row = join([*opening, *written])
            logits, labels = self.backbone(input_ids=row.ids, attention_mask=row.mask).logits, row.labels
            lengths = row.mask.sum(1).double()
            flops = count(lengths, head=lengths)
        else:
            thoughts = self.think(batch.prompts, slots)
            row = join([constant(batch.answer_ids, SPECIAL.eot), *written])
            hidden, _ = self.read_on(thoughts, row.ids, row.mask)
            logits, labels = self.backbone.lm_head(hidden[:, 1:]), row.labels
            behind = row.mask.sum(1).double()
            flops = count(thoughts.lengths.double() + slots + behind, head=behind)
        return label_loss(logits, labels), float(flops.sum()), int((labels != IGNORED).sum())  # type: ignore[union-attr]

    # -- answering -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def answer(
        self, prompts: PromptBatch, limits: AnswerLimits = _NO_LIMITS, generator: torch.Generator | None = None
    ) -> AnswerOutput:
        """Think in the slots of the last stage, then decode greedily.

        Knobs: ``stage`` (its layout; default the last), ``latents`` (slots; default the stage's), ``ablation`` (a kind
        of :class:`SlotAblation`; its noise comes from ``generator`` or a fixed one).

        ``sequential_passes``: n + 1 up to the first token of a sequential writer, else 1, and one for each further
        token. An ablation adds the passes in which the replaced latents were computed.
        """
        check_keys("limits.knobs", limits.knobs, ("stage", "latents", "ablation"))
        stage = self.curriculum.check_stage(limits.knobs.get("stage", self.curriculum.last_stage))
        slots = self._slots(stage)
        if "latents" in limits.knobs:
            slots = self.writer.slots(check_count("limits.knobs: latents", limits.knobs["latents"]))
        ablation = limits.knobs.get("ablation")
        ablation = None if ablation is None else read_value("limits.knobs: ablation", SlotAblation, ablation)
        if ablation is not None and not (slots and self.writer.sequential):
            raise ValueError(
                f"limits.knobs: ablation {ablation.kind!r} given, but {self.method!r} computes no latents here"
            )

        writes = self.curriculum.writes_text(stage)
        given = [] if writes else [constant(prompts.ids, SPECIAL.ans)]
        opening = self._opening(prompts, slots)
        count = FlopCounter(self.backbone)
        if opening is not None:
            start = join([*opening, *given], side="left")
            output = self.backbone(input_ids=start.ids, attention_mask=start.mask, use_cache=True, logits_to_keep=1)
            logits, state, passes = output.logits[:, -1], output.state, 0
            seen = start.mask.sum(1).double()
            flops = count(seen, head=1)
        else:
            thoughts, passes = self.think(prompts, slots), slots
            row = join([constant(prompts.ids, SPECIAL.eot), *given])
            seen = thoughts.lengths.double() + slots + row.ids.shape[1]
            flops = count(seen, head=1)
            if ablation is not None:
                generator = torch.Generator().manual_seed(ANSWER_SEED) if generator is None else generator
                pause = self.backbone.embed(torch.tensor([[SPECIAL.pause]], device=prompts.ids.device))[0, 0]
                thoughts = self._reread(prompts, ablation.apply(thoughts.latents, pause, generator))
                flops = flops + count(thoughts.lengths.double() + slots - 1)
                passes += 1
            hidden, state = self.read_on(thoughts, row.ids, row.mask)
            logits = self.backbone.lm_head(hidden[:, -1])

        size = prompts.limits
        most = (written_step_tokens(size) + 1 if writes else 0) + size.answer_tokens
        if limits.new_tokens is not None:
            most = min(most, limits.new_tokens)
        if limits.sequential_passes is not None:
            most = min(most, check_count("limits.sequential_passes", limits.sequential_passes, passes + 1) - passes)
        decoded = greedy_decode(self.backbone, logits, state, most)
        later = decoded.emitted.double() - 1
        flops = flops + count(later, past=seen, head=later)
        ids = answer_after_marker(decoded.ids, size) if writes else until_stop(decoded.ids)
        info = {"text": decoded.ids, "latents": slots}
        return AnswerOutput(ids, decoded.emitted, decoded.emitted + passes, flops, info)  # type: ignore[arg-type]

    @torch.no_grad()
    def trace(self, prompts: PromptBatch, sites: Sites = _EVERYWHERE) -> Trace:
        """Hidden states at the slots of the last stage: ``hidden [n, layers, B, 1, D]``, one step a slot, after each
        chosen block.

        Raises ``ValueError`` for a method without slots or a block that does not exist.
        """
        slots = self._slots(self.curriculum.last_stage)
        if not slots:
            raise ValueError(f"trace: {self.method!r} has no latent slots to record")
        blocks = range(len(self.backbone.model.layers)) if sites.blocks is None else sites.blocks
        if outside := [b for b in blocks if not 0 <= b < len(self.backbone.model.layers)]:
            raise ValueError(
                f"sites.blocks: {outside} given, but the backbone has {len(self.backbone.model.layers)} blocks"
            )
        latents = self.think(prompts, slots).latents if self.writer.sequential else None
        embeds, mask = self._filled(prompts, latents, slots)
        context = SequenceContext.build(mask.shape[0], mask.shape[1], mask.device, attention_mask=mask)
        hidden, recorded = embeds, []
        for block in range(len(self.backbone.model.layers)):
            hidden, _ = self.backbone.run(hidden, context, slice(block, block + 1))
            if block in blocks:
                recorded.append(hidden[:, -slots:])
        kept = slots if sites.steps is None else min(sites.steps, slots)
        steps_first = torch.stack(recorded).permute(2, 0, 1, 3)[:kept, :, :, None]
        valid = torch.ones(kept, len(prompts), 1, dtype=torch.bool, device=mask.device)
        return Trace(steps_first, valid, tuple(f"block {b}" for b in sorted(blocks)))

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _slots(self, stage: int) -> int:
        return self.writer.slots(self.curriculum.latents(stage))

    def _opening(self, prompts: PromptBatch, slots: int) -> list[Segment] | None:
        """What stands before the written part, as tokens; ``None`` when the slots must be computed one after
        another."""
        if not slots:
            return [prompt(prompts)]
        if self.writer.sequential:
            return None
        return [prompt(prompts), constant(prompts.ids, SPECIAL.bot, *[SPECIAL.pause] * slots, SPECIAL.eot)]

    def _filled(self, prompts: PromptBatch, latents: Tensor | None, slots: int) -> tuple[Tensor, Tensor]:
        """Prompt, ``<bot>`` and filled slots as input vectors ``[B, S, D]`` and mask; rows end together."""
        fill = SPECIAL.latent if latents is not None else SPECIAL.pause
        row = join([prompt(prompts), constant(prompts.ids, SPECIAL.bot, *[fill] * slots)], side="left")
        embeds = self.backbone.embed(row.ids)
        if latents is not None:
            embeds = torch.cat([embeds[:, : embeds.shape[1] - slots], latents], 1)
        return embeds, row.mask

    def _reread(self, prompts: PromptBatch, latents: Tensor) -> Thoughts:
        """Thoughts as they stand when the slots hold the given latents: everything but the last one read in one
        pass."""
        embeds, mask = self._filled(prompts, latents, latents.shape[1])
        _, state = self.backbone.model(inputs_embeds=embeds[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        return Thoughts(latents, state, mask.sum(1) - latents.shape[1])


@register_method("coconut")
class Coconut(LatentReasoner):
    """Chain of continuous thought: each latent is the hidden state before it."""

    writer = SlotWriter("last_hidden")


@register_method("coconut_no_latents")
class CoconutNoLatents(LatentReasoner):
    """Control: the same curriculum, steps vanish, nothing takes their place."""

    writer = SlotWriter("nothing")


@register_method("coconut_pause")
class CoconutPause(LatentReasoner):
    """Control: the learned ``<pause>`` token in every slot, one pass."""

    writer = SlotWriter("pause")
