"""One token of decay attention."""

import torch
from torch import Tensor

from latentcot.kernels.gated_scan.step import takes_triton


def decay_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor | None = None,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """``S = diag(exp(g)) S + k^T v; o = scale q S`` for one token.

    q, k ``[B,H,K]``, v ``[B,H,V]``, log_decay None, ``[H]``, ``[B,H]`` or ``[B,H,K]``, state ``[B,H,K,V]`` (None is
    zero) -> (o ``[B,H,V]``, state). ``in_place`` overwrites the given state and returns it; ValueError without one. In
    plain PyTorch all tensors have one dtype; the kernel, taken for CUDA tensors when gradients are off, wants a float32
    state.
    """
    if q.is_cuda and takes_triton(q, k, v, log_decay, state):
        from latentcot.kernels import step_triton

        return step_triton.decay_attention_step(q, k, v, log_decay, scale, state, in_place=in_place)
    if in_place:
        if state is None:
            raise ValueError("decay_attention_step: in_place=True needs a state to write into; state is None")
        if log_decay is not None:
            state.mul_(torch.exp(log_decay if log_decay.dim() == 3 else log_decay.unsqueeze(-1)).unsqueeze(-1))
        written = state.addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
    else:
        written = k.unsqueeze(-1) * v.unsqueeze(-2)
        if state is not None:
            if log_decay is None:
                written = state + written
            else:
                decay = torch.exp(log_decay if log_decay.dim() == 3 else log_decay.unsqueeze(-1)).unsqueeze(-1)
                written = torch.addcmul(written, decay, state)
    o = torch.matmul((scale * q).unsqueeze(-2), written).squeeze(-2)
    return o, written
