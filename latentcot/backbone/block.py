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
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentcot.backbone.context import SequenceContext
from latentcot.backbone.mixers import Mixer
from latentcot.backbone.mixers.base import linear_flops
from latentcot.backbone.norms import RMSNorm
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


class Block(nn.Module):
    """
    Args:
        mixer: the token mixer, built already.
        mlp: the channel mixer, built already.
        norm_placement: see the table above.
        hidden_size, norm_eps, norm_affine: of the norms; ``norm_affine=False`` leaves their weights out.
        recompute_mlp: keep only the input of the second half for backward and compute it again there.
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
    ):
        super().__init__()
        if norm_placement not in NORM_PLACEMENTS:
            raise ValueError(f"norm_placement: {norm_placement!r} given, expected one of {', '.join(NORM_PLACEMENTS)}")
        self.norm_placement = norm_placement
        self.recompute_mlp = recompute_mlp
        self.attn = mixer
        self.mlp = mlp
        self.attn_norm = RMSNorm(hidden_size, norm_eps, norm_affine)
        self.mlp_norm = RMSNorm(hidden_size, norm_eps, norm_affine)
        if norm_placement.startswith("sandwich"):
            self.attn_norm_2 = RMSNorm(hidden_size, norm_eps, norm_affine)
            self.mlp_norm_2 = RMSNorm(hidden_size, norm_eps, norm_affine)

    def forward(
        self, hidden: Tensor, context: SequenceContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState | None]:
        """``hidden [B, S, D]`` to the same shape, and the mixer's new state (``None`` unless ``context.keep_state``)."""
        before = hidden if self.norm_placement == "post" else self.attn_norm(hidden)
        mixed, state = self.attn(before, context, state)
        hidden = self._join(hidden, mixed, "attn")
        if self.recompute_mlp and torch.is_grad_enabled():
            # the MLP draws nothing at random, so no generator's state is kept
            found = checkpoint(self._second_half, hidden, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(found, Tensor)
            return found, state
        return self._second_half(hidden), state

    def _second_half(self, hidden: Tensor) -> Tensor:
        before = hidden if self.norm_placement == "post" else self.mlp_norm(hidden)
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
        """Forward FLOPs of ``tokens`` tokens through this block (matrix products and the recurrence; norms are left out)."""
        return self.attn.flops(tokens, keys, directions) + linear_flops(self.mlp, tokens)
