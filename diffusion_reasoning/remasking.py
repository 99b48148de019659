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

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from latentcot.diffusion_reasoning.corruption import check_logits, check_maskable
from latentcot.diffusion_reasoning.quota import ranks
from latentcot.diffusion_reasoning.schedule import NoiseSchedule


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


REMDM_VARIANTS = ("cap", "rescale", "conf", "loop", "forward_backward")
_PUBLISHED_ETA = {"cap": 0.008, "rescale": 0.015, "loop": 0.02}


@dataclass(frozen=True)
class ReMDM:
    r"""Re-mask revealed tokens of the canvas in every step of the ancestral sampler (arXiv:2503.00307).

    ==================== ========================================================================== =============
    variant              :math:`\sigma_t`                                                            published eta
    ==================== ========================================================================== =============
    ``cap``              :math:`\min(\eta, \sigma_{max})`                                            0.008
    ``rescale``          :math:`\eta\,\sigma_{max}`                                                  0.015
    ``conf``             :math:`\sigma_{max}` shared out by a softmax of :math:`-p_i`, the            –
                         probability of token i when it was last revealed; 0 at masked positions
    ``loop``             0 before ``t_on`` and after ``t_off``; between them                        0.02
                         :math:`\min(\eta, \sigma_{max})` with the share of clean tokens held at
                         ``alpha_on``
    ``forward_backward`` :math:`(\alpha_s - \alpha_t)/\alpha_t`                                      –
    ==================== ========================================================================== =============

    All are cut at :math:`\sigma_{max}`. ``loop`` brings a schedule of its own, linear from 0 at t = 1 to ``alpha_on`` at
    ``t_on``, and from there at ``t_off`` to 1 at t = 0; both ends of a step are read off that one curve.

    Args:
        eta: strength; ``None`` = the published value. ``conf`` and ``forward_backward`` have none.
        variant: see the table.
        t_on, t_off, alpha_on: of ``loop`` (published: 0.55, 0.05, 0.9).

    Raises:
        ValueError: unknown variant, eta below 0 (above 1 for ``rescale``) or given where there is none, times out of
            order.
    """

    eta: float | None = None
    variant: Literal["cap", "rescale", "conf", "loop", "forward_backward"] = "cap"
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    def __post_init__(self) -> None:
        if self.variant not in REMDM_VARIANTS:
            raise ValueError(f"variant: {self.variant!r} given, expected one of {', '.join(map(repr, REMDM_VARIANTS))}")
        if self.eta is not None and self.variant not in _PUBLISHED_ETA:
            raise ValueError(f"eta: ReMDM's variant {self.variant!r} has none, got {self.eta}")
        if not self.strength >= 0.0 or (self.variant == "rescale" and self.strength > 1.0):
            raise ValueError(
                f"eta: expected eta >= 0{' and <= 1' if self.variant == 'rescale' else ''}, got {self.eta}"
            )
        if not 0.0 < self.t_off < self.t_on < 1.0 or not 0.0 < self.alpha_on < 1.0:
            raise ValueError(
                "t_on, t_off, alpha_on: expected 0 < t_off < t_on < 1 and 0 < alpha_on < 1, got "
                f"{self.t_on}, {self.t_off} and {self.alpha_on}"
            )

    @property
    def strength(self) -> float:
        """``eta``, or the published value."""
        return _PUBLISHED_ETA.get(self.variant, 1.0) if self.eta is None else self.eta

    def alpha(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Share of clean tokens at times ``t``: the schedule's, or that of the loop."""
        if self.variant != "loop":
            return schedule.alpha(t)
        rising = (1 - t) * (self.alpha_on / (1 - self.t_on))
        last = 1 - t * ((1 - self.alpha_on) / self.t_off)
        return torch.where(t > self.t_on, rising, torch.where(t > self.t_off, self.alpha_on, last))

    def sigma(
        self,
        alpha_t: Tensor,
        alpha_s: Tensor,
        t: Tensor | None = None,
        probability: Tensor | None = None,
        revealed: Tensor | None = None,
    ) -> Tensor:
        """Re-masking probability of each row ``[R]``; of each position ``[R, L]`` for ``conf``.

        Args:
            alpha_t, alpha_s: share of clean tokens before and after the step ``[R]``.
            t: time before it ``[R]``; ``loop`` needs it.
            probability: ``[R, L]`` of each token when it was last revealed; ``conf`` needs it.
            revealed: ``[R, L]`` positions that hold a revealed token; ``conf`` needs it.
        """
        highest, eta = sigma_max(alpha_t, alpha_s), self.strength
        match self.variant:
            case "cap":
                return highest.clamp(max=eta)
            case "rescale":
                return eta * highest
            case "forward_backward":
                rate = (alpha_s - alpha_t) / alpha_t.clamp(min=1e-300)
                return torch.where(alpha_t > 0, torch.minimum(rate, highest), highest)
            case "loop":
                if t is None:
                    raise ValueError("t: the variant 'loop' needs the time before the step")
                return torch.where((t <= self.t_on) & (t > self.t_off), highest.clamp(max=eta), 0.0)
        if probability is None or revealed is None:
            raise ValueError("probability, revealed: the variant 'conf' needs both")
        # masked before the softmax: a row with nothing revealed would be a softmax over nothing
        score = (-probability).masked_fill(~revealed, -torch.inf)
        score = torch.where(revealed.any(1, keepdim=True), score, 0.0)
        return (highest[:, None] * score.softmax(1)).masked_fill(~revealed, 0.0)


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
        return block & (ranks(-confidence.masked_fill(~block, torch.inf)) < self.count)


Remasking = ReMDM | Revise | None

REMASKINGS: dict[str, Callable[[], ReMDM | Revise]] = {
    **{variant: (lambda variant=variant: ReMDM(variant=variant)) for variant in REMDM_VARIANTS},
    "revise": Revise,
}


def register_remask(name: str, make: Callable[[], ReMDM | Revise]) -> None:
    """Give a re-masking of your own a name for ``DiffusionGenerationConfig(remask=name)``: a sub-class of
    :class:`ReMDM` or :class:`Revise`, or either with values of its own. ``ValueError`` when the name is taken."""
    if name in REMASKINGS:
        raise ValueError(f"name: there is a re-masking {name!r} already")
    REMASKINGS[name] = make


def find_remask(remask: str | Remasking, eta: float | None = None) -> Remasking:
    """By name, or a value as it is; ``eta`` replaces the strength of a named :class:`ReMDM`."""
    if not isinstance(remask, str):
        if remask is not None and not isinstance(remask, ReMDM | Revise):
            raise ValueError(f"remask: expected a name, ReMDM, Revise or None, got {remask!r}")
        if eta is not None:
            raise ValueError("eta: it belongs to a re-masking given by name; write it into the ReMDM itself")
        return remask
    if remask not in REMASKINGS:
        raise ValueError(f"remask: unknown re-masking {remask!r}; valid: {', '.join(REMASKINGS)}, or a value")
    found = REMASKINGS[remask]()
    if eta is None:
        return found
    if not isinstance(found, ReMDM):
        raise ValueError(f"eta: {remask!r} has none")
    return replace(found, eta=eta)
