r"""Decay attention in Triton with no decay, one per head, or one per head and token.

One kernel computes, in either direction of time and for any three tensors,

.. math:: y_i = \sum_{j} (a_i \cdot b_j) D_{ij}\, c_j, \qquad D_{ij} = \exp\Big(\sum_{\min < t \le \max} g_t\Big),

over :math:`j \le i` (left to right) or :math:`j \ge i` (right to left), min and max being those of i and j. The
operator and all its gradients have this form, because with scalar decays the roles of q, k and v are alike:

===========  =========  ===  ===  ====  ==================
result       direction  a    b    c     state
===========  =========  ===  ===  ====  ==================
o            forward    q    k    v     S ``[K,V]``
dq           forward    do   v    k     S transposed
dk           reverse    v    do   q     dS transposed
dv           reverse    k    q    do    dS
===========  =========  ===  ===  ====  ==================

A program walks the chunks of one sequence and head with a block of c's columns: the state stays in registers, every
tensor is read once. In a chunk with running sums G of the gates,
:math:`Y = (A B^\top \odot D) C + e^{G} \odot (A S)`, :math:`S' = e^{G_C} S + (e^{G_C - G} \odot B)^\top C`; right to left the
two factors change places.

The gradient of a gate is what passes it: :math:`\langle S, dS \rangle` at the beginning of a window of 256 tokens, exact from the
stored S, less :math:`\sum_{t' < t} (q \cdot dq - k \cdot dk)_{t'}` from there. Over the whole sequence the sum would gather
rounding. Summed from the right, its terms would hold what a gradient of the last state adds before any decay, and where
gates are strong the small result would be lost in their rounding.
"""

# Inside a kernel Python's types do not hold: constants become constexpr, ranges are unrolled.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# A condition on a constexpr is decided when a kernel is compiled, one on a number when it runs: they stay apart.
# ruff: noqa: SIM102

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentcot.kernels.launch import WINDOW, Launch, launch_shape, power_of_two

# exp2 of it is zero in float32: a gate below it, -inf too, acts as a full reset and never makes inf - inf
LOWEST = tl.constexpr(-200.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scalar_kernel(
    a, b, c, g, own, out, overlap, s_in, s_out, stored, carry, offsets, bases,
    scale, H, DA, DC,
    a_token, a_head, b_token, b_head, c_token, c_head, own_token, own_head, g_token, g_head, T,
    in_row, in_column,
    DECAY: tl.constexpr,  # 0 none, 1 one per head, 2 one per head and token
    REVERSE: tl.constexpr,
    SCALE_WRITE: tl.constexpr,  # the scale belongs to b, not to a
    HAS_IN: tl.constexpr,
    HAS_OUT: tl.constexpr,
    OVERLAP: tl.constexpr,  # also store the row dots of own and out
    WINDOWS: tl.constexpr,  # 0, or 1: store the state at window starts, or 2: overlap of the state with the stored one
    C: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    CHUNKS_A_WINDOW: tl.constexpr,
    GATE: tl.constexpr,  # float64 for float32 inputs: differences of large running sums lose digits
    PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    n = tl.program_id(1) // H
    h = tl.program_id(1) % H
    start = tl.load(offsets + n)
    end = tl.load(offsets + n + 1)
    rows = tl.arange(0, C)
    da = tl.arange(0, BA)
    dc = block * BC + tl.arange(0, BC)
    a_inside = (da < DA)[None, :]
    c_inside = (dc < DC)[None, :]
    a += h.to(tl.int64) * a_head + da[None, :]
    b += h.to(tl.int64) * b_head + da[None, :]
    c += h.to(tl.int64) * c_head + dc[None, :]
    out += h.to(tl.int64) * DC + dc[None, :]
    if OVERLAP:
        own += h.to(tl.int64) * own_head + dc[None, :]
        overlap += block.to(tl.int64) * T * H + h
    state_at = (n.to(tl.int64) * H + h) * DA * DC
    square = (da < DA)[:, None] & c_inside
    inner = da[:, None] * DC + dc[None, :]
    if HAS_IN:
        state = tl.load(s_in + state_at + (da[:, None] * in_row + dc[None, :] * in_column), mask=square, other=0.0)
    else:
        state = tl.zeros([BA, BC], dtype=tl.float32)
    if REVERSE:
        seen = rows[:, None] <= rows[None, :]
    else:
        seen = rows[:, None] >= rows[None, :]
    if DECAY == 1:  # the same in every chunk
        per_token = tl.load(g + h.to(tl.int64) * g_head).to(tl.float32)
        per_token = tl.where(per_token > 0, float("nan"), tl.maximum(per_token, LOWEST)) * LOG2E  # growth shows as NaN
        apart = tl.abs(rows[:, None] - rows[None, :]).to(tl.float32)
        decays = tl.where(seen, tl.exp2(per_token * apart), 0.0)
    chunks = tl.cdiv(end - start, C).to(tl.int32)
    if WINDOWS > 0:
        base = tl.load(bases + n)
    for step in range(chunks):
        if REVERSE:
            chunk = chunks - 1 - step
        else:
            chunk = step
        t = start + chunk.to(tl.int64) * C + rows
        valid = t < end
        row = valid[:, None]
        if WINDOWS == 1 and not REVERSE:
            if chunk % CHUNKS_A_WINDOW == 0:
                at = ((base + chunk // CHUNKS_A_WINDOW) * H + h) * DA * DC
                tl.store(stored + at + inner, state, mask=square)
        if WINDOWS == 2 and not REVERSE:
            if chunk % CHUNKS_A_WINDOW == 0:
                at = (base + chunk // CHUNKS_A_WINDOW) * H + h
                other = tl.load(stored + at * DA * DC + inner, mask=square, other=0.0)
                tl.store(carry + at * tl.num_programs(0) + block, tl.sum(state * other))
        a_rows = tl.load(a + t[:, None] * a_token, mask=row & a_inside, other=0.0)
        b_rows = tl.load(b + t[:, None] * b_token, mask=row & a_inside, other=0.0)
        c_rows = tl.load(c + t[:, None] * c_token, mask=row & c_inside, other=0.0)
        weights = tl.dot(a_rows, tl.trans(b_rows), input_precision=PRECISION) * scale
        y = tl.dot(a_rows, state.to(a_rows.dtype), input_precision=PRECISION)
        if OVERLAP and a_rows.dtype != tl.float32:
            rest = (state - state.to(a_rows.dtype).to(tl.float32)).to(a_rows.dtype)
            y = tl.dot(a_rows, rest, acc=y, input_precision=PRECISION)
        if DECAY == 0:
            weights = tl.where(seen, weights, 0.0)
            if not SCALE_WRITE:
                y *= scale
            written = c_rows
        else:
            if DECAY == 1:
                count = tl.minimum(end - start - chunk.to(tl.int64) * C, C).to(tl.int32)
                up_to = tl.exp2(per_token * (rows + 1).to(tl.float32))
                after = tl.exp2(per_token * tl.maximum(count - 1 - rows, 0).to(tl.float32))
                total = tl.exp2(per_token * count.to(tl.float32))
                weights *= decays
            else:
                gates = tl.load(g + t * g_token + h.to(tl.int64) * g_head, mask=valid, other=0.0).to(tl.float32)
                gates = tl.where(gates > 0, float("nan"), tl.maximum(gates, LOWEST)).to(GATE) * LOG2E
                sums = tl.cumsum(gates, 0)
                whole = tl.sum(gates, 0)
                up_to = tl.exp2(sums.to(tl.float32))
                after = tl.exp2((whole - sums).to(tl.float32))
                total = tl.exp2(whole.to(tl.float32))
                if REVERSE:
                    between = sums[None, :] - sums[:, None]
                else:
                    between = sums[:, None] - sums[None, :]
                weights *= tl.where(seen, tl.exp2(tl.where(seen, between, 0.0).to(tl.float32)), 0.0)
            if REVERSE:
                read = after
                write = up_to
            else:
                read = up_to
                write = after
            if not SCALE_WRITE:
                read *= scale
            y *= read[:, None]
            written = (c_rows * write[:, None]).to(c_rows.dtype)
            state *= total
        if OVERLAP:
            # row dots of own and y from unrounded weights: what cancels between q·dq and k·dk then cancels exactly
            mine = tl.load(own + t[:, None] * own_token, mask=row & c_inside, other=0.0)
            products = tl.dot(mine, tl.trans(c_rows), input_precision=PRECISION)
            dots = tl.sum(weights * products, 1) + tl.sum(mine.to(tl.float32) * y, 1)
            tl.store(overlap + t * H, dots, mask=valid)
        y = tl.dot(weights.to(c_rows.dtype), c_rows, acc=y, input_precision=PRECISION)
        added = tl.dot(tl.trans(b_rows), written, input_precision=PRECISION)
        if SCALE_WRITE:
            state += added * scale
        else:
            state += added
        tl.store(out + t[:, None] * (H * DC), y.to(out.dtype.element_ty), mask=row & c_inside)
        if WINDOWS == 1 and REVERSE:
            if chunk % CHUNKS_A_WINDOW == 0:
                at = ((base + chunk // CHUNKS_A_WINDOW) * H + h) * DA * DC
                tl.store(stored + at + inner, state, mask=square)
        if WINDOWS == 2 and REVERSE:
            if chunk % CHUNKS_A_WINDOW == 0:
                at = (base + chunk // CHUNKS_A_WINDOW) * H + h
                other = tl.load(stored + at * DA * DC + inner, mask=square, other=0.0)
                tl.store(carry + at * tl.num_programs(0) + block, tl.sum(state * other))
    if HAS_OUT:
        tl.store(s_out + state_at + inner, state, mask=square)


def default_launch(DA: int, DC: int, dtype: torch.dtype) -> Launch:
    """Chunk, columns, warps, stages for contraction width DA: tiles a, b ``[C,DA]`` and the state ``[DA,columns]``."""
    wide = power_of_two(DA)
    if dtype.itemsize == 2:
        shape = Launch(64, 64, 4, 2) if wide <= 128 else Launch(64, 32, 4, 2) if wide == 256 else Launch(32, 32, 8, 2)
    else:
        shape = Launch(32, 32, 4, 1) if wide <= 128 else Launch(16, 32, 4, 1) if wide == 256 else Launch(16, 16, 4, 1)
    return shape._replace(block=min(shape.block, power_of_two(DC)))


def scalar_pass(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    gates: Tensor | None,
    offsets: Tensor,
    *,
    scale: float,
    reverse: bool,
    scale_write: bool,
    state: Tensor | None = None,
    transposed: bool = False,
    last: Tensor | None = None,
    own: Tensor | None = None,
    store: Tensor | None = None,
    compare: Tensor | None = None,
    bases: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One pass of the kernel over ``a, b [B,S,H,DA]``, ``c [B,S,H,DC]``: (y ``[B,S,H,DC]``, overlap, carry).

    ``gates`` is None, ``[H]`` or ``[B,S,H]``; ``state [N,H,DA,DC]`` (``transposed``: ``[N,H,DC,DA]``) comes in, ``last``
    is filled with what goes out. ``own``: overlap ``[blocks,B,S,H]`` holds partial row dots of own and y. ``store`` is
    filled with the states at window starts, ``[windows,H,DA,DC]``; ``compare``: carry ``[windows,H,blocks]`` holds partial
    sums of the product with them.
    """
    B, S, H, DA = a.shape
    DC = c.shape[-1]
    N = offsets.numel() - 1
    default = default_launch(DA, DC, a.dtype)
    if own is None:
        shape = launch_shape("decay_forward", DA, DC, a.dtype, a.device, default)
    else:  # three more tiles in registers
        default = default._replace(block=min(default.block, 32))
        shape = launch_shape("decay_overlap", DA, DC, a.dtype, a.device, default)
    blocks = triton.cdiv(DC, shape.block)
    out = torch.empty(B, S, H, DC, dtype=out_dtype or c.dtype, device=c.device)
    overlap = None if own is None else torch.empty(blocks, B, S, H, dtype=torch.float32, device=c.device)
    windows = store if store is not None else compare
    carry = None
    if compare is not None:
        carry = torch.empty(compare.shape[0], H, blocks, dtype=torch.float32, device=c.device)
    decay = 0 if gates is None else 1 if gates.dim() == 1 else 2
    gate_strides = (0, 0) if gates is None else (0, gates.stride(0)) if decay == 1 else gates.stride()[1:]
    arguments: Any = (
        a, b, c, gates, own, out, overlap, state, last, windows, carry, offsets, bases,
        scale, H, DA, DC,
        *a.stride()[1:3], *b.stride()[1:3], *c.stride()[1:3], *((0, 0) if own is None else own.stride()[1:3]),
        *gate_strides, B * S, *((1, DA) if transposed else (DC, 1)),
    )  # fmt: skip
    _scalar_kernel[(blocks, N * H)](
        *arguments,
        DECAY=decay, REVERSE=reverse, SCALE_WRITE=scale_write, HAS_IN=state is not None, HAS_OUT=last is not None,
        OVERLAP=own is not None, WINDOWS=1 if store is not None else 2 if compare is not None else 0,
        C=shape.chunk, BA=power_of_two(DA), BC=shape.block, CHUNKS_A_WINDOW=WINDOW // shape.chunk,
        GATE=tl.float64 if a.dtype == torch.float32 else tl.float32, PRECISION="ieee",
        num_warps=shape.warps, num_stages=shape.stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return out, overlap, carry


@triton.jit
def _gate_kernel(
    upper, lower, carry, dg, spans, T, H, blocks_upper, blocks_lower, blocks_carry,
    W: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = h < H
    start = tl.load(spans + piece * 4)
    end = tl.load(spans + piece * 4 + 1)
    if end > start:
        row = tl.arange(0, W)
        t = start + row
        mask = (t < end)[:, None] & inside[None, :]
        at = t[:, None] * H + h[None, :]
        # of the token before: a token's own x, taken from a sum that includes it, would leave its rounding
        has_before = mask & (row > 0)[:, None]
        x = tl.zeros([W, BH], dtype=tl.float32)
        for _ in range(blocks_upper):
            x += tl.load(upper + at - H, mask=has_before, other=0.0)
            upper += T * H
        for _ in range(blocks_lower):
            x -= tl.load(lower + at - H, mask=has_before, other=0.0)
            lower += T * H
        passing = tl.zeros([BH], dtype=tl.float32)
        for block in range(blocks_carry):
            passing += tl.load(carry + (piece * H + h) * blocks_carry + block, mask=inside, other=0.0)
        tl.store(dg + at, passing[None, :] - tl.cumsum(x, 0), mask=mask)


def gate_gradient(upper: Tensor, lower: Tensor, carry: Tensor, spans: Tensor) -> Tensor:
    """``dg_t``, float32 ``[B,S,H]``: what passes the window's beginning less the sum of (upper - lower) from there to t - 1.

    ``upper, lower [blocks,B,S,H]`` and ``carry [windows,H,blocks]`` are partial sums.
    """
    _, B, S, H = upper.shape
    dg = torch.empty(B, S, H, dtype=torch.float32, device=upper.device)
    heads = min(16, power_of_two(H, 1))
    _gate_kernel[(spans.shape[0], triton.cdiv(H, heads))](
        upper, lower, carry, dg, spans, B * S, H, upper.shape[0], lower.shape[0], carry.shape[-1],
        W=WINDOW, BH=heads, num_warps=4,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return dg
