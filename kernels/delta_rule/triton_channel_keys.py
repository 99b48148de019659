r"""The walks that hold a block of key channels, for a log-decay per key channel (compare ``triton_keys.py``).

The gradients are those of the scalar decay with a factor per channel inside the sums over tokens. Those sums go level
by level through halves of the chunk (``triton_channel_solve.py``): with F the level's factors and M its pairs,
:math:`\sum_j w_{ij} e^{G_i - G_j} k_j = F \odot ((w \odot M) (F \odot k))`, summed over levels, plus the token itself.

Every decay multiplies a channel of q or k, so the gradient of the gates is an elementwise product: with
:math:`x_t = q\,dq - \beta k z - k \cdot \text{left}` the gradient of :math:`g_t` is the product of the state with its
gradient, row by row, at the beginning of a window of tokens, less the sum of x from there to t − 1.
"""

# Inside a kernel Python's types do not hold: constants become constexpr, ranges are unrolled.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from latentcot.kernels.compile_together import Entry
from latentcot.kernels.delta_rule.triton_channel_solve import (
    level_factors,
    level_pairs,
    level_pairs_transposed,
    load_sums,
)
from latentcot.kernels.delta_rule.triton_tiles import load_tile, power, store_tile


@Entry
@triton.jit
def channel_left_kernel(
    q, k, sums, strengths, initial, writes, targets, d_o, d_q, d_k, gates, erase_products, offsets, scale,
    T,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    o_token: tl.constexpr,
    o_head: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, the part -beta z of dk, q dq - beta k z (``gates``), all ``[T,HEADS,K]``, and k·z ``[blocks,HEADS,T]``."""
    blocks = tl.cdiv(K, BLOCK)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % HEADS
    n = tl.program_id(0) // blocks // HEADS
    key = block * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(offsets + n)
    end = tl.load(offsets + n + 1)
    column = tl.arange(0, WIDTH)
    row = tl.arange(0, C)
    q += (head // GROUP).to(tl.int64) * q_head
    k += (head // GROUP).to(tl.int64) * k_head
    d_o += head.to(tl.int64) * o_head
    sums += head.to(tl.int64) * K
    strengths += head.to(tl.int64) * T
    erase_products += (block.to(tl.int64) * HEADS + head) * T
    if HAS_STATE:
        initial += (n.to(tl.int64) * HEADS + head) * K * V
        state = load_tile(initial, column, key * V, column < V, key < K)
    else:
        state = tl.zeros([WIDTH, BLOCK], dtype=tl.float32)

    for c in range(tl.cdiv(end - begin, C).to(tl.int32)):
        first = begin + c * C
        inside = row < (end - first).to(tl.int32)
        token = first * HEADS + head
        u = load_tile(writes + token * V, row * HEADS * V, column, inside, column < V)
        d_o_tile = load_tile(d_o + first * o_token, row * o_token, column, inside, column < V).to(u.dtype)
        x = load_tile(targets + token * V, row * HEADS * V, column, inside, column < V)
        k_tile = load_tile(k + first * k_token, row * k_token, key, inside, key < K).to(tl.float32)
        q_tile = load_tile(q + first * q_token, row * q_token, key, inside, key < K).to(tl.float32)
        b = tl.load(strengths + first + row, mask=inside, other=0.0)[:, None]
        G = load_sums(sums, first, end, row, key, HEADS, K)
        total = tl.load(sums + (tl.minimum(first + C, end) - 1) * HEADS * K + key, mask=key < K, other=0.0)
        held = state.to(u.dtype)
        start = power(G)
        dq = tl.dot(d_o_tile, held, input_precision=PRECISION) * (scale * start)
        z = tl.dot(x, held, input_precision=PRECISION) * start
        reads = scale * tl.dot(d_o_tile, tl.trans(u), input_precision=PRECISION)
        erases = tl.dot(x, tl.trans(u), input_precision=PRECISION)
        for level in tl.static_range(LEVELS):
            factor = level_factors(sums, G, first, end, key, 2**level, C, HEADS, K)
            keys = (k_tile * factor).to(u.dtype)
            pairs = level_pairs(2**level, C)
            dq += factor * tl.dot(tl.where(pairs, reads, 0.0).to(u.dtype), keys, input_precision=PRECISION)
            z += factor * tl.dot(tl.where(pairs, erases, 0.0).to(u.dtype), keys, input_precision=PRECISION)
        store_tile(d_k + token * K, -b * z, row * HEADS * K, key, inside, key < K)
        store_tile(gates + token * K, q_tile * dq - b * k_tile * z, row * HEADS * K, key, inside, key < K)
        # a token reads its own write through no gate
        own = tl.sum(tl.where(row[:, None] == tl.arange(0, C)[None, :], reads, 0.0), axis=1)
        dq += own[:, None] * k_tile
        store_tile(d_q + token * K, dq, row * HEADS * K, key, inside, key < K)
        tl.store(erase_products + first + row, tl.sum(z * k_tile, axis=1), mask=inside)
        state *= power(total)[None, :]
        keys = (k_tile * power(total[None, :] - G)).to(u.dtype)
        state = tl.dot(tl.trans(u), keys, state, input_precision=PRECISION)


@Entry
@triton.jit
def channel_right_kernel(
    q, k, sums, strengths, initial, d_last, checkpoints, writes, targets, d_o, d_k, gates, starts, offsets, windows,
    scale, T,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    o_token: tl.constexpr,
    o_head: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dk what the keys left for later tokens, takes its product with k from ``gates``.

    ``starts [W,HEADS,K]``: the product of the state with its gradient at the beginning of each window, row by row.
    """
    blocks = tl.cdiv(K, BLOCK)
    head = tl.program_id(0) // blocks % HEADS
    n = tl.program_id(0) // blocks // HEADS
    key = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(offsets + n)
    end = tl.load(offsets + n + 1)
    column = tl.arange(0, WIDTH)
    row = tl.arange(0, C)
    q += (head // GROUP).to(tl.int64) * q_head
    k += (head // GROUP).to(tl.int64) * k_head
    d_o += head.to(tl.int64) * o_head
    sums += head.to(tl.int64) * K
    strengths += head.to(tl.int64) * T
    in_state = (n.to(tl.int64) * HEADS + head) * K * V
    window = tl.load(windows + n)
    if HAS_LAST:
        d_state = load_tile(d_last + in_state, column, key * V, column < V, key < K)
    else:
        d_state = tl.zeros([WIDTH, BLOCK], dtype=tl.float32)

    chunks = tl.cdiv(end - begin, C).to(tl.int32)
    for step in range(chunks):
        c = chunks - 1 - step
        first = begin + c * C
        inside = row < (end - first).to(tl.int32)
        token = first * HEADS + head
        u = load_tile(writes + token * V, row * HEADS * V, column, inside, column < V)
        d_o_tile = load_tile(d_o + first * o_token, row * o_token, column, inside, column < V).to(u.dtype)
        x = load_tile(targets + token * V, row * HEADS * V, column, inside, column < V)
        k_tile = load_tile(k + first * k_token, row * k_token, key, inside, key < K).to(tl.float32)
        q_tile = load_tile(q + first * q_token, row * q_token, key, inside, key < K).to(tl.float32)
        b = tl.load(strengths + first + row, mask=inside, other=0.0)
        G = load_sums(sums, first, end, row, key, HEADS, K)
        total = tl.load(sums + (tl.minimum(first + C, end) - 1) * HEADS * K + key, mask=key < K, other=0.0)
        left = tl.dot(u, d_state.to(u.dtype), input_precision=PRECISION) * power(total[None, :] - G)
        reads = scale * tl.dot(u, tl.trans(d_o_tile), input_precision=PRECISION)
        erases = -b[None, :] * tl.dot(u, tl.trans(x), input_precision=PRECISION)
        for level in tl.static_range(LEVELS):
            factor = level_factors(sums, G, first, end, key, 2**level, C, HEADS, K)
            keys = (k_tile * factor).to(u.dtype)
            queries = (q_tile * factor).to(u.dtype)
            pairs = level_pairs_transposed(2**level, C)
            part = tl.dot(tl.where(pairs, reads, 0.0).to(u.dtype), queries, input_precision=PRECISION)
            part = tl.dot(tl.where(pairs, erases, 0.0).to(u.dtype), keys, part, input_precision=PRECISION)
            left += factor * part
        rows = load_tile(gates + token * K, row * HEADS * K, key, inside, key < K) - k_tile * left
        store_tile(gates + token * K, rows, row * HEADS * K, key, inside, key < K)
        own = tl.sum(tl.where(row[:, None] == tl.arange(0, C)[None, :], reads, 0.0), axis=1)
        left += own[:, None] * q_tile
        erased = load_tile(d_k + token * K, row * HEADS * K, key, inside, key < K).to(tl.float32)
        store_tile(d_k + token * K, erased + left, row * HEADS * K, key, inside, key < K)
        start = power(G)
        queries = (scale * start * q_tile).to(u.dtype)
        keys = (-b[:, None] * start * k_tile).to(u.dtype)
        d_state *= power(total)[None, :]
        d_state = tl.dot(tl.trans(d_o_tile), queries, d_state, input_precision=PRECISION)
        d_state = tl.dot(tl.trans(x), keys, d_state, input_precision=PRECISION)
        if (c % WINDOW == 0) & (c > 0):
            at = ((window + c // WINDOW) * HEADS + head) * K
            state = load_tile(checkpoints + at * V, column, key * V, column < V, key < K)
            tl.store(starts + at + key, tl.sum(state * d_state, axis=0), mask=key < K)
    at = (window * HEADS + head) * K
    if HAS_STATE:
        state = load_tile(initial + in_state, column, key * V, column < V, key < K)
        tl.store(starts + at + key, tl.sum(state * d_state, axis=0), mask=key < K)
    else:
        tl.store(starts + at + key, tl.zeros([BLOCK], dtype=tl.float32), mask=key < K)


@Entry
@triton.jit
def channel_gates_kernel(
    gates, starts, d_decay, offsets, windows, owners,
    N,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of log_decay ``[T,HEADS,K]`` of one window, head and block of channels, 16 tokens at a time."""
    blocks = tl.cdiv(K, BLOCK)
    key = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(0) // blocks % HEADS
    window = (tl.program_id(0) // blocks // HEADS).to(tl.int64)
    n = tl.load(owners + window)
    if n >= N:
        return
    end = tl.load(offsets + n + 1)
    begin = tl.load(offsets + n) + (window - tl.load(windows + n)) * TOKENS
    row = tl.arange(0, 16)
    before = tl.load(starts + (window * HEADS + head) * K + key, mask=key < K, other=0.0)
    for step in range(TOKENS // 16):
        first = begin + step * 16
        inside = row < (end - first).to(tl.int32)
        # x of the token before: x of the token itself, taken from a sum that includes it, would leave its rounding
        has_before = inside & (row + step > 0)
        x = load_tile(gates + ((first - 1) * HEADS + head) * K, row * HEADS * K, key, has_before, key < K)
        d_g = before[None, :] - tl.cumsum(x, axis=0)
        store_tile(d_decay + (first * HEADS + head) * K, d_g, row * HEADS * K, key, inside, key < K)
        before -= tl.sum(x, axis=0)
