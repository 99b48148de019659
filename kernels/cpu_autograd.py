"""What the autograd functions of the compiled CPU path share."""

from typing import Any

import torch
from torch import Tensor

from latentcot.kernels.cpu_jit import ROWS, WIDTH


def gate_array(log_decay: Tensor | None, like: Tensor) -> Tensor:
    """The log-decay as ``[B,S,H,K]``, ``[B,S,H,1]`` or, the same for all tokens, ``[1,1,H,1]``."""
    H = like.shape[2]
    if log_decay is None:
        return like.new_zeros(1, 1, H, 1)
    if log_decay.dim() == 4:
        return log_decay
    return log_decay.unsqueeze(-1) if log_decay.dim() == 3 else log_decay.view(1, 1, H, 1)


def mark_size(K: int, V: int) -> int:
    """Numbers that one stored state takes inside the kernels, padding included."""
    return -(-K // WIDTH) * WIDTH * -(-V // ROWS) * ROWS


def gate_gradient(dg: Tensor, log_decay: Tensor) -> Tensor:
    """The gradient in the shape of the log-decay: ``[H]`` takes the sum over rows and tokens."""
    if log_decay.dim() == 4:
        return dg
    dg = dg.squeeze(-1)
    return dg.sum((0, 1)) if log_decay.dim() == 1 else dg


def again(function: Any, inputs: Any, grads: Any) -> list[Tensor | None]:
    """Gradients of ``function(*inputs) -> outputs``, as differentiable functions of the inputs and of ``grads``."""
    with torch.enable_grad():
        views = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t in views if t is not None and t.requires_grad]
        found = iter(
            torch.autograd.grad(function(*views)[: len(grads)], wanted, grads, create_graph=True, allow_unused=True)
        )
        return [next(found) if t is not None and t.requires_grad else None for t in views]
