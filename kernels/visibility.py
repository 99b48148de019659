"""Who sees whom: frozen values that every operator takes as ``visibility``."""

from dataclasses import dataclass
from typing import Literal

GATES = ("own", "next")
COMBINATIONS = (None, "average", "gate")
INSIDES = ("softmax", "bilinear", "decayed", "additive")
WRITES = ("recurrent", "order_free")


@dataclass(frozen=True, slots=True)
class Causal:
    """Token t sees tokens 0 … t: the default of every operator."""


@dataclass(frozen=True, slots=True)
class Bidirectional:
    """Every token sees every token of its sequence: two directions of one operator.

    ``gate="own"`` runs the causal operator forward and on the time-reversed inputs, gates included: backwards, the
    state is decayed by the gate of the token that reads it. ``gate="next"`` decays it by the gate of the token it comes
    from, which makes the weight of a pair the same in both directions, ``exp(-|G_i - G_j|)``. They are different
    operators.

    ``combine`` is for the delta rule, where the two directions have separate states and no diagonal can be subtracted:
    ``"average"`` (what None means there) or ``"gate"`` (``direction_gate`` weighs them per head). ``decay_attention``
    adds the directions and counts the diagonal once; it takes None only.

    Source: arXiv:2502.16249 for the two-scan forms; each form has its own quadratic oracle in the tests.
    """

    gate: Literal["own", "next"] = "own"
    combine: Literal["average", "gate"] | None = None

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ValueError(f"Bidirectional: gate is {self.gate!r}, expected one of {GATES}")
        if self.combine not in COMBINATIONS:
            raise ValueError(f"Bidirectional: combine is {self.combine!r}, expected one of {COMBINATIONS}")


@dataclass(frozen=True, slots=True)
class BlockCausal:
    """Bidirectional inside a block of ``length`` tokens, causal across blocks. No operator defines it yet: they raise.

    ``inside`` says how tokens of one block see each other, ``write`` how a finished block enters the state.
    """

    length: int
    inside: Literal["softmax", "bilinear", "decayed", "additive"] = "softmax"
    write: Literal["recurrent", "order_free"] = "recurrent"

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"BlockCausal: length is {self.length!r}, expected a whole number of tokens, at least 1")
        if self.inside not in INSIDES:
            raise ValueError(f"BlockCausal: inside is {self.inside!r}, expected one of {INSIDES}")
        if self.write not in WRITES:
            raise ValueError(f"BlockCausal: write is {self.write!r}, expected one of {WRITES}")


Visibility = Causal | Bidirectional | BlockCausal


def check_visibility(operator: str, visibility: Visibility, *, with_state: bool) -> None:
    """Raise unless ``visibility`` is one that ``operator`` can run; ``with_state``: a state is given or asked for."""
    if isinstance(visibility, Causal):
        return
    if isinstance(visibility, BlockCausal):
        raise ValueError(
            f"{operator}: BlockCausal is not defined for this operator yet; use Causal() or Bidirectional()"
        )
    if not isinstance(visibility, Bidirectional):
        raise TypeError(
            f"{operator}: visibility is {visibility!r}, expected an instance of Causal, Bidirectional or BlockCausal "
            f"(the value Causal(), not the class)"
        )
    if with_state:
        raise ValueError(
            f"{operator}: a state belongs to the causal direction; "
            f"with Bidirectional() leave out initial_state and output_state"
        )
