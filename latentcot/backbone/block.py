r"""One block: norm, mixer, norm, MLP, with residuals; the only block class of the library.

Norm placements (x the residual stream, f the mixer or the MLP):

======================== ======================================= =====================
placement                one sub-layer                           used by
======================== ======================================= =====================
``pre``                  :math:`x + f(n(x))`                     hybrid study, Llama
``sandwich_pre_residual``  :math:`x + n_2(f(n_1(x)))`            Ouro
``sandwich_post_residual`` :math:`n_2(x + f(n_1(x)))`            Huginn
``post``                 :math:`n(x + f(x))`                     HRM, TRM
======================== ======================================= =====================

With ``modulation`` (MDLM, ARFlow; placement ``pre``) a vector c that the model lays into the context shifts, scales and gates both halves:
:math:`x + g\, f(n(x)(1 + s) + b)` with :math:`b_1, s_1, g_1, b_2, s_2, g_2 = W c + a`, W and a zero at first, so that the block is the
identity.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentcot.backbone.context import SequenceContext
from latentcot.backbone.mixers import Mixer
from latentcot.backbone.mixers.base import linear_flops
from latentcot.backbone.norms import NormKind, make_norm
from latentcot.backbone.state import LayerState

NormPlacement = Literal["pre", "sandwich_pre_residual", "sandwich_post_residual", "post"]
NORM_PLACEMENTS: tuple[NormPlacement, ...] = ("pre", "sandwich_pre_residual", "sandwich_post_residual", "post")


class SwiGLU(nn.Module):
    r"""Gated MLP :math:`W_{down}(\mathrm{silu}(W_{gate} x) \odot W_{up} x)`, no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


CONDITION = "condition"
"""Name under which the model lays its conditioning ``[B, W]`` or ``[B, S, W]`` into the tables of a context."""


class GELUMLP(nn.Module):
    r"""MLP :math:`W_{down}\,\mathrm{gelu}(W_{up} x + a) + b` with the tanh form of GELU (MDLM, ARFlow)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Modulation(nn.Linear):
    """Conditioning ``[B, W]`` or ``[B, S, W]`` to ``parts`` vectors of width D, each ``[B, 1 or S, D]``; zero at first."""

    def __init__(self, condition_width: int, hidden_size: int, parts: int):
        super().__init__(condition_width, parts * hidden_size)
        self.parts = parts

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def read(self, context: SequenceContext) -> tuple[Tensor, ...]:
        """From the conditioning of a context; ``ValueError`` when it has none."""
        if CONDITION not in context.tables:
            raise ValueError(
                f"context: a modulated block needs its conditioning; give condition= to the model, or lay it into "
                f"context.tables[{CONDITION!r}]"
            )
        condition = context.tables[CONDITION]
        if condition.dim() not in (2, 3) or condition.shape[-1] != self.in_features:
            raise ValueError(
                f"condition: shape {list(condition.shape)} given, expected [B, {self.in_features}] or [B, S, {self.in_features}]"
            )
        return self(condition if condition.dim() == 3 else condition[:, None]).chunk(self.parts, -1)


class Block(nn.Module):
    """
    Args:
        mixer: the token mixer, built already.
        mlp: the channel mixer, built already.
        norm_placement: see the table above.
        hidden_size, norm_eps, norm_affine: of the norms; ``norm_affine=False`` leaves their weights out.
        recompute_mlp: keep only the input of the second half for backward and compute it again there.
        norm: ``rms`` or ``layer``.
        modulation: width W of the conditioning; ``None`` = no modulation.
    """

    def __init__(
        self,
        mixer: Mixer,
        mlp: nn.Module,
        hidden_size: int,
        norm_placement: NormPlacement = "pre",
        norm_eps: float = 1e-6,
        norm_affine: bool = True,
        recompute_mlp: bool = False,
        norm: NormKind = "rms",
        modulation: int | None = None,
    ):
        super().__init__()
        if norm_placement not in NORM_PLACEMENTS:
            raise ValueError(f"norm_placement: {norm_placement!r} given, expected one of {', '.join(NORM_PLACEMENTS)}")
        self.norm_placement = norm_placement
        self.recompute_mlp = recompute_mlp
        self.attn = mixer
        self.mlp = mlp
        if modulation is not None and norm_placement != "pre":
            raise ValueError(f"modulation: it belongs to norm_placement 'pre', got {norm_placement!r}")
        self.attn_norm = make_norm(norm, hidden_size, norm_eps, norm_affine)
        self.mlp_norm = make_norm(norm, hidden_size, norm_eps, norm_affine)
        if norm_placement.startswith("sandwich"):
            self.attn_norm_2 = make_norm(norm, hidden_size, norm_eps, norm_affine)
            self.mlp_norm_2 = make_norm(norm, hidden_size, norm_eps, norm_affine)
        self.modulation = None if modulation is None else Modulation(modulation, hidden_size, 6)

    def forward(
        self, hidden: Tensor, context: SequenceContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        """``hidden [B, S, D]`` to the same shape, and the mixer's new state (``None`` unless ``context.keep_state``)."""
        before = hidden if self.norm_placement == "post" else self.attn_norm(hidden)
        second: tuple[Tensor, ...] = ()
        if self.modulation is None:
            mixed, state = self.attn(before, context, state)
        else:
            shift, scale, gate, *rest = self.modulation.read(context)
            second = tuple(rest)
            mixed, state = self.attn(before * (1 + scale) + shift, context, state)
            mixed = gate * mixed
        hidden = self._join(hidden, mixed, "attn")
        if self.recompute_mlp and torch.is_grad_enabled():
            # the MLP draws nothing at random, so no generator's state is kept
            found = checkpoint(self._second_half, hidden, *second, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(found, Tensor)
            return found, state
        return self._second_half(hidden, *second), state

    def _second_half(self, hidden: Tensor, *modulation: Tensor) -> Tensor:
        before = hidden if self.norm_placement == "post" else self.mlp_norm(hidden)
        if modulation:
            shift, scale, gate = modulation
            return self._join(hidden, gate * self.mlp(before * (1 + scale) + shift), "mlp")
        return self._join(hidden, self.mlp(before), "mlp")

    def _join(self, hidden: Tensor, branch: Tensor, part: str) -> Tensor:
        match self.norm_placement:
            case "pre":
                return hidden + branch
            case "sandwich_pre_residual":
                return hidden + getattr(self, f"{part}_norm_2")(branch)
            case "sandwich_post_residual":
                return getattr(self, f"{part}_norm_2")(hidden + branch)
            case _:
                return getattr(self, f"{part}_norm")(hidden + branch)

    def flops(self, tokens: int, keys: float, directions: int = 1) -> float:
        """Forward FLOPs of ``tokens`` tokens through this block (matrix products and the recurrence; norms are left out, and so is
        modulation, which costs one product a row)."""
        return self.attn.flops(tokens, keys, directions) + linear_flops(self.mlp, tokens)
