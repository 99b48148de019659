"""One turn of the sampling loop: the rows it is about, what is asked of the device in front of it, and what may turn out
to be wrong in it."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Some rows of a batch, ``numbers [R]``. In the usual case it is the ``whole`` batch, and then nothing is gathered or
    scattered.

    Only :meth:`write` writes in place, so that whoever was handed a tensor keeps what he was handed.
    """

    numbers: Tensor
    whole: bool

    def of(self, tensor: Tensor) -> Tensor:
        """The rows ``[R, ...]`` of ``[B, ...]``."""
        return tensor if self.whole else tensor[self.numbers]

    def copy(self, tensor: Tensor) -> Tensor:
        """As :meth:`of`, for callers that may write into it."""
        return tensor.clone() if self.whole else tensor[self.numbers]

    def into(self, tensor: Tensor, values: Tensor) -> Tensor:
        """``[B, ...]`` with these rows replaced by ``values [R, ...]``."""
        return values if self.whole else tensor.index_put((self.numbers,), values)

    def write(self, table: Tensor, values: Tensor) -> None:
        """As :meth:`into`, in place: for a large table that is nobody else's."""
        if self.whole:
            table.copy_(values)
        else:
            table[self.numbers] = values

    def numbers_of(self, r: Tensor) -> Tensor:
        """Numbers within the batch of rows that are counted within the selection."""
        return r if self.whole else self.numbers[r]


@dataclass(frozen=True)
class Places:
    """Marked positions of the rows of a turn in reading order: row within the turn and column, each ``[n]``."""

    r: Tensor
    column: Tensor

    @classmethod
    def of(cls, marked: Tensor, count: int) -> "Places":
        """Those marked in ``[R, L]``, whose number is known: nothing has to be waited for."""
        return cls(*marked.nonzero_static(size=count).unbind(1))

    @property
    def index(self) -> tuple[Tensor, Tensor]:
        return self.r, self.column


@dataclass(frozen=True)
class Turn:
    """Rows ``at`` of turn ``number`` of the loop, those among them that need a pass (``asked``, or none), their current
    block ``here [R, L]`` with its ``size`` and ``steps [R]``, which of their positions may be revealed (``candidates``
    and their ``places``), and those that a recorder is told of (``recorded``).

    ``closing``: rows that are past the last step of their block; ``refilling``: those that are revised; ``ending``: those
    that have no pass left behind this one; ``[R]``, or ``None`` where the sampler knows no such rows.
    """

    number: int
    at: Selection
    asked: Selection | None
    here: Tensor
    size: Tensor
    steps: Tensor
    candidates: Tensor
    places: Places
    recorded: Places | None
    closing: Tensor | None
    refilling: Tensor | None
    ending: Tensor | None


def either(*masks: Tensor | None) -> Tensor | None:
    """Where any of them holds; ``None`` = nowhere."""
    given = [mask for mask in masks if mask is not None]
    return functools.reduce(torch.bitwise_or, given) if given else None


class Questions:
    """Numbers that are asked of the device together, with one wait.

    A pass leaves behind what would show that something is wrong in it, as a number with the test that it passes when all
    is well; the next :meth:`ask` reads them, and calls what looks closely and raises for those that fail.
    """

    def __init__(self) -> None:
        self._open: list[tuple[Tensor, Callable[[float], bool], Callable[[], None]]] = []

    def leave(self, value: Tensor, well: Callable[[float], bool], otherwise: Callable[[], None]) -> None:
        self._open.append((value, well, otherwise))

    def leave_sum(self, values: Tensor, otherwise: Callable[[], None]) -> None:
        """A sum is no finite number where one of its terms is none (or, rarely, where it overflows: ``otherwise`` looks
        for itself)."""
        self.leave(values.sum(dtype=torch.float64), math.isfinite, otherwise)

    def ask(self, counts: Sequence[Tensor] = ()) -> list[int]:
        """How many are marked in each of the boolean ``counts``; raises what is left behind first."""
        left, self._open = self._open, []
        if not left and not counts:
            return []
        asked = [*(marked.sum(dtype=torch.float64) for marked in counts), *(value for value, _, _ in left)]
        found = torch.stack(asked).tolist()
        for value, (_, well, otherwise) in zip(found[len(counts) :], left, strict=True):
            if not well(value):
                otherwise()
        return [int(n) for n in found[: len(counts)]]
