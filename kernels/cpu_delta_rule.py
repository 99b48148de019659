"""The delta rule on a CPU: compiled steps with a backward pass of their own (needs Numba)."""

from typing import Any, cast

import torch
from torch import Tensor

from latentcot.kernels.cpu_autograd import again, gate_array, gate_gradient, mark_size
from latentcot.kernels.cpu_delta_kernels import CHUNK, backward, forward
from latentcot.kernels.cpu_threads import array, spread
from latentcot.kernels.delta_rule import chunked


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None = None,
    *,
    output_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Same as :func:`latentcot.kernels.delta_rule.chunked.delta_rule`, on CPU tensors, float32 or float64.

    Derivatives of a derivative are those of the chunked form.
    """
    o, state = cast(
        tuple[Tensor, Tensor], _DeltaRule.apply(q, k, v, beta, log_decay, scale, initial_state, output_state)
    )
    return o, state if output_state else None


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        scale: float,
        initial_state: Tensor | None,
        output_state: bool,
    ) -> tuple[Tensor, Tensor]:
        B, S, H, K = q.shape
        V = v.shape[-1]
        o = q.new_empty(B, S, H, V)
        state = q.new_empty((B, H, K, V) if output_state else (0, 0, 0, 0))
        keep = any(ctx.needs_input_grad)
        marks = q.new_empty((B * H, -(-S // CHUNK), mark_size(K, V)) if keep else (0, 0, 0))
        initial = q.new_empty(0, 0, 0, 0) if initial_state is None else initial_state
        g = gate_array(log_decay, q)
        inputs = [array(t) for t in (q, k, v, beta, g)]
        spread(forward, B * H, 4.0 * B * H * S * K * V, *inputs, scale, *(array(t) for t in (initial, o, state, marks)))
        ctx.save_for_backward(q, k, v, beta, log_decay, initial_state, marks)
        ctx.scale, ctx.output_state = scale, output_state
        return o, state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, log_decay, initial_state, marks = ctx.saved_tensors
        scale = ctx.scale
        given = grads if ctx.output_state else grads[:1]
        if torch.is_grad_enabled():  # create_graph: the gradients must be differentiable themselves
            dq, dk, dv, d_beta, dg, d_initial = again(
                lambda q, k, v, beta, g, s: chunked.delta_rule(q, k, v, beta, g, scale, s), ctx.saved_tensors[:6], given
            )
            return dq, dk, dv, d_beta, dg, None, d_initial, None
        B, S, H, K = q.shape
        V = v.shape[-1]
        dq, dk, dv, d_beta = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v, beta))
        wanted = log_decay if ctx.needs_input_grad[4] else None
        dg = q.new_empty((0, 0, 0, 0) if wanted is None else (B, S, H, K if wanted.dim() == 4 else 1))
        d_initial = q.new_empty((0, 0, 0, 0) if initial_state is None else (B, H, K, V))
        g = gate_array(log_decay, q)
        inputs = [array(t) for t in (q, k, v, beta, g)]
        outputs = [array(t) for t in (dq, dk, dv, d_beta, dg, d_initial)]
        spread(
            backward, B * H, 10.0 * B * H * S * K * V, *inputs, scale, *(array(t) for t in (marks, *grads)), *outputs
        )
        d_decay = None if wanted is None else gate_gradient(dg, wanted)
        return dq, dk, dv, d_beta, d_decay, None, d_initial if initial_state is not None else None, None
