r"""``block_diffusion``: think on a canvas that is filled block by block, each over a few denoising steps.

The canvas is that of ``masked_diffusion`` (steps and answer behind the prompt, filled up with ``<eos>``), and blocks are counted from the
first token of the prompt. Training is one two-stream pass; in use a state is carried from block to block, so that a pass of a linear
layer costs the same whatever stands before.
"""

import warnings
from collections.abc import Mapping
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone import HybridForCausalLM, SequenceContext
from latentcot.diffusion_reasoning.block_diffusion.model import BlockDiffusionModel
from latentcot.diffusion_reasoning.block_diffusion.objective import (
    WHOLE,
    Normalise,
    block_diffusion_loss,
    check_interval,
)
from latentcot.diffusion_reasoning.block_diffusion.sampler import block_generate
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig
from latentcot.diffusion_reasoning.reasoner import MaskedDiffusion
from latentcot.diffusion_reasoning.samplers import DiffusionOutput, Hook
from latentcot.reasoner import (
    SPECIAL,
    AnswerLimits,
    AnswerOutput,
    LossOutput,
    PromptBatch,
    Reasoner,
    Sites,
    StepContext,
    TaskBatch,
    Trace,
    register_method,
)
from latentcot.sequences import Joined, answer_after_marker, constant, until_stop

_NO_LIMITS, _EVERYWHERE = AnswerLimits(), Sites()

DEFAULTS: dict[str, Any] = {
    "canvas": "steps_and_answer",
    "canvas_tokens": None,
    "block_length": 4,
    "inside": "softmax",
    "interval": None,
    "normalise": "answer",
    "tokens_per_step": 1,
    "order": "prob",
    "threshold": None,
    "temperature": 0.0,
}


@register_method("block_diffusion")
class BlockDiffusion(MaskedDiffusion):
    """Block diffusion over a canvas behind the prompt.

    Settings:
        canvas, canvas_tokens: as for ``masked_diffusion``.
        block_length: b, 4.
        inside: what tokens of a block give each other in linear layers, see :class:`latentcot.kernels.BlockCausal`; with hgrn layers
            ``"decayed"``.
        interval: masking probabilities of training ``[lo, hi]``; ``None`` = all of them, which makes the loss a bound.
        normalise: of the loss, as for ``masked_diffusion``.
        tokens_per_step, order, threshold, temperature: of the sampler inside a block; a threshold replaces the number of steps.

    Knobs of :meth:`answer`: ``steps`` = number of denoising steps over the whole canvas (at least one a block).
    """

    def __init__(self, backbone: HybridForCausalLM, settings: Mapping[str, Any] | None = None):
        given = dict(settings or {})
        if unknown := sorted(set(given) - set(DEFAULTS)):
            raise ValueError(f"settings: {unknown} unknown to block_diffusion; valid: {', '.join(DEFAULTS)}")
        Reasoner.__init__(self, backbone, DEFAULTS | given)
        own = self.settings
        if own["canvas"] not in ("steps_and_answer", "answer"):
            raise ValueError(f"settings: canvas = {own['canvas']!r} given, expected 'steps_and_answer' or 'answer'")
        if own["normalise"] not in get_args(Normalise):
            raise ValueError(
                f"settings: normalise = {own['normalise']!r} given, expected one of {', '.join(map(repr, get_args(Normalise)))}"
            )
        for name in ("canvas_tokens", "block_length", "tokens_per_step"):
            value = own[name]
            if value is None and name == "canvas_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"settings: {name} = {value!r} given, expected a positive integer")
        self.interval = WHOLE if own["interval"] is None else check_interval(tuple(own["interval"]))
        self.model()  # forms that the stack does not define fail here
        self._canvas_sampler(None, 2, None)

    def model(self) -> BlockDiffusionModel:
        """The backbone as a block-diffusion model; it shares the weights."""
        return BlockDiffusionModel(
            self.backbone, self.settings["block_length"], SPECIAL.mask, inside=self.settings["inside"]
        )

    # -- training ----------------------------------------------------------------------------------------------------

    def loss(self, batch: TaskBatch, ctx: StepContext, carry: object = None) -> LossOutput:
        row, maskable = self._rows(batch.prompts, self._text(batch))
        out = block_diffusion_loss(
            self.model(),
            row.ids,
            maskable=maskable,
            attention_mask=row.mask,
            interval=self.interval,
            normalise=self.settings["normalise"],
            generator=ctx.generator,
            rank=ctx.rank,
            world_size=ctx.world_size,
        )
        parts = {"loss": float(out.loss.detach())}
        if out.is_bound:
            parts["nats_per_token"] = float(out.nats_per_token)
        lengths, heads = row.mask.sum(1).tolist(), out.masked.sum(1).tolist()
        b = self.settings["block_length"]
        # both streams: every token meets half of the sequence on average, and its own block
        flops = sum(self.backbone.flops(2 * n, (n + b) / 2, head_tokens=h) for n, h in zip(lengths, heads, strict=True))
        return LossOutput(out.loss, parts, flops)

    # -- answering -----------------------------------------------------------------------------------------------------

    def _canvas_sampler(self, steps: int | None, canvas: int, max_nfe: int | None) -> DiffusionGenerationConfig:
        own = self.settings
        shared: dict[str, Any] = {"order": own["order"], "temperature": own["temperature"], "max_nfe": max_nfe}
        if own["threshold"] is not None:
            return DiffusionGenerationConfig(quota="threshold", threshold=own["threshold"], **shared)
        count = -(-canvas // own["tokens_per_step"]) if steps is None else steps
        blocks = -(-canvas // own["block_length"]) + 1  # the prompt may end inside of one
        count = max(count, blocks)
        return DiffusionGenerationConfig(steps=None if count >= canvas else count, **shared)

    def _generate(
        self, row: Joined, maskable: Tensor, config: DiffusionGenerationConfig, seeds: Tensor, hook: Hook | None
    ) -> DiffusionOutput:
        # a block that the prompt shares is short, and may be given more steps than it has tokens
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "steps: .* passes are more than there are tokens")
            return block_generate(self.model(), row.ids, config, row.mask, maskable, row_seeds=seeds, hook=hook)

    @torch.no_grad()
    def answer(
        self, prompts: PromptBatch, limits: AnswerLimits = _NO_LIMITS, generator: torch.Generator | None = None
    ) -> AnswerOutput:
        """Fill the canvas block by block and read the answer off it; text ends at the first ``<eos>``.

        ``sequential_passes`` counts the reading of the prompt, denoising passes and commits; FLOPs are those of these passes, each over
        one block behind what it has read, with half of the canvas as the mean.
        """
        row, canvas, out = self._fill(prompts, limits, generator)
        text = until_stop(canvas)
        if self.settings["canvas"] == "steps_and_answer":
            ids = answer_after_marker(text, prompts.limits)
        else:
            ids = F.pad(text, (0, prompts.limits.answer_tokens), value=SPECIAL.pad)[:, : prompts.limits.answer_tokens]
        ended = canvas == SPECIAL.eos
        emitted = torch.where(ended.any(1), ended.to(torch.uint8).argmax(1) + 1, canvas.shape[1])
        b, size = self.settings["block_length"], canvas.shape[1]
        flops = []
        for length, passes in zip(row.mask.sum(1).tolist(), out.nfe.tolist(), strict=True):
            read = (length - size) // b * b
            first = self.backbone.flops(read, (read + b) / 2, head_tokens=0) if read else 0.0
            rest = passes - (read > 0)
            flops.append(first + rest * self.backbone.flops(b, read + size / 2 + b))
        return AnswerOutput(ids, emitted, out.nfe, torch.tensor(flops, dtype=torch.float64), {"text": canvas})

    @torch.no_grad()
    def trace(self, prompts: PromptBatch, sites: Sites = _EVERYWHERE) -> Trace:
        """Hidden states after each chosen block of the network in every denoising pass; valid are the tokens of the block of text that
        the pass was over."""
        layers = range(len(self.backbone.model.layers)) if sites.blocks is None else sites.blocks
        seen: list[tuple[int, Tensor, Tensor]] = []
        row, _, out = self._fill(prompts, _NO_LIMITS, None, lambda number, rows, z: seen.append((number, rows, z)))
        seen = seen if sites.steps is None else seen[: sites.steps]
        batch, length = row.ids.shape
        b, device = self.settings["block_length"], row.ids.device
        _, maskable = self._rows(prompts, constant(prompts.ids, *[SPECIAL.mask] * self.canvas_tokens(prompts.limits)))
        now = maskable.to(torch.uint8).argmax(1) // b - 1  # the first pass over a block has number 0
        shape = (len(seen), len(layers), batch, length, self.backbone.config.hidden_size)
        hidden = torch.zeros(shape, device=device, dtype=self.backbone.dtype)
        valid = torch.zeros(len(seen), batch, length, dtype=torch.bool, device=device)
        for step, (number, rows, held) in enumerate(seen):
            now[rows] += number == 0
            x, mask = out.sequences[rows], row.mask[rows]
            here = (torch.arange(length, device=device) // b == now[rows, None]) & mask
            column = now[rows, None] * b + torch.arange(held.shape[1], device=device)
            inside = column < length
            z = x.clone()
            at = inside.nonzero(as_tuple=True)
            z[at[0], column[at]] = held[at]
            context = SequenceContext.build(
                x.shape[0], x.shape[1], device, attention_mask=mask, visibility=self.model().form, streams=2
            )
            stream, recorded = self.backbone.embed(torch.cat([x, z])), {}
            for layer in range(len(self.backbone.model.layers)):
                stream, _ = self.backbone.run(stream, context, slice(layer, layer + 1))
                recorded[layer] = stream.chunk(2)[1]
            for index, layer in enumerate(layers):
                hidden[step, index, rows] = recorded[layer] * here[..., None]
            valid[step, rows] = here
        return Trace(hidden, valid, tuple(f"block {layer}" for layer in layers))
