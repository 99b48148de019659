"""One token of the gated scan, and when a step is Triton's."""

from functools import lru_cache

import torch
from torch import Tensor

from latentcot.kernels.dispatch import missing_for_triton


@lru_cache(maxsize=32)
def _served(device: torch.device, dtype: torch.dtype) -> bool:
    return missing_for_triton("gated_scan", device, dtype) is None


def takes_triton(*tensors: Tensor | None) -> bool:
    """Whether the one-token kernels of ``step_triton.py`` serve a step on these tensors (of a CUDA device).

    They have no derivative, so gradients must be off, and compute in float32, so nothing may be float64.
    """
    if torch.is_grad_enabled():
        return False
    return all(t is None or (t.is_cuda and _served(t.device, t.dtype)) for t in tensors)


def gated_scan_step(
    x: Tensor, log_decay: Tensor, state: Tensor | None = None, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """``h = exp(g) h + x`` for one token: x, log_decay, state ``[B,D]`` -> (o ``[B,D]``, state). State None is zero.

    ``in_place`` overwrites the given state (float32) and returns it; ValueError without one.
    """
    if x.is_cuda and takes_triton(x, log_decay, state):
        from latentcot.kernels import step_triton

        return step_triton.gated_scan_step(x, log_decay, state, in_place=in_place)
    if in_place:
        if state is None:
            raise ValueError("gated_scan_step: in_place=True needs a state to write into; state is None")
        state.mul_(torch.exp(log_decay)).add_(x)
        return state.to(x.dtype, copy=True), state
    h = x if state is None else torch.addcmul(x, torch.exp(log_decay), state)
    return h, h
