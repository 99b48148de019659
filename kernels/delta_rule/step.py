"""One token of the delta rule."""

import torch
from torch import Tensor


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``S = diag(exp(g)) S``; per reflection ``u = beta (v - k S); S = S + k^T u``; then ``o = scale q S``.

    q ``[B,H,K]``, k ``[B,R,H,K]``, v ``[B,R,H_v,V]``, beta ``[B,R,H_v]``, log_decay None, ``[B,H_v]`` or ``[B,H_v,K]``,
    state ``[B,H_v,K,V]`` (None is zero) -> (o ``[B,H_v,V]``, state).
    """
    R, Hv = v.shape[1:3]
    repeats = Hv // q.shape[1]
    if repeats > 1:
        q, k = q.repeat_interleave(repeats, dim=1), k.repeat_interleave(repeats, dim=2)
    if state is not None and log_decay is not None:
        state = torch.exp(log_decay if log_decay.dim() == 3 else log_decay.unsqueeze(-1)).unsqueeze(-1) * state
    for r in range(R):
        u = v[:, r]
        if state is not None:
            u = u - torch.matmul(k[:, r].unsqueeze(-2), state).squeeze(-2)
        u = beta[:, r].unsqueeze(-1) * u
        written = k[:, r].unsqueeze(-1) * u.unsqueeze(-2)
        state = written if state is None else state + written
    assert state is not None  # R >= 1
    return torch.matmul((scale * q).unsqueeze(-2), state).squeeze(-2), state
