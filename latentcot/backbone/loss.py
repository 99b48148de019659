r"""Next-token cross-entropy, also without ever holding the logits of all positions.

The logits of a long batch are the largest tensor of a training step: positions × Vocab, in float32, and once more as their
gradient. With a ``chunk`` the head and the loss run over so many positions at a time, and backward forms each chunk's logits
again. The result is the same up to the order of sums; the price is one more pass through the head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # label that no loss counts


def next_token_targets(
    labels: Tensor, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """What positions 0 … S - 2 are scored on, ``[B, S - 1]``: label i + 1, or -100.

    Labels of -100, padded targets and the first token of each packed sequence (no target of the sequence before it) are left out.
    Raises ``ValueError`` when nothing is left to score.
    """
    targets = labels[:, 1:].clone()
    if attention_mask is not None:
        mask = attention_mask[:, -labels.shape[1] :].bool()
        targets[~(mask[:, 1:] & mask[:, :-1])] = IGNORED
    if cu_seqlens is not None:
        starts = cu_seqlens[1:-1].long()
        starts = starts[(starts > 0) & (starts < labels.shape[1])]
        targets[:, starts - 1] = IGNORED
    if not bool((targets != IGNORED).any()):
        raise ValueError("labels: no position is left to score (all are -100, padded, or first in their sequence)")
    return targets


def next_token_loss(
    logits: Tensor, labels: Tensor, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of label i + 1 given position i, in nats; which positions count says :func:`next_token_targets`."""
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels: shape {list(labels.shape)} given, expected {list(logits.shape[:2])}")
    targets = next_token_targets(labels, attention_mask, cu_seqlens)
    precise = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(precise.flatten(0, 1), targets.flatten())


def summed_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], chunk: int | None = None
) -> Tensor:
    """Sum over positions of the cross-entropy of ``head(hidden)``, in nats, float32 or better.

    Args:
        hidden: ``[P, D]``.
        targets: ``[P]``, -100 = not counted.
        head: ``[P', D]`` to logits ``[P', Vocab]``.
        chunk: positions whose logits exist at a time, P' <= chunk; ``None`` = all. Above zero, or ``ValueError``.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"loss_chunk: {chunk} positions given, expected at least 1, or None for all at once")

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        logits = head(rows)
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(precise, wanted, reduction="sum")

    if chunk is None or hidden.shape[0] <= chunk:
        return part(hidden, targets)
    sums = []
    for rows, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        found = checkpoint(part, rows, wanted, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(found, Tensor)
        sums.append(found)
    return torch.stack(sums).sum()
