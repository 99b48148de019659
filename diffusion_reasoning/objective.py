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
any other. Four weights replace w(t):

========= ========================================================================= =======================
name      weight of a masked token                                                  where
========= ========================================================================= =======================
elbo      w(t)                                                                      MDLM, LLaDA
uniform   1
mgdm      (T - k) · a (1 - e^{-CE})^gamma at t = (k+1)/T; the factor is not         MGDM (arXiv:2410.14157)
          detached
cart      ½ · sum over clean j != i of p (1-p)^{|i-j|-1}, at least ``floor``        Dream (arXiv:2508.15487)
========= ========================================================================= =======================

Whole recipes by name: :mod:`~latentcot.diffusion_reasoning.recipes`.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone import HybridForCausalLM
from latentcot.diffusion_reasoning.corruption import (
    Corruption,
    check_logits,
    check_maskable,
    corrupt,
    precise,
    without_mask_token,
)
from latentcot.diffusion_reasoning.denoiser import BackboneDenoiser, Denoiser, as_denoiser
from latentcot.diffusion_reasoning.schedule import NoiseSchedule, sample_times

Weight = Literal["elbo", "uniform", "mgdm", "cart"]
Time = Literal["antithetic", "iid", "importance", "discrete"]
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

    @property
    def bits_per_token(self) -> Tensor:
        """The same in bits."""
        return self.nats_per_token / math.log(2)


def diffusion_loss(
    model: Denoiser | HybridForCausalLM,
    x0: Tensor,
    *,
    schedule: NoiseSchedule,
    mask_id: int,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    time: Time | Tensor = "antithetic",
    weight: Weight = "elbo",
    normalise: Normalise = "elbo",
    generator: torch.Generator | None = None,
    rank: int = 0,
    world_size: int = 1,
    time_eps: float = 1e-3,
    forbid_mask_token: bool = True,
    discrete_steps: int | None = None,
    focal: tuple[float, float] = (0.25, 1.0),
    cart_p: float = 0.3,
    cart_floor: float = 0.0,
    carry: str = "none",
    carry_probability: float = 0.8,
) -> DiffusionLoss:
    """One network pass at one random time a row; two with a carry.

    Args:
        model: callable ``(z, attention_mask) -> logits``, a hybrid backbone (run bidirectionally, head at masked
            positions only) or a ``DiffusionLM``.
        x0: clean tokens ``[B, L]``.
        maskable: ``[B, L]``; False = given: never noised, no loss. Default: every real token.
        attention_mask: ``[B, L]``, True = real; padded positions can not be maskable.
        time: how times are drawn (:func:`~latentcot.diffusion_reasoning.schedule.sample_times`), or the times ``[B]``
            themselves.
        weight: see the table above. ``mgdm`` needs ``time="discrete"``.
        normalise: see the table above. Rows without a maskable position are left out; ``elbo`` divides by all real
            tokens of the other rows, given ones included.
        rank, world_size: place in a data-parallel group, so that times are stratified over the global batch.
        discrete_steps: T of ``time="discrete"``.
        focal: (a, gamma) of ``mgdm``.
        cart_p, cart_floor: p and the least weight of ``cart`` (without a floor a fully masked row has weight 0).
        carry: what the network was built with, or ``none``. With ``carry_probability`` a pass without gradient comes
            first, and the loss is that of a second one that starts from what the first one carried over
            (arXiv:2510.17206).

    Raises:
        ValueError: see :func:`~latentcot.diffusion_reasoning.corruption.corrupt`; unknown names; no maskable position
            at all.
        FloatingPointError: a cross-entropy that is not finite, naming row and position.
    """
    model = as_denoiser(model)
    if weight not in get_args(Weight):
        raise ValueError(f"weight: {weight!r} given, expected one of {', '.join(map(repr, get_args(Weight)))}")
    if weight == "mgdm" and (not isinstance(time, str) or time != "discrete"):
        raise ValueError(f"weight: 'mgdm' counts its weights in steps, so time must be 'discrete', got {time!r}")
    if not 0.0 < cart_p < 1.0 or cart_floor < 0.0 or focal[0] <= 0.0 or focal[1] < 0.0:
        raise ValueError(
            "cart_p, cart_floor, focal: expected 0 < p < 1, a floor >= 0, a > 0 and gamma >= 0, got "
            f"{cart_p}, {cart_floor} and {focal}"
        )
    check_carry(model, carry, carry_probability)
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
    t = sample_times(
        x0.shape[0],
        mode,
        time_eps,
        generator,
        rank,
        world_size,
        fixed,
        schedule,
        discrete_steps,  # type: ignore[arg-type]
    ).to(x0.device)
    noisy = corrupt(x0, t, schedule, mask_id, maskable, generator)
    sigma = schedule.sigma(t) if getattr(model, "time_conditioning", False) else None
    logits = _masked_logits(model, noisy, real, mask_id, sigma, carry, carry_probability, generator)
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
    if mode == "importance":
        w = torch.full_like(t, schedule.total_weight())
    elif discrete_steps is not None:
        w = schedule.step_weight(t, discrete_steps)
    else:
        w = schedule.weight(t)
    w = w.to(per_token.dtype)[:, None]
    nelbo = (w * per_token.detach()).sum(1)
    match weight:
        case "elbo":
            per_token = w * per_token
        case "mgdm":
            assert discrete_steps is not None
            a, gamma = focal
            left = (discrete_steps - (t * discrete_steps).round() + 1).to(per_token.dtype)[:, None]  # T - k
            # never quite 0: the slope of x^gamma there is infinite below gamma = 1, and what is certain has CE = 0
            unsure = (-torch.expm1(-per_token)).clamp(min=torch.finfo(per_token.dtype).tiny)
            per_token = left * a * unsure.pow(gamma) * per_token
        case "cart":
            per_token = cart_weights(noisy.masked, real, cart_p).clamp(min=cart_floor).to(per_token.dtype) * per_token
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


def cart_weights(masked: Tensor, real: Tensor, p: float = 0.3) -> Tensor:
    r"""Context-adaptive weights :math:`\tfrac12 \sum_{j\,clean,\,j \ne i} p (1-p)^{|i-j|-1}`, ``[B, L]`` fp64.

    A masked token counts for as much as there is clean context near it: 1 with everything around it known (far from the
    ends), 0 with nothing. ``masked``, ``real [B, L]`` bool; distances count real tokens.
    """
    position = (real.long().cumsum(1) - 1).double()
    distance = (position[:, :, None] - position[:, None, :]).abs()
    near = torch.where(distance > 0, p * (1 - p) ** (distance - 1).clamp(min=0), 0.0)
    clean = (real & ~masked).double()
    return torch.einsum("bij,bj->bi", near, clean) / 2


def check_carry(model: Denoiser, carry: str, probability: float) -> None:
    """``ValueError`` unless the network was built with this carry and the probability is one."""
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"carry_probability: expected a probability, got {probability}")
    own = getattr(getattr(model, "carry", None), "name", "none")
    if carry not in ("none", own):
        raise ValueError(f"carry: {carry!r} asked for, but the network was built with {own!r}")


def _masked_logits(
    model: Denoiser,
    noisy: Corruption,
    real: Tensor,
    mask_id: int,
    sigma: Tensor | None,
    carry: str,
    probability: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Logits ``[n, V]`` of the masked positions."""
    if isinstance(model, BackboneDenoiser):
        embeddings = None
        if carry != "none":
            device = "cpu" if generator is None else generator.device
            twice = bool(torch.rand((), generator=generator, device=device) < probability)
            if twice and bool(noisy.masked.any()):
                with torch.no_grad():
                    hidden = model.hidden(noisy.z, real, sigma)
                # the mixture itself has a gradient: it reaches the carry's parameters and the embeddings
                memory = model.carried(noisy.z, hidden, noisy.masked, mask_id)
                embeddings = model.embed_with(noisy.z, noisy.masked, memory)
        return model.at(noisy.z, real, noisy.masked, sigma, embeddings)
    if sigma is None and (at := getattr(model, "at", None)) is not None:  # its head runs at the chosen positions alone
        return at(noisy.z, real, noisy.masked)
    logits = model(noisy.z, real) if sigma is None else model(noisy.z, real, sigma)
    check_logits(logits, noisy.z, mask_id)
    return logits[noisy.masked]
