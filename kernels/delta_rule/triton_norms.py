"""Unit vectors from queries and keys, and their reciprocal lengths; the walks finish the backward (``triton_keys.py``)."""

import triton
import triton.language as tl

from latentcot.kernels.compile_together import Entry
from latentcot.kernels.delta_rule.triton_tiles import load_tile, store_tile


@Entry
@triton.jit
def norm_kernel(
    x, unit, norms,
    T,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    x_token: tl.constexpr,
    x_head: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """``norms [HEADS,T]``, (sum of squares + EPS)^(-1/2) of every row of x ``[T,HEADS,K]``, and ``unit``, x times that."""
    head = tl.program_id(0) % HEADS
    first = (tl.program_id(0) // HEADS).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    inside = first + row < T
    key = tl.arange(0, WIDTH)
    tile = load_tile(x + first * x_token + head.to(tl.int64) * x_head, row * x_token, key, inside, key < K)
    tile = tile.to(tl.float32)
    norm = 1.0 / tl.sqrt(tl.sum(tile * tile, axis=1) + EPS)
    tl.store(norms + head.to(tl.int64) * T + first + row, norm, mask=inside)
    store_tile(unit + (first * HEADS + head) * K, tile * norm[:, None], row * HEADS * K, key, inside, key < K)
