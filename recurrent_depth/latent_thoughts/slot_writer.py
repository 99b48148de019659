r"""Who writes the input vector of a latent slot: :class:`SlotWriter`.

Coconut (arXiv:2412.06769) feeds the last hidden state, after the final norm, of the position before the slot. Its two
controls leave everything else as it is: ``pause`` puts one learned token into every slot, ``nothing`` has no slots at
all, so that only the curriculum is left.
"""

from dataclasses import dataclass

from latentcot.recurrent_depth.settings import check_choice

KINDS = ("last_hidden", "pause", "nothing")


@dataclass(frozen=True)
class SlotWriter:
    """``kind``: ``last_hidden``, ``pause`` or ``nothing``."""

    kind: str = "last_hidden"

    def __post_init__(self) -> None:
        check_choice("slot_writer: kind", self.kind, KINDS)

    @property
    def sequential(self) -> bool:
        """Whether a slot has to wait for the one before it."""
        return self.kind == "last_hidden"

    def slots(self, latents: int) -> int:
        """How many of ``latents`` planned slots a sequence really has."""
        return 0 if self.kind == "nothing" else latents
