r"""The walks that hold a block of value columns, for a log-decay per key channel (compare ``triton_states.py``).

.. math::
    \tilde U = \Theta (b V - b (K_0 S)), \quad O = s\, Q_0 S + P \tilde U, \quad S' = e^{G_C} S + K_1^\top \tilde U, \\
    X = \Theta^\top (P^\top dO + K_1\, dS'), \quad dV = b X, \quad
    dS = e^{G_C} dS' + Q_0^\top (s\, dO) - K_0^\top (b X)

with :math:`Q_0 = e^G Q`, :math:`K_0 = e^G K`, :math:`K_1 = e^{G_C - G} K` and P as ``triton_channel_solve.py`` left
them: a decay per channel multiplies inside a product, so it is applied once, before the walk, and not per block here.
"""

# Inside a kernel Python's types do not hold: constants become constexpr, ranges are unrolled.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from latentcot.kernels.compile_together import Entry
from latentcot.kernels.delta_rule.triton_tiles import load_tile, power, store_tile


@Entry
@triton.jit
def channel_forward_kernel(
    query, erase, write, v, solved, weights, sums, strengths, initial, o, last, writes, checkpoints, offsets, windows,
    scale, T,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    v_token: tl.constexpr,
    v_head: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_STATE: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs, last states and, with ``KEEP``, the writes and a state every ``WINDOW`` chunks."""
    blocks = tl.cdiv(V, BLOCK)
    head = tl.program_id(0) // blocks % HEADS
    n = tl.program_id(0) // blocks // HEADS
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(offsets + n)
    end = tl.load(offsets + n + 1)
    key = tl.arange(0, WIDTH)
    row = tl.arange(0, C)
    pair = tl.arange(0, C)
    in_state = (n.to(tl.int64) * HEADS + head) * K * V
    strengths += head.to(tl.int64) * T
    if HAS_STATE:
        state = load_tile(initial + in_state, key * V, column, key < K, column < V)
    else:
        state = tl.zeros([WIDTH, BLOCK], dtype=tl.float32)

    for c in range(tl.cdiv(end - begin, C).to(tl.int32)):
        first = begin + c * C
        inside = row < (end - first).to(tl.int32)
        if KEEP and c % WINDOW == 0:
            at = tl.load(windows + n) + c // WINDOW
            store_tile(checkpoints + (at * HEADS + head) * K * V, state, key * V, column, key < K, column < V)
        token = first * HEADS + head
        q_tile = load_tile(query + token * K, row * HEADS * K, key, inside, key < K)
        e_tile = load_tile(erase + token * K, row * HEADS * K, key, inside, key < K)
        w_tile = load_tile(write + token * K, row * HEADS * K, key, inside, key < K)
        v_tile = load_tile(v + first * v_token + head.to(tl.int64) * v_head, row * v_token, column, inside, column < V)
        inverse = load_tile(solved + token * C, row * HEADS * C, pair, inside, pair < C)
        P = load_tile(weights + token * C, row * HEADS * C, pair, inside, pair < C)
        b = tl.load(strengths + first + row, mask=inside, other=0.0)
        total = tl.load(sums + ((tl.minimum(first + C, end) - 1) * HEADS + head) * K + key, mask=key < K, other=0.0)
        held = state.to(q_tile.dtype)
        target = tl.dot(e_tile, held, input_precision=PRECISION)
        target = b[:, None] * (v_tile.to(tl.float32) - target)
        written = tl.dot(inverse, target.to(inverse.dtype), input_precision=PRECISION).to(q_tile.dtype)
        if KEEP:
            store_tile(writes + token * V, written, row * HEADS * V, column, inside, column < V)
        state *= power(total)[:, None]
        state = tl.dot(tl.trans(w_tile), written, state, input_precision=PRECISION)
        read = scale * tl.dot(q_tile, held, input_precision=PRECISION)
        read = tl.dot(P, written, read, input_precision=PRECISION)
        store_tile(o + token * V, read, row * HEADS * V, column, inside, column < V)
    store_tile(last + in_state, state, key * V, column, key < K, column < V)


@Entry
@triton.jit
def channel_reverse_kernel(
    query, erase, write, v, solved, weights, sums, strengths, d_o, d_last, targets, d_v, d_initial, reads, offsets,
    scale, T,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    v_token: tl.constexpr,
    v_head: tl.constexpr,
    o_token: tl.constexpr,
    o_head: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """X (``targets``), dv, the gradient of the initial states, and X·v per block of columns, ``[blocks,HEADS,T]``."""
    blocks = tl.cdiv(V, BLOCK)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % HEADS
    n = tl.program_id(0) // blocks // HEADS
    column = block * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(offsets + n)
    end = tl.load(offsets + n + 1)
    key = tl.arange(0, WIDTH)
    row = tl.arange(0, C)
    pair = tl.arange(0, C)
    in_state = (n.to(tl.int64) * HEADS + head) * K * V
    strengths += head.to(tl.int64) * T
    reads += (block.to(tl.int64) * HEADS + head) * T
    if HAS_LAST:
        d_state = load_tile(d_last + in_state, key * V, column, key < K, column < V)
    else:
        d_state = tl.zeros([WIDTH, BLOCK], dtype=tl.float32)

    chunks = tl.cdiv(end - begin, C).to(tl.int32)
    for step in range(chunks):
        first = begin + (chunks - 1 - step) * C
        inside = row < (end - first).to(tl.int32)
        token = first * HEADS + head
        q_tile = load_tile(query + token * K, row * HEADS * K, key, inside, key < K)
        e_tile = load_tile(erase + token * K, row * HEADS * K, key, inside, key < K)
        w_tile = load_tile(write + token * K, row * HEADS * K, key, inside, key < K)
        v_tile = load_tile(v + first * v_token + head.to(tl.int64) * v_head, row * v_token, column, inside, column < V)
        d_o_tile = load_tile(
            d_o + first * o_token + head.to(tl.int64) * o_head, row * o_token, column, inside, column < V
        ).to(q_tile.dtype)  # fmt: skip
        inverse = load_tile(solved + token * C, pair, row * HEADS * C, pair < C, inside)  # both transposed
        P = load_tile(weights + token * C, pair, row * HEADS * C, pair < C, inside)
        b = tl.load(strengths + first + row, mask=inside, other=0.0)
        total = tl.load(sums + ((tl.minimum(first + C, end) - 1) * HEADS + head) * K + key, mask=key < K, other=0.0)
        d_u = tl.dot(w_tile, d_state.to(w_tile.dtype), input_precision=PRECISION)
        d_u = tl.dot(P, d_o_tile, d_u, input_precision=PRECISION)
        x = tl.dot(inverse, d_u.to(inverse.dtype), input_precision=PRECISION)
        d_value = b[:, None] * x
        store_tile(targets + token * V, x, row * HEADS * V, column, inside, column < V)
        store_tile(d_v + token * V, d_value, row * HEADS * V, column, inside, column < V)
        tl.store(reads + first + row, tl.sum(x * v_tile.to(tl.float32), axis=1), mask=inside)
        d_read = (scale * d_o_tile.to(tl.float32)).to(q_tile.dtype)
        d_state *= power(total)[:, None]
        d_state = tl.dot(tl.trans(q_tile), d_read, d_state, input_precision=PRECISION)
        d_state = tl.dot(tl.trans(e_tile), (-d_value).to(q_tile.dtype), d_state, input_precision=PRECISION)
    if HAS_STATE:
        store_tile(d_initial + in_state, d_state, key * V, column, key < K, column < V)
