"""The short convolution's Triton kernels as operators of PyTorch, which autograd and ``torch.compile`` know.

``latentcot::short_convolution_forward/_backward`` for one tensor, ``latentcot::short_convolution_qkv_forward/_backward``
for three. First derivatives only.
"""

from typing import Any

import torch
from torch import Tensor

from latentcot.kernels import convolution_triton as kernels


def _state(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, wanted: bool) -> Tensor:
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return weight.new_empty((N, weight.shape[0], weight.shape[1] - 1) if wanted else (0,), dtype=torch.float32)


def _taps(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.float32)


@torch.library.custom_op("latentcot::short_convolution_forward", mutates_args=())
def one_forward(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None,
    silu: bool, both_sides: bool, output_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ys, final = kernels.forward(
        [x], weight, initial_state, cu_seqlens, lengths, silu=silu, both_sides=both_sides, output_state=output_state
    )
    return ys[0], final


@one_forward.register_fake
def _(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None,
    silu: bool, both_sides: bool, output_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), _state(x, weight, cu_seqlens, output_state)


@torch.library.custom_op("latentcot::short_convolution_backward", mutates_args=())
def one_backward(
    dy: Tensor, d_final: Tensor, x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    lengths: Tensor | None, silu: bool, both_sides: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dxs, d_weight, d_state = kernels.backward(
        [x], [dy], d_final, weight, initial_state, cu_seqlens, lengths, silu=silu, both_sides=both_sides
    )
    return dxs[0], d_weight, d_state


@one_backward.register_fake
def _(
    dy: Tensor, d_final: Tensor, x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    lengths: Tensor | None, silu: bool, both_sides: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), _taps(weight), _state(x, weight, cu_seqlens, initial_state is not None)


def _one_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, initial_state, cu_seqlens, lengths, ctx.silu, ctx.both_sides, _ = inputs
    ctx.save_for_backward(x, weight, initial_state, cu_seqlens, lengths)


def _one_gradient(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Any, ...]:
    x, weight, initial_state, cu_seqlens, lengths = ctx.saved_tensors
    dx, d_weight, d_state = one_backward(
        dy, d_final, x, weight, initial_state, cu_seqlens, lengths, ctx.silu, ctx.both_sides
    )
    return dx, d_weight.to(weight.dtype), None if initial_state is None else d_state, None, None, None, None, None


one_forward.register_autograd(_one_gradient, setup_context=_one_context)


@torch.library.custom_op("latentcot::short_convolution_qkv_forward", mutates_args=())
def qkv_forward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    lengths: Tensor | None, silu: bool, both_sides: bool, output_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ys, final = kernels.forward(
        [q, k, v], weight, initial_state, cu_seqlens, lengths, silu=silu, both_sides=both_sides,
        output_state=output_state,
    )  # fmt: skip
    return ys[0], ys[1], ys[2], final


@qkv_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    lengths: Tensor | None, silu: bool, both_sides: bool, output_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    final = _state(q, weight, cu_seqlens, output_state)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), final


@torch.library.custom_op("latentcot::short_convolution_qkv_backward", mutates_args=())
def qkv_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None, silu: bool, both_sides: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``dq, dk, dv`` are the gradients of the outputs; returns those of q, k, v, of the taps and of the state."""
    dxs, d_weight, d_state = kernels.backward(
        [q, k, v], [dq, dk, dv], d_final, weight, initial_state, cu_seqlens, lengths, silu=silu, both_sides=both_sides
    )
    return dxs[0], dxs[1], dxs[2], d_weight, d_state


@qkv_backward.register_fake
def _(
    dq: Tensor, dk: Tensor, dv: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None, silu: bool, both_sides: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_state = _state(q, weight, cu_seqlens, initial_state is not None)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), _taps(weight), d_state


def _qkv_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.silu, ctx.both_sides, _ = inputs
    ctx.save_for_backward(*tensors)


def _qkv_gradient(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, d_final: Tensor) -> tuple[Any, ...]:
    weight, initial_state = ctx.saved_tensors[3:5]
    dxs = qkv_backward(dq, dk, dv, d_final, *ctx.saved_tensors, ctx.silu, ctx.both_sides)
    d_state = None if initial_state is None else dxs[4]
    return *dxs[:3], dxs[3].to(weight.dtype), d_state, None, None, None, None, None


qkv_forward.register_autograd(_qkv_gradient, setup_context=_qkv_context)
