r"""Softmax attention of clean and noisy copies of a sequence in one call, which block diffusion trains on: :func:`attend_in_streams`.

With blocks of b tokens, clean token i sees the clean tokens j with :math:`\lfloor j/b \rfloor \le \lfloor i/b \rfloor`, noisy token i the
clean ones of earlier blocks, :math:`\lfloor j/b \rfloor < \lfloor i/b \rfloor`, and the noisy ones of its own, in one softmax.

Three quarters of these pairs are never seen. A dense mask computes them all the same and is itself S x 2S numbers; PyTorch's
FlexAttention skips them in tiles, so it is taken where it works and sequences are long, see :func:`takes_flex` (two calls of attention,
forward and backward, 4 rows of 4096 tokens, 16 heads of 64, blocks of 32, bf16, H200: 4.3 ms instead of 12.1).
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from latentcot.backbone.context import SequenceContext
from latentcot.kernels import BlockCausal

LONG = 1024
"""Tokens from which tiles pay for compiling: 20 s at the first call of a process."""
MOST = 6
"""Kinds of sequences (length, block, dtype) that are compiled for. Beyond its limit of 8 torch.compile would run FlexAttention as it is
written, with all 2S x 2S scores."""
_compiled_for: set[tuple[int, int, torch.dtype]] = set()


def attend_in_streams(q: Tensor, k: Tensor, v: Tensor, context: SequenceContext, window: int | None = None) -> Tensor:
    """``q [2B, H, S, K]``, ``k, v [2B, G, S, K]``, clean rows first, to ``[2B, H, S, K]``.

    Args:
        context: of two streams.
        window: pairs that lie this many real tokens apart or more do not see each other.
    """
    grouped = q.shape[1] != k.shape[1]
    if takes_flex(q, context, window):
        assert isinstance(context.visibility, BlockCausal)
        mask = stream_block_mask(q.shape[2], context.visibility.length, str(q.device))
        q, k, v = (torch.cat(t.chunk(2), 2) for t in (q, k, v))
        attend = flex_attention if torch.compiler.is_compiling() else _compiled()
        o = attend(q, k, v, block_mask=mask, enable_gqa=grouped)
        return torch.cat(o.chunk(2, 2))
    (q, noisy_q), (k, noisy_k), (v, noisy_v) = (t.chunk(2) for t in (q, k, v))
    of_clean, of_noisy = context.stream_masks
    if window is not None:
        near = near_in_streams(context, window)
        of_clean, of_noisy = of_clean & near, of_noisy & torch.cat([near, near], -1)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=of_clean, enable_gqa=grouped)
    keys, values = torch.cat([k, noisy_k], 2), torch.cat([v, noisy_v], 2)
    noisy_o = F.scaled_dot_product_attention(noisy_q, keys, values, attn_mask=of_noisy, enable_gqa=grouped)
    return torch.cat([o, noisy_o])


def takes_flex(q: Tensor, context: SequenceContext, window: int | None) -> bool:
    """On a GPU, from :data:`LONG` tokens on, for rows without padding and without a window, in 32 bits or fewer, for heads whose width is
    a power of two from 16 to 128, and for the first :data:`MOST` kinds of sequences. Everything else takes dense masks."""
    width = q.shape[-1]
    fits = (
        q.device.type == "cuda"
        and q.shape[2] >= LONG
        and context.mask is None
        and window is None
        and q.dtype != torch.float64
        and 16 <= width <= 128
        and width & (width - 1) == 0
    )
    if not fits or not isinstance(context.visibility, BlockCausal):
        return False
    kind = (q.shape[2], context.visibility.length, q.dtype)
    if len(_compiled_for) < MOST:
        _compiled_for.add(kind)
    return kind in _compiled_for


@lru_cache(maxsize=16)
def stream_block_mask(length: int, block: int, device: str) -> BlockMask:
    """Which tiles of 2S queries and 2S keys, clean ones first, hold a pair that is seen."""

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_noisy, noisy = query >= length, key >= length
        mine, its = query % length // block, key % length // block
        return torch.where(noisy, of_noisy & (its == mine), torch.where(of_noisy, its < mine, its <= mine))

    return create_block_mask(seen, None, None, 2 * length, 2 * length, device=device)


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def near_in_streams(context: SequenceContext, window: int) -> Tensor:
    """Pairs of one copy of a sequence that lie less than ``window`` real tokens apart, ``[B, 1, S, S]``; the window looks both ways."""
    positions = context.positions.chunk(2)[0]
    return ((positions[:, :, None] - positions[:, None, :]).abs() < window)[:, None]
