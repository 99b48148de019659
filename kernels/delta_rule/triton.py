r"""The delta rule in Triton: one parallel solve, then walks along each sequence with the state in registers.

Forward: the triangular inverse of all chunks (``triton_solve.py``), then a walk from left to right
(``triton_states.py``). Backward: a walk from right to left for the values (``triton_states.py``), walks in both
directions for queries and keys (``triton_keys.py``), and the sums of their row products into the gradients of the
strengths and decays. Kept for the backward are the inverse, the writes and, with gates, a state every 256 tokens.
Value heads of a group share their queries and keys by index; nothing is repeated in memory.

States and everything that is summed are float32. 16-bit inputs are multiplied in 16 bits; the inverse is computed in
float32 and then rounded to the inputs' dtype. For float32 inputs the running sums of the log-decays are float64: their
differences are wanted, and a strong gate makes the sums large.

Nothing here touches a GPU at import. Under ``TRITON_INTERPRET=1`` (set before Triton is imported) the kernels run on
CPU tensors.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from latentcot.kernels.delta_rule import triton_channel
from latentcot.kernels.delta_rule.triton_keys import finish_kernel, left_kernel, right_kernel
from latentcot.kernels.delta_rule.triton_plan import (
    PRECISION,
    WINDOW,
    config,
    count,
    inverse_precision,
    piece_bound,
    pieces,
    strides,
    sum_dtype,
    tokens,
)
from latentcot.kernels.delta_rule.triton_solve import solve_kernel
from latentcot.kernels.delta_rule.triton_states import forward_kernel, reverse_kernel
from latentcot.kernels.launch import power_of_two

# pyright: reportCallIssue=false
# Triton's launch options (num_warps, num_stages) are not parameters of the kernels.


def _forward_shapes(
    q: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, keep: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what the forward returns; see :func:`_forward`."""
    B, S, _, K = q.shape
    Hv, V = v.shape[-2:]
    channel = log_decay is not None and log_decay.dim() == 4
    C = config("delta_channel_forward" if channel else "delta_forward", K, V, q.dtype, q.device).chunk
    T = B * S
    gated = log_decay is not None
    windows = piece_bound(B, S, cu_seqlens, WINDOW)
    wide = torch.float64 if q.dtype == torch.float32 else torch.float32
    return [
        ((B, S, Hv, V), v.dtype),
        ((count(q, cu_seqlens), Hv, K, V), torch.float32),
        ((2, T, Hv, C) if channel else (T, Hv, C), q.dtype),
        ((T, Hv, K) if channel else (Hv, T) if gated else (0,), wide),
        ((Hv, T), torch.float32),
        ((T, Hv, V) if keep else (0,), q.dtype),
        ((windows, Hv, K, V) if keep and gated else (0,), torch.float32),
    ]


@torch.library.custom_op("latentcot::delta_rule_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, last state, inverses ``[T,Hv,C]``, running sums and strengths ``[Hv,T]``, writes ``[T,Hv,V]``, kept states).

    With a decay per channel the inverses come with the weights between tokens, ``[2,T,Hv,C]``, and the running sums
    are ``[T,Hv,K]``.
    """
    B, S, H, K = q.shape
    Hv, V = v.shape[-2:]
    T, N = B * S, count(q, cu_seqlens)
    shapes = _forward_shapes(q, v, log_decay, cu_seqlens, keep)
    buffers = [torch.empty(s, dtype=d, device=q.device) for s, d in shapes]
    o, last, solved, sums, strengths, writes, kept = buffers
    q, k, v, beta = tokens(q), tokens(k), tokens(v), tokens(beta)
    gates = None if log_decay is None else tokens(log_decay)
    initial = None if initial_state is None else initial_state.contiguous()
    if gates is not None and gates.dim() == 4:
        triton_channel.forward(q, k, v, beta, gates, scale, initial, cu_seqlens, keep, buffers)
        return o, last, solved, sums, strengths, writes, kept
    shape = config("delta_forward", K, V, q.dtype, q.device)
    offsets, bases, owners, chunks = pieces(q, cu_seqlens, shape.chunk)
    _, windows, _, _ = pieces(q, cu_seqlens, WINDOW)
    K_wide = power_of_two(K)
    solve_kernel[(chunks * Hv,)](
        k, beta, gates, solved, sums, strengths, offsets, bases, owners,
        T, N, Hv, K, *strides(k), beta.stride(1), 0 if gates is None else gates.stride(1),
        C=shape.chunk, GROUP=Hv // H, WIDTH=K_wide, BLOCK=min(K_wide, 64), GATED=gates is not None,
        SUM_DTYPE=sum_dtype(q.dtype), PRECISION=PRECISION, INVERSE=inverse_precision(q), num_warps=1, num_stages=1,
    )  # fmt: skip
    forward_kernel[(triton.cdiv(V, shape.block) * Hv * N,)](
        q, k, v, solved, sums, strengths, initial, o, last, writes, kept, offsets, windows, scale,
        T, Hv, K, V, *strides(q), *strides(k), *strides(v),
        C=shape.chunk, GROUP=Hv // H, WIDTH=K_wide, BLOCK=shape.block, WINDOW=WINDOW // shape.chunk,
        GATED=gates is not None, HAS_STATE=initial is not None, KEEP=keep, PRECISION=PRECISION,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return o, last, solved, sums, strengths, writes, kept


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(s, dtype=d) for s, d in _forward_shapes(q, v, log_decay, cu_seqlens, keep))


@torch.library.custom_op("latentcot::delta_rule_backward", mutates_args=())
def _backward(
    d_o: Tensor | None,
    d_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    last: Tensor,
    solved: Tensor,
    sums: Tensor,
    strengths: Tensor,
    writes: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_decay and the initial state; empty for an input that was None."""
    B, S, H, K = q.shape
    Hv, V = v.shape[-2:]
    T, N, m = B * S, count(q, cu_seqlens), Hv // H
    if log_decay is not None and log_decay.dim() == 4:
        return triton_channel.backward(
            d_o, d_last, q, k, v, beta, log_decay, scale, initial_state, cu_seqlens,
            last, solved, sums, strengths, writes, kept,
        )  # fmt: skip
    gated, has_state, has_last = log_decay is not None, initial_state is not None, d_last is not None
    d_o = torch.zeros(B, S, Hv, V, dtype=v.dtype, device=q.device) if d_o is None else tokens(d_o)
    q, k, v = tokens(q), tokens(k), tokens(v)
    initial = None if initial_state is None else initial_state.contiguous()
    d_last = None if d_last is None else d_last.contiguous()
    offsets, windows, owners, window_count = pieces(q, cu_seqlens, WINDOW)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    shape = config("delta_reverse", K, V, q.dtype, q.device)
    value_blocks = triton.cdiv(V, shape.block)
    targets, d_v = new(T, Hv, V, dtype=q.dtype), new(B, S, Hv, V, dtype=v.dtype)
    d_initial = new(*initial.shape) if initial is not None else new(0)
    reads, ends = new(value_blocks, Hv, T), new(value_blocks, Hv, window_count) if gated else new(0)
    reverse_kernel[(value_blocks * Hv * N,)](
        q, k, v, solved, sums, strengths, last, kept, d_o, d_last, targets, d_v, d_initial, reads, ends,
        offsets, windows, scale,
        T, window_count, Hv, K, V, *strides(q), *strides(k), *strides(v), *strides(d_o),
        C=shape.chunk, GROUP=m, WIDTH=power_of_two(K), BLOCK=shape.block, WINDOW=WINDOW // shape.chunk,
        GATED=gated, HAS_STATE=has_state, HAS_LAST=has_last, PRECISION=PRECISION,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip

    left, right = (config(name, K, V, q.dtype, q.device) for name in ("delta_left", "delta_right"))
    key_blocks = triton.cdiv(K, left.block)
    d_q, d_k = new(B, S, Hv, K, dtype=q.dtype), new(B, S, Hv, K, dtype=k.dtype)
    products = new(3, key_blocks, Hv, T)
    grid = (key_blocks * Hv * N,)
    left_kernel[grid](
        q, k, sums, strengths, initial, writes, targets, d_o, d_q, d_k, products[0], products[1], offsets, scale,
        T, Hv, K, V, *strides(q), *strides(k), *strides(d_o),
        C=left.chunk, SUM_CHUNK=shape.chunk, GROUP=m, WIDTH=power_of_two(V), BLOCK=left.block, GATED=gated,
        HAS_STATE=has_state, PRECISION=PRECISION, num_warps=left.warps, num_stages=left.stages,
    )  # fmt: skip
    right_kernel[grid](
        q, k, sums, strengths, d_last, writes, targets, d_o, d_k, products[2], offsets, scale,
        T, Hv, K, V, *strides(q), *strides(k), *strides(d_o),
        C=right.chunk, SUM_CHUNK=shape.chunk, GROUP=m, WIDTH=power_of_two(V), BLOCK=right.block, GATED=gated,
        HAS_LAST=has_last, PRECISION=PRECISION, num_warps=right.warps, num_stages=right.stages,
    )  # fmt: skip
    d_beta = new(B, S, Hv, dtype=beta.dtype)
    d_decay = new(0) if log_decay is None else new(B, S, Hv, dtype=log_decay.dtype)
    finish_kernel[(window_count * Hv,)](
        strengths, reads, ends, products[0], products[1], products[2], d_beta, d_decay, offsets, windows, owners,
        T, N, window_count, Hv, TOKENS=WINDOW, VALUE_BLOCKS=value_blocks, KEY_BLOCKS=key_blocks, GATED=gated, num_warps=4,
    )  # fmt: skip
    if m > 1:
        d_q = d_q.view(B, S, H, m, K).sum(3)
        d_k = d_k.view(B, S, H, m, K).sum(3)
    return d_q, d_k, d_v, d_beta, d_decay, d_initial


@_backward.register_fake
def _(
    d_o: Tensor | None,
    d_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    last: Tensor,
    solved: Tensor,
    sums: Tensor,
    strengths: Tensor,
    writes: Tensor,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape)

    return tuple(like(x) for x in (q, k, v, beta, log_decay, initial_state))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, beta, log_decay, scale, initial_state, cu_seqlens, keep = inputs
    if not keep:
        raise RuntimeError("latentcot::delta_rule_forward: a gradient is asked for, but keep is False")
    ctx.save_for_backward(q, k, v, beta, log_decay, initial_state, cu_seqlens, *output[1:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.scale = scale


def _gradients(ctx: Any, d_o: Tensor | None, d_last: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, beta, log_decay, initial_state, cu_seqlens, *kept = ctx.saved_tensors
    d_q, d_k, d_v, d_beta, d_decay, d_initial = _backward(
        d_o, d_last, q, k, v, beta, log_decay, ctx.scale, initial_state, cu_seqlens, *kept
    )
    return (
        d_q, d_k, d_v, d_beta, None if log_decay is None else d_decay, None,
        None if initial_state is None else d_initial, None, None,
    )  # fmt: skip


_forward.register_autograd(_gradients, setup_context=_setup)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Same as :func:`latentcot.kernels.delta_rule.reference.delta_rule` for S >= 1 and one reflection a token.

    q, k ``[B,S,H,K]``, v ``[B,S,H_v,V]`` with H_v a multiple of H, beta ``[B,S,H_v]``, log_decay None, ``[B,S,H_v]``
    or ``[B,S,H_v,K]`` (<= 0), initial_state ``[N,H_v,K,V]`` float32 or None (zero), cu_seqlens ``[N+1]`` int64 on the device or None.
    Returns o ``[B,S,H_v,V]`` in v's dtype and the last states ``[N,H_v,K,V]`` in float32. q, k, v are float32, float16
    or bfloat16; where they differ, all take the widest. First derivatives of everything, through both results.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, beta, log_decay, initial_state)
    )
    found = _forward(
        q.to(dtype), k.to(dtype), v.to(dtype), beta, log_decay, float(scale), initial_state, cu_seqlens, keep
    )
    return found[0].to(v.dtype), found[1]
