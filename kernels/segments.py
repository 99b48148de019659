r"""Decays between two positions of a chunk, without ever forming a positive exponent or a difference of large sums.

The weight of token j seen from token i is :math:`\exp(\sum_{j<t\le i} g_t)`, all :math:`g \le 0`. The usual
:math:`\exp(G_i - G_j)` of running sums G loses digits once a strong gate has made G large, and factors of the form
:math:`e^{-G_j}` overflow. Here every exponent is a plain sum of gates, computed as a product with a fixed 0/1 matrix,
so terms share a sign, nothing cancels and every factor lies in [0, 1].

* One gate per token: all pairs at once, :func:`pair_decays`.
* One gate per channel: pairs would need ``C x C x K`` exponentials. Split the chunk in halves, and the halves again:
  for i in the right and j in the left half around a midpoint m, the exponent is (sum from m to i) + (sum from j+1 to
  m-1), one factor for the query and one for the key, so each of the log2(C) levels is an ordinary matrix product of
  scaled queries and keys, masked to its own pairs. :class:`Levels` holds the matrices, :func:`level_decays` the
  factors, :func:`decayed_products` the result.
"""

from functools import lru_cache

import torch
from torch import Tensor

# exp(-LIMIT) is zero in float64, so a gate below it (log 0 = -inf above all) acts as a full reset; 0 * inf never
# appears.
LIMIT = 1000.0


@lru_cache(maxsize=64)
def _pair_matrix(C: int, ends: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 0/1 matrix of "which gates lie between" ``[C, rows*columns]`` and the mask ``[rows*columns]``, 0 or -inf."""
    with torch.inference_mode(False):
        t = torch.arange(C, device=device)
        i = t.view(1, -1, 1)
        j = torch.arange(-1 if ends else 0, C, device=device).view(1, 1, -1)
        t = t.view(-1, 1, 1)
        between = ((j < t) & (t <= i)).to(dtype).flatten(1)
        mask = torch.zeros(C, j.numel(), dtype=dtype, device=device).masked_fill_((j > i)[0], float("-inf")).flatten()
        return between, mask


def pair_decays(log_decay: Tensor, *, ends: bool) -> Tensor:
    """Decay from token j (column) to token i (row), 0 if j > i: ``[...,C] -> [...,C,C]``, with ends ``[...,C,1+C]``.

    With ``ends`` column 0 is the decay from before the chunk to token i; the last row is the decay from j to the end of
    the chunk.
    """
    C = log_decay.shape[-1]
    between, mask = _pair_matrix(C, ends, log_decay.dtype, log_decay.device)
    exponent = torch.addmm(mask, log_decay.clamp_min(-LIMIT).reshape(-1, C), between)
    return exponent.exp().view(*log_decay.shape, -1)


class Levels:
    """The fixed matrices of the halving scheme for chunks of C tokens.

    Level l splits blocks of 2^(l+1) tokens in halves. A token is in one half only, so one factor a token and level is
    enough: in a right half the decay from the midpoint to the token, in a left half the decay from the token to the
    midpoint.
    ``sums [L*C (+ 2C), C]`` maps gates to the exponents, level-major; with ``ends`` followed by C rows "from before the
    chunk to token i" and C rows "from token j to the end". ``masks [L,C,C]`` says which pairs (i right, j left) belong
    to a level.
    """

    def __init__(self, C: int, ends: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.count = (C - 1).bit_length()
        self.ends = ends
        i = torch.arange(C).view(-1, 1)
        t = torch.arange(C).view(1, -1)
        sums, masks = [], []
        for level in range(self.count):
            right = (i >> level & 1).bool()
            edge = ((i >> level) + (~right).long()) << level  # where the right half of the token's block begins
            sums.append(torch.where(right, (t >= edge) & (t <= i), (t > i) & (t < edge)))
            masks.append((i >> (level + 1) == t >> (level + 1)) & right & ~right.mT)
        if ends:
            sums += [t <= i, t > i]
        with torch.inference_mode(False):  # a cached inference tensor could not be used in training later
            empty = torch.zeros(0, C, dtype=torch.bool)
            self.sums = torch.cat([empty, *sums]).to(device=device, dtype=dtype)
            self.masks = torch.cat([empty, *masks]).view(self.count, C, C).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def levels(C: int, ends: bool, dtype: torch.dtype, device: torch.device) -> Levels:
    return Levels(C, ends, dtype, device)


def level_decays(log_decay: Tensor, plan: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """``[M,C,K]`` -> factors by level ``[M,L,C,K]`` and, with ends, from the start and to the end, ``[M,C,K]`` each."""
    M, C, K = log_decay.shape
    factors = torch.bmm(plan.sums.expand(M, -1, -1), log_decay.clamp_min(-LIMIT)).exp()
    pairs, ends = plan.count * C, C if plan.ends else 0
    by_level, start, end = factors.split([pairs, ends, ends], dim=1)
    return by_level.view(M, plan.count, C, K), start, end


def decayed_products(q: Tensor, scaled_k: Tensor, by_level: Tensor, masks: Tensor) -> Tensor:
    """``A_ij = sum_k q_ik k_jk exp(sum of g_k over j < t <= i)`` for j < i, else 0: ``[M,C,K] -> [M,C,C]``.

    ``scaled_k [M,L,C,K]`` is ``k * by_level``, which two products of the delta rule share.
    """
    return (torch.matmul(q.unsqueeze(1) * by_level, scaled_k.mT) * masks).sum(1)
