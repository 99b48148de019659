"""What a sampler is made of, checked when it is put together. The named combinations: ``named_samplers.py``."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from latentcot.diffusion_reasoning.carry import CARRIES
from latentcot.diffusion_reasoning.confidence import ON_UNIT_SCALE, Confidence, TopPRule, find_confidence
from latentcot.diffusion_reasoning.corruption import check_mask_id
from latentcot.diffusion_reasoning.quota import (
    Bernoulli,
    Cosine,
    Dream,
    EasyFirst,
    EntropyBudget,
    Factor,
    FirstHitting,
    Quota,
    Threshold,
    Uniform,
    quota_names,
    registered_quota,
)
from latentcot.diffusion_reasoning.remasking import Remasking, ReMDM, find_remask
from latentcot.diffusion_reasoning.schedule import NoiseSchedule
from latentcot.reasoner import SPECIAL

Stop = Literal["canvas", "eos_block", "eos_truncate", "eos_or_degenerate", "fixed_point"]
Record = Literal["light", "full"]


@dataclass(frozen=True)
class DiffusionGenerationConfig:
    """One sampler. The usual ones are built by name: :mod:`~latentcot.diffusion_reasoning.named_samplers`.

    Args:
        max_new_tokens: masked positions put behind the input; 0 = infilling at ``maskable`` only.
        steps: passes over the whole canvas, shared out over the blocks; ``None`` = one token a pass.
        block_length: maskable positions decoded together, left to right; ``None`` = all at once.
        order: confidence, by name or a callable (:mod:`~latentcot.diffusion_reasoning.confidence`).
        quota: a name of :data:`~latentcot.diffusion_reasoning.quota.QUOTAS`, one of your own
            (:func:`~latentcot.diffusion_reasoning.quota.register_quota`), or a value.
        threshold: of the ``threshold`` quota.
        factor, factor_quirk: of the ``factor`` quota.
        entropy_budget: nats a pass, of the ``entropy_budget`` quota.
        order_temperature: above 0, the positions to reveal are drawn without replacement from
            softmax(confidence / order_temperature) instead of taken from the top (Dream's ``alg_temp``). Counted quotas
            only.
        temperature: of proposed tokens; 0 = argmax.
        gumbel_dtype: of the noise behind them. ``float32`` cuts off its tail, which lowers the effective temperature
            (arXiv:2409.02908); it is there to show that.
        top_k, top_p: filters on the tempered distribution, before confidence.
        top_p_rule: whether the token that crosses ``top_p`` stays, see
            :func:`~latentcot.diffusion_reasoning.confidence.filter_logits`.
        guidance: w of ``u + (w + 1)(c - u)``, u the logits with all given tokens masked; 0 = off. A pass then counts as
            two.
        remask: :class:`~latentcot.diffusion_reasoning.remasking.ReMDM`, ``Revise``, a name of
            :data:`~latentcot.diffusion_reasoning.remasking.REMASKINGS`, or ``None``.
        eta: strength of a re-masking given by name.
        carry: what the network takes from pass to pass; it must have been built with it (``none`` fits every network).
        stop: ``canvas`` = when all is filled; ``eos_block`` = when a finished block holds ``eos_id`` (the rest is
            filled with it); ``eos_truncate`` = as ``canvas``, and everything behind the first ``eos_id`` becomes it;
            ``eos_or_degenerate`` = as ``eos_block``, and also when the last 256 of more than 256 tokens have an entropy
            of less than 4 nats (arXiv:2503.09573); ``fixed_point`` = when predicting everything anew changes nothing
            (``easy_first`` only).
        max_nfe: most network passes a row may take; in the last one everything masked is filled at once.
        logits_eos_inf: ``eos_id`` is never produced (LLaDA's name).
        confidence_eos_eot_inf: ``eos_id`` and ``eot_id`` are revealed last (LLaDA's name), at any temperature.
        seed: of the rows' random numbers; ``None`` = a new one each call, from torch's default generator.
        schedule, t_end: of the ``bernoulli`` quota; the schedule is also what a time-conditioned network's sigma comes
            from.
        forbid_mask_token: the mask token is never proposed. Without it, a network that proposes it is an error.
        record: keep a :class:`~latentcot.diffusion_reasoning.trajectory.Trajectory`; ``full`` = with top-k tables.
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
    remask: str | Remasking = None
    stop: Stop = "canvas"
    max_nfe: int | None = None
    seed: int | None = 0
    mask_id: int = SPECIAL.mask
    eos_id: int = SPECIAL.eos
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    t_end: float = 1e-5
    forbid_mask_token: bool = True
    parity: Literal["llada"] | None = None
    factor: float | None = None
    factor_quirk: bool = False
    entropy_budget: float | None = None
    order_temperature: float = 0.0
    top_p_rule: TopPRule = "keep_crossing"
    guidance: float = 0.0
    eta: float | None = None
    carry: str = "none"
    record: Record | None = None
    gumbel_dtype: Literal["float64", "float32"] = "float64"
    eot_id: int | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    def __post_init__(self) -> None:
        check_mask_id(self.mask_id, eos_id=self.eos_id, eot_id=self.eot_id)
        for name, low in (("max_new_tokens", 0), ("steps", 1), ("block_length", 1), ("top_k", 1), ("max_nfe", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
        for name in ("temperature", "order_temperature", "guidance"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(self, name)}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected 0 < top_p <= 1, got {self.top_p}")
        for name, choices in (
            ("stop", get_args(Stop)),
            ("parity", (None, "llada")),
            ("top_p_rule", get_args(TopPRule)),
            ("carry", CARRIES),
            ("record", (None, *get_args(Record))),
            ("gumbel_dtype", ("float64", "float32")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} given, expected one of {', '.join(map(repr, choices))}"
                )
        find_confidence(self.order)
        quota = self.make_quota()
        if self.steps is not None and not quota.takes_steps:
            raise ValueError(f"steps: {type(quota).__name__} has no number of steps; bound its passes by max_nfe")
        if self.steps is None and not quota.counted:
            raise ValueError(f"steps: {type(quota).__name__} needs a number of steps")
        self._check_order(quota)
        self._check_combinations(quota)

    def _check_order(self, quota: Quota) -> None:
        named = isinstance(self.order, str)
        if isinstance(quota, Threshold | Factor | EasyFirst) and named and self.order not in ON_UNIT_SCALE:
            raise ValueError(
                f"order: {self.order!r} is not within 0..1, so no {type(quota).__name__.lower()} fits it; take one of "
                f"{', '.join(sorted(ON_UNIT_SCALE))}"
            )
        if isinstance(quota, EntropyBudget) and named and self.order != "neg_entropy":
            raise ValueError(f"order: the entropy budget is counted on 'neg_entropy', got {self.order!r}")
        if self.order_temperature > 0 and not isinstance(quota, Uniform | Cosine | Dream):
            raise ValueError(
                f"order_temperature: {type(quota).__name__} takes no drawn order; it belongs to uniform, cosine and dream"
            )

    def _check_combinations(self, quota: Quota) -> None:
        remask = self.make_remask()
        if isinstance(remask, ReMDM) and (not isinstance(quota, Bernoulli) or quota.last != "argmax"):
            raise ValueError(
                f"remask: ReMDM belongs to the bernoulli quota (the ancestral sampler), got quota {self.quota!r}"
            )
        if quota.repredicts and remask is not None:
            raise ValueError(
                f"remask: {type(quota).__name__} sends tokens back to the mask itself, got {self.remask!r}"
            )
        if self.stop == "fixed_point" and not quota.repredicts:
            raise ValueError(
                f"stop: 'fixed_point' needs a quota that predicts everything anew (easy_first), got {self.quota!r}"
            )
        if self.guidance > 0 and self.carry != "none":
            raise ValueError("guidance: its two branches share no carry; take carry='none' or guidance=0")
        if self.guidance > 0 and self.max_nfe is not None and self.max_nfe < 2:
            raise ValueError("max_nfe: a guided pass counts as two; at least 2 is needed")
        if self.confidence_eos_eot_inf and quota.repredicts:
            raise ValueError(f"confidence_eos_eot_inf: {type(quota).__name__} has no order of revealing")

    def make_quota(self) -> Quota:
        match self.quota:
            case Quota():
                return self.quota
            case "uniform":
                return Uniform()
            case "cosine":
                return Cosine()
            case "dream":
                return Dream()
            case "threshold":
                return Threshold(self.threshold)
            case "factor":
                if self.factor is None:
                    raise ValueError("factor: the quota 'factor' needs one")
                return Factor(self.factor, self.factor_quirk)
            case "entropy_budget":
                if self.entropy_budget is None:
                    raise ValueError("entropy_budget: the quota 'entropy_budget' needs one")
                return EntropyBudget(self.entropy_budget)
            case "bernoulli":
                return Bernoulli(self.schedule, self.t_end)
            case "first_hitting":
                return FirstHitting()
            case "easy_first":
                return EasyFirst()
        own = registered_quota(self.quota)
        if own is None:
            raise ValueError(f"quota: unknown quota {self.quota!r}; valid: {', '.join(quota_names())}, or a Quota")
        return own

    def make_remask(self) -> Remasking:
        return find_remask(self.remask, self.eta)
