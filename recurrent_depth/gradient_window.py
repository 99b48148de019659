r"""Which recurrences carry gradient: :class:`GradientWindow` (truncated back-propagation through depth).

Of r recurrences the first :math:`\max(r - k, 0)` run without gradient, the last :math:`\min(r, k)` with it. The prelude
learns through the input injected into those last k, and only through it (arXiv:2502.05171, k = 8). The k can rise over
training together with the mean of r (arXiv:2511.07384).
"""

from dataclasses import dataclass, replace

from latentcot.recurrent_depth.settings import check_count
from latentcot.recurrent_depth.step_sampler import check_ramp, ramp


@dataclass(frozen=True)
class GradientWindow:
    """
    Args:
        last: k, how many recurrences at the end carry gradient; ``None`` = all. With 0 only coda and head learn.
        ramp, ramp_share: a curriculum from 1 to k, as in :class:`~latentcot.recurrent_depth.StepSampler`; it needs a
            ``last``.

    Raises:
        ValueError: k below 0, an unknown ramp, or a ramp towards ``None``.
    """

    last: int | None = 8
    ramp: str = "none"
    ramp_share: float = 0.75

    def __post_init__(self) -> None:
        if self.last is not None:
            check_count("gradient_window: last", self.last)
        check_ramp("gradient_window", self.ramp, self.ramp_share)
        if self.ramp != "none" and not self.last:
            raise ValueError(f"gradient_window: last = {self.last} given with a ramp, which needs a number to rise to")

    def at_progress(self, progress: float) -> "GradientWindow":
        """The window at ``progress`` (0 to 1) of training."""
        if self.ramp == "none" or self.last is None:
            return self
        k = 1 + (self.last - 1) * ramp(self.ramp, progress / self.ramp_share)
        return replace(self, last=round(k), ramp="none")

    def split(self, recurrences: int) -> tuple[int, int]:
        """``(without gradient, with gradient)``; they add up to ``recurrences``."""
        with_gradient = recurrences if self.last is None else min(recurrences, self.last)
        return recurrences - with_gradient, with_gradient


FULL = GradientWindow(None)
