"""The gated scan step by step: the definition."""

import torch
from torch import Tensor


def gated_scan(x: Tensor, log_decay: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``h_t = exp(g_t) h_{t-1} + x_t``: x, log_decay ``[B,S,D]``, state ``[B,D]`` -> (o ``[B,S,D]``, last state)."""
    B, S, D = x.shape
    h = x.new_zeros(B, D) if initial_state is None else initial_state
    outputs = []
    for t in range(S):
        h = torch.exp(log_decay[:, t]) * h + x[:, t]
        outputs.append(h)
    return torch.stack(outputs, dim=1), h
