"""When a sample is no longer worth going on with."""

import torch
from torch import Tensor

WINDOW, LEAST_ENTROPY = 256, 4.0


def unigram_entropy(tokens: Tensor, counted: Tensor | None = None) -> Tensor:
    """Entropy of the token frequencies of each row in nats, ``[B]``; over ``counted [B, L]`` positions (default: all).

    A sampler whose noise has too short a tail makes text look better while this falls (arXiv:2409.02908): report it
    beside generative perplexity.
    """
    counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted
    ordered, where = tokens.masked_fill(~counted, -1).sort(dim=1)
    counted = counted.take_along_dim(where, 1)
    # a run of equal tokens is one frequency; every member of it knows its length by counting members of its run
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = starts.long().cumsum(1) - 1
    sizes = torch.zeros(ordered.shape, dtype=torch.float64, device=tokens.device)
    sizes = sizes.scatter_add(1, run, counted.double())
    share = sizes / sizes.sum(1, keepdim=True).clamp(min=1)
    return -torch.special.xlogy(share, share).sum(1)


def degenerate(z: Tensor, held: Tensor, window: int = WINDOW, least: float = LEAST_ENTROPY) -> Tensor:
    """Rows with more than ``window`` tokens whose last ``window`` ones have an entropy below ``least`` nats
    (arXiv:2503.09573); ``held [B, L]``: positions that hold a real token."""
    behind = held.long().flip(1).cumsum(1).flip(1)  # how many are held from here on
    recent = held & (behind <= window)
    return (held.sum(1) > window) & (unigram_entropy(z, recent) < least)
