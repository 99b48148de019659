"""Pieces shared by the compiled matrix-state kernels: tokens of a chunk into local rows, states in and out.

Inside a kernel the state is held by value channel, ``[V,K]``: the recurrences of two value channels do not depend on
each other, so a few rows and the tokens of one chunk stay in the first-level cache while they are worked on. K is
padded to a multiple of ``WIDTH`` and V to a multiple of ``ROWS`` by zeros, which change nothing.

:func:`gates` also gives one factor per channel and chunk. Multiplying by a rounded e^g at every token drifts: with
e^g = 1 - 2^-12 the error of a weight 4096 tokens back is that of one rounding times 4096. The exact decay of the chunk,
from the sum of its log-decays in float64, over the product of the rounded ones is the correction, applied to what comes
in from earlier chunks.
"""

from typing import Any

import numpy as np

from latentcot.kernels.cpu_jit import decay, kernel, load, store


@kernel
def rows(x: Any, b: int, h: int, t0: int, n: int, width: int, scale: float, out: Any) -> None:
    """``out[t*width + c] = scale * x[b, t0+t, h, c]`` for t < n, zeros beyond the channels of x ``[B,S,H,size]``."""
    S, H, size = x.shape[1], x.shape[2], x.shape[3]
    flat = x.reshape(-1)
    factor = x.dtype.type(scale)
    for t in range(n):
        source, target = ((b * S + t0 + t) * H + h) * size, t * width
        for c in range(size):
            store(out, target + c, factor * load(flat, source + c, 0), 1)
        for c in range(size, width):
            out[target + c] = 0


@kernel
def gates(g: Any, b: int, h: int, t0: int, n: int, width: int, out: Any, drift: Any, sums: Any) -> None:
    """Decays of a chunk and the correction of their rounding: ``out [n*width]``, ``drift [width]``.

    g: log-decay ``[B,S,H,K]``, or with K = 1 one for all channels; B = S = 1 serves all tokens. ``sums`` float64
    ``[2*width]`` is scratch.
    """
    B, S, H, size = g.shape
    exponents = g.reshape(-1)
    row = b if B > 1 else 0
    for c in range(size):
        sums[c] = 0.0
        sums[width + c] = 1.0
    for t in range(n):
        source, target = ((row * S + (t0 + t if S > 1 else 0)) * H + h) * size, t * width
        for c in range(size):
            exponent = load(exponents, source + c, 0)
            factor = decay(exponent)
            store(out, target + c, factor, 1)
            store(sums, c, load(sums, c, 2) + exponent, 2)
            store(sums, width + c, load(sums, width + c, 3) * factor, 3)
        fill = out[target] if size == 1 else out.dtype.type(0)
        for c in range(size, width):
            out[target + c] = fill
    for c in range(size):
        # below the threshold nothing comes through the chunk that could be seen beside its own writes
        drift[c] = np.exp(sums[c]) / sums[width + c] if 1e-30 < sums[width + c] < 1.0 else 1.0
    for c in range(size, width):
        drift[c] = drift[0]


@kernel
def scale_rows(state: Any, factors: Any, width: int) -> None:
    """Multiply each row of ``state [V*width]`` by ``factors [width]``."""
    for x in range(0, len(state), width):
        for c in range(width):
            store(state, x + c, load(state, x + c, 0) * load(factors, c, 1), 0)


@kernel
def take_state(source: Any, b: int, h: int, width: int, state: Any) -> None:
    """``[B,H,K,V]`` at (b, h) into rows ``[V*width]``; an empty source is the zero state."""
    state[:] = 0
    if source.size > 0:
        for x in range(source.shape[3]):
            for c in range(source.shape[2]):
                state[x * width + c] = source[b, h, c, x]


@kernel
def give_state(state: Any, b: int, h: int, width: int, target: Any) -> None:
    """Rows ``[V*width]`` into ``[B,H,K,V]`` at (b, h), or nowhere if the target is empty."""
    if target.size > 0:
        for c in range(target.shape[2]):
            for x in range(target.shape[3]):
                target[b, h, c, x] = state[x * width + c]


@kernel
def give_rows(source: Any, b: int, h: int, t0: int, n: int, width: int, target: Any) -> None:
    """``target[b, t0+t, h, c] = source[t*width + c]`` for the channels of the target ``[B,S,H,size]``."""
    S, H, size = target.shape[1], target.shape[2], target.shape[3]
    flat = target.reshape(-1)
    for t in range(n):
        row = ((b * S + t0 + t) * H + h) * size
        for c in range(size):
            store(flat, row + c, load(source, t * width + c, 0), 1)


@kernel
def give_gates(source: Any, factors: Any, b: int, h: int, t0: int, n: int, width: int, target: Any) -> None:
    """``target = factors * source`` like :func:`give_rows`; a target of one channel takes the sum over the row."""
    S, H, size = target.shape[1], target.shape[2], target.shape[3]
    flat = target.reshape(-1)
    for t in range(n):
        row = ((b * S + t0 + t) * H + h) * size
        if size == 1:
            total = source.dtype.type(0)
            for c in range(width):
                total += factors[t * width + c] * source[t * width + c]
            flat[row] = total
        else:
            for c in range(size):
                store(flat, row + c, load(factors, t * width + c, 0) * load(source, t * width + c, 0), 1)
