"""Gated DeltaNet's mixer in Triton, gates and norms inside the kernels of the delta rule: registration."""

from typing import Any

import torch
from torch import Tensor

from latentcot.kernels.compile_together import compile_together, signature
from latentcot.kernels.delta_rule import triton_scalar
from latentcot.kernels.delta_rule.triton import forward_shapes
from latentcot.kernels.delta_rule.triton_plan import tokens
from latentcot.kernels.delta_rule.triton_scalar import Raw


def _shapes(
    q: Tensor, v: Tensor, a: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What the forward returns: what the delta rule does, unit vectors of q and k, their reciprocal lengths ``[2,H,T]``."""
    B, S, H, K = q.shape
    unit = ((B, S, H, K), q.dtype)
    norms = ((2, H, B * S), torch.float32)
    return [*forward_shapes(q, v, a, cu_seqlens, keep), unit, unit, norms]


@torch.library.custom_op("latentcot::gated_delta_net_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    scale: float,
    largest: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of ``latentcot::delta_rule_forward``, the unit vectors and their reciprocal lengths."""
    buffers = [torch.empty(s, dtype=d, device=q.device) for s, d in _shapes(q, v, a, cu_seqlens, keep)]
    o, last, solved, sums, strengths, writes, kept, q_unit, k_unit, norms = buffers
    initial = None if initial_state is None else initial_state.contiguous()
    raw = Raw(A_log.contiguous(), dt_bias.contiguous(), largest)
    inputs = (q_unit, k_unit, tokens(v), tokens(b), tokens(a), scale, initial, cu_seqlens)

    def launches() -> None:
        triton_scalar.normalise(tokens(q), q_unit, norms[0])
        triton_scalar.normalise(tokens(k), k_unit, norms[1])
        triton_scalar.forward(*inputs, keep, buffers[:7], raw)

    def gradients() -> None:
        triton_scalar.backward(
            o, None, *inputs, solved, sums, strengths, writes, kept, raw._replace(norms=norms, o=o)
        )  # fmt: skip

    key = ("gated_delta_net", signature(*inputs, keep, q), q.device)
    compile_together(key, q.device, launches, *([gradients] if keep else []))
    launches()
    return o, last, solved, sums, strengths, writes, kept, q_unit, k_unit, norms


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    scale: float,
    largest: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(s, dtype=d) for s, d in _shapes(q, v, a, cu_seqlens, keep))


@torch.library.custom_op("latentcot::gated_delta_net_backward", mutates_args=())
def _backward(
    d_o: Tensor | None,
    d_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    scale: float,
    largest: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    solved: Tensor,
    sums: Tensor,
    strengths: Tensor,
    writes: Tensor,
    kept: Tensor,
    norms: Tensor,
    o: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, a, b, A_log, dt_bias and the initial state (empty if that was None).

    q and k are the unit vectors, and their gradients those of what they were made from.
    """
    raw = Raw(A_log.contiguous(), dt_bias.contiguous(), largest, norms, o)
    d_q, d_k, d_v, d_b, d_a, d_initial, d_A_log, d_dt_bias = triton_scalar.backward(
        d_o, d_last, q, k, v, b, a, scale, initial_state, cu_seqlens, solved, sums, strengths, writes, kept, raw
    )
    return d_q, d_k, d_v, d_a, d_b, d_A_log, d_dt_bias, d_initial


@_backward.register_fake
def _(
    d_o: Tensor | None,
    d_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    scale: float,
    largest: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    solved: Tensor,
    sums: Tensor,
    strengths: Tensor,
    writes: Tensor,
    kept: Tensor,
    norms: Tensor,
    o: Tensor,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape)

    return tuple(like(x) for x in (q, k, v, a, b, A_log, dt_bias, initial_state))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, v, a, b, A_log, dt_bias, scale, largest, initial_state, cu_seqlens, keep = inputs
    if not keep:
        raise RuntimeError("latentcot::gated_delta_net_forward: a gradient is asked for, but keep is False")
    o, _, *kept, q_unit, k_unit, norms = output
    ctx.save_for_backward(q_unit, k_unit, v, a, b, A_log, dt_bias, initial_state, cu_seqlens, *kept, norms, o)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.options = scale, largest


def _gradients(ctx: Any, d_o: Tensor | None, d_last: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, a, b, A_log, dt_bias, initial_state, cu_seqlens, *kept = ctx.saved_tensors
    *gradients, d_initial = _backward(
        d_o, d_last, q, k, v, a, b, A_log, dt_bias, *ctx.options, initial_state, cu_seqlens, *kept
    )
    return (*gradients, None, None, None if initial_state is None else d_initial, None, None)


_forward.register_autograd(_gradients, setup_context=_setup)


def gated_delta_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    scale: float,
    largest: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet for S >= 1; q, k, v of one dtype, initial_state float32, cu_seqlens int64 on the device.

    beta = largest·sigmoid(b), log-decay = -e^A_log·softplus(a + dt_bias); q and k are divided by their lengths. o in v's
    dtype and the last states in float32; first derivatives of everything.
    """
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, a, b, A_log, dt_bias, initial_state)
    )
    found = _forward(q, k, v, a, b, A_log, dt_bias, scale, largest, initial_state, cu_seqlens, keep)
    return found[0], found[1]
