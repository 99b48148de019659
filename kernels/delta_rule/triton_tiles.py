"""What the delta rule's kernels share: where a program is, tiles, and decays between the tokens of a chunk.

Tokens are flat (``T = B*S``), ``offsets [N+1]`` bounds the sequences. Chunks of a sequence are counted from its own
beginning, so a chunk never holds tokens of two sequences; rows past the end of a sequence are loaded as zeros, which
are neutral (k = 0, beta = 0) and are never stored.
"""

# Inside a kernel Python's types do not hold: constants become constexpr.
# pyright: reportArgumentType=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Log-decays (base 2) below this act as a full reset. Sums of a chunk then stay finite, so no difference is inf - inf,
# and 2^-100 of any float32 state is gone next to anything that is written.
RESET = tl.constexpr(-100.0)


@triton.jit
def load_tile(base, rows, columns, rows_inside, columns_inside):
    """``[rows, columns]`` from ``base`` and the two offsets, zero where either mask is false."""
    return tl.load(
        base + rows[:, None] + columns[None, :], mask=rows_inside[:, None] & columns_inside[None, :], other=0.0
    )


@triton.jit
def store_tile(base, tile, rows, columns, rows_inside, columns_inside):
    tl.store(
        base + rows[:, None] + columns[None, :],
        tile.to(base.dtype.element_ty),
        mask=rows_inside[:, None] & columns_inside[None, :],
    )


@triton.jit
def running_sums(sums, begin, first, end, C: tl.constexpr, SUM_CHUNK: tl.constexpr):
    """Running sums of log-decays (base 2) from the beginning of this chunk ``[C]``, and over all of it.

    ``sums`` points at this head's row and restarts every ``SUM_CHUNK`` tokens, a multiple of C; a chunk that begins in
    between subtracts what came before it. Rows past the end carry the last sum, so that no exponent is above zero.
    """
    t = first + tl.arange(0, C)
    total = tl.load(sums + tl.minimum(first + C, end) - 1)
    G = tl.load(sums + t, mask=t < end, other=0.0)
    G = tl.where(t < end, G, total)
    if SUM_CHUNK > C:
        before = tl.load(sums + first - 1, mask=(first - begin) % SUM_CHUNK != 0, other=0.0)
        G -= before
        total -= before
    return G, total


@triton.jit
def base_two(log_decay):
    """Log-decays in base 2, none below ``RESET``. What is no log-decay, above zero or NaN, becomes NaN and shows."""
    return tl.where(log_decay <= 0, tl.maximum(log_decay * LOG2_E, RESET), float("nan"))


@triton.jit
def power(exponent):
    """2^exponent in float32; the difference of two sums is taken in their own dtype before."""
    return tl.exp2(exponent.to(tl.float32))


@triton.jit
def pair_decays(G, C: tl.constexpr, GATED: tl.constexpr, OWN: tl.constexpr = True):
    """``[C,C]`` weights of token j (column) seen from token i (row): 2^(G_i - G_j) for j <= i (j < i without ``OWN``), else 0."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if OWN:
        seen = j <= i
    else:
        seen = j < i
    if GATED:
        decays = tl.exp2(tl.where(seen, (G[:, None] - G[None, :]).to(tl.float32), float("-inf")))
    else:
        decays = tl.where(seen, 1.0, 0.0)
    return decays


@triton.jit
def diagonal(weights, C: tl.constexpr):
    """The diagonal ``[C]`` of ``weights [C,C]``."""
    return tl.sum(tl.where(tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :], weights, 0.0), axis=1)


@triton.jit
def pair_decays_transposed(G, C: tl.constexpr, GATED: tl.constexpr, OWN: tl.constexpr = True):
    """The transpose of :func:`pair_decays`, formed as such: row j, column i."""
    j = tl.arange(0, C)[:, None]
    i = tl.arange(0, C)[None, :]
    if OWN:
        seen = j <= i
    else:
        seen = j < i
    if GATED:
        decays = tl.exp2(tl.where(seen, (G[None, :] - G[:, None]).to(tl.float32), float("-inf")))
    else:
        decays = tl.where(seen, 1.0, 0.0)
    return decays
