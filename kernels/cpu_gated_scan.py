"""The gated scan on a CPU: compiled steps with a backward pass of their own (needs Numba)."""

from typing import Any, cast

import torch
from torch import Tensor

from latentcot.kernels.cpu_autograd import again
from latentcot.kernels.cpu_scan_kernels import BLOCK, backward, forward
from latentcot.kernels.cpu_threads import array, spread
from latentcot.kernels.gated_scan import chunked

STEP_COST = 4.0  # a step waits for memory rather than for arithmetic: what it counts in multiply-adds


def gated_scan(x: Tensor, log_decay: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Same as :func:`latentcot.kernels.gated_scan.reference.gated_scan`, for S >= 1, on CPU tensors.

    float32 or float64. Derivatives of a derivative are those of the chunked form.
    """
    h = cast(Tensor, _Scan.apply(x, log_decay, initial_state))
    return h, h[:, -1]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> Tensor:
        B, S, D = x.shape
        h = x.new_empty(B, S, D)
        initial = x.new_empty(0, 0) if initial_state is None else initial_state
        arrays = [array(t) for t in (x, log_decay, initial, h)]
        spread(forward, B * -(-D // BLOCK), STEP_COST * x.numel(), *arrays)
        ctx.save_for_backward(x, log_decay, initial_state, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, log_decay, initial_state, h = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradients must be differentiable themselves
            return tuple(again(chunked.gated_scan, (x, log_decay, initial_state), grads))
        B, S, D = x.shape
        dx, dg = x.new_empty(B, S, D), x.new_empty(B, S, D)
        initial = x.new_empty(0, 0) if initial_state is None else initial_state
        d_initial = x.new_empty(initial.shape)
        arrays = [array(t) for t in (log_decay, initial, h, grads[0], dx, dg, d_initial)]
        spread(backward, B * -(-D // BLOCK), STEP_COST * x.numel(), *arrays)
        return dx, dg, None if initial_state is None else d_initial
