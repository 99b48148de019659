r"""How many recurrences a training step takes: :class:`StepSampler`.

Huginn (arXiv:2502.05171) draws from a log-normal Poisson law, :math:`\tau \sim N(\ln \bar r - \varsigma^2/2,
\varsigma)`, :math:`r \sim \mathrm{Poisson}(e^\tau) + 1` with :math:`\varsigma = 1/2`: mean :math:`\bar r + 1`, a lower
median, and a heavy right tail. One number a step, the same on every data-parallel worker: the generator is seeded by a
constant plus the optimiser step.

A *curriculum* lets the mean rise from 1 to m over the first part of training (retrofitting, arXiv:2511.07384):
:math:`m(p) = 1 + (m - 1)\, g(\min(p / f, 1))` at progress p, with :func:`ramp` g and share f.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentcot.recurrent_depth.settings import check_choice, check_count

KINDS = ("lognormal_poisson", "poisson", "geometric", "uniform", "fixed")
RAMPS = ("none", "linear", "one_minus_sqrt")
SEED = 514229  # added to the optimiser step
SECOND_SEED = 317811  # the reference's constant for a second, independent draw of the same step


@dataclass(frozen=True)
class StepSampler:
    r"""The law of r, a whole number that is at least 1.

    ================== =========================================== ================
    kind               r                                           mean of r
    ================== =========================================== ================
    lognormal_poisson  Poisson(exp N(ln m - s²/2, s)) + 1          m + 1
    poisson            Poisson(m) + 1                              m + 1
    geometric          P(r = j) = (1 - 1/m)^(j-1) / m              m
    uniform            1, 2, ..., 2 m - 1 equally likely           m
    fixed              m                                           m
    ================== =========================================== ================

    Args:
        kind: see the table.
        mean: m; a whole number for ``uniform`` and ``fixed``, at least 1.
        spread: s, the standard deviation of the log-normal; 0.5.
        most: larger draws are cut to this (``None`` = no cut, as published); bounds the memory and time of one step.
        ramp: curriculum over the mean: ``none``, ``linear`` or ``one_minus_sqrt`` (see :func:`ramp`).
        ramp_share: f, the part of training over which the mean rises; 0.75 as in the main runs of the source.

    Raises:
        ValueError: unknown kind, or numbers out of range.
    """

    kind: str = "lognormal_poisson"
    mean: float = 32
    spread: float = 0.5
    most: int | None = None
    ramp: str = "none"
    ramp_share: float = 0.75

    def __post_init__(self) -> None:
        check_choice("sampler: kind", self.kind, KINDS)
        if self.kind in ("uniform", "fixed"):
            check_count(f"sampler: mean of {self.kind!r}", self.mean, 1)
        elif isinstance(self.mean, bool) or not (math.isfinite(self.mean) and self.mean >= 1):
            raise ValueError(f"sampler: mean = {self.mean!r} given, expected a number of at least 1")
        if not (math.isfinite(self.spread) and self.spread >= 0):
            raise ValueError(f"sampler: spread = {self.spread!r} given, expected a number of at least 0")
        if self.most is not None:
            check_count("sampler: most", self.most, 1)
        check_ramp("sampler", self.ramp, self.ramp_share)

    def draw(self, count: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """``count`` independent draws, int64 ``[count]`` on the CPU."""
        m = float(self.mean)
        if self.kind == "fixed":
            r = torch.full((count,), int(m))
        elif self.kind == "uniform":
            r = torch.randint(1, 2 * int(m), (count,), generator=generator)
        elif self.kind == "geometric":
            # The inverse of the law's distribution function; 1 - u is never 0.
            u = torch.rand(count, generator=generator, dtype=torch.float64)
            r = torch.ones(count) if m == 1 else (torch.log1p(-u) / math.log1p(-1 / m)).floor() + 1
        else:
            rate = torch.full((count,), m, dtype=torch.float64)
            if self.kind == "lognormal_poisson":
                noise = torch.randn(count, generator=generator, dtype=torch.float64)
                rate = (math.log(m) - self.spread**2 / 2 + self.spread * noise).exp()
            r = torch.poisson(rate, generator=generator) + 1
        return r.long() if self.most is None else r.long().clamp(max=self.most)

    def at_progress(self, progress: float) -> "StepSampler":
        """The law at ``progress`` (0 = first step, 1 = end of training): this one without a ramp and with the mean
        reached by then, rounded where the kind needs a whole number."""
        if self.ramp == "none":
            return self
        mean = 1 + (self.mean - 1) * ramp(self.ramp, progress / self.ramp_share)
        return replace(self, mean=round(mean) if self.kind in ("uniform", "fixed") else mean, ramp="none")

    def at_step(self, step: int, seed: int = SEED, progress: float = 1.0) -> int:
        """The one draw of optimiser step ``step``: the same wherever it is asked for. ``progress`` counts with a ramp
        only."""
        return int(self.at_progress(progress).draw(generator=torch.Generator().manual_seed(seed + step)))

    @property
    def typical(self) -> int:
        """Recurrences to answer with when nothing else is said: m, rounded."""
        return max(1, round(self.mean))


def ramp(kind: str, progress: float) -> float:
    r"""How far a curriculum has come, 0 to 1, at ``progress`` of its own stretch (cut to 0 … 1).

    ``linear``: :math:`p`. ``one_minus_sqrt``: :math:`1 - \sqrt{1 - p}`, slow at first, steep at the end; the source
    names the shape without its equation, so that which end is steep is our reading. ``none``: 1.
    """
    check_choice("ramp", kind, RAMPS)
    p = min(max(progress, 0.0), 1.0)
    return {"none": 1.0, "linear": p, "one_minus_sqrt": 1 - math.sqrt(1 - p)}[kind]


def check_ramp(owner: str, kind: str, share: float) -> None:
    """``ValueError`` for an unknown ramp or a share outside (0, 1]."""
    check_choice(f"{owner}: ramp", kind, RAMPS)
    if not 0 < share <= 1:
        raise ValueError(f"{owner}: ramp_share = {share!r} given, expected a number above 0 and at most 1")
