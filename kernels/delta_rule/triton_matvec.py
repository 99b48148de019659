r"""A few rows times a weight matrix, with what stands before and after in the same launch.

.. math:: y = \mathrm{residual} + f(x) W^\top

========== ============================================================================================ ====================
``before`` f(x)                                                                                         columns of x
========== ============================================================================================ ====================
``none``   x                                                                                            D
``rms``    :math:`x\,(\mathrm{mean}(x^2) + \epsilon)^{-1/2} \odot w`                                    D
``heads``  the same within each head of V columns, times :math:`\mathrm{silu}(z)` if a gate z is given  D = H·V
``swiglu`` :math:`\mathrm{silu}(x_{:D}) \odot x_{D:}`                                                   2 D
========== ============================================================================================ ====================

For one token nearly all time goes into reading W, and what is left into launches: so f is formed anew by every program, from a row that
is in the L2 cache, and a program holds whole rows of W, all of its loads under way at once. Nothing is rounded between f and the
product. For more than :data:`MOST_ROWS` rows a matrix product is faster. No derivatives; can be captured in a CUDA graph.
"""

# Inside a kernel any number may stand for a constexpr, which a type checker cannot know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentcot.kernels.gated_scan.triton import sigmoids
from latentcot.kernels.launch import power_of_two

MOST_ROWS = 4
WIDEST = 8192  # columns of W that a program holds at once
TILE = 8192  # numbers of W a program of eight warps: 64 bytes under way a thread
Before = Literal["none", "rms", "heads", "swiglu"]
MODES: dict[str, int] = {"none": 0, "rms": 1, "heads": 2, "swiglu": 3}


@triton.jit
def _matvec_kernel(
    x, weight, norm, gate, residual, y, N, D, V, x_row, gate_row, residual_row, eps,
    ROWS: tl.constexpr, MODE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """WIDTH: D rounded up, HEADS of them for ``heads``; BLOCK rows of W a program."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    in_n, in_d = n < N, d < D
    w = tl.load(weight + n.to(tl.int64)[:, None] * D + d[None, :], mask=in_n[:, None] & in_d[None, :], other=0.0)
    if HAS_NORM:
        if MODE == 2:
            scale = tl.load(norm + d % V, mask=in_d, other=0.0).to(tl.float32)
        else:
            scale = tl.load(norm + d, mask=in_d, other=0.0).to(tl.float32)
    for b in tl.static_range(ROWS):
        row = tl.load(x + b * x_row + d, mask=in_d, other=0.0).to(tl.float32)
        if MODE == 1:
            row *= tl.rsqrt(tl.sum(row * row, 0) / D + eps)
        if MODE == 2:
            heads = tl.reshape(row, [HEADS, WIDTH // HEADS])
            heads *= tl.rsqrt(tl.sum(heads * heads, 1) / V + eps)[:, None]
            row = tl.reshape(heads, [WIDTH])
            if HAS_GATE:
                z = tl.load(gate + b * gate_row + d, mask=in_d, other=0.0).to(tl.float32)
                row *= z * sigmoids(z)[0]
        if MODE == 3:
            row *= sigmoids(row)[0] * tl.load(x + b * x_row + D + d, mask=in_d, other=0.0).to(tl.float32)
        if HAS_NORM:
            row *= scale
        out = tl.sum(w.to(tl.float32) * row[None, :], 1)
        if HAS_RESIDUAL:
            out += tl.load(residual + b * residual_row + n, mask=in_n, other=0.0).to(tl.float32)
        tl.store(y + b * N + n, out.to(y.dtype.element_ty), mask=in_n)


def serves(rows: int, columns: int, head: int | None = None) -> bool:
    """Whether :func:`matvec` takes so many rows, columns D of W, and columns of a head for ``heads`` (a power of two)."""
    return (
        1 <= rows <= MOST_ROWS and power_of_two(columns) <= WIDEST and (head is None or power_of_two(head, 1) == head)
    )


def matvec(
    x: Tensor, weight: Tensor, *, before: Before = "none", norm: Tensor | None = None, eps: float = 1e-6,
    gate: Tensor | None = None, head: int | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See the top of this module.

    Args:
        x: ``[B, D]``, for ``swiglu`` ``[B, 2D]``; columns contiguous.
        weight: W ``[N, D]``, contiguous.
        before: f.
        norm: w of ``rms`` ``[D]`` and of ``heads`` ``[V]``; None is ones.
        eps: inside the root.
        gate: z of ``heads``, ``[B, D]``, columns contiguous.
        head: V of ``heads``, a power of two that divides D.
        residual: ``[B, N]``, columns contiguous.

    Returns:
        ``[B, N]`` of the dtype of x.

    Raises:
        ValueError: shapes and layouts that do not fit, named with what was expected.
    """
    N, D = weight.shape
    B = x.shape[0]
    columns = 2 * D if before == "swiglu" else D
    if before not in MODES:
        raise ValueError(f"matvec: before is {before!r}, expected one of {', '.join(MODES)}")
    if (before == "heads") != (head is not None) or (head is not None and D % head):
        raise ValueError(
            f"matvec: head is {head!r} for before={before!r}, expected the width of a head for 'heads' alone"
        )
    if not serves(B, D, head):
        raise ValueError(
            f"matvec: {B} rows, {D} columns and heads of {head} given, expected at most {MOST_ROWS}, {WIDEST} and a power of two"
        )
    if not weight.is_contiguous():
        raise ValueError(f"matvec: weight has strides {weight.stride()}, expected contiguous rows [N, D]")
    width = D if head is None else head
    for name, tensor, shape in (
        ("x", x, (B, columns)), ("norm", norm, (width,)), ("gate", gate, (B, D)), ("residual", residual, (B, N))
    ):  # fmt: skip
        if tensor is not None and (tensor.shape != shape or tensor.stride(-1) != 1):
            raise ValueError(
                f"matvec: {name} has shape {list(tensor.shape)}, strides {tensor.stride()}, expected {list(shape)}, columns contiguous"
            )
    y = torch.empty(B, N, dtype=x.dtype, device=x.device)
    wide, block, warps = config(N, D)
    _matvec_kernel[(triton.cdiv(N, block),)](
        x, weight, norm, gate, residual, y, N, D, width, x.stride(0), 0 if gate is None else gate.stride(0),
        0 if residual is None else residual.stride(0), eps,
        ROWS=B, MODE=MODES[before], HAS_NORM=norm is not None, HAS_GATE=gate is not None,
        HAS_RESIDUAL=residual is not None, HEADS=1 if head is None else wide // head, WIDTH=wide, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return y


def config(N: int, D: int) -> tuple[int, int, int]:
    """(padded columns, rows of W a program, warps a program): enough programs for every processor, enough bytes under way."""
    wide = power_of_two(D)
    block = max(1, min(TILE // wide, 8))
    while block > 1 and triton.cdiv(N, block) < 512:
        block //= 2
    return wide, block, max(1, min(8, wide * block // 1024))
