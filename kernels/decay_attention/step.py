"""One token of decay attention."""

import torch
from torch import Tensor


def decay_attention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``S = diag(exp(g)) S + k^T v; o = scale q S`` for one token.

    q, k ``[B,H,K]``, v ``[B,H,V]``, log_decay None, ``[H]``, ``[B,H]`` or ``[B,H,K]``, state ``[B,H,K,V]`` (None is
    zero) -> (o ``[B,H,V]``, state).
    """
    written = k.unsqueeze(-1) * v.unsqueeze(-2)
    if state is not None:
        if log_decay is None:
            written = state + written
        else:
            decay = torch.exp(log_decay if log_decay.dim() == 3 else log_decay.unsqueeze(-1)).unsqueeze(-1)
            written = torch.addcmul(written, decay, state)
    o = torch.matmul((scale * q).unsqueeze(-2), written).squeeze(-2)
    return o, written
