r"""What the coda gets to see: :class:`Readout`.

Huginn's released code applies the final norm *once after the loop*, :math:`z = n(s_r)`, and the same norm once more
after the coda. The paper (arXiv:2502.05171) can be read as having it at the end of the core, inside the loop: weights
released for one order do not work in the other.
"""

from dataclasses import dataclass

from latentcot.recurrent_depth.settings import check_choice

LOOP_NORMS = ("after_loop", "every_recurrence", "none")


@dataclass(frozen=True)
class Readout:
    """``loop_norm``: ``after_loop`` (code; the default), ``every_recurrence`` (the other reading of the paper: the
    state itself is normalised) or ``none``."""

    loop_norm: str = "after_loop"

    def __post_init__(self) -> None:
        check_choice("readout: loop_norm", self.loop_norm, LOOP_NORMS)
