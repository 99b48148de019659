r"""The triangular inverse of every chunk, :math:`\Theta = (I + A)^{-1}`, all chunks at once.

:math:`A_{ij} = \beta_i (k_i \cdot k_j) e^{G_i - G_j}` for j < i. A program owns one chunk of one value head. A is formed
in blocks of 16 x 16; the blocks on the diagonal are inverted by halving,

.. math:: T_1 = I, \quad T_{2b} = T_b - T_b (A \odot M_b) T_b,

:math:`M_b` marking the rows in the right half and the columns in the left half of each block of 2b tokens; the others
follow by substitution, :math:`\Theta_{ab} = -\Theta_{aa} \sum_{b \le c < a} A_{ac} \Theta_{cb}`. No power of A is ever
formed: with repeated keys and :math:`\beta` near 2 the powers grow like binomial coefficients while the inverse stays
small, and their sum would lose every digit.

The program also writes the running sums of the log-decays (base 2) and the write strengths, head by head, so that the
kernels that walk the chunks one after the other read both in contiguous pieces and sum nothing themselves.
"""

# Inside a kernel Python's types do not hold: constants become constexpr, ranges are unrolled.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from latentcot.kernels.compile_together import Entry
from latentcot.kernels.delta_rule.triton_tiles import base_two, load_tile, store_tile


@triton.jit
def softplus(x):
    """log(1 + e^x) in float32, exact for large and for very negative x."""
    small = tl.exp(-tl.abs(x))
    # 1 + small rounds; the quotient repairs what log sees of it
    one = 1.0 + small
    log = tl.where(one == 1.0, small, tl.log(one) * (small / tl.where(one == 1.0, 1.0, one - 1.0)))
    return tl.maximum(x, 0.0) + log


@triton.jit
def _row(tile, a, ROWS: tl.constexpr):
    """Row ``a`` of ``tile [ROWS,16]``: a tile is no list that a constant could index."""
    if ROWS == 1:
        row = tl.reshape(tile, [16])
    else:
        row = tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == a, tile, 0.0), axis=0)
    return row


@triton.jit
def _system(products, b, G_row, G_column, DIAGONAL: tl.constexpr, GATED: tl.constexpr):
    """A block of A from the products of its keys; on the diagonal only what lies strictly below it."""
    if GATED:
        exponent = (G_row[:, None] - G_column[None, :]).to(tl.float32)
        if DIAGONAL:
            below = tl.arange(0, 16)[:, None] > tl.arange(0, 16)[None, :]
            exponent = tl.where(below, exponent, float("-inf"))
        weights = b[:, None] * tl.exp2(exponent)
    elif DIAGONAL:
        below = tl.arange(0, 16)[:, None] > tl.arange(0, 16)[None, :]
        weights = tl.where(below, b[:, None], 0.0)
    else:
        weights = b[:, None]
    return products * weights


@triton.jit
def _invert(A, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower triangular block of 16 tokens."""
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    T = tl.where(i == j, 1.0, 0.0) - tl.where((i // 2 == j // 2) & (i > j), A, 0.0)
    for bits in range(1, 4):  # a real loop: four blocks with every level unrolled take most of the compilation
        lower = (i >> (bits + 1) == j >> (bits + 1)) & ((i >> bits) % 2 == 1) & ((j >> bits) % 2 == 0)
        inner = tl.dot(tl.where(lower, A, 0.0), T, input_precision=PRECISION)
        T -= tl.dot(T, inner, input_precision=PRECISION)
    return T


@Entry
@triton.jit
def solve_kernel(
    k, beta, log_decay, log_rate, bias, solved, sums, strengths, offsets, bases, owners,
    T, N,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    k_token: tl.constexpr,
    k_head: tl.constexpr,
    beta_token: tl.constexpr,
    gate_token: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    RAW: tl.constexpr,
    LARGEST: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head: ``solved [T,HEADS,C]``, ``sums`` and ``strengths [HEADS,T]``.

    ``owners`` names the sequence of each chunk (N for those that no sequence has), ``bases [N+1]`` the first chunk of
    each sequence.

    With ``RAW`` beta is LARGEST·sigmoid of what ``beta`` holds and the log-decay -e^log_rate·softplus(``log_decay`` +
    bias), both ``[HEADS]``.
    """
    chunk = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    n = tl.load(owners + chunk)
    if n >= N:
        return
    end = tl.load(offsets + n + 1)
    first = tl.load(offsets + n) + (chunk - tl.load(bases + n)) * C

    strengths += head.to(tl.int64) * T
    t = first + tl.arange(0, C // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = t < end
    b = tl.load(beta + t * beta_token + head, mask=inside, other=0.0).to(tl.float32)
    if RAW:
        b = tl.where(inside, LARGEST * tl.sigmoid(b), 0.0)
    tl.store(strengths + t, b, mask=inside)
    if GATED:
        g = tl.load(log_decay + t * gate_token + head, mask=inside, other=0.0).to(SUM_DTYPE)
        if RAW:
            rate = tl.exp(tl.load(log_rate + head).to(tl.float32))
            g = -rate * softplus(g.to(tl.float32) + tl.load(bias + head).to(tl.float32))
            g = tl.where(inside, g, 0.0).to(SUM_DTYPE)
        g = base_two(g)
        G = tl.cumsum(g, axis=1)
        if C > 16:  # a sum along one block alone does not compile
            blocks = tl.sum(g, axis=1)
            G += (tl.cumsum(blocks, axis=0) - blocks)[:, None]
        tl.store(sums + head.to(tl.int64) * T + t, G, mask=inside)
    else:
        G = b

    b0, G0 = _row(b, 0, C // 16), _row(G, 0, C // 16)
    if C > 16:
        b1, G1 = _row(b, 1, C // 16), _row(G, 1, C // 16)
    if C > 32:
        b2, G2 = _row(b, 2, C // 16), _row(G, 2, C // 16)
        b3, G3 = _row(b, 3, C // 16), _row(G, 3, C // 16)

    # products of keys, block by block: named, because a list of tiles can not be carried through a loop
    k += first * k_token + (head // GROUP).to(tl.int64) * k_head
    row = tl.arange(0, 16).to(tl.int64)
    rows = row * k_token
    left = end - first
    sixteen = tl.full([], 16, dtype=tl.int64)
    step = sixteen * k_token
    A00 = tl.zeros([16, 16], dtype=tl.float32)
    if C > 16:
        A10 = tl.zeros([16, 16], dtype=tl.float32)
        A11 = tl.zeros([16, 16], dtype=tl.float32)
    if C > 32:
        A20 = tl.zeros([16, 16], dtype=tl.float32)
        A21 = tl.zeros([16, 16], dtype=tl.float32)
        A22 = tl.zeros([16, 16], dtype=tl.float32)
        A30 = tl.zeros([16, 16], dtype=tl.float32)
        A31 = tl.zeros([16, 16], dtype=tl.float32)
        A32 = tl.zeros([16, 16], dtype=tl.float32)
        A33 = tl.zeros([16, 16], dtype=tl.float32)
    for part in tl.static_range(WIDTH // BLOCK):
        column = part * BLOCK + tl.arange(0, BLOCK)
        k0 = load_tile(k, rows, column, row < left, column < K)
        A00 = tl.dot(k0, tl.trans(k0), A00, input_precision=PRECISION)
        if C > 16:
            k1 = load_tile(k + step, rows, column, row + 16 < left, column < K)
            A10 = tl.dot(k1, tl.trans(k0), A10, input_precision=PRECISION)
            A11 = tl.dot(k1, tl.trans(k1), A11, input_precision=PRECISION)
        if C > 32:
            k2 = load_tile(k + 2 * step, rows, column, row + 32 < left, column < K)
            A20 = tl.dot(k2, tl.trans(k0), A20, input_precision=PRECISION)
            A21 = tl.dot(k2, tl.trans(k1), A21, input_precision=PRECISION)
            A22 = tl.dot(k2, tl.trans(k2), A22, input_precision=PRECISION)
            k3 = load_tile(k + 3 * step, rows, column, row + 48 < left, column < K)
            A30 = tl.dot(k3, tl.trans(k0), A30, input_precision=PRECISION)
            A31 = tl.dot(k3, tl.trans(k1), A31, input_precision=PRECISION)
            A32 = tl.dot(k3, tl.trans(k2), A32, input_precision=PRECISION)
            A33 = tl.dot(k3, tl.trans(k3), A33, input_precision=PRECISION)

    solved += (first * HEADS + head) * C
    rows = row * HEADS * C
    column = tl.arange(0, 16)
    whole = column < 16
    none = tl.zeros([16, 16], dtype=tl.float32)
    A00 = _invert(_system(A00, b0, G0, G0, True, GATED), INVERSE)
    store_tile(solved, A00, rows, column, row < left, whole)
    if C > 16:
        down = sixteen * HEADS * C
        A11 = _invert(_system(A11, b1, G1, G1, True, GATED), INVERSE)
        A10 = _system(A10, b1, G1, G0, False, GATED)
        T10 = -tl.dot(A11, tl.dot(A10, A00, input_precision=INVERSE), input_precision=INVERSE)
        store_tile(solved + 16, none, rows, column, row < left, whole)
        store_tile(solved + down, T10, rows, column, row + 16 < left, whole)
        store_tile(solved + down + 16, A11, rows, column, row + 16 < left, whole)
    if C > 32:
        A22 = _invert(_system(A22, b2, G2, G2, True, GATED), INVERSE)
        A33 = _invert(_system(A33, b3, G3, G3, True, GATED), INVERSE)
        A20 = _system(A20, b2, G2, G0, False, GATED)
        A21 = _system(A21, b2, G2, G1, False, GATED)
        A30 = _system(A30, b3, G3, G0, False, GATED)
        A31 = _system(A31, b3, G3, G1, False, GATED)
        A32 = _system(A32, b3, G3, G2, False, GATED)
        T21 = -tl.dot(A22, tl.dot(A21, A11, input_precision=INVERSE), input_precision=INVERSE)
        T32 = -tl.dot(A33, tl.dot(A32, A22, input_precision=INVERSE), input_precision=INVERSE)
        T20 = tl.dot(A20, A00, input_precision=INVERSE)
        T20 = -tl.dot(A22, tl.dot(A21, T10, T20, input_precision=INVERSE), input_precision=INVERSE)
        T31 = tl.dot(A31, A11, input_precision=INVERSE)
        T31 = -tl.dot(A33, tl.dot(A32, T21, T31, input_precision=INVERSE), input_precision=INVERSE)
        T30 = tl.dot(A30, A00, input_precision=INVERSE)
        T30 = tl.dot(A31, T10, T30, input_precision=INVERSE)
        T30 = -tl.dot(A33, tl.dot(A32, T20, T30, input_precision=INVERSE), input_precision=INVERSE)
        store_tile(solved + 32, none, rows, column, row < left, whole)
        store_tile(solved + 48, none, rows, column, row < left, whole)
        store_tile(solved + down + 32, none, rows, column, row + 16 < left, whole)
        store_tile(solved + down + 48, none, rows, column, row + 16 < left, whole)
        store_tile(solved + 2 * down, T20, rows, column, row + 32 < left, whole)
        store_tile(solved + 2 * down + 16, T21, rows, column, row + 32 < left, whole)
        store_tile(solved + 2 * down + 32, A22, rows, column, row + 32 < left, whole)
        store_tile(solved + 2 * down + 48, none, rows, column, row + 32 < left, whole)
        store_tile(solved + 3 * down, T30, rows, column, row + 48 < left, whole)
        store_tile(solved + 3 * down + 16, T31, rows, column, row + 48 < left, whole)
        store_tile(solved + 3 * down + 32, T32, rows, column, row + 48 < left, whole)
        store_tile(solved + 3 * down + 48, A33, rows, column, row + 48 < left, whole)
