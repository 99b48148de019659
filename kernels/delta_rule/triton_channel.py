"""Launches of the delta rule with a log-decay for every key channel; registered in ``triton.py``."""

import torch
import triton
from torch import Tensor

from latentcot.kernels.delta_rule.triton_channel_keys import (
    channel_gates_kernel,
    channel_left_kernel,
    channel_right_kernel,
)
from latentcot.kernels.delta_rule.triton_channel_solve import channel_solve_kernel, scale_kernel
from latentcot.kernels.delta_rule.triton_channel_states import channel_forward_kernel, channel_reverse_kernel
from latentcot.kernels.delta_rule.triton_keys import finish_kernel
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
from latentcot.kernels.launch import power_of_two

# pyright: reportCallIssue=false, reportArgumentType=false
# Triton's launch options (num_warps and so on) are not parameters of the kernels.


def _scaled(
    q: Tensor, k: Tensor, log_decay: Tensor, sums: Tensor, chunk: int, cu_seqlens: Tensor | None, store: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k decayed from the beginning of their chunk, k decayed to its end; fills ``sums`` on ``store``."""
    T, Hv, K = sums.shape
    H = q.shape[2]
    reads, erases, writings = (torch.empty(T, Hv, K, dtype=q.dtype, device=q.device) for _ in range(3))
    offsets, bases, owners, chunks = pieces(q, cu_seqlens, chunk)
    block = min(power_of_two(K), 64)
    scale_kernel[(chunks * Hv * triton.cdiv(K, block),)](
        q, k, log_decay, sums, reads, erases, writings, offsets, bases, owners, count(q, cu_seqlens),
        Hv, K, *strides(q), *strides(k), *strides(log_decay),
        C=chunk, GROUP=Hv // H, BLOCK=block, SUM_DTYPE=sum_dtype(q.dtype), STORE_SUMS=store, num_warps=4,
    )  # fmt: skip
    return reads, erases, writings


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
) -> None:
    """Fills the buffers of ``latentcot::delta_rule_forward``; inputs as the kernels take them."""
    assert log_decay is not None
    o, last, solved, sums, strengths, writes, kept = buffers
    B, S, H, K = q.shape
    Hv, V = v.shape[-2:]
    T, N = B * S, count(q, cu_seqlens)
    shape = config("delta_channel_forward", K, V, q.dtype, q.device)
    C, K_wide = shape.chunk, power_of_two(K)
    reads, erases, writings = _scaled(q, k, log_decay, sums, C, cu_seqlens, True)
    offsets, bases, owners, chunks = pieces(q, cu_seqlens, C)
    _, windows, _, _ = pieces(q, cu_seqlens, WINDOW)
    channel_solve_kernel[(chunks * Hv,)](
        q, k, beta, sums, solved[0], solved[1], strengths, offsets, bases, owners, scale,
        T, N, Hv, K, *strides(q), *strides(k), beta.stride(1),
        C=C, LEVELS=C.bit_length() - 1, GROUP=Hv // H, WIDTH=K_wide, BLOCK=min(K_wide, 64), PRECISION=PRECISION,
        INVERSE=inverse_precision(q), num_warps=4, num_stages=1,
    )  # fmt: skip
    channel_forward_kernel[(triton.cdiv(V, shape.block) * Hv * N,)](
        reads, erases, writings, v, solved[0], solved[1], sums, strengths, initial, o, last, writes, kept,
        offsets, windows, scale, T, Hv, K, V, *strides(v),
        C=C, WIDTH=K_wide, BLOCK=shape.block, WINDOW=WINDOW // C, HAS_STATE=initial is not None, KEEP=keep,
        PRECISION=PRECISION, **options(shape, q.dtype),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``latentcot::delta_rule_backward``."""
    assert log_decay is not None
    B, S, H, K = q.shape
    Hv, V = v.shape[-2:]
    T, N, m = B * S, count(q, cu_seqlens), Hv // H
    has_state, has_last = initial is not None, d_last is not None
    d_o = torch.zeros(B, S, Hv, V, dtype=v.dtype, device=q.device) if d_o is None else tokens(d_o)
    q, k, v, log_decay = tokens(q), tokens(k), tokens(v), tokens(log_decay)
    initial = None if initial is None else initial.contiguous()
    d_last = None if d_last is None else d_last.contiguous()
    offsets, windows, owners, window_count = pieces(q, cu_seqlens, WINDOW)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    shape = config("delta_channel_reverse", K, V, q.dtype, q.device)
    C, levels = shape.chunk, shape.chunk.bit_length() - 1
    reads, erases, writings = _scaled(q, k, log_decay, sums, C, cu_seqlens, False)
    value_blocks = triton.cdiv(V, shape.block)
    targets, d_v = new(T, Hv, V, dtype=q.dtype), new(B, S, Hv, V, dtype=v.dtype)
    d_initial = new(*initial.shape) if initial is not None else new(0)
    products = new(value_blocks, Hv, T)
    channel_reverse_kernel[(value_blocks * Hv * N,)](
        reads, erases, writings, v, solved[0], solved[1], sums, strengths, d_o, d_last, targets, d_v, d_initial,
        products, offsets, scale, T, Hv, K, V, *strides(v), *strides(d_o),
        C=C, WIDTH=power_of_two(K), BLOCK=shape.block, HAS_STATE=has_state, HAS_LAST=has_last, PRECISION=PRECISION,
        **options(shape, q.dtype),
    )  # fmt: skip
    del reads, erases, writings

    left, right = (config(f"delta_channel_{name}", K, V, q.dtype, q.device) for name in ("left", "right"))
    key_blocks = triton.cdiv(K, left.block)
    grid = (key_blocks * Hv * N,)
    d_q, d_k = new(B, S, Hv, K, dtype=q.dtype), new(B, S, Hv, K, dtype=k.dtype)
    gates, erase_products, starts = new(T, Hv, K), new(key_blocks, Hv, T), new(window_count, Hv, K)
    d_decay = new(B, S, Hv, K, dtype=log_decay.dtype)
    channel_left_kernel[grid](
        q, k, sums, strengths, initial, writes, targets, d_o, d_q, d_k, gates, erase_products, offsets, scale,
        T, Hv, K, V, *strides(q), *strides(k), *strides(d_o),
        C=C, LEVELS=levels, GROUP=m, WIDTH=power_of_two(V), BLOCK=left.block, HAS_STATE=has_state,
        PRECISION=PRECISION, **options(left, q.dtype),
    )  # fmt: skip
    channel_right_kernel[grid](
        q, k, sums, strengths, initial, d_last, kept, writes, targets, d_o, d_k, gates, starts, offsets, windows,
        scale, T, Hv, K, V, *strides(q), *strides(k), *strides(d_o),
        C=C, LEVELS=levels, GROUP=m, WIDTH=power_of_two(V), BLOCK=left.block, WINDOW=WINDOW // C,
        HAS_STATE=has_state, HAS_LAST=has_last, PRECISION=PRECISION, **options(right, q.dtype),
    )  # fmt: skip
    block = min(power_of_two(K), 64)
    channel_gates_kernel[(window_count * Hv * triton.cdiv(K, block),)](
        gates, starts, d_decay, offsets, windows, owners, N, Hv, K, TOKENS=WINDOW, BLOCK=block, num_warps=4,
    )  # fmt: skip
    d_beta = new(B, S, Hv, dtype=beta.dtype)
    finish_kernel[(window_count * Hv,)](
        strengths, products, None, None, erase_products, None, None, None, None, d_beta, None, None, None,
        offsets, windows, owners, T, N, window_count, Hv, 0, TOKENS=WINDOW, VALUE_BLOCKS=value_blocks, KEY_BLOCKS=key_blocks, GATED=False,
        RAW=False, LARGEST=1.0, num_warps=4,
    )  # fmt: skip
    if m > 1:
        d_q = d_q.view(B, S, H, m, K).sum(3)
        d_k = d_k.view(B, S, H, m, K).sum(3)
    return d_q, d_k, d_v, d_beta, d_decay, d_initial
