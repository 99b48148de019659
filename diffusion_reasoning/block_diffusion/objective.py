r"""The loss of block diffusion: a bound on :math:`-\log p(x)` from one two-stream pass, every block at a noise level of its own.

.. math:: L = \sum_c \mathbb{E}_{p_c} \frac{1}{p_c} \sum_{i \in c} \mathbb{1}[z_i = m]\, (-\log p_\theta(x_i \mid z^c, x^{<c}))

Each maskable token of block c becomes m with probability p_c. The levels of all blocks of a batch are stratified together,
:math:`u_j = (U + j) / (B\, n_b)` with a U of its own for each, and :math:`p = lo + (hi - lo)\, u` (arXiv:2503.09573). On the whole
interval, [1e-3, 1], the expectation bounds :math:`-\log p(x)`; blocks of one token are always masked (p = 1), which makes it exact.

On a narrower interval ("clipped") the gradient is less noisy and the loss is *not* a bound: blocks whose realised share of masked
tokens falls outside are drawn again, and :attr:`BlockDiffusionLoss.is_bound` is False. Evaluate on the whole interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.diffusion_reasoning.block_diffusion.model import BlockDiffusionModel
from latentcot.diffusion_reasoning.corruption import check_maskable, precise, without_mask_token

WHOLE = (1e-3, 1.0)
WIDTHS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
REDRAWS = 10_000  # a possible share is found long before
_SLACK = 1e-9  # of shares at the ends of an interval: 0.1 + 0.7 is a little less than 4/5

Normalise = Literal["elbo", "answer", "tokens", "masked"]


@dataclass(frozen=True)
class BlockCorruption:
    """``z [B, L]`` noisy tokens; ``masked [B, L]`` which were replaced; ``p [B, n_b]`` the levels; ``block_of [B, L]``: number of each
    real token's block."""

    z: Tensor
    masked: Tensor
    p: Tensor
    block_of: Tensor


@dataclass(frozen=True)
class BlockDiffusionLoss:
    """``loss``: scalar to differentiate. The rest is detached.

    ``nelbo_nats [B]``: one-draw estimate of each row's bound; ``n_maskable [B]``; ``per_token [B, L]``: cross-entropy times 1/p, 0
    where nothing was masked; ``p [B, n_b]``; ``masked [B, L]``; ``is_bound``: False under a clipped interval.
    """

    loss: Tensor
    nelbo_nats: Tensor
    n_maskable: Tensor
    per_token: Tensor
    p: Tensor
    masked: Tensor
    is_bound: bool

    @property
    def nats_per_token(self) -> Tensor:
        """Over all maskable tokens, masked or not. ``ValueError`` under a clipped interval, where it would bound nothing."""
        if not self.is_bound:
            raise ValueError(
                "nats_per_token: the loss was taken on a clipped interval, which bounds no likelihood; evaluate on the whole one"
            )
        return self.nelbo_nats.sum() / self.n_maskable.sum()


def block_levels(
    rows: int,
    blocks: int,
    interval: tuple[float, float] = WHOLE,
    generator: torch.Generator | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """Masking probabilities ``[rows, blocks]`` fp32, one in each of ``rows · blocks · world_size`` equal parts of ``interval``."""
    low, high = check_interval(interval)
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank, world_size: expected 0 <= rank < world_size, got {rank} and {world_size}")
    device = None if generator is None else generator.device
    u = torch.rand(rows, blocks, generator=generator, dtype=torch.float64, device=device)
    part = torch.arange(rank * rows * blocks, (rank + 1) * rows * blocks, device=u.device).view(rows, blocks)
    return (low + (high - low) * (u + part) / (rows * blocks * world_size)).float()


def corrupt_blocks(
    x0: Tensor,
    block_length: int,
    mask_id: int,
    *,
    maskable: Tensor,
    real: Tensor,
    interval: tuple[float, float] = WHOLE,
    generator: torch.Generator | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> BlockCorruption:
    """Mask maskable tokens block by block.

    Under a clipped interval, blocks whose realised share of masked tokens lies outside are drawn again until none is left. A block
    that is shorter, or partly given, so that no number of its tokens makes a share within, keeps its first draw.

    Args:
        x0: clean tokens ``[B, L]``.
        maskable, real: ``[B, L]`` bool, see :func:`block_diffusion_loss`; blocks are counted over real tokens.

    Raises:
        ValueError: the mask token at a maskable position; an interval that no number of ``block_length`` tokens can meet.
    """
    low, high = check_interval(interval)
    if bool(((x0 == mask_id) & maskable).any()):
        row, position = ((x0 == mask_id) & maskable).nonzero()[0].tolist()
        raise ValueError(
            f"x0: row {row} holds the mask token {mask_id} at maskable position {position}; clean text must not contain it there"
        )
    block_of = (real.long().cumsum(1) - 1).clamp(min=0) // block_length
    blocks = int(block_of.max()) + 1
    if block_length == 1:
        p = torch.ones(x0.shape[0], blocks, device=x0.device)
    else:
        p = block_levels(x0.shape[0], blocks, interval, generator, rank, world_size).to(x0.device)

    def draw() -> Tensor:
        device = None if generator is None else generator.device
        u = torch.rand(x0.shape, generator=generator, device=device).to(x0.device)
        return (u < p.gather(1, block_of)) & maskable

    def count(chosen: Tensor) -> Tensor:
        return torch.zeros(p.shape, dtype=torch.long, device=x0.device).scatter_add(1, block_of, chosen.long())

    masked = draw()
    if block_length > 1 and not _is_whole(interval):
        sizes = count(maskable)
        possible = _meets(sizes, low, high)
        if not bool(_meets(torch.tensor([block_length]), low, high)):
            raise ValueError(
                f"interval: no number of {block_length} tokens is a share within [{low}, {high}]; take a wider one, or longer blocks"
            )
        for _ in range(REDRAWS):
            share = count(masked).double() / sizes.clamp(min=1)
            again = possible & ((share > high + _SLACK) | (share < low - _SLACK))
            if not bool(again.any()):
                break
            masked = torch.where(again.gather(1, block_of), draw(), masked)
        else:
            raise RuntimeError(f"interval: blocks outside [{low}, {high}] were left after {REDRAWS} redraws")
    return BlockCorruption(x0.masked_fill(masked, mask_id), masked, p, block_of)


def block_diffusion_loss(
    model: BlockDiffusionModel,
    x0: Tensor,
    *,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    interval: tuple[float, float] = WHOLE,
    normalise: Normalise = "elbo",
    block_length: int | None = None,
    generator: torch.Generator | None = None,
    rank: int = 0,
    world_size: int = 1,
    forbid_mask_token: bool = True,
) -> BlockDiffusionLoss:
    """One two-stream pass; the head runs at masked positions of the noisy stream alone.

    Args:
        x0: clean tokens ``[B, L]``.
        maskable: ``[B, L]`` bool; False = given: never noised, no loss. Default: every real token, but the first of a row where the
            model is shifted, which nothing speaks about.
        attention_mask: ``[B, L]``, True = real; padding may stand anywhere.
        interval: of the masking probabilities; narrower than [1e-3, 1] is "clipped".
        normalise: ``elbo`` = by real tokens of the rows that have a maskable one, ``answer`` = each row by its maskable tokens, then
            the mean over rows, ``tokens`` = by maskable tokens, ``masked`` = by masked ones (no bound).
        block_length: instead of the model's own, for growing blocks.
        rank, world_size: place in a data-parallel group.

    Raises:
        ValueError: see :func:`corrupt_blocks`; shapes; unknown names; no maskable position at all.
        FloatingPointError: a cross-entropy that is not finite, naming row and position.
    """
    if normalise not in get_args(Normalise):
        raise ValueError(f"normalise: {normalise!r} given, expected one of {', '.join(map(repr, get_args(Normalise)))}")
    real = check_maskable(x0, None) if attention_mask is None else attention_mask.bool()
    if real.shape != x0.shape:
        raise ValueError(f"attention_mask: shape {list(real.shape)} given, expected {list(x0.shape)}")
    first = real & (real.long().cumsum(1) == 1)
    if maskable is None:
        maskable = real & ~first if model.shift else real
    else:
        maskable = check_maskable(x0, maskable)
        if bool((maskable & ~real).any()):
            raise ValueError("maskable: it is True at padded positions (attention_mask False)")
        if model.shift and bool((maskable & first).any()):
            raise ValueError(
                "maskable: it is True at the first token of a row, which a shifted model says nothing about"
            )
    n_maskable = maskable.sum(1)
    scored = n_maskable > 0
    if not bool(scored.any()):
        raise ValueError("maskable: no row has a maskable position, so there is nothing to score")
    length = model.block_length if block_length is None else block_length
    noisy = corrupt_blocks(
        x0,
        length,
        model.mask_id,
        maskable=maskable,
        real=real,
        interval=interval,
        generator=generator,
        rank=rank,
        world_size=world_size,
    )
    logits = precise(model.forward_two_stream(noisy.z, x0, block_length, real, at=noisy.masked))
    if forbid_mask_token:
        logits = without_mask_token(logits, model.mask_id)
    cross_entropy = F.cross_entropy(logits, x0[noisy.masked], reduction="none")
    if not bool(cross_entropy.detach().isfinite().all()):
        row, position = noisy.masked.nonzero()[int((~cross_entropy.isfinite()).nonzero()[0])].tolist()
        raise FloatingPointError(
            f"cross-entropy is not finite at row {row}, position {position} (token {int(x0[row, position])})"
        )
    weighted = cross_entropy / noisy.p.gather(1, noisy.block_of)[noisy.masked].to(cross_entropy.dtype)
    per_token = torch.zeros(x0.shape, dtype=weighted.dtype, device=x0.device).masked_scatter(noisy.masked, weighted)
    match normalise:
        case "elbo":
            loss = per_token.sum() / real[scored].sum()
        case "answer":
            loss = (per_token.sum(1) / n_maskable.clamp(min=1)).sum() / scored.sum()
        case "tokens":
            loss = per_token.sum() / n_maskable.sum()
        case _:
            loss = per_token.sum() / noisy.masked.sum().clamp(min=1)
    per_token = per_token.detach()
    is_bound = length == 1 or _is_whole(interval)
    return BlockDiffusionLoss(loss, per_token.sum(1), n_maskable, per_token, noisy.p, noisy.masked, is_bound)


@torch.no_grad()
def least_variance_interval(
    model: BlockDiffusionModel,
    batches: Sequence[Tensor],
    *,
    widths: Sequence[float] = WIDTHS,
    lows: int = 5,
    generator: torch.Generator | None = None,
) -> tuple[tuple[float, float], dict[tuple[float, float], float]]:
    """The clipped interval on which the loss of a row varies least, and the variance on every one that was tried.

    For each width, ``lows`` intervals from [1e-3, width] up to [1 - width, 1]. Meant for every validation (arXiv:2503.09573).

    Args:
        batches: clean tokens ``[B, L]`` each, at least two rows in all.
    """
    if not batches or sum(len(x) for x in batches) < 2:
        raise ValueError("batches: a variance needs at least two rows")
    if lows < 2 or not widths or not all(0.0 < w < 1.0 for w in widths):
        raise ValueError(f"widths, lows: expected widths within (0, 1) and at least 2 lows, got {widths} and {lows}")
    tried: dict[tuple[float, float], float] = {}
    for width in widths:
        for k in range(lows):
            low = max(WHOLE[0], round((1 - width) * k / (lows - 1), 6))
            interval = (low, min(1.0, low + width))
            losses = [
                out.nelbo_nats / out.n_maskable
                for x in batches
                for out in [block_diffusion_loss(model, x, interval=interval, generator=generator)]
            ]
            tried[interval] = float(torch.cat(losses).double().var())
    return min(tried, key=lambda i: tried[i]), tried


def check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if not 0.0 < low < high <= 1.0:
        raise ValueError(f"interval: expected 0 < lo < hi <= 1, got {tuple(interval)}")
    return float(low), float(high)


def _is_whole(interval: tuple[float, float]) -> bool:
    return interval[0] <= WHOLE[0] and interval[1] >= WHOLE[1]


def _meets(sizes: Tensor, low: float, high: float) -> Tensor:
    """Blocks of which some number of tokens, at least one, is a share within the interval."""
    n = sizes.double()
    least = (n * (low - _SLACK)).ceil().clamp(min=1)
    return (sizes > 0) & (least <= n * (high + _SLACK))
