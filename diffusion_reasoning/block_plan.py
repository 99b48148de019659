"""How denoising steps are shared out over blocks of a canvas, and what a counted quota makes of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentcot.diffusion_reasoning.quota import PassView, Quota


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
    if not quota.counted or not quota.takes_steps or quota.repredicts:
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
