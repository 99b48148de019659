"""Packed rows to padded rows and back, and the reversal of time that bidirectional calls need.

A packed row holds N sequences end to end, ``x [1,S,...]`` with N+1 offsets. Operators run it as ``[N,S_max,...]`` with
zeros at the end of the shorter rows: a token with k = 0, beta = 0, log_decay = 0 (x = 0 for the scan) leaves every
state as it is.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


class Packing:
    """Where each token of a packed row goes in the padded rows."""

    def __init__(self, offsets: Sequence[int], device: torch.device) -> None:
        lengths = [end - start for start, end in pairwise(offsets)]
        self.count = len(lengths)
        self.longest = max(lengths)
        self.lengths = torch.tensor(lengths, device=device)
        row = torch.repeat_interleave(torch.arange(self.count, device=device), self.lengths)
        start = torch.tensor(offsets[:-1], device=device)
        self.index = torch.arange(offsets[-1], device=device) - start[row] + row * self.longest  # [S]

    def unpack(self, x: Tensor) -> Tensor:
        """``[1,S,...] -> [N,S_max,...]``, zeros behind each sequence."""
        padded = x.new_zeros(self.count * self.longest, *x.shape[2:]).index_copy(0, self.index, x[0])
        return padded.unflatten(0, (self.count, self.longest))

    def pack(self, y: Tensor) -> Tensor:
        """``[N,S_max,...] -> [1,S,...]``."""
        return y.flatten(0, 1).index_select(0, self.index).unsqueeze(0)


def shifted_gate(log_decay: Tensor) -> Tensor:
    """The gate of the next token at each position (0 at the last): ``g_t -> g_{t+1}`` along axis 1."""
    return torch.cat([log_decay[:, 1:], torch.zeros_like(log_decay[:, :1])], dim=1)


def with_reversed(x: Tensor) -> Tensor:
    """``[B,S,...] -> [2B,S,...]``: the rows, then the same rows with time reversed.

    Right-padded rows may be flipped whole: their neutral tokens then come first and leave the zero state alone, which
    is the same as flipping within the real length.
    """
    return torch.cat([x, x.flip(1)])


def split_directions(o: Tensor) -> tuple[Tensor, Tensor]:
    """Undo :func:`with_reversed` on an output: (forward, backward), both in the original order of time."""
    forward, backward = o.chunk(2)
    return forward, backward.flip(1)
