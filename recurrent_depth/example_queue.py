"""Examples for a batch whose rows become free at different times: :class:`ExampleQueue`.

Where rows carry their example over several steps, a loader that hands out a whole batch a step loses what it hands to a row still at
work. Here as many examples are taken as rows are free, so that every epoch is the data set once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from latentcot.recurrent_depth.settings import check_count


class ExampleQueue:
    """
    Args:
        size: examples of the data set.
        make: indices to examples, any nest of tensors with rows first; all of one shape, whatever the indices.
        seed: of the order, which is drawn anew for every epoch; ``None`` = 0, 1, 2, ...

    ``given``: examples handed out so far; ``epoch`` the number of the running one.
    """

    def __init__(self, size: int, make: Callable[[Sequence[int]], Any], seed: int | None = 0):
        self.size = check_count("size", size, 1)
        self.make, self.seed, self.given = make, seed, 0
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def epoch(self) -> int:
        return self.given // self.size

    def index(self, number: int) -> int:
        """Which example is handed out as the ``number``-th, from 0."""
        epoch, place = divmod(number, self.size)
        if self._order[0] != epoch:
            if self.seed is None:
                order = list(range(self.size))
            else:
                order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
            self._order = (epoch, order)
        return self._order[1][place]

    def take(self, free: Tensor) -> Any:
        """Examples for the rows that are ``free [B]`` bool, each at its place; in the other rows, which ignore theirs, stands one of
        the same (or example 0), which counts for nothing.

        Raises:
            ValueError: a mask of another kind.
        """
        if free.dtype != torch.bool or free.dim() != 1:
            raise ValueError(f"free: shape {list(free.shape)} of {free.dtype} given, expected one axis of bools")
        places = free.nonzero()[:, 0].tolist()
        taken = [self.index(self.given + i) for i in range(len(places))]
        self.given += len(places)
        examples = self.make(taken or [0])
        source = torch.zeros(len(free), dtype=torch.long)
        source[places] = torch.arange(len(places))
        return tree_map(lambda t: t[source.to(t.device)], examples)
