"""Decay attention in Triton as registered operators: passes of the kernels put together, forward and backward.

``torch.ops.latentcot.decay_attention_forward`` and ``_backward`` take plain tensors and numbers, so that
``torch.compile(fullgraph=True)``, fake tensors and CUDA graphs see one opaque step each. Which kernels run depends on
the shape of the gates alone: ``triton_scalar.py`` for none, ``[H]`` and ``[B,S,H]``, ``triton_vector.py`` for ``[B,S,H,K]``
and for HGRN2, where ``bound`` is given and k holds the raw gate.

``reverse`` runs the same operator from right to left, :math:`o_i = s \\sum_{j \\ge i} (q_i \\cdot k_j) \\exp(\\sum_{i<t\\le j} g_t) v_j`: the
second half of the bidirectional forms.
"""

from typing import Any

import torch
from torch import Tensor

from latentcot.kernels.decay_attention import triton_scalar, triton_vector
from latentcot.kernels.launch import WINDOW, flat, sequence_offsets, span_bases, span_count, spans


@torch.library.custom_op("latentcot::decay_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor | None,
    bound: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, last state, and what the backward reuses with one gate per channel: A, reading rows, writing rows, decays)."""
    q, k, v = flat(q), flat(k), flat(v)
    B, S, H, K = q.shape
    V = v.shape[-1]
    offsets = sequence_offsets(B, S, cu_seqlens, q.device)
    last = torch.empty(offsets.numel() - 1, H, K, V, dtype=torch.float32, device=q.device)
    initial = None if initial_state is None else initial_state.contiguous()
    if bound is None and (gates is None or gates.dim() < 4):
        o, _, _ = triton_scalar.scalar_pass(
            q, k, v, _even(gates), offsets,
            scale=scale, reverse=reverse, scale_write=False, state=initial, last=last,
        )  # fmt: skip
        return o, last, q.new_empty(0), q.new_empty(0), q.new_empty(0), last.new_empty(0)
    chunk = triton_vector.chunk_length(K, V, q.dtype, q.device)
    pieces = spans(B, S, cu_seqlens, chunk, q.device)
    bases = span_bases(B, S, cu_seqlens, chunk, q.device)
    pairs, read, write, totals = triton_vector.prepare(q, k, _even(gates), bound, pieces, scale, V, reverse)
    o, _ = triton_vector.recurrence(
        pairs, read, write, v, totals, offsets, bases, chunk=chunk, reverse=reverse, on_rows=True,
        state=initial, last=last,
    )  # fmt: skip
    return o, last, pairs, read, write, totals


def _even(gates: Tensor | None) -> Tensor | None:
    return gates if gates is None or gates.dim() == 1 else flat(gates)


@_forward.register_fake
def _(q, k, v, gates, bound, initial_state, cu_seqlens, scale, reverse):  # pyright: ignore
    B, S, H, K = q.shape
    V = v.shape[-1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty(B, S, H, V, dtype=v.dtype, device=v.device)
    last = torch.empty(N, H, K, V, dtype=torch.float32, device=v.device)
    if bound is None and (gates is None or gates.dim() < 4):
        return o, last, q.new_empty(0), q.new_empty(0), q.new_empty(0), last.new_empty(0)
    chunk = triton_vector.chunk_length(K, V, q.dtype, q.device)
    rows = [torch.empty(B, S, H, width, dtype=q.dtype, device=q.device) for width in (chunk, K, K)]
    return o, last, *rows, last.new_empty(span_count(B, S, cu_seqlens, chunk), H, K)


@torch.library.custom_op("latentcot::decay_attention_backward", mutates_args=())
def _backward(
    do: Tensor,
    d_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor | None,
    bound: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    last: Tensor,
    pairs: Tensor,
    read: Tensor,
    write: Tensor,
    totals: Tensor,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dgates float32, dbound, d initial state); absent ones are empty."""
    q, k, v, do = flat(q), flat(k), flat(v), flat(do.to(v.dtype))
    B, S, H, K = q.shape
    V = v.shape[-1]
    device = q.device
    offsets = sequence_offsets(B, S, cu_seqlens, device)
    windows = spans(B, S, cu_seqlens, WINDOW, device)
    bases = span_bases(B, S, cu_seqlens, WINDOW, device)
    d_last = d_last.to(torch.float32).contiguous()
    initial = None if initial_state is None else initial_state.contiguous()
    d_initial = torch.empty_like(d_last) if initial is not None else None
    stored = None
    if bound is not None or (gates is not None and gates.dim() > 1):
        stored = torch.empty(windows.shape[0], H, V, K, dtype=torch.float32, device=device)
    gates = _even(gates)

    def empty() -> Tensor:  # outputs must not share storage
        return d_last.new_empty(0)

    if bound is None and (gates is None or gates.dim() < 4):
        common: dict[str, Any] = {"gates": gates, "offsets": offsets, "scale": scale, "bases": bases}
        own_q, own_k = (None, None) if stored is None else (q, k)
        dq, of_q, _ = triton_scalar.scalar_pass(
            do, v, k, reverse=reverse, scale_write=False, state=initial, transposed=True, own=own_q, store=stored, **common
        )
        dv, _, _ = triton_scalar.scalar_pass(
            k, q, do, reverse=not reverse, scale_write=True, state=d_last, last=d_initial, **common
        )
        dk, of_k, carry = triton_scalar.scalar_pass(
            v, do, q, reverse=not reverse, scale_write=True, state=d_last, transposed=True, own=own_k, compare=stored,
            **common,
        )  # fmt: skip
        dg = empty()
        if of_q is not None and of_k is not None and carry is not None:
            upper, lower = (of_k, of_q) if reverse else (of_q, of_k)
            dg = triton_scalar.gate_gradient(upper, lower, carry, (last * d_last).sum((2, 3)), windows)
        return dq, dk, dv, dg, empty(), empty() if d_initial is None else d_initial

    chunk = pairs.shape[-1]
    chunk_bases = span_bases(B, S, cu_seqlens, chunk, device)
    along: dict[str, Any] = {"totals": totals, "offsets": offsets, "pieces": chunk_bases, "chunk": chunk, "bases": bases}
    dv, _ = triton_vector.recurrence(
        pairs, write, read, do, reverse=not reverse, on_rows=True, transpose_pairs=True, state=d_last, last=d_initial,
        **along,
    )  # fmt: skip
    dq_state, _ = triton_vector.recurrence(
        None, do, v, write, reverse=reverse, on_rows=False, state=initial, transposed=True, store=stored, **along
    )
    dk_state, carry = triton_vector.recurrence(
        None, v, do, read, reverse=not reverse, on_rows=False, state=d_last, transposed=True, compare=stored, **along
    )
    assert carry is not None
    dq, dk, dg, d_bound = triton_vector.gradients(
        q, k, gates, bound, v, do, dq_state, dk_state, carry, (last * d_last).sum(3), windows, scale, reverse, chunk
    )
    return dq, dk, dv, dg, d_bound if bound is not None else empty(), empty() if d_initial is None else d_initial


@_backward.register_fake
def _(do, d_last, q, k, v, gates, bound, initial_state, cu_seqlens, last, pairs, read, write, totals, scale, reverse):  # pyright: ignore
    def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)

    empty = d_last.new_empty(0, dtype=torch.float32)
    gated = gates is not None and gates.dim() > 1
    return (
        like(q), like(k), like(v), like(gates, torch.float32) if gated else empty,
        empty if bound is None else like(bound, torch.float32),
        empty if initial_state is None else like(d_last, torch.float32),
    )  # fmt: skip


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, gates, bound, initial_state, cu_seqlens, scale, reverse = inputs
    ctx.save_for_backward(q, k, v, gates, bound, initial_state, cu_seqlens, *output[1:])
    ctx.scale, ctx.reverse = scale, reverse
    ctx.set_materialize_grads(True)


def _differentiate(ctx: Any, do: Tensor, d_last: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, gates, bound, initial_state, cu_seqlens, last, *kept = ctx.saved_tensors
    dq, dk, dv, dg, d_bound, d_initial = torch.ops.latentcot.decay_attention_backward(
        do, d_last, q, k, v, gates, bound, initial_state, cu_seqlens, last, *kept, ctx.scale, ctx.reverse
    )
    gated = gates is not None and gates.dim() > 1
    return (
        dq, dk, dv, dg.to(gates.dtype) if gated else None, None if bound is None else d_bound,
        None if initial_state is None else d_initial, None, None, None,
    )  # fmt: skip


_forward.register_autograd(_differentiate, setup_context=_keep)


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    reverse: bool = False,
    bound: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same as :func:`latentcot.kernels.decay_attention.reference.decay_attention` for S >= 1; (o, last state float32).

    q, k ``[B,S,H,K]``, v ``[B,S,H,V]`` of one 16- or 32-bit dtype, states float32, cu_seqlens ``[N+1]`` on the device of q.
    ``bound [H,K]`` float32 makes it HGRN2 (``fused.py``). First derivatives only.
    """
    if log_decay is not None and log_decay.dim() == 1 and log_decay.requires_grad:
        log_decay = log_decay.expand(q.shape[:3])  # a constant has no gradient of its own; a learned one sums its tokens'
    if log_decay is not None and log_decay.dim() == 3 and q.stride(-1) == 1 and 0 in log_decay.stride():
        log_decay = log_decay.contiguous()
    o, last, *_ = torch.ops.latentcot.decay_attention_forward(
        q, k, v, log_decay, bound, initial_state, cu_seqlens, scale, reverse
    )
    return o, last
