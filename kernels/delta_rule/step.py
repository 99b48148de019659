"""One token of the delta rule."""

import torch
from torch import Tensor

from latentcot.kernels.gated_scan.step import takes_triton


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor | None = None,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """``S = diag(exp(g)) S``; per reflection ``u = beta (v - k S); S = S + k^T u``; then ``o = scale q S``.

    q ``[B,H,K]``, k ``[B,R,H,K]``, v ``[B,R,H_v,V]``, beta ``[B,R,H_v]``, log_decay None, ``[B,H_v]`` or ``[B,H_v,K]``,
    state ``[B,H_v,K,V]`` (None is zero) -> (o ``[B,H_v,V]``, state). ``in_place`` overwrites the given state and returns
    it; ValueError without one. In plain PyTorch all tensors have one dtype; the kernel, taken for CUDA tensors when
    gradients are off, wants a float32 state.
    """
    if q.is_cuda and takes_triton(q, k, v, beta, log_decay, state):
        from latentcot.kernels import step_triton

        return step_triton.delta_rule_step(q, k, v, beta, log_decay, scale, state, in_place=in_place)
    if in_place and state is None:
        raise ValueError("delta_rule_step: in_place=True needs a state to write into; state is None")
    R, Hv = v.shape[1:3]
    repeats = Hv // q.shape[1]
    if repeats > 1:
        q, k = q.repeat_interleave(repeats, dim=1), k.repeat_interleave(repeats, dim=2)
    if state is not None and log_decay is not None:
        decay = torch.exp(log_decay if log_decay.dim() == 3 else log_decay.unsqueeze(-1)).unsqueeze(-1)
        state = state.mul_(decay) if in_place else decay * state
    o = v[:, 0]
    for r in range(R):
        key, u, last = k[:, r], v[:, r], r == R - 1
        read = None
        if state is not None:
            # the query reads what was there before the last write, in the same product: q S = q S_before + (q . k) u
            reads = torch.matmul(torch.stack((key, q), dim=-2) if last else key.unsqueeze(-2), state)
            u, read = u - reads[..., 0, :], reads[..., -1, :]
        u = beta[:, r].unsqueeze(-1) * u
        if last:
            own = scale * (q * key).sum(-1, keepdim=True)
            o = own * u if read is None else torch.add(own * u, read, alpha=scale)
        key, row = key.unsqueeze(-1), u.unsqueeze(-2)
        if state is None:
            state = key * row
        else:
            state = state.addcmul_(key, row) if in_place else torch.addcmul(state, key, row)
    assert state is not None  # R >= 1
    return o, state
