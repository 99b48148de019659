r"""The short convolution in Triton, for one tensor or for q, k and v in one launch.

A program holds a block of channels and walks a piece of one sequence, token by token, with the inputs under the window
in registers: each input is loaded once. Backward walks the same way and carries a second window, of
:math:`dz_t = dy_t\,\mathrm{act}'(z_t)` with the pre-activation z formed anew; the gradient of an input is complete
:math:`W-1` tokens after it, :math:`dx_s = \sum_o \mathrm{tap}_o\, dz_{s-o}`. Gradients of the taps are summed per piece
and then over pieces, in a fixed order.

Offsets of taps run from -LEFT to RIGHT: LEFT = W-1 and RIGHT = 0 (causal) or W-1 (both sides, shared taps). Sequences
are given by offsets into the tokens; with ``lengths`` the rest of a row is padding, whose outputs and gradients are
zero whatever it holds. All sums are float32.
"""

# Inside a kernel tuples grow by addition only, and any number may stand for a constexpr.
# ruff: noqa: RUF005
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentcot.kernels.gated_scan.triton import row_offset, sigmoids
from latentcot.kernels.launch import Launch, flat, launch_shape, sequence_offsets

# ``stages`` counts the tokens whose loads are under way together; a warp holds 4 channels a lane
FORWARD = Launch(chunk=64, block=128, warps=1, stages=4)
BACKWARD = Launch(chunk=128, block=128, warps=1, stages=4)
ENOUGH_PROGRAMS = 2048  # shorter pieces until there are as many, since one program has few bytes under way
SHORTEST_PIECE = 16


@triton.jit
def _within(d, D, low, r, high):
    """The mask of channels d < D, of none of them unless low <= r < high."""
    return d < tl.where(r >= low, tl.where(r < high, D, 0), 0)


@triton.jit
def _input(x, state, n, r, start, end, d, D, c, C, x_token, LEFT: tl.constexpr, HAS_STATE: tl.constexpr):
    """Input r of sequence n: before ``start`` the given state or zero, from ``end`` on zero."""
    value = tl.load(x + row_offset(r, x_token) + d, mask=_within(d, D, start, r, end), other=0.0).to(tl.float32)
    if HAS_STATE:
        at = (row_offset(n, C) + c) * LEFT + (r - start + LEFT)
        value += tl.load(state + at, mask=_within(d, D, start - LEFT, r, start), other=0.0)
    return value


@triton.jit
def _taps(weight, d, D, c, LEFT: tl.constexpr):
    """The columns of ``weight [C,W]``: entry w belongs to the offsets w - LEFT and LEFT - w."""
    taps = ()
    for w in tl.static_range(LEFT + 1):
        taps = taps + (tl.load(weight + c * (LEFT + 1) + w, mask=d < D, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _weighted(taps, window, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """The pre-activation, from the inputs at offsets -LEFT … RIGHT."""
    z = taps[LEFT] * window[LEFT]
    for o in tl.static_range(LEFT):
        z += taps[o] * window[o]
    for o in tl.static_range(RIGHT):
        z += taps[LEFT - 1 - o] * window[LEFT + 1 + o]
    return z


@triton.jit
def _forward_piece(
    x, y, weight, state, n, start, end, first, last, d, D, c, C, x_token,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    taps = _taps(weight, d, D, c, LEFT)
    window = ()
    for i in tl.static_range(LEFT + RIGHT):
        window = window + (_input(x, state, n, first - LEFT + i, start, end, d, D, c, C, x_token, LEFT, HAS_STATE),)
    for i in range(0, (last - first).to(tl.int32), BATCH):
        fresh = ()  # the loads of a batch are under way together
        for u in tl.static_range(BATCH):
            t = first + i + u + RIGHT
            mask = _within(d, D, start, t, tl.minimum(end, last + RIGHT))
            fresh = fresh + (tl.load(x + row_offset(t, x_token) + d, mask=mask, other=0.0),)
        for u in tl.static_range(BATCH):
            t = first + i + u
            window = window + (fresh[u].to(tl.float32),)
            z = _weighted(taps, window, LEFT, RIGHT)
            if SILU:
                z *= sigmoids(z)[0]
            z = tl.where(t < end, z, 0.0).to(y.dtype.element_ty)
            tl.store(y + row_offset(t, D) + d, z, mask=_within(d, D, first, t, last))
            window = window[1:]


@triton.jit
def _keep_inputs(
    x, final, state, n, start, end, d, D, c, C, x_token, LEFT: tl.constexpr, HAS_STATE: tl.constexpr
):  # fmt: skip
    """The last LEFT inputs of [state; x]."""
    for j in tl.static_range(LEFT):
        value = _input(x, state, n, end - LEFT + j, start, end, d, D, c, C, x_token, LEFT, HAS_STATE)
        tl.store(final + (row_offset(n, C) + c) * LEFT + j, value, mask=d < D)


@triton.jit
def _backward_piece(
    x, dy, dx, weight, state, d_final, d_state, partial, n, start, end, first, last, d, D, c, C, x_token, dy_token,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FINAL: tl.constexpr,
    BATCH: tl.constexpr,
):  # fmt: skip
    """``partial`` is this piece's place for its sums over tokens, ``[W,C]``."""
    taps = _taps(weight, d, D, c, LEFT)
    window = ()
    slopes = ()  # dz of the tokens under the window of the input whose gradient is next complete
    sums = ()
    for i in tl.static_range(LEFT + RIGHT):
        r = first - RIGHT - LEFT + i
        window = window + (_input(x, state, n, r, start, end, d, D, c, C, x_token, LEFT, HAS_STATE),)
        slopes = slopes + (tl.zeros_like(taps[0]),)
    for _ in tl.static_range(LEFT + 1):
        sums = sums + (tl.zeros_like(taps[0]),)
    for i in range(0, (last - first).to(tl.int32) + LEFT + RIGHT, BATCH):
        fresh = ()  # the loads of a batch are under way together
        above = ()
        for u in tl.static_range(BATCH):
            t = first - RIGHT + i + u
            mask = _within(d, D, start, t + RIGHT, tl.minimum(end, last + LEFT + RIGHT))
            fresh = fresh + (tl.load(x + row_offset(t + RIGHT, x_token) + d, mask=mask, other=0.0),)
            mask = _within(d, D, start, t, tl.minimum(end, last + LEFT))
            above = above + (tl.load(dy + row_offset(t, dy_token) + d, mask=mask, other=0.0),)
        for u in tl.static_range(BATCH):
            t = first - RIGHT + i + u
            window = window + (fresh[u].to(tl.float32),)
            slope = above[u].to(tl.float32)
            if SILU:
                z = _weighted(taps, window, LEFT, RIGHT)
                on, off = sigmoids(z)
                slope *= on * (1.0 + z * off)
            slopes = slopes + (slope,)

            # tokens around the piece are counted by its neighbours
            own = tl.where(_within(d, D, first, t, last), slope, 0.0)
            counted = ()
            for w in tl.static_range(LEFT + 1):
                pair = window[w]
                if RIGHT > 0 and w < LEFT:
                    pair = window[w] + window[2 * LEFT - w]
                counted = counted + (sums[w] + own * pair,)
            sums = counted

            s = t - LEFT
            gradient = taps[LEFT] * slopes[RIGHT]
            for m in tl.static_range(1, LEFT + 1):
                gradient += taps[LEFT - m] * slopes[RIGHT + m]
                if RIGHT > 0:
                    gradient += taps[LEFT - m] * slopes[RIGHT - m]
            if HAS_FINAL:
                j = s - end + LEFT
                at = (row_offset(n, C) + c) * LEFT + j
                gradient += tl.load(d_final + at, mask=_within(d, D, 0, j, LEFT), other=0.0)
            kept = tl.where(s < end, gradient, 0.0).to(dx.dtype.element_ty)
            tl.store(dx + row_offset(s, D) + d, kept, mask=_within(d, D, first, s, last))
            if HAS_STATE:
                at = (row_offset(n, C) + c) * LEFT + (s - start + LEFT)
                ours = _within(d, D, start - LEFT, s, tl.where(first == start, start, start - LEFT))
                tl.store(d_state + at, gradient, mask=ours)
            window, slopes = window[1:], slopes[1:]
    for w in tl.static_range(LEFT + 1):
        tl.store(partial + w * C + c, sums[w], mask=d < D)


@triton.jit
def _place(piece_of, piece_from, offsets, lengths, N, M, HAS_LENGTHS: tl.constexpr, CHUNK: tl.constexpr, blocks):
    """(block, piece, sequence, its start and end without padding, first and last token of the piece).

    Pieces M … M+N-1 are the final states of the N sequences; a piece of sequence N is none.
    """
    block, piece = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n = (piece - M).to(tl.int64)
    if piece < M:
        n = tl.load(piece_of + piece)
    start = tl.load(offsets + tl.minimum(n, N - 1))
    stop = tl.load(offsets + tl.minimum(n, N - 1) + 1)
    first = start
    if piece < M:
        first = tl.load(piece_from + piece)
    end = stop
    if HAS_LENGTHS:
        length = tl.load(lengths + tl.minimum(n, N - 1)).to(tl.int64)
        end = tl.minimum(start + tl.maximum(length, 0), stop)  # on a GPU the lengths have not been looked at
    return block, piece, n, start, end, first, tl.minimum(first + CHUNK, stop)


@triton.jit
def _forward_kernel(
    x0, x1, x2, y0, y1, y2, weight, state, final, piece_of, piece_from, offsets, lengths,
    N, M, D0, D1, D2, token0, token1, token2,
    PARTS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    b0, b1, b2 = tl.cdiv(D0, BLOCK), tl.cdiv(D1, BLOCK), tl.cdiv(D2, BLOCK)
    block, piece, n, start, end, first, last = _place(
        piece_of, piece_from, offsets, lengths, N, M, HAS_LENGTHS, CHUNK, b0 + b1 + b2
    )
    C = D0 + D1 + D2
    d = tl.arange(0, BLOCK)
    for part in tl.static_range(PARTS):  # pointers are chosen by branches, which keeps what is known of their alignment
        if part == 0:
            x, y, D, token, before, from_block, to_block = x0, y0, D0, token0, 0, 0, b0
        elif part == 1:
            x, y, D, token, before, from_block, to_block = x1, y1, D1, token1, D0, b0, b0 + b1
        else:
            x, y, D, token, before, from_block, to_block = x2, y2, D2, token2, D0 + D1, b0 + b1, b0 + b1 + b2
        if (block >= from_block) & (block < to_block) & (n < N):
            e = (block - from_block) * BLOCK + d
            if piece < M:
                _forward_piece(
                    x, y, weight, state, n, start, end, first, last, e, D, before + e, C, token,
                    LEFT, RIGHT, SILU, HAS_STATE, BATCH,
                )  # fmt: skip
            else:
                _keep_inputs(x, final, state, n, start, end, e, D, before + e, C, token, LEFT, HAS_STATE)


@triton.jit
def _backward_kernel(
    x0, x1, x2, dy0, dy1, dy2, dx0, dx1, dx2, weight, state, d_final, d_state, partial,
    piece_of, piece_from, offsets, lengths,
    N, M, D0, D1, D2, token0, token1, token2, dy_token0, dy_token1, dy_token2,
    PARTS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_FINAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    b0, b1, b2 = tl.cdiv(D0, BLOCK), tl.cdiv(D1, BLOCK), tl.cdiv(D2, BLOCK)
    block, piece, n, start, end, first, last = _place(
        piece_of, piece_from, offsets, lengths, N, M, HAS_LENGTHS, CHUNK, b0 + b1 + b2
    )
    C = D0 + D1 + D2
    own = partial + row_offset(piece, C) * (LEFT + 1)
    d = tl.arange(0, BLOCK)
    for part in tl.static_range(PARTS):
        if part == 0:
            x, dy, dx, D, token, dy_token = x0, dy0, dx0, D0, token0, dy_token0
            before, from_block, to_block = 0, 0, b0
        elif part == 1:
            x, dy, dx, D, token, dy_token = x1, dy1, dx1, D1, token1, dy_token1
            before, from_block, to_block = D0, b0, b0 + b1
        else:
            x, dy, dx, D, token, dy_token = x2, dy2, dx2, D2, token2, dy_token2
            before, from_block, to_block = D0 + D1, b0 + b1, b0 + b1 + b2
        if (block >= from_block) & (block < to_block):
            e = (block - from_block) * BLOCK + d
            if n < N:
                _backward_piece(
                    x, dy, dx, weight, state, d_final, d_state, own, n, start, end, first, last, e, D, before + e, C,
                    token, dy_token, LEFT, RIGHT, SILU, HAS_STATE, HAS_FINAL, BATCH,
                )  # fmt: skip
            else:
                for w in tl.static_range(LEFT + 1):
                    tl.store(own + w * C + before + e, tl.zeros([BLOCK], tl.float32), mask=e < D)


def _cut(offsets: Tensor, tokens: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Sequences cut into pieces of ``chunk`` tokens: (sequence of each piece, its first token), without a look at the host.

    There are at most ``tokens // chunk + N`` of them; places that stay empty belong to sequence N.
    """
    N = offsets.numel() - 1
    counts = (offsets[1:] - offsets[:-1] + (chunk - 1)) // chunk
    ends = counts.cumsum(0)
    piece = torch.arange(tokens // chunk + N, device=offsets.device)
    sequence = torch.searchsorted(ends, piece, right=True)
    known = sequence.clamp(max=N - 1)
    return sequence, offsets[known] + (piece - (ends - counts)[known]) * chunk


@lru_cache(maxsize=64)
def _regular_pieces(B: int, S: int, chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        per_row = -(-S // chunk)
        piece = torch.arange(B * per_row, device=device)
        return piece // per_row, piece // per_row * S + piece % per_row * chunk


def config(kernel: str, tokens: int, channels: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The launch shape of ``"short_convolution_forward"`` or ``"short_convolution_backward"``."""
    default = FORWARD if kernel.endswith("forward") else BACKWARD
    while default.chunk > SHORTEST_PIECE and tokens * channels < ENOUGH_PROGRAMS * default.chunk * default.block:
        default = default._replace(chunk=default.chunk // 2)
    return launch_shape(kernel, channels, 1, dtype, device, default)


def _sequences(
    x: Tensor, cu_seqlens: Tensor | None, shape: Launch
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(offsets ``[N+1]``, sequence of each piece, first token of each piece)."""
    B, S = x.shape[:2]
    offsets = sequence_offsets(B, S, cu_seqlens, x.device)
    if cu_seqlens is None:
        return offsets, *_regular_pieces(B, S, shape.chunk, x.device)
    return offsets, *_cut(offsets, S, shape.chunk)


def _three(tensors: list[Tensor]) -> list[Tensor | None]:
    return [*tensors, *[None] * (3 - len(tensors))]


def _widths(tensors: list[Tensor], axis: int) -> list[int]:
    """Sizes (axis 2) or token strides (axis 1) of one or three tensors ``[B,S,D]``; zero for the missing ones."""
    found = [t.shape[2] if axis == 2 else t.stride(1) for t in tensors]
    return [*found, *[0] * (3 - len(found))]


def forward(
    xs: list[Tensor], weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None,
    *, silu: bool, both_sides: bool, output_state: bool,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """One or three inputs ``[B,S,D_i]``, taps ``[C,W]`` with C the sum of the widths -> (outputs, last inputs).

    States are ``[N,C,W-1]`` float32; without ``output_state`` the second result is empty.
    """
    xs = [flat(x) for x in xs]
    B, S, _ = xs[0].shape
    C, W = weight.shape
    shape = config("short_convolution_forward", B * S, C, xs[0].dtype, xs[0].device)
    offsets, piece_of, piece_from = _sequences(xs[0], cu_seqlens, shape)
    N, M = offsets.numel() - 1, piece_of.numel()
    ys = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    final = torch.empty(*((N, C, W - 1) if output_state else (0,)), dtype=torch.float32, device=weight.device)
    blocks = sum(triton.cdiv(x.shape[2], shape.block) for x in xs)
    constants: dict[str, Any] = {
        "PARTS": len(xs), "LEFT": W - 1, "RIGHT": W - 1 if both_sides else 0, "SILU": silu,
        "HAS_STATE": initial_state is not None, "HAS_LENGTHS": lengths is not None,
        "CHUNK": shape.chunk, "BLOCK": shape.block, "BATCH": shape.stages, "num_warps": shape.warps,
    }  # fmt: skip
    _forward_kernel[((M + (N if output_state else 0)) * blocks,)](
        *_three(xs), *_three(ys), weight.contiguous(), None if initial_state is None else initial_state.contiguous(),
        final, piece_of, piece_from, offsets, lengths, N, M, *_widths(xs, 2), *_widths(xs, 1), **constants,
    )  # fmt: skip
    return ys, final


def backward(
    xs: list[Tensor], dys: list[Tensor], d_final: Tensor, weight: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, lengths: Tensor | None, *, silu: bool, both_sides: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """(gradients of the inputs, of the taps ``[C,W]`` in float32, of the initial state or an empty tensor).

    ``d_final`` is the gradient of :func:`forward`'s second result, empty when that was.
    """
    xs, dys = [flat(x) for x in xs], [flat(dy) for dy in dys]
    B, S, _ = xs[0].shape
    C, W = weight.shape
    shape = config("short_convolution_backward", B * S, C, xs[0].dtype, xs[0].device)
    offsets, piece_of, piece_from = _sequences(xs[0], cu_seqlens, shape)
    N, M = offsets.numel() - 1, piece_of.numel()
    dxs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    has_state = initial_state is not None
    d_state = torch.empty(*((N, C, W - 1) if has_state else (0,)), dtype=torch.float32, device=weight.device)
    partial = torch.empty(M, W, C, dtype=torch.float32, device=weight.device)
    blocks = sum(triton.cdiv(x.shape[2], shape.block) for x in xs)
    constants: dict[str, Any] = {
        "PARTS": len(xs), "LEFT": W - 1, "RIGHT": W - 1 if both_sides else 0, "SILU": silu, "HAS_STATE": has_state,
        "HAS_FINAL": d_final.numel() > 0, "HAS_LENGTHS": lengths is not None,
        "CHUNK": shape.chunk, "BLOCK": shape.block, "BATCH": shape.stages, "num_warps": shape.warps,
    }  # fmt: skip
    _backward_kernel[(M * blocks,)](
        *_three(xs), *_three(dys), *_three(dxs), weight.contiguous(),
        None if initial_state is None else initial_state.contiguous(), d_final.contiguous(), d_state, partial,
        piece_of, piece_from, offsets, lengths, N, M, *_widths(xs, 2), *_widths(xs, 1), *_widths(dys, 1), **constants,
    )  # fmt: skip
    return dxs, partial.sum(0).t().contiguous(), d_state
