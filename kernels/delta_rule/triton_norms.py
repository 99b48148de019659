r"""The L2 norms of queries and keys, and what is left of their backward: with :math:`y = r x` and :math:`\tilde d = r\, dy` from the walks,

.. math:: dx = r (dy - y (y \cdot dy)) = \tilde d - r^2 x (x \cdot \tilde d),

after the sum over the value heads that share a query or a key.
"""

import triton
import triton.language as tl

from latentcot.kernels.delta_rule.triton_tiles import load_tile, store_tile


@triton.jit
def norm_kernel(
    x, norms,
    T,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    x_token: tl.constexpr,
    x_head: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """``norms [HEADS,T]``: (sum of squares + EPS)^(-1/2) of every row of x ``[T,HEADS,K]``."""
    head = tl.program_id(0) % HEADS
    first = (tl.program_id(0) // HEADS).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    inside = first + row < T
    key = tl.arange(0, WIDTH)
    tile = load_tile(x + first * x_token + head.to(tl.int64) * x_head, row * x_token, key, inside, key < K)
    tile = tile.to(tl.float32)
    norm = 1.0 / tl.sqrt(tl.sum(tile * tile, axis=1) + EPS)
    tl.store(norms + head.to(tl.int64) * T + first + row, norm, mask=inside)


@triton.jit
def norm_backward_kernel(
    x, d_scaled, norms, d_x,
    T,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    x_token: tl.constexpr,
    x_head: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """x, d_x ``[T,HEADS,K]``, ``d_scaled [T,HEADS*GROUP,K]``, ``norms [HEADS,T]``: ROWS tokens of one head."""
    head = tl.program_id(0) % HEADS
    first = (tl.program_id(0) // HEADS).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    inside = first + row < T
    key = tl.arange(0, WIDTH)
    tile = load_tile(x + first * x_token + head.to(tl.int64) * x_head, row * x_token, key, inside, key < K)
    tile = tile.to(tl.float32)
    d_tile = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for part in range(GROUP):
        at = (first * HEADS + head) * GROUP + part
        d_tile += load_tile(d_scaled + at * K, row * HEADS * GROUP * K, key, inside, key < K).to(tl.float32)
    norm = tl.load(norms + head.to(tl.int64) * T + first + row, mask=inside, other=0.0)
    along = norm * norm * tl.sum(tile * d_tile, axis=1)
    d_tile -= along[:, None] * tile
    store_tile(d_x + (first * HEADS + head) * K, d_tile, row * HEADS * K, key, inside, key < K)
