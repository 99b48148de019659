r"""Norms over the last axis in Triton: L2, and RMS with a weight and a gate.

Both are :math:`\hat x = x\,(\sum x^2 / n + \epsilon)^{-1/2}` with n = 1 (L2) or the width (RMS), and
:math:`y = \hat x \odot w \odot \mathrm{act}(z)`. A program holds whole rows, so forward reads each input once and
backward forms the length anew instead of storing it:
:math:`dx = r\,(d\hat x - \hat x \sum(d\hat x \odot \hat x)/n)` with r the factor above. A zero row gives
:math:`\hat x = 0` and :math:`dx = d\hat x/\sqrt\epsilon`, exactly, because nothing is divided by a length.

Gradients of w are summed over the rows of a program and then over programs, in a fixed order. All sums are float32.
First derivatives only.
"""

# Inside a kernel any number may stand for a constexpr, which a type checker cannot know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentcot.kernels.gated_scan.triton import sigmoids
from latentcot.kernels.launch import flat, power_of_two

TILE = 2048  # numbers a program holds of each tensor: 16 a thread
WARPS = 4
WEIGHT_PROGRAMS = 1056  # programs that sum gradients of w, eight for each of 132 processors
GATES = {None: 0, "silu": 1, "sigmoid": 2}


@triton.jit
def _fetch(x, r, d, D, H, token, head, mask):
    """Rows r of a tensor of H rows a token, in float32."""
    at = (r // H).to(tl.int64) * token + (r % H).to(tl.int64) * head
    return tl.load(x + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x, weight, gate, y, rows, D, H, x_token, x_head, gate_H, gate_token, gate_head, eps, inverse,
    HAS_WEIGHT: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    mask = (r < rows)[:, None] & (d < D)[None, :]
    tile = _fetch(x, r, d, D, H, x_token, x_head, mask)
    tile *= tl.rsqrt(tl.sum(tile * tile, 1) * inverse + eps)[:, None]
    if HAS_WEIGHT:
        tile *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if GATE > 0:
        z = _fetch(gate, r, d, D, gate_H, gate_token, gate_head, mask)
        if GATE == 1:
            tile *= z
        tile *= sigmoids(z)[0]
    tl.store(y + r.to(tl.int64)[:, None] * D + d[None, :], tile.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    x, weight, gate, dy, dx, dgate, partial,
    rows, tiles, D, H, x_token, x_head, gate_H, gate_token, gate_head, dy_H, dy_token, dy_head, eps, inverse,
    HAS_WEIGHT: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, WIDTH)
    w = tl.full([1, WIDTH], 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for step in range(tiles):
        r = (tl.program_id(0) * tiles + step) * ROWS + tl.arange(0, ROWS)
        mask = (r < rows)[:, None] & (d < D)[None, :]
        own = r.to(tl.int64)[:, None] * D + d[None, :]
        unit = _fetch(x, r, d, D, H, x_token, x_head, mask)
        factor = tl.rsqrt(tl.sum(unit * unit, 1) * inverse + eps)[:, None]
        unit *= factor
        upstream = _fetch(dy, r, d, D, dy_H, dy_token, dy_head, mask)
        if GATE > 0:
            z = _fetch(gate, r, d, D, gate_H, gate_token, gate_head, mask)
            on, off = sigmoids(z)
            slope = on * off
            if GATE == 1:
                slope = on * (1.0 + z * off)
                on *= z
            tl.store(dgate + own, (upstream * unit * w * slope).to(dgate.dtype.element_ty), mask=mask)
            upstream *= on
        if HAS_WEIGHT:
            total += upstream * unit
            upstream *= w
        along = tl.sum(upstream * unit, 1)[:, None] * inverse
        tl.store(dx + own, (factor * (upstream - unit * along)).to(dx.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        tl.store(partial + tl.program_id(0).to(tl.int64) * D + d, tl.sum(total, 0), mask=d < D)


def _strides(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x or a contiguous copy, rows a token, elements between tokens, between rows): rows of ``[B,S,H,D]`` in place."""
    if x.dim() == 4 and not x.is_contiguous():
        x = flat(x)
        return x, x.shape[2], x.stride(1), x.stride(2)
    return x.contiguous(), 1, x.shape[-1], 0


def _shape(x: Tensor) -> tuple[int, int, int, int]:
    """(rows, width D, rows a program, padded width)."""
    D = x.shape[-1]
    width = power_of_two(D)
    return x.numel() // D, D, max(1, TILE // width), width


def _warps(rows_a_program: int, width: int) -> int:
    return max(1, min(16, WARPS * rows_a_program * width // TILE))


def forward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, *, mean: bool, activation: str | None
) -> Tensor:
    """y of the shape and dtype of x; ``mean`` tells RMS from L2."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, D, many, width = _shape(x)
    x, *x_strides = _strides(x)
    z_strides = [1, 0, 0]
    if gate is not None:
        gate, *z_strides = _strides(gate)
    constants: dict[str, Any] = {
        "HAS_WEIGHT": weight is not None, "GATE": GATES[activation], "ROWS": many, "WIDTH": width,
        "num_warps": _warps(many, width),
    }  # fmt: skip
    _forward_kernel[(triton.cdiv(rows, many),)](
        x, None if weight is None else weight.contiguous(), gate, y, rows, D, *x_strides, *z_strides,
        eps, 1.0 / D if mean else 1.0, **constants,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, *, mean: bool, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, d weight in float32, d gate); the last two are empty where there was no weight, no gate."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = torch.empty(
        (0,) if gate is None else gate.shape, dtype=(x if gate is None else gate).dtype, device=x.device
    )
    rows, D, many, width = _shape(x)
    x, *x_strides = _strides(x)
    dy, *dy_strides = _strides(dy)
    z_strides = [1, 0, 0]
    if gate is not None:
        gate, *z_strides = _strides(gate)
    tiles = 1 if weight is None else triton.cdiv(triton.cdiv(rows, many), WEIGHT_PROGRAMS)  # a program
    programs = triton.cdiv(triton.cdiv(rows, many), tiles)
    partial = torch.empty((0,) if weight is None else (programs, D), dtype=torch.float32, device=x.device)
    constants: dict[str, Any] = {
        "HAS_WEIGHT": weight is not None, "GATE": GATES[activation], "ROWS": many, "WIDTH": width,
        "num_warps": _warps(many, width),
    }  # fmt: skip
    _backward_kernel[(programs,)](
        x, None if weight is None else weight.contiguous(), gate, dy, dx, dgate, partial,
        rows, tiles, D, *x_strides, *z_strides, *dy_strides, eps, 1.0 / D if mean else 1.0, **constants,
    )  # fmt: skip
    return dx, partial if weight is None else partial.sum(0), dgate


@torch.library.custom_op("latentcot::l2_norm_forward", mutates_args=())
def l2_forward(x: Tensor, eps: float) -> Tensor:
    return forward(x, None, None, eps, mean=False, activation=None)


@l2_forward.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("latentcot::l2_norm_backward", mutates_args=())
def l2_backward(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    return backward(dy, x, None, None, eps, mean=False, activation=None)[0]


@l2_backward.register_fake
def _(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _l2_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.eps = inputs
    ctx.save_for_backward(x)


def _l2_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return l2_backward(dy, ctx.saved_tensors[0], ctx.eps), None


l2_forward.register_autograd(_l2_gradient, setup_context=_l2_context)


@torch.library.custom_op("latentcot::gated_rms_norm_forward", mutates_args=())
def rms_forward(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, activation: str) -> Tensor:
    return forward(x, weight, gate, eps, mean=True, activation=None if gate is None else activation)


@rms_forward.register_fake
def _(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, activation: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("latentcot::gated_rms_norm_backward", mutates_args=())
def rms_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dy, x, weight, gate, eps, mean=True, activation=None if gate is None else activation)


@rms_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    d_weight = x.new_empty((0,) if weight is None else weight.shape, dtype=torch.float32)
    return x.new_empty(x.shape), d_weight, x.new_empty((0,)) if gate is None else gate.new_empty(gate.shape)


def _rms_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, gate, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(x, weight, gate)


def _rms_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gate = ctx.saved_tensors
    dx, d_weight, dgate = rms_backward(dy, x, weight, gate, ctx.eps, ctx.activation)
    d_weight = None if weight is None else d_weight.to(weight.dtype)
    return dx, d_weight, None if gate is None else dgate, None, None


rms_forward.register_autograd(_rms_gradient, setup_context=_rms_context)
