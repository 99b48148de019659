r"""How many of the masked positions a pass reveals, and which: values that a sampler is put together from.

========== ================================================================== ===============================
value      reveals                                                            source
========== ================================================================== ===============================
Uniform    floor(n/s) of a block's n tokens a pass, one more in the first     LLaDA (arXiv:2502.09992)
           n mod s passes
Cosine     until a fraction cos(pi/2 · (i+1)/s) is masked, at least one       MaskGIT's curve
Threshold  the most confident one, and all with confidence >= tau             Fast-dLLM (arXiv:2505.22618)
Bernoulli  each one with probability (alpha_s - alpha_t)/(1 - alpha_t)        ancestral, MDLM (2406.07524)
========== ================================================================== ===============================

Everything is counted row by row: no row's result depends on its neighbours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentcot.diffusion_reasoning.schedule import NoiseSchedule


@dataclass(frozen=True)
class PassView:
    """What a quota sees of a pass over R rows.

    ``confidence [R, L]`` (minus infinity off the candidates), ``candidates [R, L]``; of the current block of each row:
    ``block_size [R]`` tokens at its start, ``steps [R]`` it may take, ``step [R]`` which one this is; ``sigma [R]``:
    probability that a token goes back to the mask (0 without ReMDM); ``uniform()``: fresh U(0, 1) numbers ``[R, L]``.
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
        order = self.confidence.sort(dim=1, descending=True, stable=True).indices
        rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
        return torch.empty_like(order).scatter(1, order, rank)


class Quota:
    """Base of every quota. ``counted``: takes at most one step a token, so that more are clamped; ``may_wait``: a step
    may reveal nothing (the last network output is then used again); ``takes_steps``: whether a number of steps means
    anything to it."""

    counted = True
    may_wait = False
    takes_steps = True

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
class Threshold(Quota):
    tau: float = 0.9
    takes_steps = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"threshold: expected a confidence within 0..1, got {self.tau}")

    def reveal(self, view: PassView) -> Tensor:
        return view.candidates & ((view.confidence >= self.tau) | (view.ranks == 0))


@dataclass(frozen=True)
class Bernoulli(Quota):
    """Reverse process on the grid ``t = 1 ... t_end`` in equal steps. With re-masking probability sigma the chance of a
    reveal is ``(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)`` (arXiv:2503.00307)."""

    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    t_end: float = 1e-5
    counted = False
    may_wait = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.t_end < 1.0:
            raise ValueError(f"t_end: expected a time within [0, 1), got {self.t_end}")

    def alphas(self, steps: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha_t, alpha_s)`` of each row's step, fp64."""
        before, after = (
            self.schedule.alpha(1 - (1 - self.t_end) * (i.clamp(max=steps).double() / steps)) for i in (step, step + 1)
        )
        return before, after

    def reveal(self, view: PassView) -> Tensor:
        alpha_t, alpha_s = self.alphas(view.steps, view.step)
        rate = (alpha_s - (1 - view.sigma) * alpha_t) / (1 - alpha_t)
        return view.candidates & (view.uniform() < rate[:, None])

    def closing(self, steps: Tensor, step: Tensor) -> Tensor:
        return step >= steps


@dataclass(frozen=True)
class BlockPlan:
    """Blocks of the maskable positions of each row, left to right.

    ``block_of [B, L]``: block number of each position, -1 where it is given; ``n_blocks [B]``; ``size [B, n]`` and
    ``steps [B, n]`` of each block (0 where a row has fewer); ``clamped``: whether a block was given more steps than it
    has tokens.
    """

    block_of: Tensor
    n_blocks: Tensor
    size: Tensor
    steps: Tensor
    clamped: bool


def plan_blocks(
    maskable: Tensor, block_length: int | None, steps: int | None, quota: Quota, parity: str | None = None
) -> BlockPlan:
    """Share out ``steps`` over blocks of ``block_length`` maskable tokens; the last block may be shorter.

    Each block gets ``steps // n_blocks``, the first ones one more; a counted quota then takes at most one step a token.
    ``steps`` of ``None``: one token a pass.

    Raises:
        ValueError: fewer steps than blocks; with ``parity="llada"`` also when blocks or steps do not come out even.
    """
    n = maskable.sum(1)
    length = maskable.shape[1] if block_length is None else block_length
    n_blocks = -(-n // length)
    most = int(n_blocks.max()) if n_blocks.numel() else 0
    block_of = torch.where(maskable, (maskable.long().cumsum(1) - 1) // length, -1)
    number = torch.arange(max(most, 1), device=maskable.device)
    size = (n[:, None] - number * length).clamp(min=0, max=length)
    if parity == "llada":
        if bool((n % length).any()):
            raise ValueError(
                f"block_length: {length} does not divide the answer of {n.tolist()[:8]} tokens, which parity='llada' "
                "asks for"
            )
        if steps is not None and bool((steps % n_blocks.clamp(min=1)).any()):
            raise ValueError(
                f"steps: {steps} is no multiple of the number of blocks {n_blocks.tolist()[:8]}, which parity='llada' "
                "asks for"
            )
    if steps is None:
        return BlockPlan(block_of, n_blocks, size, size.clone(), False)
    if steps < most:
        raise ValueError(f"steps: {steps} given for {most} blocks; every block needs at least one pass")
    blocks = n_blocks.clamp(min=1)[:, None]
    shared = torch.where(number < n_blocks[:, None], steps // blocks + (number < steps % blocks), 0)
    taken = torch.minimum(shared, size) if quota.counted else shared
    return BlockPlan(block_of, n_blocks, size, taken, bool((taken < shared).any()))


def quota_table(n: int, quota: Quota, steps: int | None = None, block_length: int | None = None) -> list[list[int]]:
    """How many tokens each pass of each block reveals, for a counted quota and an answer of ``n`` tokens.

    ``quota_table(10, Uniform(), steps=6, block_length=4)`` is ``[[2, 2], [2, 2], [1, 1]]``.
    """
    if not quota.counted or not quota.takes_steps:
        raise ValueError(f"quota: what {type(quota).__name__} reveals depends on the network's output or on chance")
    plan = plan_blocks(torch.ones(1, n, dtype=torch.bool), block_length, steps, quota)
    table = []
    for size, taken in zip(plan.size[0], plan.steps[0], strict=True):
        masked = torch.ones(1, int(size), dtype=torch.bool)
        counts = []
        for step in range(int(taken)):
            confidence = torch.where(masked, 0.0, -torch.inf)
            view = PassView(
                confidence, masked, size[None], taken[None], torch.tensor([step]), torch.zeros(1), confidence.clone
            )
            revealed = quota.reveal(view)
            counts.append(int(revealed.sum()))
            masked = masked & ~revealed
        table.append(counts)
    return table


QUOTAS = ("uniform", "cosine", "threshold", "bernoulli")
