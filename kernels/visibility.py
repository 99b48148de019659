"""Who sees whom: frozen values that every operator takes as ``visibility``."""

from dataclasses import dataclass
from typing import Literal

GATES = ("own", "next")
COMBINATIONS = (None, "average", "gate")
INSIDES = ("softmax", "bilinear", "decayed", "additive")
WRITES = ("recurrent", "order_free")
BLOCK_OPERATORS = ("decay_attention", "delta_rule")  # those that define BlockCausal


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
    r"""Bidirectional inside a block of ``length`` tokens, causal across blocks: for block diffusion.

    Blocks are counted from the start of each sequence and the last one may be shorter. S_c is the state before block c
    (``initial_state`` for c = 0), s the scale, q, k, v, g, beta as in the operator. ``output_state`` is the state after
    the last block, complete or not. A shorter block is a block: carrying the state on in the middle of one starts
    another there.

    ``inside`` says what token i of block c reads:

    * ``"softmax"``: :math:`o_i = s\, q_i S_c` + softmax attention to all tokens of the block, with scale
      :math:`K^{-1/2}` and without g and beta. The read of the past is not decayed inside the block. Not with several
      reflections a token: its keys would be more than one.
    * ``"bilinear"``: :math:`o_i = s\, q_i S_c` + what ``Bidirectional()`` gives on the block alone: the operator
      forward and on the time-reversed block, both from a zero state, the diagonal counted once. For the delta rule the
      two are averaged, or weighed by ``direction_gate``.
    * ``"decayed"``: the causal operator itself (it starts from S_c, so the past fades and is erased inside the block)
      joined with the reverse scan of the block, from zero at the block's end, in the same way.
    * ``"additive"``: every token reads the state after its block, :math:`o_i = s\, q_i S_{c+1}`.

    ``write`` says how a finished block enters the state:

    * ``"recurrent"``: token by token, as the causal operator does.
    * ``"order_free"``: no token of a block comes before another. With K, V the block's keys and values as rows and
      :math:`\bar S = \Gamma S_c`, where :math:`\Gamma = \exp(\sum g)` over the block: decay attention
      :math:`S_{c+1} = \bar S + K^\top V`; delta rule, with b the diagonal of the block's betas (at least zero),
      :math:`S_{c+1} = \bar S + K^\top (I + b K K^\top)^{-1} b\, (V - K \bar S)`, the minimiser of
      :math:`\tfrac12 \|S - \bar S\|^2 + \tfrac12 \sum_j \beta_j \|k_j S - v_j\|^2`. For one token that is the
      causal rule with :math:`\beta / (1 + \beta \|k\|^2)` for beta. With ``"decayed"`` it is not defined: that form
      scans token by token.

    Sources: arXiv:2501.16085 (softmax inside a block, linear state across blocks), arXiv:2503.09573 (block diffusion);
    the order-free delta write is derived here. The defaults are those of our block diffusion.
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
        if self.inside == "decayed" and self.write == "order_free":
            raise ValueError(
                "BlockCausal: inside='decayed' with write='order_free' is not defined, because the first scans a block "
                "token by token and the second gives its tokens no order; change one of them"
            )


Visibility = Causal | Bidirectional | BlockCausal


def check_visibility(operator: str, visibility: Visibility, *, with_state: bool) -> None:
    """Raise unless ``visibility`` is one that ``operator`` can run; ``with_state``: a state is given or asked for."""
    if isinstance(visibility, Causal):
        return
    if isinstance(visibility, BlockCausal):
        if operator not in BLOCK_OPERATORS:
            raise ValueError(
                f"{operator}: BlockCausal is not defined for this operator; {' and '.join(BLOCK_OPERATORS)} define it"
            )
        return
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
