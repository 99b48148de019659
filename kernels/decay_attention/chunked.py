r"""Decay attention chunk by chunk, in batched matrix products.

With :math:`D_{ij}` the decay from token j to token i of a chunk (per channel for vector gates) and :math:`S` the state
that comes in,

.. math::
    A_{ij} = s \sum_\kappa q_{i\kappa} k_{j\kappa} D_{ij\kappa}, \quad
    O = A V + s (Q \odot D_{\cdot,0}) S, \quad
    S' = D_{C,0} S + (K \odot D_{C,\cdot})^\top V .

Everything but the last line is computed for all chunks at once. How the decays are formed is in ``segments.py``.
"""

import torch
from torch import Tensor

from latentcot.kernels.chunking import chunk_count, from_chunks, to_chunks, zero_state
from latentcot.kernels.segments import decayed_products, end_decays, pair_decays

SCALAR_CHUNK = 64
VECTOR_CHUNK = 32


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None = None,
    *,
    output_state: bool = True,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Same as :func:`latentcot.kernels.decay_attention.reference.decay_attention`, for S >= 1."""
    B, S, H, K = q.shape
    V = v.shape[-1]
    vector = log_decay is not None and log_decay.dim() == 4
    n, C = chunk_count(S, chunk_size or (VECTOR_CHUNK if vector else SCALAR_CHUNK))
    with_states = n > 1 or output_state or initial_state is not None
    if log_decay is not None and log_decay.dim() == 1 and n * C != S:
        log_decay = log_decay.expand(B, S, H)  # padded tokens need a gate of their own
    q, k, v = to_chunks(q * scale, n, C), to_chunks(k, n, C), to_chunks(v, n, C)

    # q decayed from the incoming state, k decayed to the outgoing one, and the decay of the whole chunk
    read, write, total = q, k, None
    if log_decay is None:
        weights = torch.bmm(q, k.mT).tril()
    elif vector:
        gates = to_chunks(log_decay, n, C)
        weights = decayed_products(q, k, gates)
        weights = weights + torch.diag_embed((q * k).sum(-1))  # a token sees itself undecayed
        if with_states:
            start, end = end_decays(gates)
            read, write, total = q * start, k * end, start[:, -1].view(B, H, n, K, 1)
    else:
        fixed = log_decay.dim() == 1
        gates = log_decay.unsqueeze(-1).expand(H, C) if fixed else to_chunks(log_decay, n, C)
        decays = pair_decays(gates, ends=with_states)
        if fixed:  # [H,C,1+C], the same for all rows and chunks
            decays = decays.view(1, H, 1, C, -1).expand(B, H, n, C, -1).reshape(B * H * n, C, -1)
        weights = torch.bmm(q, k.mT) * decays[..., -C:]
        if with_states:
            read, write = q * decays[..., :1], k * decays[:, -1, 1:].unsqueeze(-1)
            total = decays[:, -1, 0].view(B, H, n, 1, 1)
    o = torch.bmm(weights, v)
    if not with_states:
        return from_chunks(o, B, H, S), None

    written = torch.bmm(write.mT, v).view(B, H, n, K, V)
    state = initial_state
    incoming = []
    for c in range(n):
        incoming.append(state)
        added = written[:, :, c]
        if state is None:
            state = added
        else:
            state = state + added if total is None else torch.addcmul(added, total[:, :, c], state)
    if initial_state is None:
        incoming[0] = zero_state(q, B, H, K, V)
    if n > 1 or initial_state is not None:
        o = torch.baddbmm(o, read, torch.stack(incoming, dim=2).view(-1, K, V))
    return from_chunks(o, B, H, S), state
