r"""How a recurrence sees the input again: :class:`Injection`, and the module it builds.

Every recurrence starts with the state :math:`s` and the prelude's output :math:`e`; joined, they enter the core. Huginn
(arXiv:2502.05171) concatenates, *state first*, and maps :math:`2D \to D` without a bias. Adding worked as well in small
models and worse in large ones.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentcot.recurrent_depth.settings import check_choice

KINDS = ("linear", "add", "gate", "ffn", "none")


@dataclass(frozen=True)
class Injection:
    r"""Which join.

    ======= ==================================================== ==============
    kind    input of the core                                    parameters
    ======= ==================================================== ==============
    linear  :math:`A\,[s; e]`                                    :math:`2D^2`
    add     :math:`s + e`                                        none
    gate    :math:`g s + (1 - g) e,\ g = \sigma(A\,[s; e])`      :math:`2D^2`
    ffn     :math:`B\,\mathrm{silu}(A\,[s; e])`                   :math:`4D^2 + 2D^2`
    none    :math:`s`                                            none
    ======= ==================================================== ==============

    ``gate`` and ``ffn`` are our readings of names alone: no equation is published for them. ``none`` shows the core its
    input only through an initial state of kind ``embedding``.
    """

    kind: str = "linear"

    def __post_init__(self) -> None:
        check_choice("injection: kind", self.kind, KINDS)

    def build(self, width: int) -> "Adapter":
        return Adapter(self.kind, width)


class Adapter(nn.Module):
    """The join as a module: ``state [B, S, D]``, ``embedded [B, S, D]`` to ``[B, S, D]``. Matrices start as a normal
    of variance 2 / (5 D), cut at ±3 standard deviations (the initialisation of every linear map in Huginn)."""

    def __init__(self, kind: str, width: int):
        super().__init__()
        self.kind = kind
        if kind in ("linear", "gate", "ffn"):
            self.weight = nn.Parameter(torch.empty((2 if kind == "ffn" else 1) * width, 2 * width))
        if kind == "ffn":
            self.output = nn.Parameter(torch.empty(width, 2 * width))
        std = math.sqrt(2 / (5 * width))
        for weight in self.parameters():
            nn.init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std)

    def forward(self, state: Tensor, embedded: Tensor) -> Tensor:
        if self.kind == "none":
            return state
        if self.kind == "add":
            return state + embedded
        joined = nn.functional.linear(torch.cat([state, embedded], -1), self.weight)
        if self.kind == "linear":
            return joined
        if self.kind == "ffn":
            return nn.functional.linear(nn.functional.silu(joined), self.output)
        gate = joined.sigmoid()  # under autocast of another dtype than state and input, which lerp would refuse
        return gate * state + (1 - gate) * embedded

    @property
    def flops_per_token(self) -> float:
        return 2.0 * sum(weight.numel() for weight in self.parameters())

    def extra_repr(self) -> str:
        return self.kind
