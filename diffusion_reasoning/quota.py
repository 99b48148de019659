r"""How many of the masked positions a pass reveals, and which: values that a sampler is put together from.

============== ==================================================================== ===============================
value          reveals                                                              source
============== ==================================================================== ===============================
Uniform        floor(n/s) of a block's n tokens a pass, one more in the first       LLaDA (arXiv:2502.09992)
               n mod s passes
Cosine         until a fraction cos(pi/2 · (i+1)/s) is masked, at least one         MaskGIT's curve
Dream          int(n_now · (1 - t_{i+1}/t_i)) on times 1 ... eps; the last pass     Dream (arXiv:2508.15487)
               takes all
Threshold      the most confident one, and all with confidence >= tau               Fast-dLLM (arXiv:2505.22618)
Factor         the most confident n with (j+1)(1 - c_(j)) <= f for 2 <= j <= n      Fast-dLLM
EntropyBudget  in increasing entropy while the running sum is <= E, at least one    bounds the factorisation error
Bernoulli      each one with probability (alpha_s - alpha_t)/(1 - alpha_t)          ancestral, MDLM (2406.07524)
FirstHitting   one uniformly random position                                        arXiv:2409.02908
EasyFirst      predicts everything anew and keeps all but the floor(n·k/T) least    MGDM (arXiv:2410.14157)
               certain; k counts down
============== ==================================================================== ===============================

Everything is counted row by row: no row's result depends on its neighbours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from latentcot.diffusion_reasoning.schedule import NoiseSchedule


@dataclass(frozen=True)
class PassView:
    """What a quota sees of a pass over R rows.

    ``confidence [R, L]`` (minus infinity off the candidates, finite on them), ``candidates [R, L]``; of the current
    block of each row: ``block_size [R]`` tokens at its start, ``steps [R]`` it may take, ``step [R]`` which one this
    is; ``sigma [R]`` or ``[R, L]``: probability that a token goes back to the mask (0 without ReMDM); ``uniform()``:
    fresh U(0, 1) numbers ``[R, L]``.
    """

    confidence: Tensor
    candidates: Tensor
    block_size: Tensor
    steps: Tensor
    step: Tensor
    sigma: Tensor
    uniform: Callable[[], Tensor]

    @property
    def ranks(self) -> Tensor:
        """0 for the most confident candidate of its row, 1 for the next; ties by lower position. ``[R, L]``"""
        return ranks(self.confidence)

    @property
    def ordered(self) -> Tensor:
        """Confidences from high to low, ``[R, L]``; minus infinity behind the last candidate."""
        return self.confidence.sort(dim=1, descending=True, stable=True).values


def ranks(values: Tensor) -> Tensor:
    """Rank of each entry of its row from high to low, ties by lower index: ``[R, L]``."""
    order = values.sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, rank)


class Quota:
    """Base of every quota.

    ``counted``: takes at most one step a token, so that more are clamped; ``may_wait``: a step may reveal nothing (the
    last network output is then used again); ``takes_steps``: whether a number of steps means anything to it;
    ``repredicts``: proposes tokens at every position of the block and says which are *kept*, all others go back to the
    mask; ``one_a_pass``: exactly one token a pass.
    """

    counted = True
    may_wait = False
    takes_steps = True
    repredicts = False
    one_a_pass = False

    def reveal(self, view: PassView) -> Tensor:
        """Which candidates to reveal, ``[R, L]`` bool."""
        raise NotImplementedError(f"{type(self).__name__} defines no reveal")

    def closing(self, steps: Tensor, step: Tensor) -> Tensor:
        """Rows ``[R]`` whose block is past its last step: what is still masked there is filled by argmax."""
        return torch.zeros_like(step, dtype=torch.bool)


@dataclass(frozen=True)
class Uniform(Quota):
    def reveal(self, view: PassView) -> Tensor:
        count = view.block_size // view.steps + (view.step < view.block_size % view.steps)
        return view.candidates & (view.ranks < count[:, None])


@dataclass(frozen=True)
class Cosine(Quota):
    def reveal(self, view: PassView) -> Tensor:
        fraction = torch.cos((view.step + 1).double() / view.steps * (math.pi / 2))
        # cos(pi/2) is 6e-17 in fp64: the last step must leave nothing
        keep = torch.where(view.step + 1 >= view.steps, 0, (view.block_size * fraction).floor().long())
        count = (view.candidates.sum(1) - keep).clamp(min=1)
        return view.candidates & (view.ranks < count[:, None])


@dataclass(frozen=True)
class Dream(Quota):
    """``int(n_now · (1 - t_{i+1}/t_i))`` of the n_now masked tokens, on s + 1 equal times from 1 to ``eps``; the last
    step takes all.

    With as many steps as tokens the first one reveals nothing and the last one two. The released code averages n_now
    over the batch; here it is the row's own, and a step that reveals nothing costs no network pass.
    """

    eps: float = 1e-3
    may_wait = True

    def __post_init__(self) -> None:
        if not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps: expected a time within (0, 1), got {self.eps}")

    def reveal(self, view: PassView) -> Tensor:
        before, after = (1 - (1 - self.eps) * (i.double() / view.steps) for i in (view.step, view.step + 1))
        masked = view.candidates.sum(1)
        count = (masked * (1 - after / before)).long()
        count = torch.where(view.step + 1 >= view.steps, masked, count)
        return view.candidates & (view.ranks < count[:, None])


@dataclass(frozen=True)
class Threshold(Quota):
    tau: float = 0.9
    takes_steps = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"threshold: expected a confidence within 0..1, got {self.tau}")

    def reveal(self, view: PassView) -> Tensor:
        return view.candidates & ((view.confidence >= self.tau) | (view.ranks == 0))


@dataclass(frozen=True)
class Factor(Quota):
    """The largest n with ``(j + 1)(1 - c_(j)) <= f`` for all 2 <= j <= n, at least one; ``c_(1) >= c_(2) >= ...``.

    ``quirk``: as the released loop has it, a last candidate that is the only one to fail is revealed all the same.
    """

    factor: float = 1.0
    quirk: bool = False
    takes_steps = False

    def __post_init__(self) -> None:
        if not 0.0 < self.factor < math.inf:
            raise ValueError(f"factor: expected a finite number above zero, got {self.factor}")

    def reveal(self, view: PassView) -> Tensor:
        number = view.candidates.sum(1, keepdim=True)
        j = torch.arange(1, view.confidence.shape[1] + 1, device=view.confidence.device)
        holds = ((j + 1) * (1 - view.ordered) <= self.factor) | (j == 1)
        if self.quirk:
            holds = holds | (j == number)
        count = (holds & (j <= number)).long().cumprod(1).sum(1)
        return view.candidates & (view.ranks < count[:, None])


@dataclass(frozen=True)
class EntropyBudget(Quota):
    """In increasing entropy while the running sum of entropies (nats) is at most ``budget``; at least one. Read off the
    confidence, which must be ``neg_entropy``. Revealing a set at once loses at most the sum of its entropies."""

    budget: float = 1.0
    takes_steps = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.budget < math.inf:
            raise ValueError(f"entropy_budget: expected a finite number of nats >= 0, got {self.budget}")

    def reveal(self, view: PassView) -> Tensor:
        number = view.candidates.sum(1, keepdim=True)
        j = torch.arange(view.confidence.shape[1], device=view.confidence.device)
        # log(p + 1e-10) makes the entropy of a certain token -1e-10: the running sum must not fall
        entropy = torch.where(j < number, (-view.ordered).clamp(min=0.0), 0.0)
        fits = (entropy.cumsum(1) <= self.budget) | (j == 0)
        count = (fits & (j < number)).long().cumprod(1).sum(1)
        return view.candidates & (view.ranks < count[:, None])


@dataclass(frozen=True)
class Bernoulli(Quota):
    """Reverse process on the grid ``t = 1 ... t_end`` in equal steps. With re-masking probability sigma the chance of a
    reveal is ``(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)`` (arXiv:2503.00307).

    Args:
        schedule: alpha(t).
        t_end: where the grid ends.
        last: what happens to masks that are left after the last step: ``argmax`` (MDLM), or ``reveal``: the last step
            reveals everything with its own draws (Dream's ``origin``).
    """

    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    t_end: float = 1e-5
    last: Literal["argmax", "reveal"] = "argmax"
    counted = False
    may_wait = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.t_end < 1.0:
            raise ValueError(f"t_end: expected a time within [0, 1), got {self.t_end}")
        if self.last not in ("argmax", "reveal"):
            raise ValueError(f"last: {self.last!r} given, expected 'argmax' or 'reveal'")

    def times(self, steps: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """``(t, s)`` of each row's step, fp64: from t to the earlier time s."""
        before, after = (1 - (1 - self.t_end) * (i.clamp(max=steps).double() / steps) for i in (step, step + 1))
        return before, after

    def alphas(self, steps: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha_t, alpha_s)`` of each row's step, fp64."""
        before, after = self.times(steps, step)
        return self.schedule.alpha(before), self.schedule.alpha(after)

    def reveal(self, view: PassView) -> Tensor:
        return self.reveal_between(view, *self.alphas(view.steps, view.step))

    def reveal_between(self, view: PassView, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        """As :meth:`reveal`, from share ``alpha_t [R]`` of clean tokens to ``alpha_s [R]``."""
        alpha_t, alpha_s = alpha_t[:, None], alpha_s[:, None]
        sigma = view.sigma if view.sigma.dim() == 2 else view.sigma[:, None]
        rate = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        if self.last == "reveal":
            rate = torch.where((view.step + 1 >= view.steps)[:, None], 1.0, rate)
        return view.candidates & (view.uniform() < rate)

    def closing(self, steps: Tensor, step: Tensor) -> Tensor:
        return step >= steps


@dataclass(frozen=True)
class FirstHitting(Quota):
    """One uniformly random masked position a pass: the ancestral process as its steps go to infinity, exactly
    (arXiv:2409.02908). Its clock, which only a time-conditioned network reads, is
    ``1 - alpha <- (1 - alpha) · u^{1/n}`` with n tokens masked."""

    takes_steps = False
    one_a_pass = True

    def reveal(self, view: PassView) -> Tensor:
        return view.candidates & (ranks(view.uniform().masked_fill(~view.candidates, -1.0)) == 0)


@dataclass(frozen=True)
class EasyFirst(Quota):
    """At step k = T - 1 ... 0 every position of the block is predicted anew; those with the ``floor(n·k/T)`` lowest of
    ``log c + noise · (k/T) · Gumbel`` go back to the mask. c must be a probability (``prob``)."""

    noise: float = 0.5
    repredicts = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise < math.inf:
            raise ValueError(f"noise: expected a finite number >= 0, got {self.noise}")

    def reveal(self, view: PassView) -> Tensor:
        share = (view.steps - 1 - view.step).clamp(min=0)
        score = view.confidence.clamp(min=0.0).log()
        if self.noise:
            gumbel = -torch.log(-torch.log(view.uniform()))
            score = score + self.noise * (share.double() / view.steps)[:, None] * gumbel
        score = score.masked_fill(~view.candidates, -torch.inf).clamp(min=-1e300)
        kept = view.block_size - view.block_size * share // view.steps
        return view.candidates & (ranks(score.masked_fill(~view.candidates, -torch.inf)) < kept[:, None])


QUOTAS: dict[str, type[Quota]] = {
    "uniform": Uniform,
    "cosine": Cosine,
    "dream": Dream,
    "threshold": Threshold,
    "factor": Factor,
    "entropy_budget": EntropyBudget,
    "bernoulli": Bernoulli,
    "first_hitting": FirstHitting,
    "easy_first": EasyFirst,
}
_OWN: dict[str, Callable[[], Quota]] = {}


def register_quota(name: str, make: Callable[[], Quota]) -> None:
    """Give a quota of your own a name for ``DiffusionGenerationConfig(quota=name)``. ``ValueError`` when it is taken."""
    if name in QUOTAS or name in _OWN:
        raise ValueError(f"name: there is a quota {name!r} already")
    _OWN[name] = make


def quota_names() -> list[str]:
    """Every name that a configuration accepts."""
    return [*QUOTAS, *_OWN]


def registered_quota(name: str) -> Quota | None:
    """A fresh quota that :func:`register_quota` named, or ``None``."""
    return _OWN[name]() if name in _OWN else None
