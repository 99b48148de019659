r"""The gated scan in Triton: one program per sequence and block of channels, the state in registers.

Forward walks the tokens left to right, backward right to left with :math:`\delta_t = dh_t + a_{t+1} \delta_{t+1}`.
Everything is computed in float32 and :math:`h` is kept in float32, because :math:`dg_t = \delta_t a_t h_{t-1}` needs it
unrounded; the caller casts. Offsets are 64-bit: a row number times its stride passes 2^31 for tensors of a few
gigabytes.

Nothing here touches a GPU at import. Under ``TRITON_INTERPRET=1`` (set before Triton is imported) the kernels run on
CPU tensors.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # channels a program holds: one warp's worth of 16-byte loads in 32 bits, and enough programs for small D
WARPS = 1


@triton.jit
def row_offset(row, stride):
    """Elements before ``row``, in 64 bits."""
    return row.to(tl.int64) * stride


@triton.jit
def _forward_kernel(
    x, g, h, h0, last, offsets,
    S, D,
    x_batch, x_row, x_channel,
    g_batch, g_row, g_channel,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    if PACKED:
        start = tl.load(offsets + n)
        end = tl.load(offsets + n + 1)
        row = n * 0
    else:
        start = (n * 0).to(tl.int64)
        end = start + S
        row = n
    # h, h0 and last are contiguous float32
    x += row_offset(row, x_batch) + row_offset(d, x_channel)
    g += row_offset(row, g_batch) + row_offset(d, g_channel)
    h += row_offset(row, S) * D + d
    state_at = row_offset(n, D) + d
    if HAS_STATE:
        state = tl.load(h0 + state_at, mask=inside, other=0.0)
    else:
        state = tl.zeros([BLOCK], dtype=tl.float32)
    t = start
    for _ in range(end - start):
        decay = tl.exp(tl.load(g + row_offset(t, g_row), mask=inside, other=0.0).to(tl.float32))
        state = decay * state + tl.load(x + row_offset(t, x_row), mask=inside, other=0.0).to(tl.float32)
        tl.store(h + row_offset(t, D), state, mask=inside)
        t += 1
    tl.store(last + state_at, state, mask=inside)


@triton.jit
def _backward_kernel(
    g, h, h0, dh, dlast, dx, dg, dh0, offsets,
    S, D,
    g_batch, g_row, g_channel,
    dh_batch, dh_row, dh_channel,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    if PACKED:
        start = tl.load(offsets + n)
        end = tl.load(offsets + n + 1)
        row = n * 0
    else:
        start = (n * 0).to(tl.int64)
        end = start + S
        row = n
    g += row_offset(row, g_batch) + row_offset(d, g_channel)
    dh += row_offset(row, dh_batch) + row_offset(d, dh_channel)
    own = row_offset(row, S) * D + d  # h, dx and dg are contiguous float32
    state_at = row_offset(n, D) + d
    carried = tl.load(dlast + state_at, mask=inside, other=0.0)  # a_{t+1} delta_{t+1}; at the end the state's gradient
    if HAS_STATE:
        first = tl.load(h0 + state_at, mask=inside, other=0.0)
    else:
        first = tl.zeros([BLOCK], dtype=tl.float32)
    t = end - 1
    for _ in range(end - start):
        delta = tl.load(dh + row_offset(t, dh_row), mask=inside, other=0.0) + carried
        carried = delta * tl.exp(tl.load(g + row_offset(t, g_row), mask=inside, other=0.0).to(tl.float32))
        before = tl.load(h + own + row_offset(tl.maximum(t - 1, start), D), mask=inside, other=0.0)
        previous = tl.where(t > start, before, first)
        tl.store(dx + own + row_offset(t, D), delta, mask=inside)
        tl.store(dg + own + row_offset(t, D), carried * previous, mask=inside)
        t -= 1
    if HAS_STATE:
        tl.store(dh0 + state_at, carried, mask=inside)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_decay: Tensor, initial_state: Tensor | None, offsets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        B, S, D = x.shape
        N = B if offsets is None else offsets.numel() - 1
        h = torch.empty(B, S, D, dtype=torch.float32, device=x.device)
        last = torch.empty(N, D, dtype=torch.float32, device=x.device)
        initial = initial_state if initial_state is None else initial_state.contiguous()
        _forward_kernel[(N, triton.cdiv(D, BLOCK))](
            x, log_decay, h, initial, last, offsets, S, D, *x.stride(), *log_decay.stride(),
            HAS_STATE=initial is not None, PACKED=offsets is not None, BLOCK=BLOCK, num_warps=WARPS,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        ctx.save_for_backward(log_decay, initial, h, offsets)
        ctx.x_dtype = x.dtype
        return h, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        log_decay, initial, h, offsets = ctx.saved_tensors
        _, S, D = h.shape
        dh, dlast = grads
        dx, dg = torch.empty_like(h), torch.empty_like(h)
        d_initial = None if initial is None else torch.empty_like(initial)
        _backward_kernel[(dlast.shape[0], triton.cdiv(D, BLOCK))](
            log_decay, h, initial, dh, dlast.contiguous(), dx, dg, d_initial, offsets, S, D,
            *log_decay.stride(), *dh.stride(),
            HAS_STATE=initial is not None, PACKED=offsets is not None, BLOCK=BLOCK, num_warps=WARPS,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        return dx.to(ctx.x_dtype), dg.to(log_decay.dtype), d_initial, None


def gated_scan(
    x: Tensor, log_decay: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same as :func:`latentcot.kernels.gated_scan.reference.gated_scan`, for S >= 1; o and the state in float32.

    x, log_decay ``[B,S,D]`` of any strides, state ``[N,D]`` float32, cu_seqlens ``[N+1]`` or None. First derivatives
    only.
    """
    offsets = None if cu_seqlens is None else cu_seqlens.to(device=x.device, dtype=torch.int64)
    h, last = _Scan.apply(x, log_decay, initial_state, offsets)  # pyright: ignore[reportGeneralTypeIssues]
    return h, last
