r"""The delta rule chunk by chunk, in batched matrix products and one triangular solve.

The writes of a chunk depend on each other: :math:`u_i = \beta_i (v_i - k_i \bar S_i)` where :math:`\bar S_i` already
holds the writes before i. With :math:`D_{ij}` the decay from token j to token i that is a unit lower triangular system
(arXiv:2406.06484, arXiv:2412.06464; per channel arXiv:2510.26692):

.. math::
    (I + A)\, \tilde U = \beta V - \beta (K \odot D_{\cdot,0}) S, \quad
    A_{ij} = \beta_i \sum_\kappa k_{i\kappa} k_{j\kappa} D_{ij\kappa} \; (j < i), \\
    O = s (Q \odot D_{\cdot,0}) S + P \tilde U, \quad
    P_{ij} = s \sum_\kappa q_{i\kappa} k_{j\kappa} D_{ij\kappa} \; (j \le i), \quad
    S' = D_{C,0} S + (K \odot D_{C,\cdot})^\top \tilde U .

:math:`(I + A)^{-1}` is found by forward substitution and applied to both right-hand sides, for all chunks at once; the
loop over chunks is two products each. How the decays are formed is in ``segments.py``.
"""

from typing import Any

import torch
from torch import Tensor

from latentcot.kernels.chunking import chunk_count, from_chunks, to_chunks, zero_state
from latentcot.kernels.segments import decayed_products, end_decays, pair_decays

SCALAR_CHUNK = 64
VECTOR_CHUNK = 32


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None = None,
    *,
    output_state: bool = True,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Same as the reference for S >= 1, one reflection a token and as many q/k heads as value heads.

    q, k ``[B,S,H,K]``, v ``[B,S,H,V]``, beta ``[B,S,H]``, log_decay None, ``[B,S,H]`` or ``[B,S,H,K]``, state
    ``[B,H,K,V]``.
    """
    B, S, H, K = q.shape
    V = v.shape[-1]
    vector = log_decay is not None and log_decay.dim() == 4
    n, C = chunk_count(S, chunk_size or (VECTOR_CHUNK if vector else SCALAR_CHUNK))
    with_states = n > 1 or output_state or initial_state is not None
    q, k, v = to_chunks(q * scale, n, C), to_chunks(k, n, C), to_chunks(v, n, C)
    b = to_chunks(beta, n, C).unsqueeze(-1)  # [M,C,1] with M = B*H*n
    bk = b * k

    read, write, erase, total = q, k, bk, None
    if log_decay is None:
        system = torch.bmm(bk, k.mT)
        weights = torch.bmm(q, k.mT).tril()
    elif vector:
        gates = to_chunks(log_decay, n, C)
        system = decayed_products(bk, k, gates)
        weights = decayed_products(q, k, gates)
        weights = weights + torch.diag_embed((q * k).sum(-1))  # a token reads its own write undecayed
        if with_states:
            start, end = end_decays(gates)
            read, write, erase, total = q * start, k * end, bk * start, start[:, -1].view(B, H, n, K, 1)
    else:
        decays = pair_decays(to_chunks(log_decay, n, C), ends=with_states)
        inside = decays[..., 1:] if with_states else decays
        system = torch.bmm(bk, k.mT) * inside
        weights = torch.bmm(q, k.mT) * inside
        if with_states:
            start = decays[..., :1]
            read, write, erase = q * start, k * decays[:, -1, 1:].unsqueeze(-1), bk * start
            total = decays[:, -1, 0].view(B, H, n, 1, 1)

    solve: Tensor = _UnitLowerInverse.apply(system)  # pyright: ignore[reportAssignmentType]
    target = b * v
    if n == 1:
        state = initial_state
        if state is not None:
            target = torch.baddbmm(target, erase, state.reshape(-1, K, V), alpha=-1)
        u = torch.bmm(solve, target)
        o = torch.bmm(weights, u)
        if state is not None:
            o = torch.baddbmm(o, read, state.reshape(-1, K, V))
        if not output_state:
            return from_chunks(o, B, H, S), None
        written = torch.bmm(write.mT, u).view(B, H, K, V)
        if state is not None:
            written = written + (state if total is None else total[:, :, 0] * state)
        return from_chunks(o, B, H, S), written

    u0 = torch.bmm(solve, target).view(B * H, n, C, V)
    w = torch.bmm(solve, erase).view(B * H, n, C, K)
    write = write.view(B * H, n, C, K)
    if total is not None:
        total = total.view(B * H, n, -1, 1)
    state = zero_state(q, B, H, K, V).flatten(0, 1) if initial_state is None else initial_state.flatten(0, 1)
    incoming, writes = [], []
    for c in range(n):
        incoming.append(state)
        u = torch.baddbmm(u0[:, c], w[:, c], state, alpha=-1)
        writes.append(u)
        state = torch.baddbmm(state if total is None else total[:, c] * state, write[:, c].mT, u)
    u = torch.stack(writes, dim=1).view(-1, C, V)
    states = torch.stack(incoming, dim=1).view(-1, K, V)
    o = torch.baddbmm(torch.bmm(weights, u), read, states)
    return from_chunks(o, B, H, S), state.view(B, H, K, V)


class _UnitLowerInverse(torch.autograd.Function):
    """``(I + strictly lower part of A)^{-1}``, ``[M,C,C]``; what lies on and above the diagonal of A is ignored.

    Its own backward, ``dA = -tril(T^T dT T^T, -1)`` with T the inverse, costs two products where the derivative of the
    library's solver runs further triangular solves, several times slower on a CPU. It is differentiable again.
    """

    @staticmethod
    def forward(ctx: Any, system: Tensor) -> Tensor:
        C = system.shape[-1]
        identity = torch.eye(C, dtype=system.dtype, device=system.device).expand_as(system)
        inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True).contiguous()
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return torch.bmm(torch.bmm(inverse.mT, grads[0]), inverse.mT).tril(-1).neg()
