r"""The two walks along a sequence that hold a block of value columns: outputs, and gradients of the values.

With :math:`G` the running sums of a chunk's log-decays, S the state it begins with and :math:`b = \beta`:

.. math::
    \tilde U = \Theta (b V - b e^G (K S)), \quad
    O = s e^G (Q S) + P \tilde U, \quad P_{ij} = s (q_i \cdot k_j) e^{G_i - G_j} \; (j \le i), \quad
    S' = e^{G_C} S + K^\top (e^{G_C - G} \tilde U).

From right to left, with dO and the gradient dS' of the state that the chunk ends with:

.. math::
    d\tilde U = P^\top dO + e^{G_C - G} (K\, dS'), \quad X = \Theta^\top d\tilde U, \quad dV = b X, \quad
    dS = e^{G_C} dS' + Q^\top (s e^G dO) - K^\top (b e^G X).

A program owns one sequence, one value head and ``BLOCK`` value columns and holds ``[K, BLOCK]`` of the state (of its
gradient) in float32. Columns do not mix, so nothing is exchanged; programs of one head are neighbours and find q, k and
the inverse in the cache. Row scalings are applied after a product wherever they can be.
"""

# Inside a kernel Python's types do not hold: constants become constexpr, ranges are unrolled.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from latentcot.kernels.compile_together import Entry
from latentcot.kernels.delta_rule.triton_tiles import (
    load_tile,
    pair_decays,
    pair_decays_transposed,
    power,
    running_sums,
    store_tile,
)


@Entry
@triton.jit
def forward_kernel(
    q, k, v, solved, sums, strengths, initial, o, last, writes, checkpoints, offsets, windows, scale,
    T,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    v_token: tl.constexpr,
    v_head: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    GATED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs ``[T,HEADS,V]`` and last states ``[N,HEADS,K,V]``.

    With ``KEEP`` also what the backward needs: the writes ``[T,HEADS,V]`` and, with gates, the state at the beginning of
    every window of ``WINDOW`` chunks, ``[W,HEADS,K,V]``; ``windows [N+1]`` is the first window of each sequence.
    """
    blocks = tl.cdiv(V, BLOCK)
    head = tl.program_id(0) // blocks % HEADS
    n = tl.program_id(0) // blocks // HEADS
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(offsets + n)
    end = tl.load(offsets + n + 1)
    key = tl.arange(0, WIDTH)
    row = tl.arange(0, C)
    pair = tl.arange(0, C)

    q += (head // GROUP).to(tl.int64) * q_head
    k += (head // GROUP).to(tl.int64) * k_head
    v += head.to(tl.int64) * v_head
    solved += head * C
    o += head.to(tl.int64) * V
    writes += head.to(tl.int64) * V
    strengths += head.to(tl.int64) * T
    sums += head.to(tl.int64) * T
    state_rows = key * V
    in_state = (n.to(tl.int64) * HEADS + head) * K * V
    if HAS_STATE:
        state = load_tile(initial + in_state, state_rows, column, key < K, column < V)
    else:
        state = tl.zeros([WIDTH, BLOCK], dtype=tl.float32)

    for c in range(tl.cdiv(end - begin, C).to(tl.int32)):
        first = begin + c * C
        inside = row < (end - first).to(tl.int32)
        if KEEP and GATED and c % WINDOW == 0:
            at = tl.load(windows + n) + c // WINDOW
            store_tile(checkpoints + (at * HEADS + head) * K * V, state, state_rows, column, key < K, column < V)
        q_tile = load_tile(q + first * q_token, row * q_token, key, inside, key < K)
        k_tile = load_tile(k + first * k_token, row * k_token, key, inside, key < K)
        v_tile = load_tile(v + first * v_token, row * v_token, column, inside, column < V)
        inverse = load_tile(solved + first * HEADS * C, row * HEADS * C, pair, inside, pair < C)
        b = tl.load(strengths + first + pair, mask=inside, other=0.0)
        held = state.to(k_tile.dtype)
        if GATED:
            G, total = running_sums(sums, begin, first, end, C, C)
        # what the next chunk waits for comes first: the writes and the state
        target = tl.dot(k_tile, held, input_precision=PRECISION)
        if GATED:
            target *= power(G)[:, None]
        target = b[:, None] * (v_tile.to(tl.float32) - target)
        u = tl.dot(inverse, target.to(inverse.dtype), input_precision=PRECISION)
        written = u.to(k_tile.dtype)
        if KEEP:
            store_tile(writes + first * HEADS * V, written, row * HEADS * V, column, inside, column < V)
        if GATED:
            state *= power(total)
            u *= power(total - G)[:, None]
        state = tl.dot(tl.trans(k_tile), u.to(k_tile.dtype), state, input_precision=PRECISION)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        read = tl.dot(q_tile, held, input_precision=PRECISION)
        if GATED:
            products *= pair_decays(G, C, True)
            read *= power(G)[:, None]
        else:
            products *= pair_decays(b, C, False)
        read = tl.dot(products.to(k_tile.dtype), written, read, input_precision=PRECISION)
        store_tile(o + first * HEADS * V, scale * read, row * HEADS * V, column, inside, column < V)
    store_tile(last + in_state, state, state_rows, column, key < K, column < V)


@Entry
@triton.jit
def reverse_kernel(
    q, k, v, o, solved, sums, strengths, initial, checkpoints, d_o, d_last, targets, d_v, d_initial, reads, answers, starts,
    offsets, windows, scale,
    T, WINDOWS,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    v_token: tl.constexpr,
    v_head: tl.constexpr,
    o_token: tl.constexpr,
    o_head: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    GATED: tl.constexpr,
    ANSWERS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the writes' right-hand sides (X, ``targets``), of v ``[T,HEADS,V]`` and of the initial states.

    Also, summed over this block's columns: ``reads [blocks,HEADS,T]``, the products of X with v, and with gates ``starts
    [blocks,HEADS,W]``, the product of the state with its gradient at the beginning of each window. With ``ANSWERS``
    also ``answers [blocks,HEADS,T]``, the products of dO with o ``[T,HEADS,V]``.
    """
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

    q += (head // GROUP).to(tl.int64) * q_head
    k += (head // GROUP).to(tl.int64) * k_head
    v += head.to(tl.int64) * v_head
    d_o += head.to(tl.int64) * o_head
    solved += head * C
    targets += head.to(tl.int64) * V
    d_v += head.to(tl.int64) * V
    strengths += head.to(tl.int64) * T
    sums += head.to(tl.int64) * T
    reads += (block.to(tl.int64) * HEADS + head) * T
    if ANSWERS:
        o += head.to(tl.int64) * V
        answers += (block.to(tl.int64) * HEADS + head) * T
    state_rows = key * V
    in_state = (n.to(tl.int64) * HEADS + head) * K * V
    chunks = tl.cdiv(end - begin, C).to(tl.int32)
    if HAS_LAST:
        d_state = load_tile(d_last + in_state, state_rows, column, key < K, column < V)
    else:
        d_state = tl.zeros([WIDTH, BLOCK], dtype=tl.float32)
    if GATED:
        window = tl.load(windows + n)
        starts += (block.to(tl.int64) * HEADS + head) * WINDOWS

    for step in range(chunks):
        c = chunks - 1 - step
        first = begin + c * C
        inside = row < (end - first).to(tl.int32)
        q_tile = load_tile(q + first * q_token, row * q_token, key, inside, key < K)
        k_tile = load_tile(k + first * k_token, row * k_token, key, inside, key < K)
        d_o_tile = load_tile(d_o + first * o_token, row * o_token, column, inside, column < V).to(k_tile.dtype)
        inverse = load_tile(solved + first * HEADS * C, pair, row * HEADS * C, pair < C, inside)  # its transpose
        v_tile = load_tile(v + first * v_token, row * v_token, column, inside, column < V)
        b = tl.load(strengths + first + pair, mask=inside, other=0.0)
        if GATED:
            G, total = running_sums(sums, begin, first, end, C, C)
            decays = pair_decays_transposed(G, C, True)
        else:
            decays = pair_decays_transposed(b, C, False)
        weights = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        weights = (weights * (scale * decays)).to(k_tile.dtype)
        d_u = tl.dot(k_tile, d_state.to(k_tile.dtype), input_precision=PRECISION)
        if GATED:
            d_u *= power(total - G)[:, None]
        d_u = tl.dot(weights, d_o_tile, d_u, input_precision=PRECISION)
        x = tl.dot(inverse, d_u.to(inverse.dtype), input_precision=PRECISION)
        d_value = b[:, None] * x
        store_tile(targets + first * HEADS * V, x, row * HEADS * V, column, inside, column < V)
        store_tile(d_v + first * HEADS * V, d_value, row * HEADS * V, column, inside, column < V)
        tl.store(reads + first + pair, tl.sum(x * v_tile.to(tl.float32), axis=1), mask=inside)
        if ANSWERS:
            o_tile = load_tile(o + first * HEADS * V, row * HEADS * V, column, inside, column < V).to(tl.float32)
            tl.store(answers + first + pair, tl.sum(o_tile * d_o_tile.to(tl.float32), axis=1), mask=inside)
        d_read = scale * d_o_tile.to(tl.float32)
        if GATED:
            start = power(G)[:, None]
            d_read *= start
            d_value *= start
            d_state *= power(total)
        d_state = tl.dot(tl.trans(q_tile), d_read.to(k_tile.dtype), d_state, input_precision=PRECISION)
        d_state = tl.dot(tl.trans(k_tile), (-d_value).to(k_tile.dtype), d_state, input_precision=PRECISION)
        if GATED and (c % WINDOW == 0) & (c > 0):
            at = window + c // WINDOW
            state = load_tile(checkpoints + (at * HEADS + head) * K * V, state_rows, column, key < K, column < V)
            tl.store(starts + at, tl.sum(state * d_state))
    if GATED:
        if HAS_STATE:
            state = load_tile(initial + in_state, state_rows, column, key < K, column < V)
            tl.store(starts + window, tl.sum(state * d_state))
        else:
            tl.store(starts + window, 0.0)
    if HAS_STATE:
        store_tile(d_initial + in_state, d_state, state_rows, column, key < K, column < V)
