"""Decay attention step by step, compiled: the loops over chunks, value channels and tokens.

What is computed is the recurrence itself, not the chunk form: on a CPU a step costs as many multiply-adds as the chunk
form spends on a token, without forming decays of pairs, so a gate per channel costs nothing extra and gates of any
strength need no care. A chunk is only the unit in which tokens are fetched and states are stored for the backward pass.
"""

from typing import Any

import numpy as np

from latentcot.kernels.cpu_chunk import gates, give_gates, give_rows, give_state, rows, scale_rows, take_state
from latentcot.kernels.cpu_jit import ROWS, WIDTH, kernel, load, store

CHUNK = 32


@kernel
def _chunk_forward(n: int, K: int, q: Any, k: Any, a: Any, v: Any, V: int, state: Any, o: Any) -> None:
    """``S = diag(a_t) S + k_t^T v_t; o_t = q_t S`` for n tokens: q, k, a ``[n*K]``, v, o ``[n*V]``, state ``[V*K]``."""
    zero = q.dtype.type(0)
    for x in range(0, V, ROWS):
        r0 = x * K
        r1 = r0 + K
        r2 = r1 + K
        r3 = r2 + K
        for t in range(n):
            i = t * K
            y = t * V + x
            v0, v1, v2, v3 = v[y], v[y + 1], v[y + 2], v[y + 3]
            o0, o1, o2, o3 = zero, zero, zero, zero
            for c in range(K):
                decay, key, query = load(a, i + c, 0), load(k, i + c, 0), load(q, i + c, 0)
                s0 = decay * load(state, r0 + c, 1) + key * v0
                s1 = decay * load(state, r1 + c, 2) + key * v1
                s2 = decay * load(state, r2 + c, 3) + key * v2
                s3 = decay * load(state, r3 + c, 4) + key * v3
                store(state, r0 + c, s0, 1)
                store(state, r1 + c, s1, 2)
                store(state, r2 + c, s2, 3)
                store(state, r3 + c, s3, 4)
                o0 += query * s0
                o1 += query * s1
                o2 += query * s2
                o3 += query * s3
            o[y], o[y + 1], o[y + 2], o[y + 3] = o0, o1, o2, o3


@kernel
def _chunk_backward(
    n: int, K: int, q: Any, k: Any, a: Any, v: Any, V: int, d_o: Any, state: Any, d_state: Any, past: Any,
    dq: Any, dk: Any, da: Any, dv: Any,
) -> None:  # fmt: skip
    """Gradients of one chunk, given the state before it and ``d_state``, the gradient of the state behind it.

    ``d_state`` becomes the gradient of the state before the chunk. ``past [n*ROWS*K]`` is scratch for the states of a
    few value channels. With P the state before token t and R the gradient of the one behind it: ``R += q_t^T do_t``,
    ``dv_t = k_t R``, ``dk_t = R v_t``, ``da_t = sum_v R P``, ``R = diag(a_t) R``; and dq_t = (diag(a_t) P + k_t^T v_t)
    do_t, of which only the sum P do_t is formed here.
    """
    zero = q.dtype.type(0)
    dq[:] = zero
    dk[:] = zero
    da[:] = zero
    for x in range(0, V, ROWS):
        r0 = x * K
        r1 = r0 + K
        r2 = r1 + K
        r3 = r2 + K
        for c in range(ROWS * K):
            past[c] = state[r0 + c]
        for t in range(n - 1):
            i = t * K
            y = t * V + x
            v0, v1, v2, v3 = v[y], v[y + 1], v[y + 2], v[y + 3]
            p0 = t * ROWS * K
            p1 = p0 + K
            p2 = p1 + K
            p3 = p2 + K
            p4 = p3 + K
            for c in range(K):
                decay, key = load(a, i + c, 0), load(k, i + c, 0)
                store(past, p4 + c, decay * load(past, p0 + c, 0) + key * v0, 1)
                store(past, p4 + K + c, decay * load(past, p1 + c, 0) + key * v1, 2)
                store(past, p4 + 2 * K + c, decay * load(past, p2 + c, 0) + key * v2, 3)
                store(past, p4 + 3 * K + c, decay * load(past, p3 + c, 0) + key * v3, 4)
        for back in range(n):
            t = n - 1 - back
            i = t * K
            y = t * V + x
            v0, v1, v2, v3 = v[y], v[y + 1], v[y + 2], v[y + 3]
            g0, g1, g2, g3 = d_o[y], d_o[y + 1], d_o[y + 2], d_o[y + 3]
            z0, z1, z2, z3 = zero, zero, zero, zero
            p0 = t * ROWS * K
            p1 = p0 + K
            p2 = p1 + K
            p3 = p2 + K
            for c in range(K):
                query, key, decay = load(q, i + c, 0), load(k, i + c, 0), load(a, i + c, 0)
                s0, s1 = load(past, p0 + c, 0), load(past, p1 + c, 0)
                s2, s3 = load(past, p2 + c, 0), load(past, p3 + c, 0)
                d0 = load(d_state, r0 + c, 1) + g0 * query
                d1 = load(d_state, r1 + c, 2) + g1 * query
                d2 = load(d_state, r2 + c, 3) + g2 * query
                d3 = load(d_state, r3 + c, 4) + g3 * query
                z0 += key * d0
                z1 += key * d1
                z2 += key * d2
                z3 += key * d3
                store(dq, i + c, load(dq, i + c, 5) + ((g0 * s0 + g1 * s1) + (g2 * s2 + g3 * s3)), 5)
                store(dk, i + c, load(dk, i + c, 6) + ((v0 * d0 + v1 * d1) + (v2 * d2 + v3 * d3)), 6)
                store(da, i + c, load(da, i + c, 7) + ((d0 * s0 + d1 * s1) + (d2 * s2 + d3 * s3)), 7)
                store(d_state, r0 + c, decay * d0, 1)
                store(d_state, r1 + c, decay * d1, 2)
                store(d_state, r2 + c, decay * d2, 3)
                store(d_state, r3 + c, decay * d3, 4)
            dv[y], dv[y + 1], dv[y + 2], dv[y + 3] = z0, z1, z2, z3


@kernel
def forward(
    first: int, last: int, q: Any, k: Any, v: Any, g: Any, scale: float, initial: Any, o: Any, final: Any,
    marks: Any,
) -> None:  # fmt: skip
    """Rows and heads first … last-1 of ``[B,H]``: o and the final state, and the state before each chunk in ``marks``.

    q, k ``[B,S,H,K]``, v, o ``[B,S,H,V]``, g as in :func:`cpu_chunk.gates`, initial, final ``[B,H,K,V]``
    (initial may be empty), marks ``[B*H,n,V*K]`` padded, or empty.
    """
    S, H, K = q.shape[1], q.shape[2], -(-q.shape[3] // WIDTH) * WIDTH
    V = -(-v.shape[3] // ROWS) * ROWS
    state = np.empty(V * K, q.dtype)
    qs, ks, decays = np.empty(CHUNK * K, q.dtype), np.empty(CHUNK * K, q.dtype), np.empty(CHUNK * K, q.dtype)
    vs, out = np.empty(CHUNK * V, q.dtype), np.empty(CHUNK * V, q.dtype)
    drift, sums = np.empty(K, q.dtype), np.empty(2 * K, np.float64)
    for item in range(first, last):
        b, h = item // H, item % H
        take_state(initial, b, h, K, state)
        for t0 in range(0, S, CHUNK):
            n = min(CHUNK, S - t0)
            rows(q, b, h, t0, n, K, scale, qs)
            rows(k, b, h, t0, n, K, 1.0, ks)
            rows(v, b, h, t0, n, V, 1.0, vs)
            gates(g, b, h, t0, n, K, decays, drift, sums)
            scale_rows(state, drift, K)
            if marks.size > 0:
                marks[item, t0 // CHUNK, :] = state
            _chunk_forward(n, K, qs, ks, decays, vs, V, state, out)
            give_rows(out, b, h, t0, n, V, o)
        give_state(state, b, h, K, final)


@kernel
def backward(
    first: int, last: int, q: Any, k: Any, v: Any, g: Any, scale: float, marks: Any, d_o: Any, d_final: Any,
    dq: Any, dk: Any, dv: Any, dg: Any, d_initial: Any,
) -> None:  # fmt: skip
    """Gradients of :func:`forward` for the same rows and heads; dg ``[B,S,H,K]`` or ``[B,S,H,1]``."""
    S, H, K = q.shape[1], q.shape[2], -(-q.shape[3] // WIDTH) * WIDTH
    V = -(-v.shape[3] // ROWS) * ROWS
    d_state = np.empty(V * K, q.dtype)
    qs, ks, decays = np.empty(CHUNK * K, q.dtype), np.empty(CHUNK * K, q.dtype), np.empty(CHUNK * K, q.dtype)
    vs, ds, dvs = np.empty(CHUNK * V, q.dtype), np.empty(CHUNK * V, q.dtype), np.empty(CHUNK * V, q.dtype)
    dqs, dks, das = np.empty(CHUNK * K, q.dtype), np.empty(CHUNK * K, q.dtype), np.empty(CHUNK * K, q.dtype)
    past = np.empty(CHUNK * ROWS * K, q.dtype)
    drift, sums = np.empty(K, q.dtype), np.empty(2 * K, np.float64)
    factor = q.dtype.type(scale)
    for item in range(first, last):
        b, h = item // H, item % H
        take_state(d_final, b, h, K, d_state)
        for t0 in range((S - 1) // CHUNK * CHUNK, -1, -CHUNK):
            n = min(CHUNK, S - t0)
            rows(q, b, h, t0, n, K, scale, qs)
            rows(k, b, h, t0, n, K, 1.0, ks)
            rows(v, b, h, t0, n, V, 1.0, vs)
            rows(d_o, b, h, t0, n, V, 1.0, ds)
            gates(g, b, h, t0, n, K, decays, drift, sums)
            _chunk_backward(
                n, K, qs, ks, decays, vs, V, ds, marks[item, t0 // CHUNK], d_state, past, dqs, dks, das, dvs
            )  # fmt: skip
            scale_rows(d_state, drift, K)
            for t in range(n):
                both = q.dtype.type(0)
                for x in range(V):
                    both += vs[t * V + x] * ds[t * V + x]
                for c in range(K):
                    dqs[t * K + c] = factor * (decays[t * K + c] * dqs[t * K + c] + both * ks[t * K + c])
            give_rows(dqs, b, h, t0, n, K, dq)
            give_rows(dks, b, h, t0, n, K, dk)
            give_rows(dvs, b, h, t0, n, V, dv)
            if dg.size > 0:
                give_gates(das, decays, b, h, t0, n, K, dg)
        give_state(d_state, b, h, K, d_initial)
