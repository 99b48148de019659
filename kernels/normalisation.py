"""The L2 norm of queries and keys, and the gated RMS norm of outputs."""

from typing import Literal

import torch
from torch import Tensor

from latentcot.kernels.checks import check_shape, check_tensors, compute_dtype
from latentcot.kernels.dispatch import BACKENDS, Backend, missing_for_triton

WIDEST = 16384  # the widest row that a Triton program holds


def l2_norm(x: Tensor, eps: float = 1e-6, *, backend: Backend = "auto") -> Tensor:
    r"""Divide by the Euclidean length over the last axis: :math:`y = x \cdot (\sum x^2 + \epsilon)^{-1/2}`.

    ``eps`` sits inside the root, so a zero vector maps to zero and its gradient is ``dy / sqrt(eps)``, finite. 16-bit
    inputs are computed in float32 and cast back. The delta rule expects q and k normalised this way (arXiv:2412.06464).
    ``backend`` is ``"auto"`` (Triton for CUDA tensors that are not float64, with first derivatives only, else PyTorch),
    ``"triton"``, or ``"chunked"`` or ``"reference"``, which both name the PyTorch path.
    """
    check_tensors("l2_norm", x=x)
    if not eps > 0:
        raise ValueError(f"l2_norm: eps is {eps}, expected > 0 (zero vectors have no gradient without it)")
    if _takes_triton("l2_norm", x, x.dtype, backend):
        from latentcot.kernels.normalisation_triton import l2_forward

        return l2_forward(x, eps)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    y = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return y.to(x.dtype)


def gated_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    activation: Literal["silu", "sigmoid"] = "silu",
    *,
    backend: Backend = "auto",
) -> Tensor:
    r"""RMS norm over the last axis, then gate: :math:`y = x\,(\mathrm{mean}(x^2) + \epsilon)^{-1/2} \odot w \odot \mathrm{act}(z)`.

    The output path of RetNet, GLA and Gated DeltaNet (arXiv:2412.06464), per head, and of HGRN, over the whole width.
    Everything is float32 (float64 for float64 inputs) until the one rounding to the dtype of x.

    Args:
        x: ``[...,D]``.
        weight: w, ``[D]``; None is ones.
        gate: z, of the shape of x, before the activation; None leaves the gate out.
        eps: inside the root, above zero.
        activation: ``"silu"`` (z·σ(z)) or ``"sigmoid"``.
        backend: as for :func:`l2_norm`.

    Returns:
        y of the shape and dtype of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named with what was expected.
    """
    name = "gated_rms_norm"
    check_tensors(name, x=x, weight=weight, gate=gate)
    if x.dim() == 0:
        raise ValueError(f"{name}: x has no axes, expected [...,D]")
    if weight is not None:
        check_shape(name, "weight", weight, "[D]", (x.shape[-1],))
    if gate is not None:
        check_shape(name, "gate", gate, "the shape of x", x.shape)
    if not eps > 0:
        raise ValueError(f"{name}: eps is {eps}, expected > 0 (zero rows have no gradient without it)")
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"{name}: activation is {activation!r}, expected 'silu' or 'sigmoid'")
    dtype = compute_dtype(x, weight, gate)
    if _takes_triton(name, x, dtype, backend):
        from latentcot.kernels.normalisation_triton import rms_forward

        return rms_forward(x, weight, gate, eps, activation)
    y = x.to(dtype)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(dtype)
    if gate is not None:
        z = gate.to(dtype)
        y = y * (torch.nn.functional.silu(z) if activation == "silu" else torch.sigmoid(z))
    return y.to(x.dtype)


def _takes_triton(name: str, x: Tensor, dtype: torch.dtype, backend: str) -> bool:
    """Whether a call runs in Triton; raises ValueError for an unknown back end and for a missing Triton."""
    if backend not in BACKENDS:
        raise ValueError(f"{name}: backend is {backend!r}, expected one of {BACKENDS}")
    if backend in ("chunked", "reference") or (backend == "auto" and not x.is_cuda) or x.numel() == 0:
        return False
    missing = missing_for_triton("gated_scan", x.device, dtype)  # what any kernel needs: a device, Triton, a dtype
    if missing is None and x.shape[-1] > WIDEST:
        missing = f"the kernels hold rows of up to {WIDEST} numbers, not {x.shape[-1]}"
    if missing is None and x.numel() // x.shape[-1] >= 2**31:
        missing = "the kernels count rows in 32 bits"
    if missing is not None and backend == "triton":
        raise ValueError(f"{name}: backend='triton' cannot run: {missing}; use backend='auto'")
    return missing is None
