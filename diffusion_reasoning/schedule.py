r"""Noise schedules of masked diffusion and the times a loss is evaluated at.

Time runs from 0 (clean) to 1 (all masked). :math:`\alpha(t)` is the probability that a token is still clean, and the
loss weight is :math:`w(t) = -\alpha'(t) / (1 - \alpha(t))`:

=================== =============================================== =============================================
name                :math:`\alpha(t)`                               :math:`w(t)`
=================== =============================================== =============================================
loglinear           :math:`1 - (1-\epsilon) t`                      :math:`1/t`
cosine              :math:`\epsilon + (1-\epsilon)\cos(\pi t/2)`    :math:`(\pi/2) \cot(\pi t/4)`
cosine2             :math:`\epsilon + (1-\epsilon)\cos^2(\pi t/2)`  :math:`\pi \cot(\pi t/2)`
linear_sigma        :math:`e^{-\sigma}`, :math:`\sigma` linear      :math:`\sigma' / (e^\sigma - 1)`
geometric           :math:`e^{-\sigma}`, :math:`\sigma` geometric   :math:`\sigma' / (e^\sigma - 1)`
cosine_complement   :math:`1 - \cos(\pi(1-t)/2)`                    :math:`(\pi/2)\tan(\pi(1-t)/2)`
=================== =============================================== =============================================

The first five are those of MDLM (arXiv:2406.07524); the last is what the dLLM library (arXiv:2602.22661) calls
``cosine``: two schedules share that name elsewhere. The expected loss does not depend on the schedule, its variance
does.
"""

import difflib
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

SCHEDULES = ("loglinear", "cosine", "cosine2", "linear_sigma", "geometric", "cosine_complement")
_WITH_SIGMA = ("linear_sigma", "geometric")
_SIGMA_RANGE = (1e-4, 20.0)

TimeMode = Literal["antithetic", "iid", "fixed", "importance", "discrete"]


@dataclass(frozen=True)
class NoiseSchedule:
    """One row of the table above.

    Args:
        name: of the schedule.
        eps: what is left of alpha at t = 1 in ``loglinear``, ``cosine`` and ``cosine2``; the others have no such floor.
        sigma_min, sigma_max: ends of sigma in ``linear_sigma`` and ``geometric`` (1e-4 and 20 when not given).

    Raises:
        ValueError: unknown name, eps outside [0, 1), sigmas out of order or given where the schedule has none.
    """

    name: str = "loglinear"
    eps: float = 1e-3
    sigma_min: float | None = None
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            close = difflib.get_close_matches(str(self.name), SCHEDULES, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"name: unknown schedule {self.name!r}; {hint}valid: {', '.join(SCHEDULES)}")
        if not 0.0 <= self.eps < 1.0:
            raise ValueError(f"eps: expected 0 <= eps < 1, got {self.eps}")
        if self.name in _WITH_SIGMA:
            low, high = self._sigma_range
            if not 0.0 < low < high:
                raise ValueError(f"sigma_min, sigma_max: expected 0 < sigma_min < sigma_max, got {low} and {high}")
        elif self.sigma_min is not None or self.sigma_max is not None:
            raise ValueError(
                f"sigma_min, sigma_max: {self.name!r} has none; they belong to {' and '.join(_WITH_SIGMA)}"
            )

    @property
    def _sigma_range(self) -> tuple[float, float]:
        low, high = _SIGMA_RANGE
        return (low if self.sigma_min is None else self.sigma_min, high if self.sigma_max is None else self.sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is clean at time ``t`` (any shape, floating)."""
        match self.name:
            case "loglinear":
                return 1 - (1 - self.eps) * t
            case "cosine":
                return self.eps + (1 - self.eps) * torch.cos(t * (math.pi / 2))
            case "cosine2":
                return self.eps + (1 - self.eps) * torch.cos(t * (math.pi / 2)).square()
            case "cosine_complement":
                return 1 - torch.sin(t * (math.pi / 2))
            case _:
                return torch.exp(-self.sigma(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise ``-log alpha(t)``: what a time-conditioned network would be given."""
        low, high = self._sigma_range
        match self.name:
            case "linear_sigma":
                return low + t * (high - low)
            case "geometric":
                return low ** (1 - t) * high**t
            case "loglinear":
                return -torch.log1p(-(1 - self.eps) * t)
            case _:
                return -torch.log(self.alpha(t))

    def weight(self, t: Tensor) -> Tensor:
        """Loss weight ``-alpha'(t) / (1 - alpha(t))``; infinite at t = 0 where alpha(0) = 1."""
        low, high = self._sigma_range
        match self.name:
            case "loglinear":
                return 1 / t
            case "cosine":
                return (math.pi / 2) / torch.tan(t * (math.pi / 4))
            case "cosine2":
                return math.pi / torch.tan(t * (math.pi / 2))
            case "linear_sigma":
                return (high - low) / torch.expm1(self.sigma(t))
            case "geometric":
                sigma = self.sigma(t)
                return sigma * math.log(high / low) / torch.expm1(sigma)
            case _:
                return (math.pi / 2) * torch.tan((1 - t) * (math.pi / 2))

    def total_weight(self) -> float:
        """Integral of w(t) over 0 ... 1: ``log(1 - alpha(1)) - log(1 - alpha(0))``; infinite where alpha(0) = 1."""
        ends = self._log_noise(torch.tensor([0.0, 1.0], dtype=torch.float64))
        return float(ends[1] - ends[0])

    def _log_noise(self, t: Tensor) -> Tensor:
        """``log(1 - alpha(t))``."""
        return torch.log(-torch.expm1(-self.sigma(t)))

    def step_weight(self, t: Tensor, steps: int) -> Tensor:
        """Weight at ``t = (k + 1) / T`` of the bound in T steps, ``T (alpha(t - 1/T) - alpha(t)) / (1 - alpha(t))``: exactly
        1/t for ``loglinear``; w(t) as T grows."""
        if self.name == "loglinear":
            return 1 / t
        alpha = self.alpha(t)
        return steps * (self.alpha((t - 1 / steps).clamp(min=0.0)) - alpha) / (1 - alpha)

    def t_from_alpha(self, alpha: Tensor) -> Tensor:
        """The time at which ``alpha(t)`` has the given value."""
        low, high = self._sigma_range
        match self.name:
            case "loglinear":
                return (1 - alpha) / (1 - self.eps)
            case "cosine":
                return torch.acos((alpha - self.eps) / (1 - self.eps)) * (2 / math.pi)
            case "cosine2":
                return torch.acos(((alpha - self.eps) / (1 - self.eps)).sqrt()) * (2 / math.pi)
            case "linear_sigma":
                return (-torch.log(alpha) - low) / (high - low)
            case "geometric":
                return torch.log(-torch.log(alpha) / low) / math.log(high / low)
            case _:
                return torch.asin(1 - alpha) * (2 / math.pi)


def sample_times(
    n: int,
    mode: TimeMode = "antithetic",
    eps: float = 1e-3,
    generator: torch.Generator | None = None,
    rank: int = 0,
    world_size: int = 1,
    times: Tensor | None = None,
    schedule: NoiseSchedule | None = None,
    discrete_steps: int | None = None,
) -> Tensor:
    r"""Times of ``n`` rows, ``[n]`` fp32, within :math:`[\epsilon, 1]`.

    ``antithetic`` puts one time into each of the ``n · world_size`` equal parts of the interval,
    :math:`u_i = (U_i + i) / N`, :math:`t_i = (1 - \epsilon) u_i + \epsilon` (arXiv:2406.07524); ``rank`` r holds the
    parts ``r·n ... r·n + n - 1`` of the global batch. ``iid`` draws each on its own. ``fixed`` checks and returns
    ``times``. ``importance`` (for a ``linear_sigma`` ``schedule``) draws in proportion to w(t), antithetically, so that
    the loss has the constant weight :meth:`NoiseSchedule.total_weight`. ``discrete`` draws :math:`t = (k+1)/T` with k
    uniform in 0 ... T - 1, T = ``discrete_steps``, each on its own.

    Raises:
        ValueError: unknown mode, eps outside (0, 1), rank outside the world, a fixed time that is 0 or outside (0, 1],
            ``importance`` with another schedule, ``discrete`` without steps.
    """
    if n < 1:
        raise ValueError(f"n: at least one row is needed, got {n}")
    if mode not in get_args(TimeMode):
        raise ValueError(f"mode: {mode!r} given, expected one of {', '.join(map(repr, get_args(TimeMode)))}")
    if (mode == "fixed") != (times is not None):
        raise ValueError(
            f"times: they belong to mode='fixed'; got mode={mode!r} and times "
            f"{'given' if times is not None else 'missing'}"
        )
    if times is not None:
        return check_times(times, n)
    if not 0.0 < eps < 1.0:
        raise ValueError(f"eps: the smallest time must lie in (0, 1), got {eps}")
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank, world_size: expected 0 <= rank < world_size, got {rank} and {world_size}")
    if mode == "importance" and (schedule is None or schedule.name != "linear_sigma"):
        raise ValueError(f"mode: 'importance' belongs to a linear_sigma schedule, got {schedule}")
    if (mode == "discrete") != (discrete_steps is not None):
        raise ValueError(f"discrete_steps: it belongs to mode='discrete'; got mode={mode!r} and {discrete_steps}")
    if discrete_steps is not None and discrete_steps < 1:
        raise ValueError(f"discrete_steps: at least one step is needed, got {discrete_steps}")
    device = "cpu" if generator is None else generator.device
    u = torch.rand(n, generator=generator, dtype=torch.float64, device=device)
    if discrete_steps is not None:
        return (((u * discrete_steps).floor() + 1) / discrete_steps).float()
    if mode in ("antithetic", "importance"):
        u = (u + torch.arange(rank * n, rank * n + n, device=device)) / (n * world_size)
    if mode == "importance":
        assert schedule is not None
        low, high = schedule._log_noise(torch.zeros_like(u)), schedule._log_noise(torch.ones_like(u))
        t = schedule.t_from_alpha(-torch.expm1(low + u * (high - low)))
        return t.float().clamp(min=torch.finfo(torch.float32).tiny, max=1.0)
    return ((1 - eps) * u + eps).float()


def check_times(times: Tensor, n: int) -> Tensor:
    """``times`` when they are ``n`` values in (0, 1]; ``ValueError`` otherwise."""
    if times.shape != (n,) or not times.is_floating_point():
        raise ValueError(f"times: shape {list(times.shape)} of {times.dtype} given, expected [{n}] of a floating type")
    if not bool(((times > 0) & (times <= 1)).all()):
        raise ValueError(
            "times: expected 0 < t <= 1 (the weight is infinite at 0), got values within "
            f"{float(times.min())}..{float(times.max())}"
        )
    return times
