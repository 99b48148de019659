"""The scan's Triton kernels as operators of PyTorch, which autograd and ``torch.compile`` know.

``latentcot::gated_scan_forward/_backward`` and ``latentcot::hgrn_scan_forward/_backward``. First derivatives only: the
backward operators have no derivative, and asking for one raises.
"""

from typing import Any

import torch
from torch import Tensor

from latentcot.kernels.gated_scan import triton as kernels
from latentcot.kernels.launch import sequence_offsets


def _state(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(N, x.shape[2], dtype=torch.float32)


@torch.library.custom_op("latentcot::gated_scan_forward", mutates_args=())
def scan_forward(
    x: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    offsets = sequence_offsets(x.shape[0], x.shape[1], cu_seqlens, x.device)
    return kernels.forward(x, log_decay, None, initial_state, offsets, fused=False)


@scan_forward.register_fake
def _(x: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _state(x, cu_seqlens)


@torch.library.custom_op("latentcot::gated_scan_backward", mutates_args=())
def scan_backward(
    dh: Tensor, dfinal: Tensor, log_decay: Tensor, o: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    offsets = sequence_offsets(o.shape[0], o.shape[1], cu_seqlens, o.device)
    return kernels.backward(None, log_decay, None, o, initial_state, dh, dfinal, offsets, fused=False)[:3]


@scan_backward.register_fake
def _(
    dh: Tensor, dfinal: Tensor, log_decay: Tensor, o: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return o.new_empty(o.shape), log_decay.new_empty(log_decay.shape), _state(o, cu_seqlens)


def _scan_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _x, log_decay, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(log_decay, output[0], initial_state, cu_seqlens)


def _scan_gradient(ctx: Any, dh: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    log_decay, o, initial_state, cu_seqlens = ctx.saved_tensors
    dx, dg, dh0 = scan_backward(dh, dfinal, log_decay, o, initial_state, cu_seqlens)
    return dx, dg, None if initial_state is None else dh0, None


scan_forward.register_autograd(_scan_gradient, setup_context=_scan_context)


@torch.library.custom_op("latentcot::hgrn_scan_forward", mutates_args=())
def hgrn_forward(
    i: Tensor, f: Tensor, lower_bound: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    offsets = sequence_offsets(i.shape[0], i.shape[1], cu_seqlens, i.device)
    bound = None if lower_bound is None else lower_bound.contiguous()
    return kernels.forward(i, f, bound, initial_state, offsets, fused=True)


@hgrn_forward.register_fake
def _(
    i: Tensor, f: Tensor, lower_bound: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    return i.new_empty(i.shape), _state(i, cu_seqlens)


@torch.library.custom_op("latentcot::hgrn_scan_backward", mutates_args=())
def hgrn_backward(
    dh: Tensor, dfinal: Tensor, i: Tensor, f: Tensor, lower_bound: Tensor | None, o: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    offsets = sequence_offsets(o.shape[0], o.shape[1], cu_seqlens, o.device)
    bound = None if lower_bound is None else lower_bound.contiguous()
    return kernels.backward(i, f, bound, o, initial_state, dh, dfinal, offsets, fused=True)


@hgrn_backward.register_fake
def _(
    dh: Tensor, dfinal: Tensor, i: Tensor, f: Tensor, lower_bound: Tensor | None, o: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    state = _state(o, cu_seqlens)
    return o.new_empty(o.shape), f.new_empty(f.shape), state, state.new_empty(o.shape[2])


def _hgrn_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    i, f, lower_bound, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(i, f, lower_bound, output[0], initial_state, cu_seqlens)


def _hgrn_gradient(ctx: Any, dh: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    i, f, lower_bound, o, initial_state, cu_seqlens = ctx.saved_tensors
    di, df, dh0, dbound = hgrn_backward(dh, dfinal, i, f, lower_bound, o, initial_state, cu_seqlens)
    d_lower = None if lower_bound is None else dbound.to(lower_bound.dtype)
    return di, df, d_lower, None if initial_state is None else dh0, None


hgrn_forward.register_autograd(_hgrn_gradient, setup_context=_hgrn_context)
