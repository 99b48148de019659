r"""One token of a Gated DeltaNet layer between its two projections, in one launch; and the gate of an MLP in another.

What the input projection gave, ``[B, N]`` with q, k, v, a and b somewhere in a row, becomes the read ``o [B, H_v, V]``:

.. math::
    x'_t = \mathrm{silu}\Big(\sum_{i<W} w_i \odot x_{t-i}\Big) \text{ for } q, k, v, \quad \hat q, \hat k \text{ of unit length}, \\
    \bar S = e^{g} S, \quad u = \beta (v' - \hat k \bar S), \quad S \leftarrow \bar S + \hat k^\top u, \quad o = s\, \hat q S

with :math:`\beta = \lambda\,\sigma(b)`, :math:`g = -e^{A} \mathrm{softplus}(a + dt)`. A program holds a tile ``[K, BLOCK]`` of one
state and forms the convolved q and k of its head anew: W loads a channel, far less than the tile.

The convolution's inputs live in a ring of W rows, row t mod W for the token at position t. A token reads W - 1 rows and
writes the one that none of its programs reads (its own input is in the projection), so nobody has to wait and nothing is moved.

State and ring are overwritten; their addresses do not change, positions are read on the device: a step can be captured in a CUDA
graph. No derivatives. Arithmetic is float32.
"""

# Inside a kernel any number may stand for a constexpr, which a type checker cannot know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentcot.kernels.delta_rule.triton_solve import softplus
from latentcot.kernels.gated_scan.triton import decay_of, sigmoids
from latentcot.kernels.launch import power_of_two
from latentcot.kernels.step_triton import config

NORM_EPS = tl.constexpr(1e-6)  # of the lengths of q and k, as everywhere in the delta family
SWIGLU_BLOCK = 512


class Columns(NamedTuple):
    """Where a row of the projection ``[B, N]`` holds what: the first column of each part."""

    q: int
    k: int
    v: int
    a: int
    b: int


@triton.jit
def _convolved(now, ring, taps, channel, inside, t, D, W: tl.constexpr):
    """silu of the convolution at the channels: ``now`` is the current input, ring ``[W, D]``, taps ``[W, D]`` newest first."""
    y = now * tl.load(taps + channel, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(1, W):
        past = tl.load(ring + (t + W - i) % W * D + channel, mask=inside, other=0.0).to(tl.float32)
        y += past * tl.load(taps + i * D + channel, mask=inside, other=0.0).to(tl.float32)
    return y * sigmoids(y)[0]


@triton.jit
def _decode_kernel(
    projected, ring, taps, A_log, dt_bias, state, position, o,
    scale, largest, row_stride, H, GROUP, K, V, D, at_q, at_k, at_v, at_a, at_b,
    W: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """H value heads, GROUP of them to a key head; D channels are convolved: queries, keys, values, in this order."""
    blocks = tl.cdiv(V, BLOCK)
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    b, h = (pair // H).to(tl.int64), pair % H
    key_head, key_width = h // GROUP, H // GROUP * K
    row, column = tl.arange(0, WIDTH), block * BLOCK + tl.arange(0, BLOCK)
    in_row, in_column = row < K, column < V
    inside = in_row[:, None] & in_column[None, :]
    at = pair.to(tl.int64) * K * V + row[:, None] * V + column[None, :]
    tile = tl.load(state + at, mask=inside, other=0.0)  # first: everything else is found while it is under way

    t = tl.load(position + b)
    projected += b * row_stride
    ring += b * W * D
    own = ring + t % W * D
    q_channel, k_channel, v_channel = key_head * K + row, key_width + key_head * K + row, 2 * key_width + h * V + column
    q_now = tl.load(projected + at_q + key_head * K + row, mask=in_row, other=0.0)
    k_now = tl.load(projected + at_k + key_head * K + row, mask=in_row, other=0.0)
    v_now = tl.load(projected + at_v + h * V + column, mask=in_column, other=0.0)
    q = _convolved(q_now.to(tl.float32), ring, taps, q_channel, in_row, t, D, W)
    k = _convolved(k_now.to(tl.float32), ring, taps, k_channel, in_row, t, D, W)
    v = _convolved(v_now.to(tl.float32), ring, taps, v_channel, in_column, t, D, W)
    # one program a key head writes its queries and keys, every program its own values
    if (block == 0) & (h % GROUP == 0):
        tl.store(own + q_channel, q_now.to(ring.dtype.element_ty), mask=in_row)
        tl.store(own + k_channel, k_now.to(ring.dtype.element_ty), mask=in_row)
    tl.store(own + v_channel, v_now.to(ring.dtype.element_ty), mask=in_column)

    q *= tl.rsqrt(tl.sum(q * q, 0) + NORM_EPS)
    k *= tl.rsqrt(tl.sum(k * k, 0) + NORM_EPS)
    beta = largest * sigmoids(tl.load(projected + at_b + h).to(tl.float32))[0]
    rate = tl.exp(tl.load(A_log + h).to(tl.float32))
    bias = tl.load(dt_bias + h).to(tl.float32)
    tile *= decay_of(-rate * softplus(tl.load(projected + at_a + h).to(tl.float32) + bias))
    u = beta * (v - tl.sum(k[:, None] * tile, 0))
    read = tl.sum(q[:, None] * tile, 0) + tl.sum(q * k, 0) * u
    tl.store(o + pair.to(tl.int64) * V + column, (scale * read).to(o.dtype.element_ty), mask=in_column)
    tl.store(state + at, tile + k[:, None] * u[None, :], mask=inside)


def gated_delta_decode(
    projected: Tensor, columns: Columns, ring: Tensor, taps: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor,
    position: Tensor, *, heads: int, scale: float, largest: float = 1.0,
) -> Tensor:  # fmt: skip
    """See the top of this module.

    Args:
        projected: ``[B, N]``, rows contiguous.
        columns: where q ``[heads·K]``, k ``[heads·K]``, v ``[H_v·V]``, a and b ``[H_v]`` begin in a row.
        ring: ``[B, W, D]``, D = 2·heads·K + H_v·V; overwritten at row ``position mod W``.
        taps: ``[W, D]``, newest first.
        A_log, dt_bias: ``[H_v]``.
        state: ``[B, H_v, K, V]`` float32, contiguous; overwritten.
        position: ``[B]`` int64, tokens before this one in each row.
        heads: query and key heads.
        scale: s.
        largest: what beta reaches, 1 or 2.

    Returns:
        o ``[B, H_v, V]`` of the dtype of ``projected``.

    Raises:
        ValueError: layouts that the kernel does not read: named, with what was expected.
    """
    B, H, K, V = state.shape
    W, D = taps.shape
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(
            f"gated_delta_decode: state needs to be contiguous float32, given {state.dtype}, strides {state.stride()}"
        )
    if (
        taps.shape[1] != 2 * heads * K + H * V
        or ring.shape != (B, W, D)
        or not (ring.is_contiguous() and taps.is_contiguous())
    ):
        raise ValueError(
            f"gated_delta_decode: ring {list(ring.shape)} and taps {list(taps.shape)} given, expected contiguous "
            f"[{B}, W, {2 * heads * K + H * V}] and [W, {2 * heads * K + H * V}]"
        )
    if projected.shape[0] != B or projected.stride(-1) != 1 or position.shape != (B,):
        raise ValueError(
            f"gated_delta_decode: projected {list(projected.shape)} and position {list(position.shape)} given, expected "
            f"[{B}, N] with contiguous rows and [{B}]"
        )
    o = torch.empty(B, H, V, dtype=projected.dtype, device=projected.device)
    block, warps = config(B * H, K, V)
    _decode_kernel[(B * H * triton.cdiv(V, block),)](
        projected, ring, taps, A_log, dt_bias, state, position, o,
        scale, largest, projected.stride(0), H, H // heads, K, V, D, *columns,
        W=W, WIDTH=power_of_two(K, 1), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return o


@triton.jit
def _swiglu_kernel(x, y, width, x_stride, BLOCK: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    gate = tl.load(x + b * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + b * x_stride + width + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + b * width + d, (gate * sigmoids(gate)[0] * up).to(y.dtype.element_ty), mask=inside)


def swiglu(x: Tensor) -> Tensor:
    """``silu(x[:, :I]) * x[:, I:]``: ``[B, 2I]`` with contiguous rows to ``[B, I]``."""
    if x.dim() != 2 or x.shape[1] % 2 or x.stride(1) != 1:
        raise ValueError(
            f"swiglu: shape {list(x.shape)}, strides {x.stride()} given, expected [B, 2I] with contiguous rows"
        )
    width = x.shape[1] // 2
    y = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    _swiglu_kernel[(x.shape[0] * triton.cdiv(width, SWIGLU_BLOCK),)](
        x, y, width, x.stride(0), BLOCK=SWIGLU_BLOCK, num_warps=4
    )
    return y
