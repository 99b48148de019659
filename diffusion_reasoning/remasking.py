r"""Sending revealed tokens back to the mask, and the exact reverse step it is part of.

Going from time t to an earlier time s with re-masking probability :math:`\sigma` (ReMDM, arXiv:2503.00307):

====================== ============================================================================================
position holds         becomes
====================== ============================================================================================
the mask               token v with :math:`p(v)\,(\alpha_s - (1-\sigma)\alpha_t)/(1-\alpha_t)`,
                       else stays masked: :math:`(1 - \alpha_s - \sigma\alpha_t)/(1-\alpha_t)`
a token                itself with :math:`1-\sigma`, the mask with :math:`\sigma`; never another token
====================== ============================================================================================

for :math:`0 \le \sigma \le \sigma_{max} = \min(1, (1-\alpha_s)/\alpha_t)` (1 where :math:`\alpha_t = 0`). Whatever
sigma, the share of clean tokens at s is :math:`\alpha_s`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentcot.diffusion_reasoning.corruption import check_logits, check_maskable


def posterior(
    logprobs: Tensor,
    z: Tensor,
    alpha_t: float,
    alpha_s: float,
    sigma: float,
    mask_id: int,
    maskable: Tensor | None = None,
) -> Tensor:
    """Probabilities ``[B, L, V]`` of each position at time s given ``z [B, L]`` at time t.

    Args:
        logprobs: the network's log-probabilities of clean tokens ``[B, L, V]``, the mask token at minus infinity; read
            at masked positions only (a token that is there is never predicted anew).
        alpha_t, alpha_s: share of clean tokens before and after, ``0 <= alpha_t <= alpha_s <= 1`` and ``alpha_t < 1``.
        sigma: probability that a revealed token is masked again; 0 is the plain reverse process.
        maskable: given positions (False) are kept whatever they hold.

    Raises:
        ValueError: alphas out of order, sigma above its maximum, or a network that predicts the mask token.
    """
    check_logits(logprobs, z, mask_id)
    if not 0.0 <= alpha_t <= alpha_s <= 1.0 or alpha_t >= 1.0:
        raise ValueError(
            f"alpha_t, alpha_s: expected 0 <= alpha_t <= alpha_s <= 1 and alpha_t < 1, got {alpha_t} and {alpha_s}"
        )
    highest = float(sigma_max(torch.tensor(alpha_t, dtype=torch.float64), torch.tensor(alpha_s, dtype=torch.float64)))
    if not 0.0 <= sigma <= highest * (1 + 1e-12):
        raise ValueError(f"sigma: expected 0 <= sigma <= {highest} = min(1, (1 - alpha_s) / alpha_t), got {sigma}")
    maskable = check_maskable(z, maskable)
    masked = (z == mask_id) & maskable
    if bool((logprobs[..., mask_id] > -torch.inf)[masked].any()):
        raise ValueError(
            f"logprobs: the mask token {mask_id} has positive probability; it is never predicted (see subs_logprobs)"
        )
    is_mask = (torch.arange(logprobs.shape[-1], device=z.device) == mask_id).to(logprobs.dtype)
    is_held = torch.nn.functional.one_hot(z, logprobs.shape[-1]).to(logprobs.dtype)
    reveal, stay = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t), (1 - alpha_s - sigma * alpha_t) / (1 - alpha_t)
    from_mask = logprobs.exp() * reveal + is_mask * stay
    from_token = is_held * (1 - sigma) + is_mask * sigma
    held = torch.where(maskable[..., None], from_token, is_held)
    return torch.where(masked[..., None], from_mask, held)


def sigma_max(alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """Largest admissible re-masking probability."""
    return torch.where(alpha_t > 0, (1 - alpha_s) / alpha_t.clamp(min=1e-300), 1.0).clamp(max=1.0)


@dataclass(frozen=True)
class ReMDM:
    """Re-mask each revealed token of the canvas with probability sigma in every step of the ancestral sampler.

    ``cap``: sigma = min(eta, sigma_max) (published runs: 0.008); ``rescale``: sigma = eta · sigma_max (0.015).
    """

    eta: float = 0.008
    variant: Literal["cap", "rescale"] = "cap"

    def __post_init__(self) -> None:
        if self.variant not in ("cap", "rescale"):
            raise ValueError(f"variant: {self.variant!r} given, expected 'cap' or 'rescale'")
        if not self.eta >= 0.0 or (self.variant == "rescale" and self.eta > 1.0):
            raise ValueError(
                f"eta: expected eta >= 0{' and <= 1' if self.variant == 'rescale' else ''}, got {self.eta}"
            )

    def sigma(self, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        highest = sigma_max(alpha_t, alpha_s)
        return highest.clamp(max=self.eta) if self.variant == "cap" else self.eta * highest


@dataclass(frozen=True)
class Revise:
    """Once a block is filled, ``passes`` more times: mask its ``count`` least confident tokens again and predict them
    anew.

    The prompt and finished blocks are not touched. Each pass is one network pass and is counted as one.
    """

    passes: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if self.passes < 1 or self.count < 1:
            raise ValueError(f"passes, count: at least 1 each, got {self.passes} and {self.count}")

    def pick(self, confidence: Tensor, block: Tensor) -> Tensor:
        """The least confident positions of ``block [R, L]``, ties by lower position; ``confidence [R, L]`` as at the
        last reveal."""
        order = confidence.masked_fill(~block, torch.inf).sort(dim=1, stable=True).indices
        rank = torch.empty_like(order).scatter(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        return block & (rank < self.count)


Remasking = ReMDM | Revise | None
