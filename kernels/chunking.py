"""Cutting sequences into chunks of equal length."""

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_count(S: int, limit: int) -> tuple[int, int]:
    """(number of chunks, chunk length) with the length at most ``limit`` and as little padding as possible."""
    n = -(-S // limit)
    return n, -(-S // n)


def to_chunks(x: Tensor, n: int, C: int) -> Tensor:
    """``[B,S,H,...] -> [B*H*n, C, ...]``, contiguous, zeros (neutral tokens) behind the sequence."""
    B, S, H = x.shape[:3]
    rest = x.shape[3:]
    if n * C != S:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, n * C - S))
    return x.reshape(B, n, C, H, *rest).transpose(2, 3).transpose(1, 2).reshape(B * H * n, C, *rest)


def from_chunks(o: Tensor, B: int, H: int, S: int) -> Tensor:
    """``[B*H*n, C, V] -> [B,S,H,V]``."""
    o = o.view(B, H, -1, o.shape[-1]).transpose(1, 2)
    return o if o.shape[1] == S else o[:, :S]


def zero_state(like: Tensor, B: int, H: int, K: int, V: int) -> Tensor:
    return torch.zeros(B, H, K, V, dtype=like.dtype, device=like.device)
