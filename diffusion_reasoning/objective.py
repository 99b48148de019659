r"""The training objective of masked diffusion: a weighted cross-entropy at masked positions.

.. math:: L = \mathbb{E}_t \sum_i \mathbb{1}[z_i = m]\, w(t)\, (-\log p_i), \qquad w(t) = -\alpha'(t) / (1 - \alpha(t))

is the negative evidence lower bound (NELBO) in nats a sequence (arXiv:2406.07524). Four normalisations are in use and
are *not* equivalent:

======== ============================================== =================================
name     formula                                        where
======== ============================================== =================================
elbo     sum of w CE / number of tokens (B · L)         MDLM, LLaDA pre-training
answer   mean over rows of (sum of w CE / A_b)          LLaDA fine-tuning
tokens   sum of w CE / sum of A_b                       d1 fine-tuning
masked   sum of w CE / number of masked tokens          DiffuLLaMA, MGDM; not the ELBO
======== ============================================== =================================

A_b is the number of maskable tokens of row b, end-of-text padding included: those tokens are masked and learned like
any other.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone import HybridForCausalLM
from latentcot.diffusion_reasoning.corruption import check_logits, check_maskable, corrupt, precise, without_mask_token
from latentcot.diffusion_reasoning.denoiser import BackboneDenoiser, Denoiser, as_denoiser
from latentcot.diffusion_reasoning.schedule import NoiseSchedule, sample_times

Weight = Literal["elbo", "uniform"]
Normalise = Literal["elbo", "answer", "tokens", "masked"]


@dataclass(frozen=True)
class DiffusionLoss:
    """``loss``: scalar to differentiate. The rest is detached.

    ``nelbo_nats [B]``: one-draw estimate of each row's NELBO, always with the weight w(t); ``n_maskable [B]``;
    ``per_token [B, L]``: weighted cross-entropy, 0 where nothing was masked; ``t [B]``; ``masked [B, L]``.
    """

    loss: Tensor
    nelbo_nats: Tensor
    n_maskable: Tensor
    per_token: Tensor
    t: Tensor
    masked: Tensor

    @property
    def nats_per_token(self) -> Tensor:
        """NELBO over all maskable tokens, masked or not; its exponential bounds the perplexity."""
        return self.nelbo_nats.sum() / self.n_maskable.sum()


def diffusion_loss(
    model: Denoiser | HybridForCausalLM,
    x0: Tensor,
    *,
    schedule: NoiseSchedule,
    mask_id: int,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    time: Literal["antithetic", "iid"] | Tensor = "antithetic",
    weight: Weight = "elbo",
    normalise: Normalise = "elbo",
    generator: torch.Generator | None = None,
    rank: int = 0,
    world_size: int = 1,
    time_eps: float = 1e-3,
    forbid_mask_token: bool = True,
) -> DiffusionLoss:
    """One network pass at one random time a row.

    Args:
        model: callable ``(z, attention_mask) -> logits``, or a hybrid backbone (run bidirectionally, head at masked
            positions only).
        x0: clean tokens ``[B, L]``.
        maskable: ``[B, L]``; False = given: never noised, no loss. Default: every real token.
        attention_mask: ``[B, L]``, True = real; padded positions can not be maskable.
        time: how times are drawn (:func:`~latentcot.diffusion_reasoning.schedule.sample_times`), or the times ``[B]``
            themselves.
        weight: ``elbo`` = w(t), ``uniform`` = 1.
        normalise: see the table above. Rows without a maskable position are left out; ``elbo`` divides by all real
            tokens of the other rows, given ones included.
        rank, world_size: place in a data-parallel group, so that times are stratified over the global batch.

    Raises:
        ValueError: see :func:`~latentcot.diffusion_reasoning.corruption.corrupt`; unknown names; no maskable position
            at all.
        FloatingPointError: a cross-entropy that is not finite, naming row and position.
    """
    model = as_denoiser(model)
    if weight not in ("elbo", "uniform"):
        raise ValueError(f"weight: {weight!r} given, expected 'elbo' or 'uniform'")
    if normalise not in ("elbo", "answer", "tokens", "masked"):
        raise ValueError(f"normalise: {normalise!r} given, expected 'elbo', 'answer', 'tokens' or 'masked'")
    real = check_maskable(x0, None) if attention_mask is None else attention_mask.bool()
    if real.shape != x0.shape:
        raise ValueError(f"attention_mask: shape {list(real.shape)} given, expected {list(x0.shape)}")
    maskable = real if maskable is None else check_maskable(x0, maskable)
    if bool((maskable & ~real).any()):
        raise ValueError("maskable: it is True at padded positions (attention_mask False)")
    n_maskable = maskable.sum(1)
    scored = n_maskable > 0
    if not bool(scored.any()):
        raise ValueError("maskable: no row has a maskable position, so there is nothing to score")

    mode, fixed = ("fixed", time) if isinstance(time, Tensor) else (time, None)
    t = sample_times(x0.shape[0], mode, time_eps, generator, rank, world_size, fixed).to(x0.device)  # type: ignore[arg-type]
    noisy = corrupt(x0, t, schedule, mask_id, maskable, generator)
    if isinstance(model, BackboneDenoiser):
        logits = model.at(noisy.z, real, noisy.masked)
    else:
        logits = model(noisy.z, real)
        check_logits(logits, x0, mask_id)
        logits = logits[noisy.masked]
    logits = without_mask_token(precise(logits), mask_id) if forbid_mask_token else precise(logits)
    cross_entropy = F.cross_entropy(logits, x0[noisy.masked], reduction="none")
    if not bool(cross_entropy.detach().isfinite().all()):
        row, position = noisy.masked.nonzero()[int((~cross_entropy.isfinite()).nonzero()[0])].tolist()
        raise FloatingPointError(
            f"cross-entropy is not finite at row {row}, position {position} (token {int(x0[row, position])})"
        )

    per_token = torch.zeros(x0.shape, dtype=cross_entropy.dtype, device=x0.device).masked_scatter(
        noisy.masked, cross_entropy
    )
    w = schedule.weight(t).to(per_token.dtype)[:, None]
    nelbo = (w * per_token.detach()).sum(1)
    if weight == "elbo":
        per_token = w * per_token
    match normalise:
        case "elbo":
            loss = per_token.sum() / real[scored].sum()
        case "answer":
            loss = (per_token.sum(1) / n_maskable.clamp(min=1)).sum() / scored.sum()
        case "tokens":
            loss = per_token.sum() / n_maskable.sum()
        case _:
            loss = per_token.sum() / noisy.masked.sum().clamp(min=1)
    return DiffusionLoss(loss, nelbo, n_maskable, per_token.detach(), t, noisy.masked)
