"""Taps of the short causal convolution in front of a recurrence, and the calls that several mixers make of it.

:math:`y_t = \\mathrm{act}(\\sum_w \\mathrm{taps}_w \\odot x_{t-(W-1)+w})` for each channel alone; its state is the last W - 1 inputs.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import initialization

from latentcot.backbone.context import SequenceContext
from latentcot.backbone.state import LayerState
from latentcot.kernels import short_convolution, short_convolution_qkv

Initialization = Literal["normal", "uniform"]


class ShortConvolution(nn.Module):
    """Holder of the depthwise taps, shape ``[width, 1, W]`` as in published checkpoints; tap W - 1 is the current token.

    Made as the identity (the current token alone); a model draws them.
    """

    def __init__(self, width: int, window: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, 1, window))
        with torch.no_grad():
            self.weight[..., -1] = 1

    def init_weights(self, std: float, how: Initialization) -> None:
        """``normal``: deviation ``std``, as linear weights; ``uniform``: within :math:`\\pm W^{-1/2}`."""
        if how == "normal":
            initialization.normal_(self.weight, 0.0, std)
        else:
            limit = 1 / math.sqrt(self.weight.shape[-1])
            initialization.uniform_(self.weight, -limit, limit)

    def flops(self, tokens: int, directions: int = 1) -> float:
        width, _, window = self.weight.shape
        taps = window if directions == 1 else 2 * window - 1  # both directions are one centred kernel
        return 2.0 * tokens * width * taps


def convolve_qkv(
    inputs: tuple[Tensor, Tensor, Tensor],
    taps: Sequence[ShortConvolution],
    context: SequenceContext,
    state: LayerState | None,
    activation: Literal["silu"] | None = "silu",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k and v ``[B, S, width]`` through their convolutions, one launch on a GPU; padded outputs are zero.

    The last result is the new state ``[B, D_q + D_k + D_v, W - 1]``, or ``None`` unless ``context.keep_state``.
    """
    return short_convolution_qkv(
        *inputs,
        *(each.weight[:, 0] for each in taps),  # pyright: ignore[reportCallIssue]
        activation=activation,
        initial_state=None if state is None else state["conv"],
        output_state=context.keep_state,
        cu_seqlens=context.cu_seqlens,
        lengths=context.lengths,
        visibility=context.visibility,
    )


def convolve_all(
    inputs: Sequence[Tensor],
    taps: Sequence[ShortConvolution],
    context: SequenceContext,
    state: LayerState | None,
) -> tuple[list[Tensor], Tensor | None]:
    """The same for any number of inputs and without an activation: for gates, which have one of their own."""
    y, after = short_convolution(
        torch.cat(list(inputs), -1),
        torch.cat([each.weight[:, 0] for each in taps]),
        activation=None,
        initial_state=None if state is None else state["conv"],
        output_state=context.keep_state,
        cu_seqlens=context.cu_seqlens,
        lengths=context.lengths,
        visibility=context.visibility,
    )
    return list(y.split([x.shape[-1] for x in inputs], -1)), after
