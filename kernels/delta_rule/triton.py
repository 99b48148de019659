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
from torch import Tensor

from latentcot.kernels.compile_together import compile_together, signature
from latentcot.kernels.delta_rule import triton_channel, triton_scalar
from latentcot.kernels.delta_rule.triton_plan import WINDOW, config, count, piece_bound, tokens


def forward_shapes(
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
        ((windows, Hv, K, V) if keep and gated else (0,), q.dtype),
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
    shapes = forward_shapes(q, v, log_decay, cu_seqlens, keep)
    buffers = [torch.empty(s, dtype=d, device=q.device) for s, d in shapes]
    gates = None if log_decay is None else tokens(log_decay)
    initial = None if initial_state is None else initial_state.contiguous()
    family = triton_channel if gates is not None and gates.dim() == 4 else triton_scalar
    o, last, solved, sums, strengths, writes, kept = buffers
    inputs = (tokens(q), tokens(k), tokens(v), tokens(beta), gates, scale, initial, cu_seqlens)

    def launches() -> None:
        family.forward(*inputs, keep, buffers)

    def gradients() -> None:
        family.backward(o, None, *inputs, solved, sums, strengths, writes, kept)

    key = ("delta_rule", signature(*inputs, keep), q.device)
    compile_together(key, q.device, launches, *([gradients] if keep else []))
    launches()
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
    return tuple(q.new_empty(s, dtype=d) for s, d in forward_shapes(q, v, log_decay, cu_seqlens, keep))


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
    solved: Tensor,
    sums: Tensor,
    strengths: Tensor,
    writes: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_decay and the initial state; empty for an input that was None."""
    launch = triton_channel.backward if log_decay is not None and log_decay.dim() == 4 else triton_scalar.backward
    d_q, d_k, d_v, d_beta, d_decay, d_initial, *_ = launch(
        d_o, d_last, q, k, v, beta, log_decay, scale, initial_state, cu_seqlens,
        solved, sums, strengths, writes, kept,
    )  # fmt: skip
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
    ctx.save_for_backward(q, k, v, beta, log_decay, initial_state, cu_seqlens, *output[2:])
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
