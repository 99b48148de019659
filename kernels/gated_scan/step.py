"""One token of the gated scan."""

import torch
from torch import Tensor


def gated_scan_step(x: Tensor, log_decay: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``h = exp(g) h + x`` for one token: x, log_decay, state ``[B,D]`` -> (o ``[B,D]``, state). State None is zero."""
    h = x if state is None else torch.addcmul(x, torch.exp(log_decay), state)
    return h, h
