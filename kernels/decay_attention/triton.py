r"""Decay attention in Triton: the passes of the kernels put together, forward and backward.

Which kernels run depends on the shape of the gates alone: ``triton_scalar.py`` for none, ``[H]`` and ``[B,S,H]``,
``triton_vector.py`` for ``[B,S,H,K]`` and for HGRN2, where ``bound`` is given and k holds the raw gate.

``reverse`` runs the operator from right to left, :math:`o_i = s \sum_{j \ge i} (q_i \cdot k_j) \exp(\sum_{i<t\le j} g_t) v_j`: the second
half of the bidirectional forms.

Eager calls go through an autograd function, compiled ones through ``torch.ops.latentcot.decay_attention_forward`` and
``_backward``: the compiler sees one opaque step each, and eager calls do not pay for the registration.
"""

from typing import Any

import torch
from torch import Tensor

from latentcot.kernels.decay_attention import triton_scalar, triton_vector
from latentcot.kernels.launch import WINDOW, flat, sequence_offsets, span_bases, span_count, spans

Kept = tuple[Tensor, Tensor, Tensor, Tensor]  # A, reading rows, writing rows, chunk decays


def _even(gates: Tensor | None) -> Tensor | None:
    return gates if gates is None or gates.dim() == 1 else flat(gates)


def forward_passes(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, bound: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, reverse: bool,
) -> tuple[Tensor, Tensor, Kept | None]:  # fmt: skip
    """(o, last state float32, what the backward reuses where the gates are vectors)."""
    q, k, v, gates = flat(q), flat(k), flat(v), _even(gates)
    B, S, H, K = q.shape
    V = v.shape[-1]
    offsets = sequence_offsets(B, S, cu_seqlens, q.device)
    last = torch.empty(offsets.numel() - 1, H, K, V, dtype=torch.float32, device=q.device)
    initial = None if initial_state is None else initial_state.contiguous()
    if bound is None and (gates is None or gates.dim() < 4):
        o, _, _ = triton_scalar.scalar_pass(
            q, k, v, gates, offsets, scale=scale, reverse=reverse, scale_write=False, state=initial, last=last
        )
        return o, last, None
    chunk = triton_vector.chunk_length(K, V, q.dtype, q.device)
    pieces = spans(B, S, cu_seqlens, chunk, q.device)
    bases = span_bases(B, S, cu_seqlens, chunk, q.device)
    # from right to left the operator is the transpose of the one from left to right, with q and k exchanged
    first, second = (k, q) if reverse else (q, k)
    pairs, read, write, totals = triton_vector.prepare(first, second, gates, bound, pieces, scale, V)
    a, b = (write, read) if reverse else (read, write)
    o, _ = triton_vector.recurrence(
        pairs, a, b, v, totals, offsets, bases, chunk=chunk, reverse=reverse, on_rows=True, transpose_pairs=reverse,
        state=initial, last=last,
    )  # fmt: skip
    return o, last, (pairs, read, write, totals)


def backward_passes(
    do: Tensor, d_last: Tensor | None, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, bound: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, last: Tensor, kept: Kept | None, scale: float, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, dgates float32, dbound, d initial state); None where there is none."""
    q, k, v, do, gates = flat(q), flat(k), flat(v), flat(do.to(v.dtype)), _even(gates)
    B, S, H, K = q.shape
    V = v.shape[-1]
    device = q.device
    offsets = sequence_offsets(B, S, cu_seqlens, device)
    d_last = None if d_last is None else d_last.to(torch.float32).contiguous()
    initial = None if initial_state is None else initial_state.contiguous()
    d_initial = None if initial is None else torch.empty_like(last)

    if bound is None and (gates is None or gates.dim() < 4):
        common: dict[str, Any] = {"gates": gates, "offsets": offsets, "scale": scale}
        if gates is None or gates.dim() == 1:
            windows, of_queries, of_keys = None, {}, {}
        else:
            windows = spans(B, S, cu_seqlens, WINDOW, device)
            stored = torch.empty(windows.shape[0], H, V, K, dtype=torch.float32, device=device)
            common["bases"] = span_bases(B, S, cu_seqlens, WINDOW, device)
            of_queries, of_keys = {"own": q, "store": stored}, {"own": k, "compare": stored}
        dq, of_q, _ = triton_scalar.scalar_pass(
            do, v, k, reverse=reverse, scale_write=False, state=initial, transposed=True, **of_queries, **common
        )
        dv, _, _ = triton_scalar.scalar_pass(
            k, q, do, reverse=not reverse, scale_write=True, state=d_last, last=d_initial, **common
        )
        dk, of_k, carry = triton_scalar.scalar_pass(
            v, do, q, reverse=not reverse, scale_write=True, state=d_last, transposed=True, **of_keys, **common
        )
        dg = None
        if windows is not None and of_q is not None and of_k is not None and carry is not None:
            upper, lower = (of_k, of_q) if reverse else (of_q, of_k)
            dg = triton_scalar.gate_gradient(upper, lower, carry, windows)
        return dq, dk, dv, dg, None, d_initial

    assert kept is not None
    pairs, read, write, totals = kept
    chunk = pairs.shape[-1]
    windows = spans(B, S, cu_seqlens, triton_vector.WINDOW, device)
    stored = torch.empty(windows.shape[0], H, V, K, dtype=q.dtype, device=device)
    along: dict[str, Any] = {
        "totals": totals, "offsets": offsets, "chunk": chunk, "pieces": span_bases(B, S, cu_seqlens, chunk, device),
        "bases": span_bases(B, S, cu_seqlens, triton_vector.WINDOW, device),
    }  # fmt: skip
    a, b = (read, write) if reverse else (write, read)
    dv, _ = triton_vector.recurrence(
        pairs, a, b, do, reverse=not reverse, on_rows=True, transpose_pairs=not reverse, state=d_last, last=d_initial,
        **along,
    )  # fmt: skip
    # right to left: q and k, v and do, the two states exchange their parts
    left, right = (v, do) if reverse else (do, v)
    at_start, at_end = (d_last, initial) if reverse else (initial, d_last)
    first_state, _ = triton_vector.recurrence(
        None, left, right, write, reverse=False, on_rows=False, state=at_start, transposed=True, store=stored, **along
    )
    second_state, carry = triton_vector.recurrence(
        None, right, left, read, reverse=True, on_rows=False, state=at_end, transposed=True, compare=stored, **along
    )
    assert carry is not None
    first, second = (k, q) if reverse else (q, k)
    dq, dk, dg, d_bound = triton_vector.gradients(
        first, second, gates, bound, right, left, first_state, second_state, carry, windows, scale, chunk
    )
    if reverse:
        dq, dk = dk, dq
    return dq, dk, dv, dg if bound is None else None, d_bound if bound is not None else None, d_initial


class _DecayAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, gates: Any, bound: Any, initial: Any, cu: Any, scale: Any, reverse: Any
    ):
        o, last, kept = forward_passes(q, k, v, gates, bound, initial, cu, scale, reverse)
        ctx.save_for_backward(q, k, v, gates, bound, initial, cu, last, *(kept or ()))
        ctx.scale, ctx.reverse = scale, reverse
        ctx.set_materialize_grads(False)
        return o, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: the result would silently count as a constant
            raise RuntimeError(
                "decay_attention: the Triton kernels give first derivatives only; use backend='chunked' for create_graph"
            )
        q, k, v, gates, bound, initial, cu, last, *kept = ctx.saved_tensors
        do, d_last = grads
        if do is None:
            do = torch.zeros_like(v)
        dq, dk, dv, dg, d_bound, d_initial = backward_passes(
            do, d_last, q, k, v, gates, bound, initial, cu, last, tuple(kept) or None, ctx.scale, ctx.reverse
        )
        return dq, dk, dv, None if dg is None else dg.to(gates.dtype), d_bound, d_initial, None, None, None


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Registered operators return tensors only, and no two of them may share storage."""
    return like.new_empty(0, dtype=torch.float32) if x is None else x


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
    o, last, kept = forward_passes(q, k, v, gates, bound, initial_state, cu_seqlens, scale, reverse)
    pairs, read, write, totals = kept or (None, None, None, None)
    return o, last, _or_empty(pairs, q), _or_empty(read, q), _or_empty(write, q), _or_empty(totals, q)


@_forward.register_fake
def _(q, k, v, gates, bound, initial_state, cu_seqlens, scale, reverse):  # pyright: ignore
    B, S, H, K = q.shape
    V = v.shape[-1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = v.new_empty(B, S, H, V)
    last = v.new_empty(N, H, K, V, dtype=torch.float32)
    if bound is None and (gates is None or gates.dim() < 4):
        return o, last, *(_or_empty(None, q) for _ in range(4))
    chunk = triton_vector.chunk_length(K, V, q.dtype, q.device)
    rows = [q.new_empty(B, S, H, width) for width in (chunk, K, K)]
    return o, last, *rows, last.new_empty(span_count(B, S, cu_seqlens, chunk), H, K)


@torch.library.custom_op("latentcot::decay_attention_backward", mutates_args=())
def _backward(
    do: Tensor,
    d_last: Tensor | None,
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
    kept = (pairs, read, write, totals) if pairs.numel() else None
    found = backward_passes(do, d_last, q, k, v, gates, bound, initial_state, cu_seqlens, last, kept, scale, reverse)
    dq, dk, dv, dg, d_bound, d_initial = found
    return dq, dk, dv, _or_empty(dg, q), _or_empty(d_bound, q), _or_empty(d_initial, q)


@_backward.register_fake
def _(do, d_last, q, k, v, gates, bound, initial_state, cu_seqlens, last, pairs, read, write, totals, scale, reverse):  # pyright: ignore
    def like(x: Tensor | None) -> Tensor:
        return _or_empty(None, q) if x is None else x.new_empty(x.shape, dtype=torch.float32)

    gated = gates if gates is not None and gates.dim() > 1 else None
    return (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), like(gated), like(bound), like(initial_state)
    )  # fmt: skip


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, d_last: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, gates, bound, initial_state, cu_seqlens, last, *kept = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(v)
    dq, dk, dv, dg, d_bound, d_initial = torch.ops.latentcot.decay_attention_backward(
        do, d_last, q, k, v, gates, bound, initial_state, cu_seqlens, last, *kept, ctx.scale, ctx.reverse
    )
    d_gates = dg.to(gates.dtype) if gates is not None and gates.dim() > 1 else None
    return (
        dq, dk, dv, d_gates, None if bound is None else d_bound,
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
    ``bound [H,K]`` float32 makes it HGRN2 (``fused.py``). ``reverse`` with one decay per channel takes neither a state
    nor a bound. First derivatives only.
    """
    vector = bound is not None or (log_decay is not None and log_decay.dim() == 4)
    if reverse and (bound is not None or (vector and initial_state is not None)):
        raise ValueError(
            "decay_attention: right to left with one decay per channel takes neither an initial state nor HGRN2's bound"
        )
    if log_decay is not None and log_decay.dim() == 1 and log_decay.requires_grad:
        # a constant needs no gradient; a learned one is the sum over its tokens, of both signs: nothing may round before it
        log_decay = log_decay.float().expand(q.shape[:3]).contiguous()
    inputs = (q, k, v, log_decay, bound, initial_state, cu_seqlens, scale, reverse)
    if torch.compiler.is_compiling():
        return torch.ops.latentcot.decay_attention_forward(*inputs)[:2]
    o, last = _DecayAttention.apply(*inputs)  # pyright: ignore[reportGeneralTypeIssues]
    return o, last
