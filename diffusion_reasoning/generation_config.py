"""What a sampler is made of, checked when it is put together, and the named combinations."""

from dataclasses import dataclass, field
from typing import Any, Literal

from latentcot.diffusion_reasoning.confidence import ON_UNIT_SCALE, Confidence, find_confidence
from latentcot.diffusion_reasoning.corruption import check_mask_id
from latentcot.diffusion_reasoning.quota import QUOTAS, Bernoulli, Cosine, Quota, Threshold, Uniform
from latentcot.diffusion_reasoning.remasking import Remasking, ReMDM
from latentcot.diffusion_reasoning.schedule import NoiseSchedule
from latentcot.reasoner import SPECIAL

Stop = Literal["canvas", "eos_block", "eos_truncate"]


@dataclass(frozen=True)
class DiffusionGenerationConfig:
    """One sampler. :func:`low_confidence` and :func:`ancestral` build the usual ones.

    Args:
        max_new_tokens: masked positions put behind the input; 0 = infilling at ``maskable`` only.
        steps: passes over the whole canvas, shared out over the blocks; ``None`` = one token a pass.
        block_length: maskable positions decoded together, left to right; ``None`` = all at once.
        order: confidence, by name or a callable (:mod:`~latentcot.diffusion_reasoning.confidence`).
        quota: ``uniform``, ``cosine``, ``threshold``, ``bernoulli`` or a
            :class:`~latentcot.diffusion_reasoning.quota.Quota`.
        threshold: of the ``threshold`` quota.
        temperature: of proposed tokens; 0 = argmax. Noise is drawn in fp64: fp32 cuts off the tail (arXiv:2409.02908).
        top_k, top_p: filters on the tempered distribution, before confidence.
        remask: :class:`~latentcot.diffusion_reasoning.remasking.ReMDM`, ``Revise`` or ``None``.
        stop: ``canvas`` = when all is filled; ``eos_block`` = when a finished block holds ``eos_id`` (the rest is
            filled with it); ``eos_truncate`` = as ``canvas``, and everything behind the first ``eos_id`` becomes it.
        max_nfe: most network passes a row may take; in the last one everything masked is filled at once.
        seed: of the rows' random numbers; ``None`` = a new one each call, from torch's default generator.
        schedule, t_end: of the ``bernoulli`` quota.
        forbid_mask_token: the mask token is never proposed.
        parity: ``"llada"`` refuses blocks and steps that do not come out even.

    Raises:
        ValueError: on any value out of range or a combination that means nothing.
    """

    max_new_tokens: int = 0
    steps: int | None = None
    block_length: int | None = None
    order: str | Confidence = "prob"
    quota: str | Quota = "uniform"
    threshold: float = 0.9
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    remask: Remasking = None
    stop: Stop = "canvas"
    max_nfe: int | None = None
    seed: int | None = 0
    mask_id: int = SPECIAL.mask
    eos_id: int = SPECIAL.eos
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    t_end: float = 1e-5
    forbid_mask_token: bool = True
    parity: Literal["llada"] | None = None

    def __post_init__(self) -> None:
        check_mask_id(self.mask_id, eos_id=self.eos_id)
        for name, low in (("max_new_tokens", 0), ("steps", 1), ("block_length", 1), ("top_k", 1), ("max_nfe", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected 0 < top_p <= 1, got {self.top_p}")
        if self.stop not in ("canvas", "eos_block", "eos_truncate"):
            raise ValueError(f"stop: {self.stop!r} given, expected 'canvas', 'eos_block' or 'eos_truncate'")
        if self.parity not in (None, "llada"):
            raise ValueError(f"parity: {self.parity!r} given, expected None or 'llada'")
        find_confidence(self.order)
        quota = self.make_quota()
        if isinstance(quota, Threshold) and isinstance(self.order, str) and self.order not in ON_UNIT_SCALE:
            raise ValueError(
                f"order: {self.order!r} is not within 0..1, so no threshold fits it; take one of "
                f"{', '.join(sorted(ON_UNIT_SCALE))}"
            )
        if self.steps is not None and not quota.takes_steps:
            raise ValueError(f"steps: {type(quota).__name__} has no number of steps; bound its passes by max_nfe")
        if self.steps is None and not quota.counted:
            raise ValueError(f"steps: {type(quota).__name__} needs a number of steps")
        if isinstance(self.remask, ReMDM) and not isinstance(quota, Bernoulli):
            raise ValueError(
                f"remask: ReMDM belongs to the bernoulli quota (the ancestral sampler), got quota {self.quota!r}"
            )

    def make_quota(self) -> Quota:
        match self.quota:
            case Quota():
                return self.quota
            case "uniform":
                return Uniform()
            case "cosine":
                return Cosine()
            case "threshold":
                return Threshold(self.threshold)
            case "bernoulli":
                return Bernoulli(self.schedule, self.t_end)
        raise ValueError(f"quota: unknown quota {self.quota!r}; valid: {', '.join(QUOTAS)}, or a Quota")


def low_confidence(
    max_new_tokens: int = 0,
    steps: int | None = None,
    block_length: int | None = None,
    *,
    order: str | Confidence = "prob",
    temperature: float = 0.0,
    threshold: float | None = None,
    **other: Any,
) -> DiffusionGenerationConfig:
    """LLaDA's semi-autoregressive sampler (arXiv:2502.09992): in every pass the most confident tokens of the current
    block stay.

    Blocks go from left to right; positions right of the current block stay visible as masks. ``threshold`` reveals by
    confidence instead of by count (arXiv:2505.22618) and takes no steps.
    """
    if threshold is not None:
        other |= {"quota": "threshold", "threshold": threshold}
    return DiffusionGenerationConfig(max_new_tokens, steps, block_length, order=order, temperature=temperature, **other)


def ancestral(
    steps: int,
    max_new_tokens: int = 0,
    *,
    temperature: float = 1.0,
    schedule: NoiseSchedule | None = None,
    remask: ReMDM | None = None,
    **other: Any,
) -> DiffusionGenerationConfig:
    """MDLM's reverse process on ``steps`` equal times (arXiv:2406.07524), with ReMDM's re-masking when ``remask`` is
    given.

    A step that reveals nothing costs no pass: the last output is used again. What is masked after the last step is
    filled by argmax.
    """
    return DiffusionGenerationConfig(
        max_new_tokens,
        steps,
        quota="bernoulli",
        order="random",
        temperature=temperature,
        schedule=NoiseSchedule() if schedule is None else schedule,
        remask=remask,
        **other,
    )
