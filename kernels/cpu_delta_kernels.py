"""The delta rule step by step, compiled: the loops over chunks, value channels and tokens.

By value channel the recurrence is one of vectors: with P the row of the state before token t,

    f = v - (k ⊙ a) P,   u = beta f,   S = a ⊙ P + u k,   o = (q ⊙ a) P + (q k) u

so no system has to be solved, and rows need not wait for each other. What a chunk is for: see ``cpu_decay_kernels.py``.
"""

from typing import Any

import numpy as np

from latentcot.kernels.cpu_chunk import gates, give_gates, give_rows, give_state, rows, scale_rows, take_state
from latentcot.kernels.cpu_jit import ROWS, WIDTH, kernel, load, store

CHUNK = 32


@kernel
def _chunk_forward(
    n: int, K: int, q: Any, k: Any, a: Any, v: Any, V: int, beta: Any, overlap: Any, state: Any, o: Any
) -> None:
    """n tokens: q, k, a ``[n*K]``, v, o ``[n*V]``, beta and overlap = q k ``[n]``, state ``[V*K]``."""
    zero = q.dtype.type(0)
    for x in range(0, V, ROWS):
        r0 = x * K
        r1 = r0 + K
        r2 = r1 + K
        r3 = r2 + K
        for t in range(n):
            i = t * K
            y = t * V + x
            w0, w1, w2, w3 = zero, zero, zero, zero
            o0, o1, o2, o3 = zero, zero, zero, zero
            for c in range(K):
                decay = load(a, i + c, 0)
                key, query = decay * load(k, i + c, 0), decay * load(q, i + c, 0)
                s0, s1 = load(state, r0 + c, 1), load(state, r1 + c, 2)
                s2, s3 = load(state, r2 + c, 3), load(state, r3 + c, 4)
                w0 += key * s0
                w1 += key * s1
                w2 += key * s2
                w3 += key * s3
                o0 += query * s0
                o1 += query * s1
                o2 += query * s2
                o3 += query * s3
            strength, both = beta[t], overlap[t]
            u0, u1 = strength * (v[y] - w0), strength * (v[y + 1] - w1)
            u2, u3 = strength * (v[y + 2] - w2), strength * (v[y + 3] - w3)
            o[y], o[y + 1], o[y + 2], o[y + 3] = o0 + both * u0, o1 + both * u1, o2 + both * u2, o3 + both * u3
            for c in range(K):
                decay, key = load(a, i + c, 0), load(k, i + c, 0)
                store(state, r0 + c, decay * load(state, r0 + c, 1) + key * u0, 1)
                store(state, r1 + c, decay * load(state, r1 + c, 2) + key * u1, 2)
                store(state, r2 + c, decay * load(state, r2 + c, 3) + key * u2, 3)
                store(state, r3 + c, decay * load(state, r3 + c, 4) + key * u3, 4)


@kernel
def _chunk_backward(
    n: int, K: int, q: Any, k: Any, a: Any, v: Any, V: int, beta: Any, d_o: Any, state: Any, d_state: Any, past: Any,
    missed: Any, dq: Any, dk: Any, da: Any, dv: Any, d_beta: Any, read: Any,
) -> None:  # fmt: skip
    """Gradients of one chunk, given the state before it and ``d_state``, the gradient of the state behind it.

    ``d_state`` becomes the gradient of the state before the chunk. ``past [n*ROWS*K]`` and ``missed [n*ROWS]`` are
    scratch for the states and the f of a few value channels. With R the gradient of the state behind token t:
    ``R += q_t^T do_t``, ``du = k_t R``, ``dv = beta du``, ``dbeta = du f``, ``E = R - k_t^T dv`` (the gradient of the
    decayed state), ``dk = R u - diag(a) P dv``, ``da = sum_v E P``, ``R = diag(a) E``; and
    dq = diag(a) P do + k (u do), of which P do goes to ``dq`` and u do to ``read``.
    """
    zero = q.dtype.type(0)
    dq[:] = zero
    dk[:] = zero
    da[:] = zero
    d_beta[:] = zero
    read[:] = zero
    for x in range(0, V, ROWS):
        r0 = x * K
        r1 = r0 + K
        r2 = r1 + K
        r3 = r2 + K
        for c in range(ROWS * K):
            past[c] = state[r0 + c]
        for t in range(n):
            i = t * K
            y = t * V + x
            p0 = t * ROWS * K
            p1 = p0 + K
            p2 = p1 + K
            p3 = p2 + K
            p4 = p3 + K
            w0, w1, w2, w3 = zero, zero, zero, zero
            for c in range(K):
                key = load(a, i + c, 0) * load(k, i + c, 0)
                w0 += key * load(past, p0 + c, 0)
                w1 += key * load(past, p1 + c, 0)
                w2 += key * load(past, p2 + c, 0)
                w3 += key * load(past, p3 + c, 0)
            f0, f1, f2, f3 = v[y] - w0, v[y + 1] - w1, v[y + 2] - w2, v[y + 3] - w3
            m = t * ROWS
            missed[m], missed[m + 1], missed[m + 2], missed[m + 3] = f0, f1, f2, f3
            strength = beta[t]
            u0, u1, u2, u3 = strength * f0, strength * f1, strength * f2, strength * f3
            if t + 1 < n:
                for c in range(K):
                    decay, key = load(a, i + c, 0), load(k, i + c, 0)
                    store(past, p4 + c, decay * load(past, p0 + c, 0) + key * u0, 1)
                    store(past, p4 + K + c, decay * load(past, p1 + c, 0) + key * u1, 2)
                    store(past, p4 + 2 * K + c, decay * load(past, p2 + c, 0) + key * u2, 3)
                    store(past, p4 + 3 * K + c, decay * load(past, p3 + c, 0) + key * u3, 4)
        for back in range(n):
            t = n - 1 - back
            i = t * K
            y = t * V + x
            m = t * ROWS
            p0 = t * ROWS * K
            p1 = p0 + K
            p2 = p1 + K
            p3 = p2 + K
            g0, g1, g2, g3 = d_o[y], d_o[y + 1], d_o[y + 2], d_o[y + 3]
            z0, z1, z2, z3 = zero, zero, zero, zero
            for c in range(K):
                query, key = load(q, i + c, 0), load(k, i + c, 0)
                z0 += key * (load(d_state, r0 + c, 1) + g0 * query)
                z1 += key * (load(d_state, r1 + c, 2) + g1 * query)
                z2 += key * (load(d_state, r2 + c, 3) + g2 * query)
                z3 += key * (load(d_state, r3 + c, 4) + g3 * query)
            strength = beta[t]
            f0, f1, f2, f3 = missed[m], missed[m + 1], missed[m + 2], missed[m + 3]
            u0, u1, u2, u3 = strength * f0, strength * f1, strength * f2, strength * f3
            e0, e1, e2, e3 = strength * z0, strength * z1, strength * z2, strength * z3
            d_beta[t] += (z0 * f0 + z1 * f1) + (z2 * f2 + z3 * f3)
            read[t] += (g0 * u0 + g1 * u1) + (g2 * u2 + g3 * u3)
            dv[y], dv[y + 1], dv[y + 2], dv[y + 3] = e0, e1, e2, e3
            for c in range(K):
                query, key, decay = load(q, i + c, 0), load(k, i + c, 0), load(a, i + c, 0)
                s0, s1 = load(past, p0 + c, 0), load(past, p1 + c, 0)
                s2, s3 = load(past, p2 + c, 0), load(past, p3 + c, 0)
                d0 = load(d_state, r0 + c, 1) + g0 * query
                d1 = load(d_state, r1 + c, 2) + g1 * query
                d2 = load(d_state, r2 + c, 3) + g2 * query
                d3 = load(d_state, r3 + c, 4) + g3 * query
                erased = (e0 * s0 + e1 * s1) + (e2 * s2 + e3 * s3)
                written = (u0 * d0 + u1 * d1) + (u2 * d2 + u3 * d3)
                store(dq, i + c, load(dq, i + c, 5) + ((g0 * s0 + g1 * s1) + (g2 * s2 + g3 * s3)), 5)
                store(dk, i + c, load(dk, i + c, 6) + (written - decay * erased), 6)
                d0 -= key * e0
                d1 -= key * e1
                d2 -= key * e2
                d3 -= key * e3
                store(da, i + c, load(da, i + c, 7) + ((d0 * s0 + d1 * s1) + (d2 * s2 + d3 * s3)), 7)
                store(d_state, r0 + c, decay * d0, 1)
                store(d_state, r1 + c, decay * d1, 2)
                store(d_state, r2 + c, decay * d2, 3)
                store(d_state, r3 + c, decay * d3, 4)


@kernel
def forward(
    first: int, last: int, q: Any, k: Any, v: Any, beta: Any, g: Any, scale: float, initial: Any, o: Any,
    final: Any, marks: Any,
) -> None:  # fmt: skip
    """Rows and heads first … last-1 of ``[B,H]``, as ``cpu_decay_kernels.forward``; beta ``[B,S,H]``."""
    S, H, K = q.shape[1], q.shape[2], -(-q.shape[3] // WIDTH) * WIDTH
    V = -(-v.shape[3] // ROWS) * ROWS
    state = np.empty(V * K, q.dtype)
    qs, ks, decays = np.empty(CHUNK * K, q.dtype), np.empty(CHUNK * K, q.dtype), np.empty(CHUNK * K, q.dtype)
    vs, out = np.empty(CHUNK * V, q.dtype), np.empty(CHUNK * V, q.dtype)
    bs, overlap = np.empty(CHUNK, q.dtype), np.empty(CHUNK, q.dtype)
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
            for t in range(n):
                bs[t] = beta[b, t0 + t, h]
                both = q.dtype.type(0)
                for c in range(K):
                    both += qs[t * K + c] * ks[t * K + c]
                overlap[t] = both
            scale_rows(state, drift, K)
            if marks.size > 0:
                marks[item, t0 // CHUNK, :] = state
            _chunk_forward(n, K, qs, ks, decays, vs, V, bs, overlap, state, out)
            give_rows(out, b, h, t0, n, V, o)
        give_state(state, b, h, K, final)


@kernel
def backward(
    first: int, last: int, q: Any, k: Any, v: Any, beta: Any, g: Any, scale: float, marks: Any, d_o: Any,
    d_final: Any, dq: Any, dk: Any, dv: Any, d_beta: Any, dg: Any, d_initial: Any,
) -> None:  # fmt: skip
    """Gradients of :func:`forward` for the same rows and heads; dg ``[B,S,H,K]`` or ``[B,S,H,1]``."""
    S, H, K = q.shape[1], q.shape[2], -(-q.shape[3] // WIDTH) * WIDTH
    V = -(-v.shape[3] // ROWS) * ROWS
    d_state = np.empty(V * K, q.dtype)
    qs, ks, decays = np.empty(CHUNK * K, q.dtype), np.empty(CHUNK * K, q.dtype), np.empty(CHUNK * K, q.dtype)
    vs, ds, dvs = np.empty(CHUNK * V, q.dtype), np.empty(CHUNK * V, q.dtype), np.empty(CHUNK * V, q.dtype)
    dqs, dks, das = np.empty(CHUNK * K, q.dtype), np.empty(CHUNK * K, q.dtype), np.empty(CHUNK * K, q.dtype)
    bs, dbs, read = np.empty(CHUNK, q.dtype), np.empty(CHUNK, q.dtype), np.empty(CHUNK, q.dtype)
    past, missed = np.empty(CHUNK * ROWS * K, q.dtype), np.empty(CHUNK * ROWS, q.dtype)
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
            for t in range(n):
                bs[t] = beta[b, t0 + t, h]
            _chunk_backward(
                n, K, qs, ks, decays, vs, V, bs, ds, marks[item, t0 // CHUNK], d_state, past, missed, dqs, dks, das,
                dvs, dbs, read,
            )  # fmt: skip
            scale_rows(d_state, drift, K)
            for t in range(n):
                d_beta[b, t0 + t, h] = dbs[t]
                for c in range(K):
                    dqs[t * K + c] = factor * (decays[t * K + c] * dqs[t * K + c] + read[t] * ks[t * K + c])
            give_rows(dqs, b, h, t0, n, K, dq)
            give_rows(dks, b, h, t0, n, K, dk)
            give_rows(dvs, b, h, t0, n, V, dv)
            if dg.size > 0:
                give_gates(das, decays, b, h, t0, n, K, dg)
        give_state(d_state, b, h, K, d_initial)
