r"""Which recurrences carry gradient: :class:`GradientWindow` (truncated back-propagation through depth).

Of r recurrences the first :math:`\max(r - k, 0)` run without gradient, the last :math:`\min(r, k)` with it. The prelude
learns through the input injected into those last k, and only through it (arXiv:2502.05171, k = 8).
"""

from dataclasses import dataclass

from latentcot.recurrent_depth.settings import check_count


@dataclass(frozen=True)
class GradientWindow:
    """``last``: k, how many recurrences at the end carry gradient; ``None`` = all. With 0 only coda and head learn."""

    last: int | None = 8

    def __post_init__(self) -> None:
        if self.last is not None:
            check_count("gradient_window: last", self.last)

    def split(self, recurrences: int) -> tuple[int, int]:
        """``(without gradient, with gradient)``; they add up to ``recurrences``."""
        with_gradient = recurrences if self.last is None else min(recurrences, self.last)
        return recurrences - with_gradient, with_gradient


FULL = GradientWindow(None)
