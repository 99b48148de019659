r"""Chunks with a log-decay for every key channel: running sums, scaled rows, and the matrices between tokens.

The weights between tokens need :math:`\sum_\kappa k_{i\kappa} k_{j\kappa} e^{G_{i\kappa} - G_{j\kappa}}`, which no
factorisation into :math:`e^{G_i}` and :math:`e^{-G_j}` gives without positive exponents. The chunk is split in halves,
and the halves again: for i in the right and j in the left half around an edge e the exponent is
:math:`(G_i - G_e) + (G_e - G_j)`, both at most zero, one factor a token and level, and every level is one product,
masked to its own pairs. Row e of the running sums is read from memory.
"""

# Inside a kernel Python's types do not hold: constants become constexpr, ranges are unrolled.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from latentcot.kernels.compile_together import Entry
from latentcot.kernels.delta_rule.triton_tiles import base_two, load_tile, power, store_tile


@triton.jit
def load_sums(sums, first, end, rows, key, HEADS: tl.constexpr, K: tl.constexpr):
    """Rows ``rows`` of this chunk's running sums; those past the end of the sequence are its last token's."""
    at = tl.minimum(first + rows, end - 1) * HEADS * K
    return tl.load(sums + at[:, None] + key[None, :], mask=(key < K)[None, :], other=0.0)


@triton.jit
def level_factors(sums, G, first, end, key, b: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr):
    """Level of blocks of 2b: decay from the edge to a token of a right half, from a token of a left half to the edge."""
    t = tl.arange(0, C)
    edge = load_sums(sums, first, end, t // (2 * b) * (2 * b) + b - 1, key, HEADS, K)
    right = (t // b) % 2 == 1
    return power(tl.where(right[:, None], G - edge, edge - G))


@triton.jit
def level_pairs(b: tl.constexpr, C: tl.constexpr):
    """``[C,C]``: row in the right half and column in the left half of the same block of 2b."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return (i // (2 * b) == j // (2 * b)) & ((i // b) % 2 == 1) & ((j // b) % 2 == 0)


@triton.jit
def level_pairs_transposed(b: tl.constexpr, C: tl.constexpr):
    """The transpose of :func:`level_pairs`: row in the left half, column in the right."""
    j = tl.arange(0, C)[:, None]
    i = tl.arange(0, C)[None, :]
    return (i // (2 * b) == j // (2 * b)) & ((i // b) % 2 == 1) & ((j // b) % 2 == 0)


@Entry
@triton.jit
def scale_kernel(
    q, k, log_decay, sums, reads, erases, writings, offsets, bases, owners,
    N,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    gate_token: tl.constexpr,
    gate_head: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    STORE_SUMS: tl.constexpr,
):  # fmt: skip
    """Of one chunk, head and block of channels: running sums G (base 2), and e^G q, e^G k, e^(G_C - G) k.

    All are ``[T,HEADS,K]``; the sums are stored with ``STORE_SUMS`` only. ``owners`` names the sequence of each chunk
    (N: of none), ``bases [N+1]`` the first chunk of each sequence.
    """
    blocks = tl.cdiv(K, BLOCK)
    key = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(0) // blocks % HEADS
    chunk = tl.program_id(0) // blocks // HEADS
    n = tl.load(owners + chunk)
    if n >= N:
        return
    end = tl.load(offsets + n + 1)
    first = tl.load(offsets + n) + (chunk - tl.load(bases + n)) * C
    row = tl.arange(0, C)
    inside = row < (end - first).to(tl.int32)
    g = load_tile(
        log_decay + first * gate_token + head.to(tl.int64) * gate_head, row * gate_token, key, inside, key < K
    )  # fmt: skip
    g = base_two(g.to(SUM_DTYPE))
    G = tl.cumsum(g, axis=0)
    total = tl.sum(g, axis=0)
    q_tile = load_tile(
        q + first * q_token + (head // GROUP).to(tl.int64) * q_head, row * q_token, key, inside, key < K
    ).to(tl.float32)  # fmt: skip
    k_tile = load_tile(
        k + first * k_token + (head // GROUP).to(tl.int64) * k_head, row * k_token, key, inside, key < K
    ).to(tl.float32)  # fmt: skip
    start = power(G)
    at = (first * HEADS + head) * K
    rows = row * HEADS * K
    if STORE_SUMS:
        store_tile(sums + at, G, rows, key, inside, key < K)
    store_tile(reads + at, start * q_tile, rows, key, inside, key < K)
    store_tile(erases + at, start * k_tile, rows, key, inside, key < K)
    store_tile(writings + at, power(total[None, :] - G) * k_tile, rows, key, inside, key < K)


@triton.jit
def _invert(A, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower triangular A by halving, without powers of A (see ``triton_solve.py``)."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    T = tl.where(i == j, 1.0, 0.0) - tl.where(level_pairs(1, C), A, 0.0)
    for level in tl.static_range(1, LEVELS):
        half = tl.where(level_pairs(2**level, C), A, 0.0)
        T -= tl.dot(T, tl.dot(half, T, input_precision=PRECISION), input_precision=PRECISION)
    return T


@Entry
@triton.jit
def channel_solve_kernel(
    q, k, beta, sums, solved, weights, strengths, offsets, bases, owners, scale,
    T, N,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    q_token: tl.constexpr,
    q_head: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    beta_token: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: (I + A)^-1 and P, both ``[T,HEADS,C]``, and the strengths, ``[HEADS,T]``; C = 2^LEVELS."""
    head = tl.program_id(0) % HEADS
    chunk = tl.program_id(0) // HEADS
    n = tl.load(owners + chunk)
    if n >= N:
        return
    end = tl.load(offsets + n + 1)
    first = tl.load(offsets + n) + (chunk - tl.load(bases + n)) * C
    row = tl.arange(0, C)
    inside = row < (end - first).to(tl.int32)
    q += first * q_token + (head // GROUP).to(tl.int64) * q_head
    k += first * k_token + (head // GROUP).to(tl.int64) * k_head
    sums += head.to(tl.int64) * K
    b = tl.load(beta + (first + row) * beta_token + head, mask=inside, other=0.0).to(tl.float32)
    tl.store(strengths + head.to(tl.int64) * T + first + row, b, mask=inside)

    A = tl.zeros([C, C], dtype=tl.float32)
    P = tl.zeros([C, C], dtype=tl.float32)
    own = tl.zeros([C], dtype=tl.float32)
    for part in range(WIDTH // BLOCK):
        key = part * BLOCK + tl.arange(0, BLOCK)
        q_tile = load_tile(q, row * q_token, key, inside, key < K)
        k_tile = load_tile(k, row * k_token, key, inside, key < K)
        q_wide = q_tile.to(tl.float32)
        k_wide = k_tile.to(tl.float32)
        own += tl.sum(q_wide * k_wide, axis=1)
        G = load_sums(sums, first, end, row, key, HEADS, K)
        for level in tl.static_range(LEVELS):
            factor = level_factors(sums, G, first, end, key, 2**level, C, HEADS, K)
            keys = (k_wide * factor).to(k_tile.dtype)
            queries = (q_wide * factor).to(k_tile.dtype)
            pairs = level_pairs(2**level, C)
            A += tl.where(pairs, tl.dot(keys, tl.trans(keys), input_precision=PRECISION), 0.0)
            P += tl.where(pairs, tl.dot(queries, tl.trans(keys), input_precision=PRECISION), 0.0)
    column = tl.arange(0, C)
    P = scale * tl.where(row[:, None] == column[None, :], own[:, None], P)
    inverse = _invert(b[:, None] * A, C, LEVELS, INVERSE)
    at = (first * HEADS + head) * C
    store_tile(solved + at, inverse, row * HEADS * C, column, inside, column < C)
    store_tile(weights + at, P, row * HEADS * C, column, inside, column < C)
