r"""``masked_diffusion``: think by filling a canvas of fixed length, all positions at once, over a few denoising steps.

Layout (canvas tokens in capitals; they are what is noised, learned and filled)::

    steps_and_answer   prompt <bot> STEPS <ANS> ANSWER <EOS> <EOS> ...
    answer             prompt <bot> ANSWER <EOS> ...

The length of the canvas follows from the task's limits alone, and the ``<eos>`` behind the text are masked and learned
like any other token (as in LLaDA's fine-tuning, arXiv:2502.09992), so no length gives the gold solution away and the
model itself says where it ends. The backbone runs with ``Bidirectional()`` visibility; rows are right-padded behind the
canvas in training and in sampling, and positions count real tokens, so a prompt has the same positions in both.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone import HybridForCausalLM, SequenceContext
from latentcot.diffusion_reasoning.corruption import check_mask_id
from latentcot.diffusion_reasoning.denoiser import BackboneDenoiser
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig
from latentcot.diffusion_reasoning.named_samplers import ancestral, low_confidence
from latentcot.diffusion_reasoning.noise import seeds_from_tokens
from latentcot.diffusion_reasoning.objective import diffusion_loss
from latentcot.diffusion_reasoning.samplers import DiffusionOutput, Hook, diffusion_generate
from latentcot.diffusion_reasoning.schedule import NoiseSchedule
from latentcot.kernels import Bidirectional
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
    TaskLimits,
    Trace,
    register_method,
)
from latentcot.sequences import (
    Joined,
    Segment,
    answer,
    answer_after_marker,
    constant,
    join,
    prompt,
    steps,
    until_stop,
    written_step_tokens,
)
from latentcot.training.budget import FlopCounter

Canvas = Literal["steps_and_answer", "answer"]
Sampler = Literal["low_confidence", "ancestral"]

_NO_LIMITS, _EVERYWHERE = AnswerLimits(), Sites()

DEFAULTS: dict[str, Any] = {
    "canvas": "steps_and_answer",
    "canvas_tokens": None,
    "schedule": "loglinear",
    "normalise": "answer",
    "sampler": "low_confidence",
    "tokens_per_step": 1,
    "block_length": None,
    "order": "prob",
    "threshold": None,
    "temperature": None,
}


@register_method("masked_diffusion")
class MaskedDiffusion(Reasoner):
    """Masked diffusion over a canvas behind the prompt.

    Settings:
        canvas: ``steps_and_answer`` (default) or ``answer``.
        canvas_tokens: length of the canvas; ``None`` = what the task's limits need (longest steps, ``<ans>``, longest
            answer, one ``<eos>``). To be set when a model is evaluated under larger limits than it was trained with.
        schedule, normalise: of the loss. ``answer`` (default) averages over canvas tokens, then over rows, as LLaDA's
            fine-tuning does.
        sampler: ``low_confidence`` (default) or ``ancestral``.
        tokens_per_step: the default number of denoising steps is ceil(canvas / tokens_per_step).
        block_length, order, threshold: of ``low_confidence``; a threshold replaces the number of steps.
        temperature: ``None`` = 0 for ``low_confidence``, 1 for ``ancestral``.

    Knobs of :meth:`answer`: ``steps`` = number of denoising steps.
    """

    def __init__(self, backbone: HybridForCausalLM, settings: Mapping[str, Any] | None = None):
        given = dict(settings or {})
        if unknown := sorted(set(given) - set(DEFAULTS)):
            raise ValueError(f"settings: {unknown} unknown to masked_diffusion; valid: {', '.join(DEFAULTS)}")
        super().__init__(backbone, DEFAULTS | given)
        own = self.settings
        for name, values in (("canvas", get_args(Canvas)), ("sampler", get_args(Sampler))):
            if own[name] not in values:
                raise ValueError(
                    f"settings: {name} = {own[name]!r} given, expected one of {', '.join(map(repr, values))}"
                )
        for name in ("canvas_tokens", "tokens_per_step", "block_length"):
            value = own[name]
            optional = name != "tokens_per_step"
            if not (optional and value is None) and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ValueError(
                    f"settings: {name} = {value!r} given, expected a positive integer{' or None' if optional else ''}"
                )
        if own["sampler"] == "ancestral" and (own["threshold"] is not None or own["block_length"] is not None):
            raise ValueError("settings: threshold and block_length belong to sampler = 'low_confidence'")
        config = backbone.config
        check_mask_id(
            SPECIAL.mask,
            config.vocab_size,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
        self.schedule = NoiseSchedule(own["schedule"])
        self._sampler(None, 2, None)  # wrong orders, thresholds and temperatures fail here

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("train", form="denoise"),)

    # -- canvas ------------------------------------------------------------------------------------------------------

    def canvas_tokens(self, limits: TaskLimits) -> int:
        """Length of the canvas for a task."""
        if self.settings["canvas_tokens"] is not None:
            return self.settings["canvas_tokens"]
        thinking = written_step_tokens(limits) + 1 if self.settings["canvas"] == "steps_and_answer" else 0
        return thinking + limits.answer_tokens + 1

    def _text(self, batch: TaskBatch) -> Segment:
        """The canvas as it should read, ``[B, C]``, filled up with ``<eos>``."""
        thinking = (
            [steps(batch), constant(batch.answer_ids, SPECIAL.ans)]
            if self.settings["canvas"] == "steps_and_answer"
            else []
        )
        text = join([*thinking, answer(batch)])
        size = self.canvas_tokens(batch.prompts.limits)
        if (longest := text.ids.shape[1]) >= size:
            raise ValueError(
                f"canvas_tokens: a text of {longest} tokens and its <eos> do not fit into a canvas of {size}"
            )
        ids = F.pad(text.ids.masked_fill(~text.mask, SPECIAL.eos), (0, size - longest), value=SPECIAL.eos)
        return Segment(ids, torch.ones_like(ids, dtype=torch.bool), learn=True)

    def _rows(self, prompts: PromptBatch, canvas: Segment) -> tuple[Joined, Tensor]:
        """Right-padded rows, and which of their positions belong to the canvas ``[B, S]``."""
        row = join([prompt(prompts), constant(prompts.ids, SPECIAL.bot), canvas])
        return row, row.segment == 2

    # -- training ----------------------------------------------------------------------------------------------------

    def loss(self, batch: TaskBatch, ctx: StepContext, carry: object = None) -> LossOutput:
        row, maskable = self._rows(batch.prompts, self._text(batch))
        out = diffusion_loss(
            self.backbone,
            row.ids,
            schedule=self.schedule,
            mask_id=SPECIAL.mask,
            maskable=maskable,
            attention_mask=row.mask,
            normalise=self.settings["normalise"],
            generator=ctx.generator,
            rank=ctx.rank,
            world_size=ctx.world_size,
        )
        flops = FlopCounter(self.backbone, directions=2)(row.mask.sum(1).double(), head=out.masked.sum(1).double())
        parts = {"loss": float(out.loss.detach()), "nats_per_token": float(out.nats_per_token)}
        return LossOutput(out.loss, parts, float(flops.sum()))  # type: ignore[union-attr]

    # -- answering -----------------------------------------------------------------------------------------------------

    def _sampler(self, denoising_steps: int | None, canvas: int, max_nfe: int | None) -> DiffusionGenerationConfig:
        own = self.settings
        count = -(-canvas // own["tokens_per_step"]) if denoising_steps is None else denoising_steps
        if own["sampler"] == "ancestral":
            return ancestral(
                count,
                schedule=self.schedule,
                max_nfe=max_nfe,
                temperature=1.0 if own["temperature"] is None else own["temperature"],
            )
        if (
            own["threshold"] is None
        ):  # more steps than tokens would be clamped with a warning: a sweep over steps may well ask for it
            count = min(count, canvas if max_nfe is None else max_nfe, canvas)
        length = own["block_length"]
        return low_confidence(
            steps=None if own["threshold"] is not None else max(count, 1 if length is None else -(-canvas // length)),
            block_length=length,
            order=own["order"],
            threshold=own["threshold"],
            temperature=own["temperature"] or 0.0,
            max_nfe=max_nfe,
        )

    def _fill(
        self, prompts: PromptBatch, limits: AnswerLimits, generator: torch.Generator | None, hook: Hook | None = None
    ) -> tuple[Joined, Tensor, DiffusionOutput]:
        """``(rows with an empty canvas, filled canvas [B, C], sampler output)``."""
        knobs = dict(limits.knobs)
        count = knobs.pop("steps", None)
        if knobs:
            raise ValueError(f"limits.knobs: {sorted(knobs)} unknown to {self.method}; valid: 'steps'")
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"limits.knobs: steps = {count!r} given, expected a positive integer")
        size = self.canvas_tokens(prompts.limits)
        if limits.new_tokens is not None:
            size = min(size, limits.new_tokens)
        config = self._canvas_sampler(count, size, limits.sequential_passes)
        row, maskable = self._rows(prompts, constant(prompts.ids, *[SPECIAL.mask] * size))
        device = None if generator is None else generator.device
        seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator, device=device))
        seeds = seeds_from_tokens(row.ids, row.mask, seed)
        out = self._generate(row, maskable, config, seeds, hook)
        return row, out.sequences[maskable].view(len(prompts), size), out

    def _canvas_sampler(self, steps: int | None, canvas: int, max_nfe: int | None) -> DiffusionGenerationConfig:
        return self._sampler(steps, canvas, max_nfe)

    def _generate(
        self, row: Joined, maskable: Tensor, config: DiffusionGenerationConfig, seeds: Tensor, hook: Hook | None
    ) -> DiffusionOutput:
        return diffusion_generate(self.backbone, row.ids, config, row.mask, maskable, row_seeds=seeds, hook=hook)

    @torch.no_grad()
    def answer(
        self, prompts: PromptBatch, limits: AnswerLimits = _NO_LIMITS, generator: torch.Generator | None = None
    ) -> AnswerOutput:
        """Fill the canvas and read the answer off it; text ends at the first ``<eos>``.

        ``tokens_emitted`` counts canvas tokens up to and including that ``<eos>``; ``sequential_passes`` is the number
        of network passes (NFE); FLOPs are those of a pass over prompt and canvas times it. ``limits.sequential_passes``
        bounds the NFE. A row's random numbers follow from its prompt and one draw of ``generator``, so they do not
        depend on the batch; equal prompts are answered alike.
        """
        row, canvas, out = self._fill(prompts, limits, generator)
        text = until_stop(canvas)
        if self.settings["canvas"] == "steps_and_answer":
            ids = answer_after_marker(text, prompts.limits)
        else:
            ids = F.pad(text, (0, prompts.limits.answer_tokens), value=SPECIAL.pad)[:, : prompts.limits.answer_tokens]
        ended = canvas == SPECIAL.eos
        emitted = torch.where(ended.any(1), ended.to(torch.uint8).argmax(1) + 1, canvas.shape[1])
        lengths = row.mask.sum(1).double()
        flops = FlopCounter(self.backbone, directions=2)(lengths, head=lengths) * out.nfe
        return AnswerOutput(ids, emitted, out.nfe, flops, {"text": canvas})  # type: ignore[arg-type]

    @torch.no_grad()
    def trace(self, prompts: PromptBatch, sites: Sites = _EVERYWHERE) -> Trace:
        """Hidden states after each chosen block in every denoising step of the default sampler; rows that had no pass
        in a step are not valid there."""
        device = prompts.ids.device
        blocks = range(len(self.backbone.model.layers)) if sites.blocks is None else sites.blocks
        seen: list[tuple[Tensor, Tensor]] = []

        def remember(number: int, rows: Tensor, z: Tensor) -> None:
            if sites.steps is None or len(seen) < sites.steps:
                seen.append((rows, z))

        row, _, _ = self._fill(prompts, _NO_LIMITS, None, remember)
        batch, length = row.ids.shape
        hidden = torch.zeros(
            len(seen),
            len(blocks),
            batch,
            length,
            self.backbone.config.hidden_size,
            device=device,
            dtype=self.backbone.dtype,
        )
        valid = torch.zeros(len(seen), batch, length, dtype=torch.bool, device=device)
        for step, (rows, z) in enumerate(seen):
            mask = row.mask[rows]
            context = SequenceContext.build(
                z.shape[0], z.shape[1], device, attention_mask=mask, visibility=Bidirectional()
            )
            stream, recorded = self.backbone.embed(z), {}
            for block in range(len(self.backbone.model.layers)):
                stream, _ = self.backbone.run(stream, context, slice(block, block + 1))
                recorded[block] = stream
            for index, block in enumerate(blocks):
                hidden[step, index, rows] = recorded[block] * mask[..., None]
            valid[step, rows] = mask
        return Trace(hidden, valid, tuple(f"block {b}" for b in blocks))

    def denoiser(self) -> BackboneDenoiser:
        """The backbone as the network of :func:`diffusion_generate` and :func:`diffusion_loss`."""
        return BackboneDenoiser(self.backbone)
