"""Decay attention step by step: the definition."""

import torch
from torch import Tensor


def decay_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t``, ``o_t = scale q_t S_t``.

    q, k ``[B,S,H,K]``, v ``[B,S,H,V]``, log_decay None, ``[H]``, ``[B,S,H]`` or ``[B,S,H,K]``, state ``[B,H,K,V]``
    -> (o ``[B,S,H,V]``, last state).
    """
    B, S, H, K = q.shape
    state = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(S):
        if log_decay is not None:
            g = log_decay if log_decay.dim() == 1 else log_decay[:, t]  # [H], [B,H] or [B,H,K]
            state = torch.exp(g if g.dim() == 3 else g.unsqueeze(-1)).unsqueeze(-1) * state
        state = state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state
