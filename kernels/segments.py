r"""Decays between two positions of a chunk, without ever forming a positive exponent or a difference of large sums.

The weight of token j seen from token i is :math:`\exp(\sum_{j<t\le i} g_t)`, all :math:`g \le 0`. The usual
:math:`\exp(G_i - G_j)` of running sums G loses digits once a strong gate has made G large, and factors of the form
:math:`e^{-G_j}` overflow. Here every exponent is a plain sum of gates, computed as a product with a fixed 0/1 matrix,
so terms share a sign, nothing cancels and every factor lies in [0, 1].

* One gate per token: all pairs at once, :func:`pair_decays`.
* One gate per channel: pairs would need ``C x C x K`` exponentials. Split the chunk in halves, and the halves again:
  for i in the right and j in the left half around a midpoint m, the exponent is (sum from m to i) + (sum from j+1 to
  m-1), one factor for the query and one for the key, so each of the log2(C) levels is an ordinary matrix product of
  scaled queries and keys, masked to its own pairs. :class:`Levels` holds the matrices,
  :func:`decayed_products` forms the result.
"""

from functools import lru_cache
from typing import Any, cast

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
    midpoint. Each of ``steps`` is a level: ``sums [C,C]`` maps gates to the exponents, ``right [C,1]`` marks the tokens
    of right halves, ``mask [C,C]`` the pairs (i right, j left) that the level is for. ``ends [2C,C]`` gives "from
    before the chunk to token i" and "from token j to the end".
    """

    def __init__(self, C: int, dtype: torch.dtype, device: torch.device) -> None:
        i = torch.arange(C).view(-1, 1)
        t = torch.arange(C).view(1, -1)
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.inference_mode(False):  # a cached inference tensor could not be used in training later
            for level in range((C - 1).bit_length()):
                right = (i >> level & 1).bool()
                edge = ((i >> level) + (~right).long()) << level  # where the right half of the token's block begins
                sums = torch.where(right, (t >= edge) & (t <= i), (t > i) & (t < edge))
                mask = (i >> (level + 1) == t >> (level + 1)) & right & ~right.mT
                self.steps.append((sums.to(device, dtype), right.to(device, dtype), mask.to(device, dtype)))
            self.ends = torch.cat([t <= i, t > i]).to(device, dtype)


@lru_cache(maxsize=64)
def levels(C: int, dtype: torch.dtype, device: torch.device) -> Levels:
    return Levels(C, dtype, device)


def end_decays(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Decay from before the chunk to token i, and from token j to the end of the chunk: ``[M,C,K]``, both."""
    M, C, _ = log_decay.shape
    ends = levels(C, log_decay.dtype, log_decay.device).ends
    start, end = torch.bmm(ends.expand(M, -1, -1), log_decay.clamp_min(-LIMIT)).exp().chunk(2, dim=1)
    return start, end


def decayed_products(q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """``A_ij = sum_k q_ik k_jk exp(sum of g_k over j < t <= i)`` for j < i, else 0: ``[M,C,K]`` each -> ``[M,C,C]``."""
    return cast(Tensor, _DecayedProducts.apply(q, k, log_decay.clamp_min(-LIMIT)))


class _DecayedProducts(torch.autograd.Function):
    """One level at a time: what is held stays in the cache, and queries and keys of a level share one tensor.

    Only queries of right halves and keys of left halves take part in a level, so ``z = factor * (q if right else k)``
    holds both, ``A`` collects ``mask * z z^T``, and with ``D = dA * mask`` the gradient is ``dz = (D + D^T) z``. The
    exponents' gradient is ``z * dz``. Under ``create_graph`` the levels are computed again, in differentiable steps on
    the inputs.
    """

    @staticmethod
    def level(q: Tensor, k: Tensor, log_decay: Tensor, sums: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        factor = torch.bmm(sums.expand(q.shape[0], -1, -1), log_decay).exp()
        return factor, torch.lerp(k, q, right) * factor

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
        M, C, _ = q.shape
        plan = levels(C, q.dtype, q.device)
        products = q.new_zeros(M, C, C)
        ctx.kept = []
        for sums, right, mask in plan.steps:
            factor, z = _DecayedProducts.level(q, k, log_decay, sums, right)
            products.addcmul_(torch.bmm(z, z.mT), mask)
            ctx.kept.append((factor, z))
        ctx.save_for_backward(q, k, log_decay)
        return products

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, log_decay = ctx.saved_tensors
        M, C, _ = q.shape
        dq, dk, dg = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(log_decay)
        for (sums, right, mask), kept in zip(levels(C, q.dtype, q.device).steps, ctx.kept, strict=True):
            factor, z = _DecayedProducts.level(q, k, log_decay, sums, right) if torch.is_grad_enabled() else kept
            d_level = grads[0] * mask
            dz = torch.bmm(d_level + d_level.mT, z)
            dg = torch.baddbmm(dg, sums.mT.expand(M, -1, -1), z * dz)
            d_unscaled = dz * factor
            dq = torch.addcmul(dq, d_unscaled, right)
            dk = torch.addcmul(dk, d_unscaled, 1 - right)
        return dq, dk, dg
