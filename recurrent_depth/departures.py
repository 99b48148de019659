"""Rows that leave a loop at different recurrences, put back in order at its end: :class:`Departures`."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Departed:
    """All rows in order: ``final [B, S, D]`` s_r; ``recurrences [B]``; ``before [B, S, D]``: s_{r-1}, and ``hidden [B, S, D]``: what
    the coda made of s_r, each ``None`` where it was not given of every row."""

    final: Tensor
    recurrences: Tensor
    before: Tensor | None
    hidden: Tensor | None


class Departures:
    """Rows in the order in which they left."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.steps: list[int] = []
        self.kept: dict[str, list[Tensor]] = {"final": [], "before": [], "hidden": []}

    def add(
        self,
        gone: Tensor | None,
        rows: Tensor,
        steps: int,
        final: Tensor,
        before: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Those of the rows at work ``[n]`` whose indices are ``gone`` (``None`` = all of them) are done after ``steps`` recurrences;
        the other tensors are of all rows at work. Returns their numbers in the batch."""
        self.rows.append(rows if gone is None else rows.index_select(0, gone))
        self.steps.append(steps)
        for name, tensor in (("final", final), ("before", before), ("hidden", hidden)):
            if tensor is not None:
                self.kept[name].append(tensor if gone is None else tensor.index_select(0, gone))
        return self.rows[-1]

    def in_order(self) -> Departed:
        """Everything, by row. Rows must all have left."""
        order = torch.cat(self.rows).argsort()
        steps = torch.tensor(self.steps, device=order.device).repeat_interleave(
            torch.tensor([len(rows) for rows in self.rows], device=order.device)
        )
        final, before, hidden = (
            torch.cat(parts).index_select(0, order) if len(parts) == len(self.rows) else None
            for parts in self.kept.values()
        )
        assert final is not None
        return Departed(final, steps.index_select(0, order), before, hidden)
