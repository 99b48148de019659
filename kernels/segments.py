r"""Decays between two positions of a chunk, without ever forming a positive exponent or a difference of large sums.

The weight of token j seen from token i is :math:`\exp(\sum_{j<t\le i} g_t)`, all :math:`g \le 0`. The usual
:math:`\exp(G_i - G_j)` of running sums G loses digits once a strong gate has made G large, and factors of the form
:math:`e^{-G_j}` overflow. Here every exponent is a plain sum of gates, computed as a product with a fixed 0/1 matrix, so terms
share a sign, nothing cancels and every factor lies in [0, 1].

* One gate per token: all pairs at once, :func:`pair_decays`.
* One gate per channel: pairs would need ``C x C x K`` exponentials. Split the chunk in halves, and the halves again: for i in
  the right and j in the left half around a midpoint m, the exponent is (sum from m to i) + (sum from j+1 to m-1), one factor for
  the query and one for the key, so each of the log2(C) levels is an ordinary matrix product of scaled queries and keys, masked to
  its own pairs. :class:`Levels` holds the matrices, :func:`level_decays` the factors, :func:`decayed_products` the result.
"""

from functools import lru_cache

import torch
from torch import Tensor

# exp(-LIMIT) is zero in float64, so a gate below it (log 0 = -inf above all) acts as a full reset; 0 * inf never appears.
LIMIT = 1000.0


@lru_cache(maxsize=64)
def _pair_matrix(C: int, ends: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 0/1 matrix ``[C, rows*columns]`` of "which gates lie between", and the mask ``[rows*columns]`` (0 or -inf)."""
    with torch.inference_mode(False):
        t = torch.arange(C, device=device)
        i = t.view(1, -1, 1)
        j = torch.arange(-1 if ends else 0, C, device=device).view(1, 1, -1)
        t = t.view(-1, 1, 1)
        between = ((j < t) & (t <= i)).to(dtype).flatten(1)
        mask = torch.zeros(C, j.numel(), dtype=dtype, device=device).masked_fill_((j > i)[0], float("-inf")).flatten()
        return between, mask


def pair_decays(log_decay: Tensor, *, ends: bool) -> Tensor:
    """``[...,C] -> [...,C,C]`` (``ends``: ``[...,C,1+C]``): decay from token j (column) to token i (row), 0 where j > i.

    With ``ends`` column 0 is the decay from before the chunk to token i; the last row is the decay from j to the end of the chunk.
    """
    C = log_decay.shape[-1]
    between, mask = _pair_matrix(C, ends, log_decay.dtype, log_decay.device)
    exponent = torch.addmm(mask, log_decay.clamp_min(-LIMIT).reshape(-1, C), between)
    return exponent.exp().view(*log_decay.shape, -1)


class Levels:
    """The fixed matrices of the halving scheme for chunks of C tokens.

    ``sums [rows, C]`` maps gates to exponents: L*C rows for queries, L*C rows for keys (level-major), then C rows "from before
    the chunk to token i" and C rows "from token j to the end". ``masks [L, C, C]`` says which pairs belong to a level; level 0
    is the diagonal.
    """

    def __init__(self, C: int, dtype: torch.dtype, device: torch.device) -> None:
        self.C = C
        self.count = 1 + (C - 1).bit_length()
        position = torch.arange(C)
        t = position.view(1, -1)
        queries, keys, masks = [torch.zeros(C, C)], [torch.zeros(C, C)], [torch.eye(C)]
        for level in range(self.count - 1):
            right = (position >> level & 1).bool().view(-1, 1)
            middle = ((position >> level) << level).view(-1, 1)  # of a right-half position: where its half begins
            after = (((position >> level) + 1) << level).view(-1, 1)  # of a left-half position: where the right half begins
            i = position.view(-1, 1)
            queries.append((right & (t >= middle) & (t <= i)).float())
            keys.append((~right & (t > i) & (t < after)).float())
            same_pair = (position >> (level + 1)).view(-1, 1) == (position >> (level + 1)).view(1, -1)
            masks.append((same_pair & right & ~right.view(1, -1)).float())
        i = position.view(-1, 1)
        sums = [*queries, *keys, (t <= i).float(), (t > i).float()]
        with torch.inference_mode(False):
            self.sums = torch.cat(sums).to(device=device, dtype=dtype)
            self.masks = torch.stack(masks).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def levels(C: int, dtype: torch.dtype, device: torch.device) -> Levels:
    with torch.inference_mode(False):
        return Levels(C, dtype, device)


def level_decays(log_decay: Tensor, plan: Levels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[M,C,K]`` -> factors for queries ``[M,L,C,K]``, for keys ``[M,L,C,K]``, from the start ``[M,C,K]``, to the end ``[M,C,K]``."""
    M, C, K = log_decay.shape
    sums = plan.sums.expand(M, -1, -1)
    factors = torch.bmm(sums, log_decay.clamp_min(-LIMIT)).exp()
    n = plan.count * C
    queries, keys, start, end = factors.split([n, n, C, C], dim=1)
    return queries.view(M, plan.count, C, K), keys.view(M, plan.count, C, K), start, end


def decayed_products(q: Tensor, k: Tensor, query_decays: Tensor, key_decays: Tensor, masks: Tensor) -> Tensor:
    """``A_ij = sum_k q_ik k_jk exp(sum of g_k over j < t <= i)`` for the pairs of ``masks``: ``[M,C,K] -> [M,C,C]``."""
    by_level = torch.matmul(q.unsqueeze(1) * query_decays, (k.unsqueeze(1) * key_decays).mT)  # [M,L,C,C]
    return (by_level * masks).sum(1)
