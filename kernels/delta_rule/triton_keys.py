r"""The two walks along a sequence that hold a block of key channels: gradients of queries, keys, strengths and decays.

From left to right the state is rebuilt, transposed, from the writes :math:`\tilde U`; X is the gradient of the writes'
right-hand sides (``triton_states.py``):

.. math::
    dq_i = s \Bigl(e^{G_i} dO_i S^\top + \sum_{j \le i} (dO_i \cdot \tilde U_j) e^{G_i - G_j} k_j\Bigr), \quad
    z_i = e^{G_i} X_i S^\top + \sum_{j < i} (X_i \cdot \tilde U_j) e^{G_i - G_j} k_j .

:math:`z_i` is what the key of token i met when it erased: its part of dk is :math:`-\beta_i z_i`. From right to left,
with R the gradient of the state that the chunk ends with, what the key of token j left behind for others:

.. math::
    e^{G_C - G_j} \tilde U_j R^\top + s \sum_{i \ge j} (\tilde U_j \cdot dO_i) e^{G_i - G_j} q_i
    - \sum_{i > j} (\tilde U_j \cdot \beta_i X_i) e^{G_i - G_j} k_i .

A program owns one sequence, one value head and ``BLOCK`` key channels; its tiles of dO, the writes and X hold all value
columns. Every decay multiplies a row of q or k, so the decays' gradient needs the products q·dq, k·z and k·(what it
left) of the rows only: with :math:`x_t` = q·dq − β k·z − k·left, the gradient of :math:`g_t` is the product of the state
with its gradient at the beginning of a window, less the sum of x from there to t − 1. Summed from the right the terms
would be those of the state undecayed, and where gates are strong the small gradient would be lost in their rounding;
over the whole sequence the sum would gather rounding, hence windows. What a token reads of its own write passes no gate:
it is in dq and dk but not in their products.

With ``PROJECT`` q and k are unit vectors y made of raw ones by ``triton_norms.py``, with the reciprocal lengths r in
``norms``, and what is written is the gradient of the raw vectors, :math:`r (dy - y (y \cdot dy))`. The product needs all key
channels, of which a program holds a block; but every term of it is also a product of value columns:

.. math:: q_i \cdot dq_i = dO_i \cdot o_i, \qquad k_j \cdot dk_j = 2\, \tilde U_j \cdot X_j - \beta_j X_j \cdot v_j ,

since a write enters what follows only as :math:`k_j^\top \tilde U_j`, and
:math:`\beta_j k_j \cdot z_j = X_j \cdot (\beta_j v_j - \tilde U_j)`. The gates take their products from the keys' side all the
same: there the rounding of pairs cancels.

The weights between the tokens of a chunk are needed by both walks and by every block of key channels. With ``PAIRS``
``pair_kernel`` has formed them once; with few blocks that costs more memory traffic than it saves work, and each walk forms
its own. Either way both walks round the same numbers, so that the pairs of tokens on one side of a gate cancel in its
gradient. The order inside a chunk is chosen for the registers: tiles that belong to one of two sums are loaded,
used and let go before the other begins.
"""

# Inside a kernel Python's types do not hold: constants become constexpr, ranges are unrolled.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from latentcot.kernels.compile_together import Entry
from latentcot.kernels.delta_rule.triton_solve import softplus
from latentcot.kernels.delta_rule.triton_tiles import (
    diagonal,
    load_tile,
    pair_decays,
    pair_decays_transposed,
    power,
    running_sums,
    store_tile,
)

SMALL = tl.constexpr(2.0**-6)


@triton.jit
def erase_factor(b):
    """What the erasing weights hold of a strength: all of it, unless it is near zero, since z is wanted there, too."""
    return tl.where(tl.abs(b) < SMALL, 1.0, b)


@Entry
@triton.jit
def pair_kernel(
    sums, strengths, writes, targets, d_o, reading, erasing, own, selves, offsets, bases, owners, scale,
    T, N,
    HEADS: tl.constexpr,
    V: tl.constexpr,
    o_token: tl.constexpr,
    o_head: tl.constexpr,
    C: tl.constexpr,
    SUM_CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights between the tokens of a chunk, all chunks at once: for j < i, ``[T,HEADS,C]`` with j the last axis,

    ``reading`` s (dO_i·U_j) e^(G_i - G_j) and ``erasing`` f_i (X_i·U_j) e^(G_i - G_j), f of :func:`erase_factor`; and for
    j = i, ``[HEADS,T]``, ``own`` s dO_i·U_i, a token's weight in its own output, which no gate scales and which is in
    none of the gates' products, and ``selves`` X_i·U_i.
    """
    chunk = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    n = tl.load(owners + chunk)
    if n >= N:
        return
    begin = tl.load(offsets + n)
    end = tl.load(offsets + n + 1)
    first = begin + (chunk - tl.load(bases + n)) * C
    row = tl.arange(0, C)
    at = head.to(tl.int64) * T + first + row
    inside = row < (end - first).to(tl.int32)
    writes += first * HEADS * V + head * V
    targets += first * HEADS * V + head * V
    d_o += first * o_token + head.to(tl.int64) * o_head
    read = tl.zeros([C, C], dtype=tl.float32)
    erase = tl.zeros([C, C], dtype=tl.float32)
    for part in range(WIDTH // BLOCK):
        column = part * BLOCK + tl.arange(0, BLOCK)
        u = load_tile(writes, row * HEADS * V, column, inside, column < V)
        x = load_tile(targets, row * HEADS * V, column, inside, column < V)
        d_o_tile = load_tile(d_o, row * o_token, column, inside, column < V).to(u.dtype)
        read = tl.dot(d_o_tile, tl.trans(u), read, input_precision=PRECISION)
        erase = tl.dot(x, tl.trans(u), erase, input_precision=PRECISION)
    b = tl.load(strengths + at, mask=inside, other=0.0)
    if GATED:
        G, _ = running_sums(sums + head.to(tl.int64) * T, begin, first, end, C, SUM_CHUNK)
        decays = pair_decays(G, C, True, False)
    else:
        decays = pair_decays(b, C, False, False)
    tl.store(own + at, scale * diagonal(read, C), mask=inside)
    tl.store(selves + at, diagonal(erase, C), mask=inside)
    to = first * HEADS * C + head * C
    store_tile(reading + to, read * (scale * decays), row * HEADS * C, row, inside, row < C)
    store_tile(erasing + to, erase * (erase_factor(b)[:, None] * decays), row * HEADS * C, row, inside, row < C)


@Entry
@triton.jit
def left_kernel(
    q, k, sums, strengths, norms, answers, own, reading, erasing, initial, writes, targets, d_o, d_q, d_k,
    read_products, erase_products, offsets, scale,
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
    SUM_CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,
    GATED: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq ``[T,HEADS,K]``, the part -beta z of dk, per block q·dq and k·z ``[blocks,HEADS,T]``; without ``PAIRS`` also ``own``."""
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
    writes += head.to(tl.int64) * V
    targets += head.to(tl.int64) * V
    d_q += head.to(tl.int64) * K
    d_k += head.to(tl.int64) * K
    strengths += head.to(tl.int64) * T
    sums += head.to(tl.int64) * T
    own += head.to(tl.int64) * T
    reading += head.to(tl.int64) * C
    erasing += head.to(tl.int64) * C
    read_products += (block.to(tl.int64) * HEADS + head) * T
    erase_products += (block.to(tl.int64) * HEADS + head) * T
    if PROJECT:
        norms += (head // GROUP).to(tl.int64) * T
        answers += head.to(tl.int64) * T
    if HAS_STATE:
        initial += (n.to(tl.int64) * HEADS + head) * K * V
        state = load_tile(initial, column, key * V, column < V, key < K)
    else:
        state = tl.zeros([WIDTH, BLOCK], dtype=tl.float32)

    for c in range(tl.cdiv(end - begin, C).to(tl.int32)):
        first = begin + c * C
        inside = row < (end - first).to(tl.int32)
        at = first + tl.arange(0, C)
        u = load_tile(writes + first * HEADS * V, row * HEADS * V, column, inside, column < V)
        x = load_tile(targets + first * HEADS * V, row * HEADS * V, column, inside, column < V)
        k_tile = load_tile(k + first * k_token, row * k_token, key, inside, key < K)
        b = tl.load(strengths + at, mask=inside, other=0.0)
        if PROJECT:
            norm = tl.load(norms + at, mask=inside, other=0.0)
            along = tl.zeros([C], dtype=tl.float32)
            for part in tl.static_range(VALUE_BLOCKS):
                along += tl.load(answers + tl.full([], part, tl.int64) * HEADS * T + at, mask=inside, other=0.0)
        if PAIRS:
            erase = load_tile(erasing + first * HEADS * C, row * HEADS * C, row, inside, row < C)
            read = load_tile(reading + first * HEADS * C, row * HEADS * C, row, inside, row < C)
            mine = tl.load(own + at, mask=inside, other=0.0)
        factor = erase_factor(b)
        z_scale = factor
        q_scale = scale + 0.0 * b
        if GATED:
            G, total = running_sums(sums, begin, first, end, C, SUM_CHUNK)
            z_scale *= power(G)
            q_scale *= power(G)
            decays = pair_decays(G, C, True, False)
        else:
            decays = pair_decays(b, C, False, False)
        held = state.to(u.dtype)
        k_wide = k_tile.to(tl.float32)

        z = tl.dot(x, held, input_precision=PRECISION) * z_scale[:, None]
        if not PAIRS:
            erase = tl.dot(x, tl.trans(u), input_precision=PRECISION)
            erase = (erase * (factor[:, None] * decays)).to(u.dtype)
        z = tl.dot(erase, k_tile, z, input_precision=PRECISION)
        store_tile(d_k + first * HEADS * K, (-b / factor)[:, None] * z, row * HEADS * K, key, inside, key < K)
        tl.store(erase_products + at, tl.sum(z * k_wide, axis=1) / factor, mask=inside)

        d_o_tile = load_tile(d_o + first * o_token, row * o_token, column, inside, column < V).to(u.dtype)
        q_tile = load_tile(q + first * q_token, row * q_token, key, inside, key < K)
        if not PAIRS:
            weights = tl.dot(d_o_tile, tl.trans(u), input_precision=PRECISION)
            mine = scale * diagonal(weights, C)
            tl.store(own + at, mine, mask=inside)
            read = (weights * (scale * decays)).to(u.dtype)
        dq = tl.dot(d_o_tile, held, input_precision=PRECISION) * q_scale[:, None]
        dq = tl.dot(read, k_tile, dq, input_precision=PRECISION)
        if GATED:
            tl.store(read_products + at, tl.sum(dq * q_tile.to(tl.float32), axis=1), mask=inside)
        dq += mine[:, None] * k_wide
        if PROJECT:
            dq = (dq - along[:, None] * q_tile.to(tl.float32)) * norm[:, None]
        store_tile(d_q + first * HEADS * K, dq, row * HEADS * K, key, inside, key < K)

        if GATED:
            state *= power(total)
            k_tile = (k_wide * power(total - G)[:, None]).to(u.dtype)
        state = tl.dot(tl.trans(u), k_tile, state, input_precision=PRECISION)


@Entry
@triton.jit
def right_kernel(
    q, k, sums, strengths, norms, reads, own, selves, reading, erasing, d_last, writes, targets, d_o, d_k, left_products,
    offsets, scale,
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
    SUM_CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,
    GATED: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dk what the keys left for later tokens; its product with k, per block, goes to ``left_products``.

    ``reads [VALUE_BLOCKS,HEADS,T]`` are the products of X with v, ``selves [HEADS,T]`` those with U.
    """
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
    writes += head.to(tl.int64) * V
    targets += head.to(tl.int64) * V
    d_k += head.to(tl.int64) * K
    strengths += head.to(tl.int64) * T
    sums += head.to(tl.int64) * T
    own += head.to(tl.int64) * T
    selves += head.to(tl.int64) * T
    reading += head.to(tl.int64) * C
    erasing += head.to(tl.int64) * C
    left_products += (block.to(tl.int64) * HEADS + head) * T
    if PROJECT:
        norms += (HEADS // GROUP + head // GROUP).to(tl.int64) * T
        reads += head.to(tl.int64) * T
    if HAS_LAST:
        d_last += (n.to(tl.int64) * HEADS + head) * K * V
        d_state = load_tile(d_last, column, key * V, column < V, key < K)
    else:
        d_state = tl.zeros([WIDTH, BLOCK], dtype=tl.float32)

    chunks = tl.cdiv(end - begin, C).to(tl.int32)
    for step in range(chunks):
        first = begin + (chunks - 1 - step) * C
        inside = row < (end - first).to(tl.int32)
        at = first + tl.arange(0, C)
        u = load_tile(writes + first * HEADS * V, row * HEADS * V, column, inside, column < V)
        d_o_tile = load_tile(d_o + first * o_token, row * o_token, column, inside, column < V).to(u.dtype)
        q_tile = load_tile(q + first * q_token, row * q_token, key, inside, key < K)
        b = tl.load(strengths + at, mask=inside, other=0.0)
        if PAIRS:  # the transposes
            read = load_tile(reading + first * HEADS * C, row, row * HEADS * C, row < C, inside)
            erase = load_tile(erasing + first * HEADS * C, row, row * HEADS * C, row < C, inside)
        if GATED:
            G, total = running_sums(sums, begin, first, end, C, SUM_CHUNK)
            decays = pair_decays_transposed(G, C, True, False)
            start = power(G)
        else:
            decays = pair_decays_transposed(b, C, False, False)
        left = tl.dot(u, d_state.to(u.dtype), input_precision=PRECISION)
        if GATED:
            left *= power(total - G)[:, None]
            d_state *= power(total)
        if not PAIRS:
            read = tl.dot(u, tl.trans(d_o_tile), input_precision=PRECISION)
            read = (read * (scale * decays)).to(u.dtype)
        left = tl.dot(read, q_tile, left, input_precision=PRECISION)
        q_wide = q_tile.to(tl.float32)
        if GATED:
            q_tile = (q_wide * (scale * start)[:, None]).to(u.dtype)
        else:
            q_tile = (q_wide * scale).to(u.dtype)
        d_state = tl.dot(tl.trans(d_o_tile), q_tile, d_state, input_precision=PRECISION)

        x = load_tile(targets + first * HEADS * V, row * HEADS * V, column, inside, column < V)
        k_tile = load_tile(k + first * k_token, row * k_token, key, inside, key < K)
        k_wide = k_tile.to(tl.float32)
        if PAIRS:
            k_tile = (k_wide * (-b / erase_factor(b))[:, None]).to(u.dtype)  # -k but where the strength is near zero
            along = tl.load(selves + at, mask=inside, other=0.0)
        else:
            weights = tl.dot(u, tl.trans(x), input_precision=PRECISION)
            along = diagonal(weights, C)
            erase = (weights * (-b[None, :] * decays)).to(u.dtype)
        left = tl.dot(erase, k_tile, left, input_precision=PRECISION)
        if GATED:
            tl.store(left_products + at, tl.sum(left * k_wide, axis=1), mask=inside)
        left += tl.load(own + at, mask=inside, other=0.0)[:, None] * q_wide
        if GATED:
            k_tile = (k_wide * (-b * start)[:, None]).to(u.dtype)
        else:
            k_tile = (k_wide * -b[:, None]).to(u.dtype)
        d_state = tl.dot(tl.trans(x), k_tile, d_state, input_precision=PRECISION)
        left += load_tile(d_k + first * HEADS * K, row * HEADS * K, key, inside, key < K).to(tl.float32)
        if PROJECT:
            along *= 2.0
            for part in tl.static_range(VALUE_BLOCKS):
                along -= b * tl.load(reads + tl.full([], part, tl.int64) * HEADS * T + at, mask=inside, other=0.0)
            left = (left - along[:, None] * k_wide) * tl.load(norms + at, mask=inside, other=0.0)[:, None]
        store_tile(d_k + first * HEADS * K, left, row * HEADS * K, key, inside, key < K)


@Entry
@triton.jit
def finish_kernel(
    strengths, reads, starts, read_products, erase_products, left_products, log_decay, log_rate, bias,
    d_beta, d_decay, d_log_rate, d_bias, offsets, windows, owners,
    T, N, WINDOWS,
    HEADS: tl.constexpr,
    gate_token: tl.constexpr,
    TOKENS: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    RAW: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Sums of the blocks' products over one window of one head: gradients of beta and log_decay, ``[T,HEADS]``.

    With ``RAW`` those of what they were computed from (see ``triton_solve.py``), and this window's sums for log_rate
    and bias, ``[HEADS,W]``.
    """
    window = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    n = tl.load(owners + window)
    if n >= N:
        return
    end = tl.load(offsets + n + 1)
    t = tl.load(offsets + n) + (window - tl.load(windows + n)) * TOKENS + tl.arange(0, TOKENS)
    inside = t < end
    at = head.to(tl.int64) * T + t
    plane = tl.full([], 1, dtype=tl.int64) * HEADS * T
    read = tl.zeros([TOKENS], dtype=tl.float32)
    for part in range(VALUE_BLOCKS):
        read += tl.load(reads + part * plane + at, mask=inside, other=0.0)
    erased = tl.zeros([TOKENS], dtype=tl.float32)
    for part in range(KEY_BLOCKS):
        erased += tl.load(erase_products + part * plane + at, mask=inside, other=0.0)
    d_b = read - erased
    if RAW:
        b = tl.load(strengths + at, mask=inside, other=0.0)
        d_b *= b * (1.0 - b / LARGEST)
    tl.store(d_beta + t * HEADS + head, d_b.to(d_beta.dtype.element_ty), mask=inside)
    if GATED:
        # x of the token before: x of the token itself, taken from a sum that includes it, would leave its rounding
        has_before = inside & (tl.arange(0, TOKENS) > 0)
        erased = tl.zeros([TOKENS], dtype=tl.float32)
        x = tl.zeros([TOKENS], dtype=tl.float32)
        for part in range(KEY_BLOCKS):
            erased += tl.load(erase_products + part * plane + at - 1, mask=has_before, other=0.0)
            x += tl.load(read_products + part * plane + at - 1, mask=has_before, other=0.0)
            x -= tl.load(left_products + part * plane + at - 1, mask=has_before, other=0.0)
        x -= tl.load(strengths + at - 1, mask=has_before, other=0.0) * erased
        before = tl.zeros([], dtype=tl.float32)
        for part in range(VALUE_BLOCKS):
            before += tl.load(starts + (part * tl.full([], 1, dtype=tl.int64) * HEADS + head) * WINDOWS + window)
        d_g = before - tl.cumsum(x, axis=0)
        if RAW:
            rate = tl.exp(tl.load(log_rate + head).to(tl.float32))
            raw = tl.load(log_decay + t * gate_token + head, mask=inside, other=0.0).to(tl.float32)
            raw += tl.load(bias + head).to(tl.float32)
            d_g = tl.where(inside, -rate * d_g, 0.0)
            at_window = head.to(tl.int64) * WINDOWS + window
            tl.store(d_log_rate + at_window, tl.sum(d_g * softplus(raw)))
            d_g *= tl.sigmoid(raw)
            tl.store(d_bias + at_window, tl.sum(d_g))
        tl.store(d_decay + t * HEADS + head, d_g.to(d_decay.dtype.element_ty), mask=inside)
