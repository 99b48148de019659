"""The delta rule step by step: the definition."""

import torch
from torch import Tensor


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decay once a token, then erase and write once per reflection, then read.

    ``S = diag(exp(g_t)) S``; for r = 1 … R: ``u = beta (v - k S)``, ``S = S + k^T u``; ``o_t = scale q_t S``.

    q ``[B,S,H,K]``; k ``[B,S,R,H,K]``, v ``[B,S,R,H_v,V]``, beta ``[B,S,R,H_v]``; log_decay None, ``[B,S,H_v]`` or
    ``[B,S,H_v,K]``; state ``[B,H_v,K,V]`` -> (o ``[B,S,H_v,V]``, last state). H_v = m H: each q/k head serves m value
    heads.
    """
    B, S, H, K = q.shape
    R, Hv, V = v.shape[2:]
    q = q.repeat_interleave(Hv // H, dim=2)
    k = k.repeat_interleave(Hv // H, dim=3)
    state = q.new_zeros(B, Hv, K, V) if initial_state is None else initial_state
    outputs = []
    for t in range(S):
        if log_decay is not None:
            g = log_decay[:, t]  # [B,H_v] or [B,H_v,K]
            state = torch.exp(g if g.dim() == 3 else g.unsqueeze(-1)).unsqueeze(-1) * state
        for r in range(R):
            stored = torch.einsum("bhk,bhkv->bhv", k[:, t, r], state)
            u = beta[:, t, r].unsqueeze(-1) * (v[:, t, r] - stored)
            state = state + k[:, t, r].unsqueeze(-1) * u.unsqueeze(-2)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state
