"""Taps of the short causal convolution in front of a recurrence, and the calls that several mixers make of it.

:math:`y_t = \\mathrm{act}(\\sum_w \\mathrm{taps}_w \\odot x_{t-(W-1)+w})` for each channel alone; its state is the last W - 1 inputs.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from latentcot.backbone.context import SequenceContext
from latentcot.backbone.state import LayerState
from latentcot.kernels import BlockCausal, Causal, short_convolution, short_convolution_qkv
from latentcot.kernels.visibility import Visibility

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
    if context.streams == 2 or context.partly_ahead:
        (q, k, v), after = _convolve(inputs, taps, activation, context, state)
        return q, k, v, after
    return short_convolution_qkv(
        *inputs,
        *(each.weight[:, 0] for each in taps),  # pyright: ignore[reportCallIssue]
        activation=activation,
        initial_state=None if state is None else state["conv"],
        output_state=context.keep_state,
        cu_seqlens=context.cu_seqlens,
        lengths=context.lengths,
        visibility=_sides(context),
    )


def convolve_all(
    inputs: Sequence[Tensor],
    taps: Sequence[ShortConvolution],
    context: SequenceContext,
    state: LayerState | None,
) -> tuple[list[Tensor], Tensor | None]:
    """The same for any number of inputs and without an activation: for gates, which have one of their own."""
    return _convolve(inputs, taps, None, context, state)


def _sides(context: SequenceContext) -> Visibility:
    """A block is convolved causally: its left neighbours are in front of it, and nothing behind it is known yet."""
    return Causal() if isinstance(context.visibility, BlockCausal) else context.visibility


def _convolve(
    inputs: Sequence[Tensor],
    taps: Sequence[ShortConvolution],
    activation: Literal["silu"] | None,
    context: SequenceContext,
    state: LayerState | None,
) -> tuple[list[Tensor], Tensor | None]:
    x, weight = torch.cat(list(inputs), -1), torch.cat([each.weight[:, 0] for each in taps])
    after = None
    if context.streams == 2:
        y = _both_streams(x, weight, activation, context)
    elif context.partly_ahead:  # the two sides meet in front of the activation
        one, both = (
            short_convolution(
                x, weight, activation=None, cu_seqlens=context.cu_seqlens, lengths=context.lengths, visibility=side
            )[0]
            for side in (Causal(), _sides(context))
        )
        y = torch.lerp(one, both, context.rho)
        y = F.silu(y) if activation == "silu" else y
    else:
        y, after = short_convolution(
            x,
            weight,
            activation=activation,
            initial_state=None if state is None else state["conv"],
            output_state=context.keep_state,
            cu_seqlens=context.cu_seqlens,
            lengths=context.lengths,
            visibility=_sides(context),
        )
    return list(y.split([x.shape[-1] for x in inputs], -1)), after


def _both_streams(x: Tensor, weight: Tensor, activation: Literal["silu"] | None, context: SequenceContext) -> Tensor:
    """Clean rows as they are; every noisy block behind the last W - 1 *clean* inputs in front of it. ``[2B, S, D]``"""
    assert isinstance(context.visibility, BlockCausal)
    clean, noisy = x.chunk(2)
    lengths = None if context.lengths is None else context.lengths.chunk(2)[0]
    batch, length, width = clean.shape
    y_clean, _ = short_convolution(clean, weight, activation=activation, lengths=lengths)
    L, W = min(context.visibility.length, length), weight.shape[1]
    n = -(-length // L)
    blocks = F.pad(noisy, (0, 0, 0, n * L - length)).reshape(batch * n, L, width)
    past = None
    if W > 1:
        past = F.pad(clean, (0, 0, W - 1, 0)).unfold(1, W - 1, L)[:, :n].reshape(batch * n, width, W - 1)
    if lengths is not None:
        starts = torch.arange(0, n * L, L, device=lengths.device)
        lengths = (lengths[:, None] - starts).clamp(0, L).flatten()
    y_noisy, _ = short_convolution(blocks, weight, activation=activation, initial_state=past, lengths=lengths)
    return torch.cat([y_clean, y_noisy.reshape(batch, n * L, width)[:, :length]])
