r"""Decay attention in Triton with one decay per key channel.

The weight of token j seen from token i differs in every channel, :math:`D_{ij\kappa} = \exp(\sum_{j<t\le i} g_{t\kappa})`, so
:math:`A_{ij} = s \sum_\kappa q_{i\kappa} k_{j\kappa} D_{ij\kappa}` is no plain product. A chunk is split in halves again
and again: for i in a right half and j in the left half before it, the exponent is one sum up to the midpoint for the
key and one from there for the query, so every level is a matrix product of scaled rows (``segments.py`` has the same
scheme for the CPU).
Every exponent is a plain sum of gates, formed as a product with a 0/1 matrix: nothing positive is ever exponentiated,
nothing cancels, and a full reset costs nothing extra.

Four kernels share the work:

* :func:`prepare`, parallel over chunks: ``A`` ``[.,C]``, the reading rows :math:`\hat q = s\, q e^{G}`, the writing rows
  :math:`\hat k = k e^{G_C - G}` and the chunk's decay :math:`e^{G_C}`;
* :func:`recurrence`, along the sequence: :math:`Y = W C + A S`, :math:`S' = e^{G_C} S + B^\top C`. It makes o from
  :math:`(A, \hat q, \hat k, v)`, dv from :math:`(A^\top, \hat k, \hat q, do)`, and the parts of dq and dk that pass through the state;
* :func:`gradients`, parallel over windows of 64 tokens: the parts of dq and dk inside chunks, and dg, the row sum of
  S ⊙ dS at the window's beginning less :math:`\sum_{t' < t} (q \odot dq - k \odot dk)_{t'}` from there (``triton_scalar.py``).

HGRN2 runs on the same kernels: with ``lower_bound`` given, "k" holds the raw gate f, and q, k and g are made on the
fly, :math:`\alpha = lb + (1-lb)\sigma(f)`, :math:`k = 1-\alpha`, :math:`g = \log \alpha`, :math:`q \leftarrow \mathrm{silu}(q)`.
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

from latentcot.kernels.launch import Launch, launch_shape, power_of_two

# tokens between two states of which the overlap is taken: rounding errors of a gate gradient add up no further
WINDOW = 64
LOWEST = tl.constexpr(-200.0)  # in base 2: exp2 of it is zero in float32
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
GROUP = 64
# decay of either half of a chunk, in base 2, up to which rows may be scaled from its middle: factors up to 2^60
SPREAD = tl.constexpr(60.0)


@triton.jit
def _log2_of_one_minus(x):
    """log2(1 - x) for 0 <= x < 0.02."""
    return x * (-LOG2E) * (1.0 + x * (0.5 + x * (1.0 / 3.0 + x * (0.25 + x * 0.2))))


@triton.jit
def sigmoid(x):
    """The reciprocal is taken as the square of a reciprocal root: one instruction of the special unit, and no division."""
    r = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return r * r


@triton.jit
def _log2(x, NATIVE: tl.constexpr):
    """log2 of x > 0. ``NATIVE``: NVIDIA's instruction, right to 2^-22; the library's function takes twenty, and the
    gates of HGRN2 one logarithm a token and channel.
    """
    if NATIVE:
        found = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        found = tl.log2(x)
    return found


@triton.jit
def hgrn_gate(f, bound, NATIVE: tl.constexpr):
    """(log2 alpha, 1 - alpha) of alpha = bound + (1 - bound) sigmoid(f), each without cancellation; (0, 0) for f = inf.

    alpha stays above 1e-35, which next to any token is nothing.
    """
    away = tl.exp2(tl.abs(f) * -LOG2E)
    near = tl.rsqrt(1.0 + away)
    near *= near
    far = away * near
    key = (1.0 - bound) * tl.where(f > 0, far, near)
    alpha = bound + (1.0 - bound) * tl.where(f > 0, near, far)
    return tl.where(key < 0.02, _log2_of_one_minus(key), _log2(tl.maximum(alpha, 1e-35), NATIVE)), key


@triton.jit
def _halves(i, j, bits):
    """Blocks of 2^(bits+1) tokens split in halves: (token i is in a right half, gates j that lie between i and the
    midpoint, tokens i and j are in different halves of one block).
    """
    right = (i >> bits) % 2 == 1
    edge = tl.where(right, i >> bits, (i >> bits) + 1) << bits  # where the right half of the token's block begins
    between = tl.where(right, (j >= edge) & (j <= i), (j > i) & (j < edge))
    pair = (i >> (bits + 1) == j >> (bits + 1)) & (right != ((j >> bits) % 2 == 1))
    return right, between, pair


@triton.jit
def _load_rows(
    q, k, g, bound, q_at, k_at, g_at, bound_at, mask, HGRN2: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """(q, k, g in base 2), float32, of one tile; masked rows are neutral."""
    q_rows = tl.load(q + q_at, mask=mask, other=0.0).to(tl.float32)
    if HGRN2:
        raw = tl.load(k + k_at, mask=mask, other=float("inf")).to(tl.float32)
        gates, k_rows = hgrn_gate(raw, bound_at, NATIVE)
        q_rows *= sigmoid(q_rows)
    else:
        k_rows = tl.load(k + k_at, mask=mask, other=0.0).to(tl.float32)
        gates = tl.load(g + g_at, mask=mask, other=0.0).to(tl.float32)
        gates = tl.where(gates > 0, float("nan"), gates)  # growth shows as NaN
        gates = tl.where(gates < LOWEST, LOWEST, gates) * LOG2E
    return q_rows, k_rows, gates


@triton.jit
def _prepare_tile(
    piece, h, q, k, g, bound, pairs, read, write, totals, wide_spread, spans, scale, H, K,
    q_token, q_head, k_token, k_head, g_token, g_head,
    EXACT: tl.constexpr, HGRN2: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
    SUMS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    start = tl.load(spans + piece * 4)
    end = tl.load(spans + piece * 4 + 1)
    rows = tl.arange(0, C)
    t = start + rows
    valid = t < end
    i = rows[:, None]
    j = rows[None, :]
    acc = tl.zeros([C, C], dtype=tl.float32)
    dtype = read.dtype.element_ty
    most = 0.0
    for k0 in range(0, K, BK):
        dk = k0 + tl.arange(0, BK)
        mask = valid[:, None] & (dk < K)[None, :]
        low = 0.0
        if HGRN2:
            low = tl.load(bound + h * K + dk, mask=dk < K, other=0.0).to(tl.float32)[None, :]
        q_rows, k_rows, gates = _load_rows(
            q, k, g, bound,
            t[:, None] * q_token + h * q_head + dk[None, :], t[:, None] * k_token + h * k_head + dk[None, :],
            t[:, None] * g_token + h * g_head + dk[None, :], low, mask, HGRN2, NATIVE,
        )  # fmt: skip
        summed = gates.to(SUMS)
        total = tl.sum(gates, 0)
        at = t[:, None] * (H * K) + h * K + dk[None, :]
        if EXACT:
            before = tl.exp2(tl.dot((j <= i).to(SUMS), summed, input_precision=PRECISION))
            behind = tl.exp2(tl.dot((j > i).to(SUMS), summed, input_precision=PRECISION))
            tl.store(read + at, (q_rows * before * scale).to(dtype), mask=mask)
            tl.store(write + at, (k_rows * behind).to(dtype), mask=mask)
            own = tl.dot(q_rows.to(dtype), tl.trans(k_rows.to(dtype)), input_precision=PRECISION)
            acc += tl.where(i == j, own, 0.0)
            for bits in range(LEVELS):  # a real loop: unrolled levels do not fit the registers
                right, between, pair = _halves(i, j, bits)
                factor = tl.exp2(tl.dot(between.to(SUMS), summed, input_precision=PRECISION))
                reader = tl.where(right, q_rows * factor, 0.0).to(dtype)
                source = tl.where(right, 0.0, k_rows * factor).to(dtype)
                product = tl.dot(reader, tl.trans(source), input_precision=PRECISION)
                acc += tl.where(pair, product, 0.0)
        else:
            tl.store(totals + (piece.to(tl.int64) * H + h) * K + dk, tl.exp2(total), mask=dk < K)
            first = tl.sum(tl.where(i < C // 2, gates, 0.0), 0)
            most = tl.minimum(most, tl.min(tl.minimum(first, total - first)))
            exponent = tl.cumsum(gates, 0) - first[None, :]
            q_rows *= tl.exp2(exponent)
            k_rows *= tl.exp2(-exponent)
            product = tl.dot(q_rows.to(OPERAND), tl.trans(k_rows.to(OPERAND)), input_precision=FAST)
            acc += tl.where(i >= j, product, 0.0)
            tl.store(read + at, (q_rows * (tl.exp2(first) * scale)[None, :]).to(dtype), mask=mask)
            tl.store(write + at, (k_rows * tl.exp2(total - first)[None, :]).to(dtype), mask=mask)
    tl.store(pairs + t[:, None] * (H * C) + h * C + j, (acc * scale).to(dtype), mask=valid[:, None])
    if not EXACT:
        tl.store(wide_spread + piece * H + h, (most < -SPREAD).to(tl.int32))


@triton.jit
def _prepare_kernel(
    q, k, g, bound, pairs, read, write, totals, wide_spread, spans, scale, H, K,
    q_token, q_head, k_token, k_head, g_token, g_head, pieces,
    EXACT: tl.constexpr,
    HGRN2: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    SUMS: tl.constexpr,  # dtype in which gates are summed: float16 is finer than bfloat16 where gates matter
    OPERAND: tl.constexpr,  # dtype of rows scaled from the middle: float16 is too narrow for them
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    NATIVE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    if EXACT:  # a program looks at a group of chunks and works on the few that need it
        group = tl.program_id(0) * GROUP
        index = group + tl.arange(0, GROUP)
        if tl.max(tl.load(wide_spread + index, mask=index < pieces * H, other=0)) > 0:
            for each in range(group, tl.minimum(group + GROUP, pieces * H)):
                if tl.load(wide_spread + each) > 0:
                    _prepare_tile(
                        each // H, (each % H).to(tl.int64), q, k, g, bound, pairs, read, write, totals, wide_spread,
                        spans, scale, H, K, q_token, q_head, k_token, k_head, g_token, g_head,
                        EXACT, HGRN2, C, LEVELS, BK, SUMS, OPERAND, PRECISION, FAST, NATIVE,
                    )  # fmt: skip
    else:
        _prepare_tile(
            tl.program_id(0), tl.program_id(1).to(tl.int64), q, k, g, bound, pairs, read, write, totals, wide_spread,
            spans, scale, H, K, q_token, q_head, k_token, k_head, g_token, g_head,
            EXACT, HGRN2, C, LEVELS, BK, SUMS, OPERAND, PRECISION, FAST, NATIVE,
        )  # fmt: skip


@triton.jit
def _recurrence_kernel(
    pairs, a, b, c, totals, out, s_in, s_out, stored, carry, offsets, pieces, bases,
    H, DA, DC,
    a_token, a_head, b_token, b_head, c_token, c_head, in_row, in_column,
    PAIRS: tl.constexpr,  # 0 none, 1 as stored, 2 transposed
    REVERSE: tl.constexpr,
    ROWS: tl.constexpr,  # the decays belong to the rows of the state, else to its columns
    HAS_IN: tl.constexpr,
    HAS_OUT: tl.constexpr,
    WINDOWS: tl.constexpr,  # 0, or 1: store the state at window starts, or 2: its overlap with the stored one
    C: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    CHUNKS_A_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) // H
    h = (tl.program_id(1) % H).to(tl.int64)
    start = tl.load(offsets + n)
    end = tl.load(offsets + n + 1)
    piece = tl.load(pieces + n)
    rows = tl.arange(0, C)
    da = tl.arange(0, BA)
    dc = tl.program_id(0) * BC + tl.arange(0, BC)
    a_inside = (da < DA)[None, :]
    c_inside = (dc < DC)[None, :]
    a += h * a_head + da[None, :]
    b += h * b_head + da[None, :]
    c += h * c_head + dc[None, :]
    out += h * DC + dc[None, :]
    state_at = (n.to(tl.int64) * H + h) * DA * DC
    square = (da < DA)[:, None] & c_inside
    inner = da[:, None] * DC + dc[None, :]
    if HAS_IN:
        state = tl.load(s_in + state_at + (da[:, None] * in_row + dc[None, :] * in_column), mask=square, other=0.0)
    else:
        state = tl.zeros([BA, BC], dtype=tl.float32)
    if WINDOWS > 0:
        base = tl.load(bases + n)
    chunks = tl.cdiv(end - start, C).to(tl.int32)
    for step in range(chunks):
        if REVERSE:
            chunk = chunks - 1 - step
        else:
            chunk = step
        t = start + chunk.to(tl.int64) * C + rows
        valid = t < end
        row = valid[:, None]
        if WINDOWS > 0 and not REVERSE:
            if chunk % CHUNKS_A_WINDOW == 0:
                at = (base + chunk // CHUNKS_A_WINDOW) * H + h
                if WINDOWS == 1:
                    tl.store(stored + at * DA * DC + inner, state.to(stored.dtype.element_ty), mask=square)
                else:
                    other = tl.load(stored + at * DA * DC + inner, mask=square, other=0.0)
                    tl.store(carry + at * DC + dc, tl.sum(state * other, 0), mask=dc < DC)
        a_rows = tl.load(a + t[:, None] * a_token, mask=row & a_inside, other=0.0)
        b_rows = tl.load(b + t[:, None] * b_token, mask=row & a_inside, other=0.0)
        c_rows = tl.load(c + t[:, None] * c_token, mask=row & c_inside, other=0.0)
        y = tl.dot(a_rows, state.to(a_rows.dtype), input_precision=PRECISION)
        if PAIRS == 1:
            w = tl.load(pairs + t[:, None] * (H * C) + h * C + rows[None, :], mask=row, other=0.0)
            y = tl.dot(w, c_rows, acc=y, input_precision=PRECISION)
        elif PAIRS == 2:
            w = tl.load(pairs + t[None, :] * (H * C) + h * C + rows[:, None], mask=valid[None, :], other=0.0)
            y = tl.dot(w, c_rows, acc=y, input_precision=PRECISION)
        tl.store(out + t[:, None] * (H * DC), y.to(out.dtype.element_ty), mask=row & c_inside)
        if ROWS:
            total = tl.load(totals + ((piece + chunk) * H + h) * DA + da, mask=da < DA, other=0.0)
            state *= total[:, None]
        else:
            total = tl.load(totals + ((piece + chunk) * H + h) * DC + dc, mask=dc < DC, other=0.0)
            state *= total[None, :]
        state = tl.dot(tl.trans(b_rows), c_rows, acc=state, input_precision=PRECISION)
        if WINDOWS > 0 and REVERSE:
            if chunk % CHUNKS_A_WINDOW == 0:
                at = (base + chunk // CHUNKS_A_WINDOW) * H + h
                if WINDOWS == 1:
                    tl.store(stored + at * DA * DC + inner, state.to(stored.dtype.element_ty), mask=square)
                else:
                    other = tl.load(stored + at * DA * DC + inner, mask=square, other=0.0)
                    tl.store(carry + at * DC + dc, tl.sum(state * other, 0), mask=dc < DC)
    if HAS_OUT:
        tl.store(s_out + state_at + inner, state, mask=square)


@triton.jit
def _gradients_window(
    block, piece, h,
    q, k, g, bound, v, do, dq_state, dk_state, carry, dq, dk, dg, dbound, wide_spread, spans, scale, H, K, V, blocks,
    q_token, q_head, k_token, k_head, g_token, g_head, v_token, v_head, do_token, do_head,
    EXACT: tl.constexpr,
    HGRN2: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SUMS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    begin = tl.load(spans + piece * 4)
    end = tl.load(spans + piece * 4 + 1)
    rows = tl.arange(0, C)
    i = rows[:, None]
    j = rows[None, :]
    channel = block * BK + tl.arange(0, BK)
    inside = channel < K
    dtype = q.dtype.element_ty
    low = 0.0
    if HGRN2:
        low = tl.load(bound + h * K + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        room = 1.0 / (1.0 - low)
    passing = tl.load(carry + (piece * H + h) * K + channel, mask=inside, other=0.0)  # the next token's gate
    bound_sum = tl.zeros([BK], dtype=tl.float32)
    most = 0.0
    chunks = tl.cdiv(end - begin, C).to(tl.int32)
    for step in range(chunks):
        t = begin + step * C + rows
        valid = t < end
        mask = valid[:, None] & inside[None, :]
        direct = tl.zeros([C, C], dtype=tl.float32)
        across = tl.zeros([C, C], dtype=tl.float32)  # its transpose, formed on its own
        for v0 in range(0, V, BV):
            dv = v0 + tl.arange(0, BV)
            wide = valid[:, None] & (dv < V)[None, :]
            v_rows = tl.load(v + t[:, None] * v_token + h * v_head + dv[None, :], mask=wide, other=0.0)
            do_rows = tl.load(do + t[:, None] * do_token + h * do_head + dv[None, :], mask=wide, other=0.0)
            direct = tl.dot(do_rows, tl.trans(v_rows), acc=direct, input_precision=PRECISION)
            across = tl.dot(v_rows, tl.trans(do_rows), acc=across, input_precision=PRECISION)
        direct *= scale
        across *= scale
        q_rows, k_rows, gates = _load_rows(
            q, k, g, bound,
            t[:, None] * q_token + h * q_head + channel[None, :],
            t[:, None] * k_token + h * k_head + channel[None, :],
            t[:, None] * g_token + h * g_head + channel[None, :], low, mask, HGRN2, NATIVE,
        )  # fmt: skip
        summed = gates.to(SUMS)
        total = tl.sum(gates, 0)
        at = t[:, None] * (H * K) + h * K + channel[None, :]
        dq_rows = tl.load(dq_state + at, mask=mask, other=0.0).to(tl.float32) * scale
        dk_rows = tl.load(dk_state + at, mask=mask, other=0.0).to(tl.float32)
        own = tl.sum(tl.where(i == j, direct, 0.0), 1)[:, None]
        if EXACT:
            dq_rows *= tl.exp2(tl.dot((j <= i).to(SUMS), summed, input_precision=PRECISION))
            dk_rows *= tl.exp2(tl.dot((j > i).to(SUMS), summed, input_precision=PRECISION))
            for bits in range(LEVELS):
                right, between, pair = _halves(i, j, bits)
                factor = tl.exp2(tl.dot(between.to(SUMS), summed, input_precision=PRECISION))
                inner = tl.where(pair, tl.where(right, direct, across), 0.0)
                z = tl.where(right, q_rows, k_rows) * factor
                dz = tl.dot(inner.to(dtype), z.to(dtype), input_precision=PRECISION) * factor
                dq_rows += tl.where(right, dz, 0.0)
                dk_rows += tl.where(right, 0.0, dz)
        else:
            first = tl.sum(tl.where(i < C // 2, gates, 0.0), 0)
            most = tl.minimum(most, tl.min(tl.minimum(first, total - first)))
            exponent = tl.cumsum(gates, 0) - first[None, :]
            late = tl.exp2(exponent)
            early = tl.exp2(-exponent)
            inner = tl.where(i > j, direct, 0.0).to(OPERAND)
            dq_rows *= tl.exp2(first)[None, :]
            dq_rows = tl.dot(inner, (k_rows * early).to(OPERAND), acc=dq_rows, input_precision=FAST) * late
            inner = tl.where(i < j, across, 0.0).to(OPERAND)
            dk_rows *= tl.exp2(total - first)[None, :]
            dk_rows = tl.dot(inner, (q_rows * late).to(OPERAND), acc=dk_rows, input_precision=FAST) * early
        x = q_rows * dq_rows - k_rows * dk_rows
        dq_rows += own * k_rows
        dk_rows += own * q_rows
        dg_rows = passing[None, :] - (tl.cumsum(x, 0) - x)
        passing -= tl.sum(x, 0)
        if HGRN2:
            inverse = tl.exp2(-gates)  # of alpha
            dg_rows -= tl.exp2(gates) * dk_rows
            raw_q = tl.load(q + t[:, None] * q_token + h * q_head + channel[None, :], mask=mask, other=0.0)
            raw_q = raw_q.to(tl.float32)
            on = sigmoid(raw_q)
            dq_rows *= on * (1.0 + raw_q * (1.0 - on))
            # key = (1 - bound) sigmoid(-f), and sigmoid(f) / alpha = (1 - bound / alpha) / (1 - bound)
            dg_rows *= k_rows * room
            tl.store(dk + at, (dg_rows * (1.0 - low * inverse)).to(dk.dtype.element_ty), mask=mask)
            per_bound = dg_rows * inverse
            bound_sum += tl.sum(tl.where(mask, per_bound, 0.0), 0)
        else:
            tl.store(dk + at, dk_rows.to(dk.dtype.element_ty), mask=mask)
            tl.store(dg + at, dg_rows.to(dg.dtype.element_ty), mask=mask)
        tl.store(dq + at, dq_rows.to(dq.dtype.element_ty), mask=mask)
    if HGRN2:
        tl.store(dbound + (piece * H + h) * K + channel, bound_sum, mask=inside)
    if not EXACT:
        tl.store(wide_spread + (piece * H + h) * blocks + block, (most < -SPREAD).to(tl.int32))


@triton.jit
def _gradients_kernel(
    q, k, g, bound, v, do, dq_state, dk_state, carry, dq, dk, dg, dbound, wide_spread, spans, scale, H, K, V, blocks,
    q_token, q_head, k_token, k_head, g_token, g_head, v_token, v_head, do_token, do_head, windows,
    EXACT: tl.constexpr,
    HGRN2: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SUMS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    NATIVE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    if EXACT:
        group = tl.program_id(0) * GROUP
        count = windows * H * blocks
        index = group + tl.arange(0, GROUP)
        if tl.max(tl.load(wide_spread + index, mask=index < count, other=0)) > 0:
            for each in range(group, tl.minimum(group + GROUP, count)):
                if tl.load(wide_spread + each) > 0:
                    _gradients_window(
                        each % blocks, (each // blocks // H).to(tl.int64), (each // blocks % H).to(tl.int64),
                        q, k, g, bound, v, do, dq_state, dk_state, carry, dq, dk, dg, dbound, wide_spread,
                        spans, scale, H, K, V, blocks,
                        q_token, q_head, k_token, k_head, g_token, g_head, v_token, v_head, do_token, do_head,
                        EXACT, HGRN2, C, LEVELS, BK, BV, SUMS, OPERAND, PRECISION, FAST, NATIVE,
                    )  # fmt: skip
    else:
        _gradients_window(
            tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64),
            q, k, g, bound, v, do, dq_state, dk_state, carry, dq, dk, dg, dbound, wide_spread, spans, scale, H, K, V, blocks,
            q_token, q_head, k_token, k_head, g_token, g_head, v_token, v_head, do_token, do_head,
            EXACT, HGRN2, C, LEVELS, BK, BV, SUMS, OPERAND, PRECISION, FAST, NATIVE,
        )  # fmt: skip


def default_pairs(K: int, V: int, dtype: torch.dtype) -> Launch:
    """Chunk, channels at a time, warps, stages of :func:`prepare`; every kernel of this file shares its chunk."""
    width = min(power_of_two(K), 128)
    return Launch(32, width, 4, 1) if dtype.itemsize == 2 else Launch(16, min(width, 64), 4, 1)


def _recurrence_launch(DA: int, DC: int, dtype: torch.dtype) -> Launch:
    wide = power_of_two(DA)
    if dtype.itemsize == 2:
        shape = Launch(0, 64, 4, 3) if wide <= 128 else Launch(0, 32, 4, 2) if wide == 256 else Launch(0, 32, 8, 2)
    else:
        shape = Launch(0, 32, 4, 1) if wide <= 256 else Launch(0, 16, 4, 1)
    return shape._replace(block=min(shape.block, power_of_two(DC)))


def chunk_length(K: int, V: int, dtype: torch.dtype, device: torch.device) -> int:
    """The chunk of all kernels of this file for one shape class."""
    return launch_shape("decay_pairs", K, V, dtype, device, default_pairs(K, V, dtype)).chunk


def _numbers(C: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Number formats and precision of the products, by the dtype of the inputs."""
    return {
        "NATIVE": device.type == "cuda" and torch.version.cuda is not None,
        "LEVELS": C.bit_length() - 1,
        "SUMS": tl.float16 if dtype.itemsize == 2 else tl.float32,
        "OPERAND": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
        "PRECISION": "ieee",
        "FAST": "tf32" if dtype == torch.float16 else "ieee",
    }


def _gate_arguments(gates: Tensor | None) -> tuple[int, int]:
    return (0, 0) if gates is None else (gates.stride(1), gates.stride(2))


def prepare(
    q: Tensor, k: Tensor, gates: Tensor | None, bound: Tensor | None, spans: Tensor, scale: float, V: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(A ``[B,S,H,C]``, reading rows and writing rows ``[B,S,H,K]``, chunk decays ``[pieces,H,K]`` float32).

    ``gates [B,S,H,K]``, or None with ``bound [H,K]`` float32 for HGRN2, where k holds f.
    """
    B, S, H, K = q.shape
    C = chunk_length(K, V, q.dtype, q.device)
    kernel = "decay_pairs" if bound is None else "hgrn2_pairs"  # gates made on the way keep the units busy otherwise
    shape = launch_shape(kernel, K, V, q.dtype, q.device, default_pairs(K, V, q.dtype))
    pairs = torch.empty(B, S, H, C, dtype=q.dtype, device=q.device)
    read, write = (torch.empty(B, S, H, K, dtype=q.dtype, device=q.device) for _ in range(2))
    totals = torch.empty(spans.shape[0], H, K, dtype=torch.float32, device=q.device)
    pieces = spans.shape[0]
    wide_spread = torch.empty(pieces, H, dtype=torch.int32, device=q.device)
    arguments: Any = (
        q, k, gates, bound, pairs, read, write, totals, wide_spread, spans, scale, H, K,
        *q.stride()[1:3], *k.stride()[1:3], *_gate_arguments(gates), pieces,
    )  # fmt: skip
    for exact, grid in ((False, (pieces, H)), (True, (triton.cdiv(pieces * H, GROUP),))):
        _prepare_kernel[grid](
            *arguments, EXACT=exact, HGRN2=bound is not None, C=C, BK=min(shape.block, power_of_two(K)), GROUP=GROUP,
            **_numbers(C, q.dtype, q.device), num_warps=shape.warps, num_stages=shape.stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return pairs, read, write, totals


def recurrence(
    pairs: Tensor | None, a: Tensor, b: Tensor, c: Tensor, totals: Tensor, offsets: Tensor, pieces: Tensor,
    *,
    chunk: int,
    reverse: bool,
    on_rows: bool,
    transpose_pairs: bool = False,
    state: Tensor | None = None,
    transposed: bool = False,
    last: Tensor | None = None,
    store: Tensor | None = None,
    compare: Tensor | None = None,
    bases: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """One pass along the sequences: (y ``[B,S,H,DC]``, carry ``[windows,H,DC]`` float32 or None).

    ``a, b [B,S,H,DA]``, ``c [B,S,H,DC]``, ``pairs [B,S,H,C]`` or None, ``totals [pieces,H,·]`` belongs to the rows of the
    state (``on_rows``) or to its columns. States and windows as in ``triton_scalar.scalar_pass``.
    """
    B, S, H, DA = a.shape
    DC = c.shape[-1]
    shape = launch_shape("decay_values", DA, DC, a.dtype, a.device, _recurrence_launch(DA, DC, a.dtype))
    out = torch.empty(B, S, H, DC, dtype=c.dtype, device=c.device)
    windows = store if store is not None else compare
    carry = None
    if compare is not None:
        carry = torch.empty(compare.shape[0], H, DC, dtype=torch.float32, device=c.device)
    arguments: Any = (pairs, a, b, c, totals, out, state, last, windows, carry, offsets, pieces, bases, H, DA, DC)
    _recurrence_kernel[(triton.cdiv(DC, shape.block), (offsets.numel() - 1) * H)](
        *arguments, *a.stride()[1:3], *b.stride()[1:3], *c.stride()[1:3], *((1, DA) if transposed else (DC, 1)),
        PAIRS=0 if pairs is None else 2 if transpose_pairs else 1, REVERSE=reverse, ROWS=on_rows,
        HAS_IN=state is not None, HAS_OUT=last is not None,
        WINDOWS=1 if store is not None else 2 if compare is not None else 0,
        C=chunk, BA=power_of_two(DA), BC=shape.block, CHUNKS_A_WINDOW=WINDOW // chunk, PRECISION="ieee",
        num_warps=shape.warps, num_stages=shape.stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return out, carry


def gradients(
    q: Tensor, k: Tensor, gates: Tensor | None, bound: Tensor | None, v: Tensor, do: Tensor,
    dq_state: Tensor, dk_state: Tensor, carry: Tensor, windows: Tensor,
    scale: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dg float32 ``[B,S,H,K]``, dbound ``[H,K]``); for HGRN2 dk is df and dg is empty."""
    B, S, H, K = q.shape
    V = v.shape[-1]
    default = Launch(0, 64 if q.dtype.itemsize == 2 else 32, 4, 1)
    shape = launch_shape("decay_gradients", K, V, q.dtype, q.device, default)
    dq = torch.empty(B, S, H, K, dtype=q.dtype, device=q.device)
    dk = torch.empty(B, S, H, K, dtype=k.dtype, device=q.device)
    dg = torch.empty((0,) if gates is None else (B, S, H, K), dtype=torch.float32, device=q.device)
    dbound = torch.zeros(
        (windows.shape[0], H, K) if bound is not None else (0, H, K), dtype=torch.float32, device=q.device
    )
    BK = min(shape.block, power_of_two(K))
    blocks, count = triton.cdiv(K, BK), windows.shape[0]
    wide_spread = torch.empty(count, H, blocks, dtype=torch.int32, device=q.device)
    arguments: Any = (
        q, k, gates, bound, v, do, dq_state, dk_state, carry, dq, dk, dg, dbound, wide_spread, windows, scale,
        H, K, V, blocks,
        *q.stride()[1:3], *k.stride()[1:3], *_gate_arguments(gates), *v.stride()[1:3], *do.stride()[1:3], count,
    )  # fmt: skip
    for exact, grid in ((False, (blocks, count, H)), (True, (triton.cdiv(wide_spread.numel(), GROUP),))):
        _gradients_kernel[grid](
            *arguments, EXACT=exact, HGRN2=bound is not None, C=chunk, BK=BK, GROUP=GROUP,
            BV=min(power_of_two(V), 128 if q.dtype.itemsize == 2 else 64), **_numbers(chunk, q.dtype, q.device),
            num_warps=shape.warps, num_stages=shape.stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return dq, dk, dg, dbound.sum(0)
