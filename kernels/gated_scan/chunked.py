r"""The gated scan without a loop over tokens.

Two neighbouring steps are one step: :math:`(a_2, b_2) \circ (a_1, b_1) = (a_2 a_1, a_2 b_1 + b_2)` with
:math:`a = e^g`. So the scan of S tokens is the scan of S/2 summaries (chunks of two, again and again) and one more
multiply-add for the tokens in between: O(S) work in 2 log2(S) batched steps. Every factor is a product of decays,
at most 1, so nothing can overflow.

Backward is the same scan from right to left:
:math:`\delta_t = dh_t + a_{t+1} \delta_{t+1}`, :math:`dx_t = \delta_t`, :math:`dg_t = \delta_t a_t h_{t-1}`,
:math:`dh_0 = a_1 \delta_1`. It is made of differentiable steps, so second derivatives work too.
"""

from typing import Any

import torch
from torch import Tensor


def gated_scan(x: Tensor, log_decay: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Same as :func:`latentcot.kernels.gated_scan.reference.gated_scan`, for S >= 1."""
    h: Tensor = _Scan.apply(x, log_decay, initial_state)  # pyright: ignore[reportAssignmentType]
    return h, h[:, -1]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> Tensor:
        decay = torch.exp(log_decay)
        if initial_state is not None:
            x = x.clone()
            x[:, 0].addcmul_(decay[:, 0], initial_state)
        h = _scan(decay, x)
        ctx.save_for_backward(log_decay, initial_state, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        log_decay, initial_state, h = ctx.saved_tensors
        decay = torch.exp(log_decay)
        following = torch.cat([torch.zeros_like(log_decay[:, :1]), log_decay[:, 1:].flip(1)], dim=1)
        delta: Tensor = _Scan.apply(grads[0].flip(1), following, None)  # pyright: ignore[reportAssignmentType]
        delta = delta.flip(1)
        first = torch.zeros_like(h[:, :1]) if initial_state is None else initial_state.unsqueeze(1)
        weighted = delta * decay
        d_state = weighted[:, 0] if ctx.needs_input_grad[2] else None
        return delta, weighted * torch.cat([first, h[:, :-1]], dim=1), d_state


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """``h_t = a_t h_{t-1} + b_t`` from the zero state, ``[B,S,D]``."""
    S = b.shape[1]
    if S == 1:
        return b.clone()
    a_odd, b_odd = a[:, 1::2], b[:, 1::2]
    half = a_odd.shape[1]
    a_even, b_even = a[:, 0::2], b[:, 0::2]
    h_odd = _scan(a_odd * a_even[:, :half], torch.addcmul(b_odd, a_odd, b_even[:, :half]))
    h = torch.empty_like(b)
    h[:, 1::2] = h_odd
    h[:, 0] = b[:, 0]
    h[:, 2::2] = torch.addcmul(b_even[:, 1:], a_even[:, 1:], h_odd[:, : b_even.shape[1] - 1])
    return h
