"""The L2 norm of queries and keys."""

import torch
from torch import Tensor

from latentcot.kernels.checks import check_tensors


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Divide by the Euclidean length over the last axis: :math:`y = x \cdot (\sum x^2 + \epsilon)^{-1/2}`.

    ``eps`` sits inside the root, so a zero vector maps to zero and its gradient is ``dy / sqrt(eps)``, finite. 16-bit
    inputs are computed in float32 and cast back. The delta rule expects q and k normalised this way (arXiv:2412.06464).
    """
    check_tensors("l2_norm", x=x)
    if not eps > 0:
        raise ValueError(f"l2_norm: eps is {eps}, expected > 0 (zero vectors have no gradient without it)")
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    y = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return y.to(x.dtype)
