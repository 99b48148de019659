"""The gated scan step by step, compiled: a block of channels walks through the tokens."""

from typing import Any

import numpy as np

from latentcot.kernels.cpu_jit import decay, kernel, load, store

BLOCK = 128  # channels of one item: their state stays in the first-level cache


@kernel
def forward(first: int, last: int, x: Any, g: Any, initial: Any, h: Any) -> None:
    """``h_t = e^{g_t} h_{t-1} + x_t`` for items first … last-1, an item being a row and a block of channels.

    x, g, h ``[B,S,D]``, initial ``[B,D]`` or empty (zero).
    """
    S, D = x.shape[1], x.shape[2]
    blocks = -(-D // BLOCK)
    xs, gs, hs = x.reshape(-1), g.reshape(-1), h.reshape(-1)
    state = np.empty(BLOCK, x.dtype)
    for item in range(first, last):
        b, d0 = item // blocks, item % blocks * BLOCK
        width = min(BLOCK, D - d0)
        for c in range(width):
            state[c] = initial[b, d0 + c] if initial.size > 0 else 0
        for t in range(S):
            i = (b * S + t) * D + d0
            for c in range(width):
                new = decay(load(gs, i + c, 0)) * load(state, c, 1) + load(xs, i + c, 0)
                store(state, c, new, 1)
                store(hs, i + c, new, 2)


@kernel
def backward(first: int, last: int, g: Any, initial: Any, h: Any, dh: Any, dx: Any, dg: Any, d_initial: Any) -> None:
    """Right to left: ``dx_t = dh_t + a_{t+1} dx_{t+1}``, ``dg_t = a_t dx_t h_{t-1}``, ``d_initial = a_1 dx_1``, a = e^g."""
    S, D = h.shape[1], h.shape[2]
    blocks = -(-D // BLOCK)
    gs, hs, dhs = g.reshape(-1), h.reshape(-1), dh.reshape(-1)
    dxs, dgs = dx.reshape(-1), dg.reshape(-1)
    carried = np.empty(BLOCK, h.dtype)
    for item in range(first, last):
        b, d0 = item // blocks, item % blocks * BLOCK
        width = min(BLOCK, D - d0)
        carried[:] = 0
        for back in range(S):
            t = S - 1 - back
            i = (b * S + t) * D + d0
            if t > 0:
                for c in range(width):
                    total = load(dhs, i + c, 0) + load(carried, c, 1)
                    weighted = decay(load(gs, i + c, 0)) * total
                    store(dxs, i + c, total, 2)
                    store(dgs, i + c, weighted * load(hs, i - D + c, 0), 3)
                    store(carried, c, weighted, 1)
            else:
                for c in range(width):
                    total = dhs[i + c] + carried[c]
                    before = initial[b, d0 + c] if initial.size > 0 else h.dtype.type(0)
                    dxs[i + c] = total
                    dgs[i + c] = decay(gs[i + c]) * total * before
                    if d_initial.size > 0:
                        d_initial[b, d0 + c] = decay(gs[i + c]) * total
