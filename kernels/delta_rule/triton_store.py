r"""One token of softmax attention before its softmax, in one launch: rotate queries and keys, store keys and values.

Pair i of a head, channels i and i + K/2 (``half``) or 2i and 2i + 1 (``interleaved``), turns by the angle of the row's position, which
is read on the device, and so is the column of the buffers that the row's key and value go to. No derivatives; can be captured in a
CUDA graph. Hybrid stacks decode with it beside the delta rule's step.
"""

# Inside a kernel any number may stand for a constexpr, which a type checker cannot know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentcot.kernels.launch import power_of_two


@triton.jit
def _store_kernel(
    projected, cos, sin, keys, values, position, q, row_stride, H, G, K, T,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program a head: H queries, then G keys, then G values. HALF and WIDTH are K/2 and K rounded up."""
    heads = H + 2 * G
    b, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    t = tl.load(position + b)
    source = projected + b * row_stride + h * K
    column = (b * T + t) * G * K
    is_query, is_key = h < H, (h >= H) & (h < H + G)
    target = values + column + (h - H - G) * K
    if is_key:
        target = keys + column + (h - H) * K
    if is_query:
        target = q + (b * H + h) * K
    if ROTATE:
        if h < H + G:
            i = tl.arange(0, HALF)
            inside = i < K // 2
            first, second = i, i + K // 2
            if INTERLEAVED:
                first, second = 2 * i, 2 * i + 1
            x = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(source + second, mask=inside, other=0.0).to(tl.float32)
            c = tl.load(cos + t * (K // 2) + i, mask=inside, other=0.0)
            s = tl.load(sin + t * (K // 2) + i, mask=inside, other=0.0)
            tl.store(target + first, (x * c - y * s).to(q.dtype.element_ty), mask=inside)
            tl.store(target + second, (y * c + x * s).to(q.dtype.element_ty), mask=inside)
        else:
            d = tl.arange(0, WIDTH)
            tl.store(target + d, tl.load(source + d, mask=d < K), mask=d < K)
    else:
        d = tl.arange(0, WIDTH)
        tl.store(target + d, tl.load(source + d, mask=d < K), mask=d < K)


def rotate_and_store(
    projected: Tensor, keys: Tensor, values: Tensor, position: Tensor, *, heads: int,
    angles: tuple[Tensor, Tensor] | None = None, interleaved: bool = False,
) -> Tensor:  # fmt: skip
    """See the top of this module.

    Args:
        projected: ``[B, N]``: queries ``[heads·K]``, keys ``[G·K]``, values ``[G·K]``, then anything; columns contiguous.
        keys, values: ``[B, T, G, K]``, contiguous, of the dtype of ``projected``; overwritten at column ``position``.
        position: ``[B]`` int64, below T.
        angles: cosine and sine of all positions ``[T, ..., K/2]`` float32, contiguous; None leaves queries and keys as they are.
        interleaved: the layout of pairs.

    Returns:
        q ``[B, heads, K]``.

    Raises:
        ValueError: shapes and layouts that do not fit, named with what was expected.
    """
    B, T, G, K = keys.shape
    if values.shape != keys.shape or not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(
            f"rotate_and_store: keys {list(keys.shape)} and values {list(values.shape)} given, expected contiguous [B, T, G, K] alike"
        )
    if projected.shape[0] != B or projected.shape[1] < (heads + 2 * G) * K or projected.stride(1) != 1:
        raise ValueError(
            f"rotate_and_store: projected {list(projected.shape)} given, expected [{B}, {(heads + 2 * G) * K} or more], columns contiguous"
        )
    if {keys.dtype, values.dtype} != {projected.dtype}:
        raise ValueError(f"rotate_and_store: keys are {keys.dtype} and projected {projected.dtype}, expected one dtype")
    for table in angles or ():
        if table.numel() != T * (K // 2) or K % 2 or not table.is_contiguous() or table.dtype != torch.float32:
            raise ValueError(
                f"rotate_and_store: angles {list(table.shape)} of {table.dtype} given, expected contiguous float32 [{T}, {K} / 2]"
            )
    q = torch.empty(B, heads, K, dtype=projected.dtype, device=projected.device)
    cos, sin = (None, None) if angles is None else angles
    _store_kernel[(B * (heads + 2 * G),)](
        projected, cos, sin, keys, values, position, q, projected.stride(0), heads, G, K, T,
        ROTATE=angles is not None, INTERLEAVED=interleaved, HALF=power_of_two(max(K // 2, 1), 1),
        WIDTH=power_of_two(K, 1), num_warps=1,
    )  # fmt: skip
    return q
