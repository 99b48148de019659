r"""Norms.

RMSNorm: :math:`x \cdot (\mathrm{mean}(x^2) + \epsilon)^{-1/2} \cdot w`, statistics in fp32 (fp64 for fp64 inputs), no bias.

LayerNorm: :math:`(x - \mathrm{mean}(x)) \cdot (\mathrm{var}(x) + \epsilon)^{-1/2} \cdot w`, as precise, no bias (MDLM).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcot.kernels import gated_rms_norm


class RMSNorm(nn.Module):
    """RMS norm over the last axis.

    Args:
        width: size of the last axis.
        eps: inside the root; 1e-6.
        affine: ``False`` leaves the weight out (HRM).
    """

    def __init__(self, width: int, eps: float = 1e-6, affine: bool = True):
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16):  # computed in fp32, rounded once; one launch on a GPU
            return gated_rms_norm(x, self.weight, None, self.eps)
        return F.rms_norm(x, (self.width,), self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}, affine={self.weight is not None}"


NormKind = Literal["rms", "layer"]


class LayerNorm(nn.Module):
    """Layer norm over the last axis, with a weight and without a bias. Arguments as for :class:`RMSNorm`."""

    def __init__(self, width: int, eps: float = 1e-5, affine: bool = True):
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = None if self.weight is None else self.weight.to(precise.dtype)
        return F.layer_norm(precise, (self.width,), weight, None, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}, affine={self.weight is not None}"


def make_norm(kind: NormKind, width: int, eps: float, affine: bool = True) -> RMSNorm | LayerNorm:
    """``rms`` or ``layer``; ``ValueError`` for anything else."""
    if kind not in ("rms", "layer"):
        raise ValueError(f"norm: {kind!r} given, expected 'rms' or 'layer'")
    return (RMSNorm if kind == "rms" else LayerNorm)(width, eps, affine)


class GatedRMSNorm(RMSNorm):
    """``RMSNorm(x) * silu(gate)``: normalise first, gate after (Gated DeltaNet, GLA, RetNet, HGRN).

    Norm and gate are one operator: nothing is rounded between them, and on a GPU they are one launch.
    """

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return gated_rms_norm(x, self.weight, gate, self.eps)
