r"""The arms of the diffusion study: three ways of generating on two backbones, with equal numbers of parameters.

=============== ========================================================= ==================================================
arm             training                                                  passes (NFE) of an answer
=============== ========================================================= ==================================================
autoregressive  cross-entropy of the next token, causal                   one a token that is not given
masked          :func:`~latentcot.diffusion_reasoning.diffusion_loss`,    what the sampler takes
                every position sees every other
block           :func:`~latentcot.diffusion_reasoning.block_diffusion.    what the sampler takes, one commit a block, and the
                block_diffusion_loss`, two streams                        reading of the prompt
=============== ========================================================= ==================================================

All of them have a learned embedding of positions, added in front of the first block: rotary angles alone leave a network that sees
both sides without a way to tell rows from columns.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.compare.diffusion_problems import Canvas
from latentcot.compare.hybrid_ratio import mixer_options
from latentcot.diffusion_reasoning import (
    DiffusionGenerationConfig,
    NoiseSchedule,
    PassView,
    Quota,
    diffusion_generate,
    diffusion_loss,
    low_confidence,
)
from latentcot.diffusion_reasoning.block_diffusion import BlockDiffusionModel, block_diffusion_loss, block_generate
from latentcot.reasoner import SPECIAL, LossOutput, Phase, Reasoner, StepContext
from latentcot.training import count_parameters
from latentcot.training.budget import FlopCounter

Way = Literal["autoregressive", "masked", "block"]
Stack = Literal["softmax", "hybrid"]
WAYS, STACKS = get_args(Way), get_args(Stack)
EARLIEST = 0.05
"""Least share of masked tokens that is trained on. Below it one token has a weight of 20 and more, and there is next to nothing to
learn."""
ARMS = tuple(f"{way}-{stack}" for way in WAYS for stack in STACKS)


# -- samplers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerPass(Quota):
    """The ``count`` most confident tokens a pass, however many there are."""

    count: int
    takes_steps = False

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"count: expected an integer of at least 1, got {self.count!r}")

    def reveal(self, view: PassView) -> Tensor:
        return view.candidates & (view.ranks < self.count)


SAMPLERS: dict[str, DiffusionGenerationConfig] = {
    "confidence": low_confidence(),
    "2 a pass": DiffusionGenerationConfig(quota=PerPass(2)),
    "threshold 0.9": low_confidence(threshold=0.9),
    "random order": low_confidence(order="random"),
    "left to right": low_confidence(order="left_to_right"),
    "all at once": low_confidence(threshold=0.0),
}
"""Name -> sampler, all greedy. In block diffusion they work inside a block, so ``all at once`` takes one pass a block."""


def sampler_names(way: Way) -> tuple[str, ...]:
    """Samplers that mean something to a way of generating."""
    return ("left to right",) if way == "autoregressive" else tuple(SAMPLERS)


# -- networks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """``layers``, ``width``, ``heads``, ``mlp_width`` of the softmax stack; every ``period``-th layer of the hybrid one is full attention,
    the others ``mixer``, and its MLP is as wide as makes the parameters equal. ``average``: decay of the weights that answer."""

    layers: int = 4
    width: int = 64
    heads: int = 4
    mlp_width: int = 192
    mixer: str = "gated_deltanet"
    period: int = 2
    average: float | None = None


def backbone_config(sizes: Sizes, stack: Stack, vocab_size: int) -> HybridConfig:
    """The configuration of a stack; the hybrid one's MLP width is the multiple of 8 that comes closest to the parameters of the other."""

    def config(width: int) -> HybridConfig:
        mixer = "attention" if stack == "softmax" else sizes.mixer
        return HybridConfig(
            vocab_size=vocab_size,
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            mixer=mixer,
            period=None if stack == "softmax" else sizes.period,
            intermediate_size=width,
            convolution_init="uniform",
            # signals keep their size from layer to layer, and tokens and places start as large as what layers add to them
            initializer_range=sizes.width**-0.5,
            embedding_scale=sizes.width**0.5,
            pad_token_id=SPECIAL.pad,
            bos_token_id=SPECIAL.bos,
            eos_token_id=SPECIAL.eos,
            **mixer_options(mixer, sizes.width, sizes.heads),
        )

    if stack == "softmax":
        return config(sizes.mlp_width)
    with torch.device("meta"):
        wanted = count_parameters(HybridForCausalLM(backbone_config(sizes, "softmax", vocab_size)))
        narrow, wide = (count_parameters(HybridForCausalLM(config(width))) for width in (8, 16))
    width = 8 * round(1 + (wanted - narrow) / (wide - narrow))
    if width < 8:
        raise ValueError(
            f"mlp_width: a hybrid of {sizes.layers} layers of width {sizes.width} has more parameters without an MLP than the softmax "
            f"stack with one of {sizes.mlp_width}; take a wider one"
        )
    return config(width)


class Arm(Reasoner):
    """One way of generating on one backbone; ``settings``: ``positions``, how many there are, and ``average``, see :class:`Sizes`."""

    way: Way
    whole = False
    """Whether a grid is filled where its clues stand, see :mod:`~latentcot.compare.diffusion_problems`."""

    def __init__(self, backbone: HybridForCausalLM, settings: dict[str, Any]):
        super().__init__(backbone, settings)
        self.places = nn.Embedding(settings["positions"], backbone.config.hidden_size)
        nn.init.normal_(self.places.weight, std=backbone.config.initializer_range)
        backbone.model.layers[0].register_forward_pre_hook(self._add_places)

    def _add_places(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, context, *others = arguments
        places = self.places(context.positions) * self.backbone.config.embedding_scale
        return (hidden + places.to(hidden.dtype), context, *others)

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("train", form="denoise", ema=self.settings.get("average")),)

    def fill(self, canvas: Canvas, sampler: DiffusionGenerationConfig) -> tuple[Tensor, Tensor]:
        """``(filled ids [B, L], passes [B])``; what the canvas holds at maskable positions is not looked at."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no fill; an arm returns the filled canvas and the passes of each row from it"
        )


class AutoregressiveArm(Arm):
    method = "canvas_autoregressive"
    way = "autoregressive"

    def loss(self, batch: Canvas, ctx: StepContext, carry: object = None) -> LossOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
        # of a text only the first <eos> is written
        first = ((batch.ids == SPECIAL.eos) & batch.maskable).long().cumsum(1) <= 1
        wanted = (batch.maskable & first)[:, 1:]
        hidden = self.backbone.model(batch.ids, batch.real)[0][:, :-1][wanted]
        logits = self.backbone.lm_head(hidden)
        loss = F.cross_entropy(logits.float(), batch.ids[:, 1:][wanted])
        flops = FlopCounter(self.backbone)(_lengths(batch), head=wanted.sum(1).double())
        return LossOutput(loss, flops=float(flops.sum()))  # type: ignore[union-attr]

    @torch.no_grad()
    def fill(self, canvas: Canvas, sampler: DiffusionGenerationConfig) -> tuple[Tensor, Tensor]:
        """Greedy, from left to right. A token that is given is read in the same pass as what follows it, so NFE counts the others, up to
        ``<eos>``; here a pass of its own reads it all the same, which changes no result."""
        ids, maskable = canvas.ids.masked_fill(canvas.maskable, SPECIAL.pad), canvas.maskable
        start = int(maskable.any(0).to(torch.uint8).argmax())
        nfe = torch.zeros(len(canvas), dtype=torch.long, device=ids.device)
        ended = torch.zeros(len(canvas), dtype=torch.bool, device=ids.device)
        real = None if canvas.real is None else canvas.real[:, :start]
        output = self.backbone(input_ids=ids[:, :start], attention_mask=real, use_cache=True, logits_to_keep=1)
        for column in range(start, ids.shape[1]):
            logits = output.logits[:, -1].float()
            logits[:, SPECIAL.mask] = -torch.inf
            token = torch.where(ended, SPECIAL.eos, logits.argmax(-1))
            chosen = maskable[:, column]
            nfe += chosen & ~ended
            ids[:, column] = torch.where(chosen, token, ids[:, column])
            ended = ended | (chosen & (token == SPECIAL.eos))
            if column + 1 < ids.shape[1]:
                output = self.backbone(
                    input_ids=ids[:, column : column + 1], state=output.state, use_cache=True, logits_to_keep=1
                )
        return ids, nfe


class MaskedArm(Arm):
    method = "canvas_masked"
    way = "masked"
    whole = True

    def loss(self, batch: Canvas, ctx: StepContext, carry: object = None) -> LossOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = diffusion_loss(
            self.backbone,
            batch.ids,
            schedule=NoiseSchedule(),
            mask_id=SPECIAL.mask,
            maskable=batch.maskable,
            attention_mask=batch.real,
            normalise="tokens",
            time_eps=EARLIEST,
            generator=ctx.generator,
            rank=ctx.rank,
            world_size=ctx.world_size,
        )
        flops = FlopCounter(self.backbone, directions=2)(_lengths(batch), head=out.masked.sum(1).double())
        return LossOutput(out.loss, flops=float(flops.sum()))  # type: ignore[union-attr]

    def fill(self, canvas: Canvas, sampler: DiffusionGenerationConfig) -> tuple[Tensor, Tensor]:
        out = diffusion_generate(self.backbone, canvas.ids, sampler, canvas.real, canvas.maskable)
        return out.sequences, out.nfe


class BlockArm(Arm):
    """``settings`` has ``block`` too: tokens of a block."""

    method = "canvas_block"
    way = "block"

    def model(self) -> BlockDiffusionModel:
        return BlockDiffusionModel(self.backbone, self.settings["block"])

    def loss(self, batch: Canvas, ctx: StepContext, carry: object = None) -> LossOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = block_diffusion_loss(
            self.model(),
            batch.ids,
            maskable=batch.maskable,
            attention_mask=batch.real,
            normalise="tokens",
            interval=(EARLIEST, 1.0),
            generator=ctx.generator,
            rank=ctx.rank,
            world_size=ctx.world_size,
        )
        # two streams, each with the tokens of its own block and the clean past
        lengths = _lengths(batch)
        flops = 2 * FlopCounter(self.backbone)(lengths, head=out.masked.sum(1).double() / 2)  # type: ignore[operator]
        return LossOutput(out.loss, flops=float(flops.sum()))  # type: ignore[union-attr]

    def fill(self, canvas: Canvas, sampler: DiffusionGenerationConfig) -> tuple[Tensor, Tensor]:
        out = block_generate(self.model().eval(), canvas.ids, sampler, canvas.real, canvas.maskable)
        return out.sequences, out.nfe


_ARMS: dict[Way, type[Arm]] = {"autoregressive": AutoregressiveArm, "masked": MaskedArm, "block": BlockArm}


def split_arm(arm: str) -> tuple[Way, Stack]:
    """``"masked-hybrid"`` -> ``("masked", "hybrid")``. ``ValueError`` for a name that is none of :data:`ARMS`."""
    if arm not in ARMS:
        raise ValueError(f"arm: {arm!r} given, expected one of {', '.join(ARMS)}")
    way, stack = arm.split("-")
    return way, stack  # type: ignore[return-value]


def make_arm(arm: str, sizes: Sizes, vocab_size: int, length: int, block: int, seed: int = 0) -> Arm:
    """A freshly initialised arm for canvases of at most ``length`` tokens."""
    way, stack = split_arm(arm)
    torch.manual_seed(seed)
    backbone = HybridForCausalLM(backbone_config(sizes, stack, vocab_size))
    return _ARMS[way](backbone, {"positions": length, "average": sizes.average, "block": block})


def _lengths(batch: Canvas) -> Tensor:
    if batch.real is None:
        return torch.full((len(batch),), float(batch.ids.shape[1]), dtype=torch.float64, device=batch.ids.device)
    return batch.real.sum(1).double()
