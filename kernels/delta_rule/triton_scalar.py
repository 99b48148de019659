"""Launches of the delta rule without decay or with one per head; registered in ``triton.py`` and ``triton_fused.py``.

Write strengths and log-decays come either as they enter the recurrence or raw: with ``Raw`` the kernels compute them.
q and k are always what enters; :func:`normalise` makes unit vectors of raw ones, and the backward then projects.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from latentcot.kernels.delta_rule.triton_keys import finish_kernel, left_kernel, pair_kernel, right_kernel
from latentcot.kernels.delta_rule.triton_norms import norm_kernel
from latentcot.kernels.delta_rule.triton_plan import (
    PRECISION,
    WINDOW,
    config,
    count,
    inverse_precision,
    options,
    pieces,
    strides,
    sum_dtype,
    tokens,
)
from latentcot.kernels.delta_rule.triton_solve import solve_kernel
from latentcot.kernels.delta_rule.triton_states import forward_kernel, reverse_kernel
from latentcot.kernels.launch import power_of_two

EPS = 1e-6  # of the L2 norm, inside the root
FEW_BLOCKS = 2  # blocks of key channels that each form the weights between tokens on their own

# pyright: reportCallIssue=false, reportArgumentType=false
# Triton's launch options (num_warps and so on) are not parameters of the kernels.


class Raw(NamedTuple):
    """beta is ``largest``·sigmoid of the given one, log_decay -e^log_rate·softplus(the given one + bias), ``[Hv]``.

    With ``norms [2,H,T]`` q and k are unit vectors made by :func:`normalise`, whose reciprocal lengths it holds, ``o`` is
    what the forward returned, and the gradients of q and k are those of the vectors before.
    """

    log_rate: Tensor
    bias: Tensor
    largest: float
    norms: Tensor | None = None
    o: Tensor | None = None


def normalise(x: Tensor, unit: Tensor, norms: Tensor) -> None:
    """Fills ``unit [B,S,H,K]`` with x divided by its lengths and ``norms [H,T]`` with their reciprocals."""
    B, S, H, K = x.shape
    norm_kernel[(triton.cdiv(B * S, 16) * H,)](
        x, unit, norms, B * S, H, K, *strides(x), WIDTH=power_of_two(K), ROWS=16, EPS=EPS, num_warps=4
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
    buffers: list[Tensor],
    raw: Raw | None = None,
) -> None:
    """Fills the buffers of ``latentcot::delta_rule_forward``."""
    o, last, solved, sums, strengths, writes, kept = buffers
    B, S, H, K = q.shape
    Hv, V = v.shape[-2:]
    T, N = B * S, count(q, cu_seqlens)
    shape = config("delta_forward", K, V, q.dtype, q.device)
    offsets, bases, owners, chunks = pieces(q, cu_seqlens, shape.chunk)
    _, windows, _, _ = pieces(q, cu_seqlens, WINDOW)
    K_wide = power_of_two(K)
    gated = log_decay is not None
    log_rate, bias, largest = (None, None, 1.0) if raw is None else (raw.log_rate, raw.bias, raw.largest)
    solve_kernel[(chunks * Hv,)](
        k, beta, log_decay, log_rate, bias, solved, sums, strengths, offsets, bases, owners,
        T, N, Hv, K, *strides(k), beta.stride(1), 0 if log_decay is None else log_decay.stride(1),
        C=shape.chunk, GROUP=Hv // H, WIDTH=K_wide, BLOCK=min(K_wide, 64), GATED=gated, RAW=raw is not None,
        LARGEST=largest, SUM_DTYPE=sum_dtype(q.dtype), PRECISION=PRECISION,
        INVERSE=inverse_precision(q), num_warps=1, num_stages=1,
    )  # fmt: skip
    forward_kernel[(triton.cdiv(V, shape.block) * Hv * N,)](
        q, k, v, solved, sums, strengths, initial, o, last, writes, kept, offsets, windows, scale,
        T, Hv, K, V, *strides(q), *strides(k), *strides(v),
        C=shape.chunk, GROUP=Hv // H, WIDTH=K_wide, BLOCK=shape.block, WINDOW=WINDOW // shape.chunk,
        GATED=gated, HAS_STATE=initial is not None, KEEP=keep, PRECISION=PRECISION,
        **options(shape, q.dtype),
    )  # fmt: skip


def backward(
    d_o: Tensor | None,
    d_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    solved: Tensor,
    sums: Tensor,
    strengths: Tensor,
    writes: Tensor,
    kept: Tensor,
    raw: Raw | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_decay, the initial state, log_rate, bias; empty for what is not there."""
    B, S, H, K = q.shape
    Hv, V = v.shape[-2:]
    T, N, m = B * S, count(q, cu_seqlens), Hv // H
    gated, has_state, has_last = log_decay is not None, initial is not None, d_last is not None
    norms, o = (None, None) if raw is None else (raw.norms, raw.o)
    log_rate, bias, largest = (None, None, 1.0) if raw is None else (raw.log_rate, raw.bias, raw.largest)
    d_o = torch.zeros(B, S, Hv, V, dtype=v.dtype, device=q.device) if d_o is None else tokens(d_o)
    q, k, v = tokens(q), tokens(k), tokens(v)
    gates = None if log_decay is None else tokens(log_decay)
    initial = None if initial is None else initial.contiguous()
    d_last = None if d_last is None else d_last.contiguous()
    offsets, windows, owners, window_count = pieces(q, cu_seqlens, WINDOW)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    shape = config("delta_reverse", K, V, q.dtype, q.device)
    value_blocks = triton.cdiv(V, shape.block)
    targets, d_v = new(T, Hv, V, dtype=q.dtype), new(B, S, Hv, V, dtype=v.dtype)
    d_initial = new(*initial.shape) if initial is not None else new(0)
    reads, starts = new(value_blocks, Hv, T), new(value_blocks, Hv, window_count) if gated else new(0)
    answers = None if norms is None else new(value_blocks, Hv, T)
    reverse_kernel[(value_blocks * Hv * N,)](
        q, k, v, o, solved, sums, strengths, initial, kept, d_o, d_last, targets, d_v, d_initial, reads, answers, starts,
        offsets, windows, scale,
        T, window_count, Hv, K, V, *strides(q), *strides(k), *strides(v), *strides(d_o),
        C=shape.chunk, GROUP=m, WIDTH=power_of_two(K), BLOCK=shape.block, WINDOW=WINDOW // shape.chunk,
        GATED=gated, ANSWERS=norms is not None, HAS_STATE=has_state, HAS_LAST=has_last, PRECISION=PRECISION,
        **options(shape, q.dtype),
    )  # fmt: skip

    left, right = (config(name, K, V, q.dtype, q.device) for name in ("delta_left", "delta_right"))
    key_blocks = triton.cdiv(K, left.block)
    d_q, d_k = new(B, S, Hv, K, dtype=q.dtype), new(B, S, Hv, K, dtype=k.dtype)
    products, (own, selves) = new(3, key_blocks, Hv, T), new(2, Hv, T)
    pairs = key_blocks > FEW_BLOCKS
    reading, erasing = new(2, T if pairs else 0, Hv, left.chunk, dtype=q.dtype)
    if pairs:
        _, bases, chunk_owners, chunks = pieces(q, cu_seqlens, left.chunk)
        pair_kernel[(chunks * Hv,)](
            sums, strengths, writes, targets, d_o, reading, erasing, own, selves, offsets, bases, chunk_owners, scale,
            T, N, Hv, V, *strides(d_o),
            C=left.chunk, SUM_CHUNK=shape.chunk, WIDTH=power_of_two(V), BLOCK=min(power_of_two(V), 64), GATED=gated,
            PRECISION=PRECISION, num_warps=4, num_stages=1,
        )  # fmt: skip
    grid = (key_blocks * Hv * N,)
    left_kernel[grid](
        q, k, sums, strengths, norms, answers, own, reading, erasing, initial, writes, targets, d_o, d_q, d_k,
        products[0], products[1], offsets, scale,
        T, Hv, K, V, *strides(q), *strides(k), *strides(d_o),
        C=left.chunk, SUM_CHUNK=shape.chunk, GROUP=m, WIDTH=power_of_two(V), BLOCK=left.block, VALUE_BLOCKS=value_blocks,
        PAIRS=pairs, GATED=gated, PROJECT=norms is not None, HAS_STATE=has_state, PRECISION=PRECISION, **options(left, q.dtype),
    )  # fmt: skip
    right_kernel[grid](
        q, k, sums, strengths, norms, reads, own, selves, reading, erasing, d_last, writes, targets, d_o, d_k, products[2],
        offsets, scale,
        T, Hv, K, V, *strides(q), *strides(k), *strides(d_o),
        C=right.chunk, SUM_CHUNK=shape.chunk, GROUP=m, WIDTH=power_of_two(V), BLOCK=right.block, VALUE_BLOCKS=value_blocks,
        PAIRS=pairs, GATED=gated, PROJECT=norms is not None, HAS_LAST=has_last, PRECISION=PRECISION, **options(right, q.dtype),
    )  # fmt: skip
    d_beta = new(B, S, Hv, dtype=beta.dtype)
    d_decay = new(0) if log_decay is None else new(B, S, Hv, dtype=log_decay.dtype)
    d_log_rate, d_bias = (new(0), new(0)) if raw is None else new(2, Hv, window_count)
    if raw is not None and cu_seqlens is not None:  # the bound of the windows may be above their number
        d_log_rate, d_bias = d_log_rate.zero_(), d_bias.zero_()
    finish_kernel[(window_count * Hv,)](
        strengths, reads, starts, products[0], products[1], products[2], gates, log_rate, bias,
        d_beta, d_decay, d_log_rate, d_bias, offsets, windows, owners,
        T, N, window_count, Hv, 0 if gates is None else gates.stride(1),
        TOKENS=WINDOW, VALUE_BLOCKS=value_blocks, KEY_BLOCKS=key_blocks, GATED=gated, RAW=raw is not None,
        LARGEST=largest, num_warps=4,
    )  # fmt: skip
    if m > 1:
        d_q, d_k = d_q.view(B, S, H, m, K).sum(3), d_k.view(B, S, H, m, K).sum(3)
    if raw is not None:
        d_log_rate, d_bias = d_log_rate.sum(1).to(raw.log_rate.dtype), d_bias.sum(1).to(raw.bias.dtype)
    return d_q, d_k, d_v, d_beta, d_decay, d_initial, d_log_rate, d_bias
