r"""The delta rule in Triton: one parallel solve, then walks along each sequence with the state in registers.

Forward: the triangular inverse of all chunks (``triton_solve.py``), then a walk from left to right
(``triton_states.py``). Backward: a walk from right to left for the values (``triton_states.py``), walks in both
directions for queries and keys (``triton_keys.py``), and the sums of their row products into the gradients of the
strengths and decays. Kept for the backward are the inverse, the writes and, with gates, a state every 256 tokens.
Value heads of a group share their queries and keys by index; nothing is repeated in memory.

States and everything that is summed are float32. 16-bit inputs are multiplied in 16 bits; the inverse is computed in
float32 and then rounded to the inputs' dtype. For float32 inputs the running sums of the log-decays are float64: their
differences are wanted, and a strong gate makes the sums large.

Nothing here touches a GPU at import. Under ``TRITON_INTERPRET=1`` (set before Triton is imported) the kernels run on
CPU tensors.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from latentcot.kernels.delta_rule.triton_keys import finish_kernel, left_kernel, right_kernel
from latentcot.kernels.delta_rule.triton_solve import solve_kernel
from latentcot.kernels.delta_rule.triton_states import forward_kernel, reverse_kernel
from latentcot.kernels.launch import Launch, flat, launch_shape, power_of_two, sequence_offsets

WINDOW = 256  # tokens between two kept states; the gradient of a gate is summed over one window
PRECISION = "ieee"  # of products of float32 inputs

# pyright: reportCallIssue=false
# Triton's launch options (num_warps, num_stages) are not parameters of the kernels.


def config(kernel: str, K: int, V: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The launch shape of ``delta_forward``, ``delta_reverse``, ``delta_left`` or ``delta_right``.

    ``block`` is value columns for the first two, key channels for the others. The solve takes ``delta_forward``'s
    chunk, and so does ``delta_reverse``. Defaults keep a program's state within 8192 numbers (64 registers a thread)
    and its tiles within 227 KB of shared memory.
    """
    K_wide, V_wide = power_of_two(K), power_of_two(V)
    short = dtype.itemsize == 2
    if kernel in ("delta_forward", "delta_reverse"):
        chunk = 64 if short else 32
        block = min(V_wide, 64 if K_wide <= 128 and short else 32)
        stages = 2 if K_wide <= 128 else 1
    else:
        chunk = {16: 64, 32: 64, 64: 64, 128: 64 if short else 32, 256: 32 if short else 16, 512: 16}[V_wide]
        chunk = chunk if short else min(chunk, 32)
        block = min(K_wide, max(16, 8192 // V_wide), 64 if short else 32)
        stages = 2 if V_wide <= 128 else 1
    found = launch_shape(kernel, K, V, dtype, device, Launch(chunk, block, 4, stages))
    if kernel == "delta_reverse":
        found = found._replace(chunk=config("delta_forward", K, V, dtype, device).chunk)
    elif kernel != "delta_forward":
        found = found._replace(chunk=min(found.chunk, config("delta_forward", K, V, dtype, device).chunk))
    return found


def _cut(offsets: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Pieces of ``size`` tokens: the first piece of each sequence ``[N+1]``, and the sequence of each of ``count``."""
    bases = F.pad(((offsets.diff() + size - 1) // size).cumsum(0), (1, 0))
    owners = torch.searchsorted(bases[1:], torch.arange(count, device=offsets.device), right=True)
    return bases, owners


@lru_cache(maxsize=64)
def _cut_rows(B: int, S: int, size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return _cut(sequence_offsets(B, S, None, device), size, count)


def _pieces(q: Tensor, cu_seqlens: Tensor | None, size: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """(offsets, first pieces, owners, an upper bound of the number of pieces), all on the device, without reading it."""
    B, S = q.shape[:2]
    offsets = sequence_offsets(B, S, cu_seqlens, q.device)
    if cu_seqlens is None:
        count = B * triton.cdiv(S, size)
        return offsets, *_cut_rows(B, S, size, count, q.device), count
    count = _piece_bound(B, S, cu_seqlens, size)
    return offsets, *_cut(offsets, size, count), count


def _piece_bound(B: int, S: int, cu_seqlens: Tensor | None, size: int) -> int:
    return B * ((S + size - 1) // size) if cu_seqlens is None else S // size + cu_seqlens.shape[0] - 1


def _tokens(x: Tensor) -> Tensor:
    """``x`` as kernels take it: evenly spaced tokens, so close that a chunk's offsets fit 32 bits, as its rows are."""
    x = flat(x)
    return x if x.shape[1] < 2 or 64 * x.stride(1) < 2**31 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(1), x.stride(2)


def _sum_dtype(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float32 else tl.float32


def _inverse_precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 or not q.is_cuda else "tf32x3"


def _count(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _forward_shapes(
    q: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, keep: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what the forward returns; see :func:`_forward`."""
    B, S, _, K = q.shape
    Hv, V = v.shape[-2:]
    C = config("delta_forward", K, V, q.dtype, q.device).chunk
    T = B * S
    gated = log_decay is not None
    windows = _piece_bound(B, S, cu_seqlens, WINDOW)
    wide = torch.float64 if q.dtype == torch.float32 else torch.float32
    return [
        ((B, S, Hv, V), v.dtype),
        ((_count(q, cu_seqlens), Hv, K, V), torch.float32),
        ((T, Hv, C), q.dtype),
        ((Hv, T) if gated else (0,), wide),
        ((Hv, T), torch.float32),
        ((T, Hv, V) if keep else (0,), q.dtype),
        ((windows, Hv, K, V) if keep and gated else (0,), torch.float32),
    ]


@torch.library.custom_op("latentcot::delta_rule_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, last state, inverses ``[T,Hv,C]``, running sums and strengths ``[Hv,T]``, writes ``[T,Hv,V]``, kept states)."""
    B, S, H, K = q.shape
    Hv, V = v.shape[-2:]
    T, N = B * S, _count(q, cu_seqlens)
    q, k, v, beta = _tokens(q), _tokens(k), _tokens(v), _tokens(beta)
    gates = None if log_decay is None else _tokens(log_decay)
    initial = None if initial_state is None else initial_state.contiguous()
    shape = config("delta_forward", K, V, q.dtype, q.device)
    shapes = _forward_shapes(q, v, log_decay, cu_seqlens, keep)
    o, last, solved, sums, strengths, writes, kept = [torch.empty(s, dtype=d, device=q.device) for s, d in shapes]
    offsets, bases, owners, chunks = _pieces(q, cu_seqlens, shape.chunk)
    _, windows, _, _ = _pieces(q, cu_seqlens, WINDOW)
    K_wide = power_of_two(K)
    solve_kernel[(chunks * Hv,)](
        k, beta, gates, solved, sums, strengths, offsets, bases, owners,
        T, N, Hv, K, *_strides(k), beta.stride(1), 0 if gates is None else gates.stride(1),
        C=shape.chunk, GROUP=Hv // H, WIDTH=K_wide, BLOCK=min(K_wide, 64), GATED=gates is not None,
        SUM_DTYPE=_sum_dtype(q.dtype), PRECISION=PRECISION, INVERSE=_inverse_precision(q), num_warps=1, num_stages=1,
    )  # fmt: skip
    forward_kernel[(triton.cdiv(V, shape.block) * Hv * N,)](
        q, k, v, solved, sums, strengths, initial, o, last, writes, kept, offsets, windows, scale,
        T, Hv, K, V, *_strides(q), *_strides(k), *_strides(v),
        C=shape.chunk, GROUP=Hv // H, WIDTH=K_wide, BLOCK=shape.block, WINDOW=WINDOW // shape.chunk,
        GATED=gates is not None, HAS_STATE=initial is not None, KEEP=keep, PRECISION=PRECISION,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return o, last, solved, sums, strengths, writes, kept


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(s, dtype=d) for s, d in _forward_shapes(q, v, log_decay, cu_seqlens, keep))


@torch.library.custom_op("latentcot::delta_rule_backward", mutates_args=())
def _backward(
    d_o: Tensor | None,
    d_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    last: Tensor,
    solved: Tensor,
    sums: Tensor,
    strengths: Tensor,
    writes: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_decay and the initial state; empty for an input that was None."""
    B, S, H, K = q.shape
    Hv, V = v.shape[-2:]
    T, N, m = B * S, _count(q, cu_seqlens), Hv // H
    gated, has_state, has_last = log_decay is not None, initial_state is not None, d_last is not None
    d_o = torch.zeros(B, S, Hv, V, dtype=v.dtype, device=q.device) if d_o is None else _tokens(d_o)
    q, k, v = _tokens(q), _tokens(k), _tokens(v)
    initial = None if initial_state is None else initial_state.contiguous()
    d_last = None if d_last is None else d_last.contiguous()
    offsets, windows, owners, count = _pieces(q, cu_seqlens, WINDOW)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    shape = config("delta_reverse", K, V, q.dtype, q.device)
    value_blocks = triton.cdiv(V, shape.block)
    targets, d_v = new(T, Hv, V, dtype=q.dtype), new(B, S, Hv, V, dtype=v.dtype)
    d_initial = new(*initial.shape) if initial is not None else new(0)
    reads, ends = new(value_blocks, Hv, T), new(value_blocks, Hv, count) if gated else new(0)
    reverse_kernel[(value_blocks * Hv * N,)](
        q, k, v, solved, sums, strengths, last, kept, d_o, d_last, targets, d_v, d_initial, reads, ends,
        offsets, windows, scale,
        T, count, Hv, K, V, *_strides(q), *_strides(k), *_strides(v), *_strides(d_o),
        C=shape.chunk, GROUP=m, WIDTH=power_of_two(K), BLOCK=shape.block, WINDOW=WINDOW // shape.chunk,
        GATED=gated, HAS_STATE=has_state, HAS_LAST=has_last, PRECISION=PRECISION,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip

    left, right = (config(name, K, V, q.dtype, q.device) for name in ("delta_left", "delta_right"))
    right = right._replace(block=left.block)  # both add to one row of products per block
    key_blocks = triton.cdiv(K, left.block)
    d_q, d_k = new(B, S, Hv, K, dtype=q.dtype), new(B, S, Hv, K, dtype=k.dtype)
    products = new(3, key_blocks, Hv, T)
    grid = (key_blocks * Hv * N,)
    left_kernel[grid](
        q, k, sums, strengths, initial, writes, targets, d_o, d_q, d_k, products[0], products[1], offsets, scale,
        T, Hv, K, V, *_strides(q), *_strides(k), *_strides(d_o),
        C=left.chunk, SUM_CHUNK=shape.chunk, GROUP=m, WIDTH=power_of_two(V), BLOCK=left.block, GATED=gated,
        HAS_STATE=has_state, PRECISION=PRECISION, num_warps=left.warps, num_stages=left.stages,
    )  # fmt: skip
    right_kernel[grid](
        q, k, sums, strengths, d_last, writes, targets, d_o, d_k, products[2], offsets, scale,
        T, Hv, K, V, *_strides(q), *_strides(k), *_strides(d_o),
        C=right.chunk, SUM_CHUNK=shape.chunk, GROUP=m, WIDTH=power_of_two(V), BLOCK=right.block, GATED=gated,
        HAS_LAST=has_last, PRECISION=PRECISION, num_warps=right.warps, num_stages=right.stages,
    )  # fmt: skip
    d_beta = new(B, S, Hv, dtype=beta.dtype)
    d_decay = new(0) if log_decay is None else new(B, S, Hv, dtype=log_decay.dtype)
    finish_kernel[(count * Hv,)](
        strengths, reads, ends, products[0], products[1], products[2], d_beta, d_decay, offsets, windows, owners,
        T, N, count, Hv, TOKENS=WINDOW, VALUE_BLOCKS=value_blocks, KEY_BLOCKS=key_blocks, GATED=gated, num_warps=4,
    )  # fmt: skip
    if m > 1:
        d_q = d_q.view(B, S, H, m, K).sum(3)
        d_k = d_k.view(B, S, H, m, K).sum(3)
    return d_q, d_k, d_v, d_beta, d_decay, d_initial


@_backward.register_fake
def _(
    d_o: Tensor | None,
    d_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    last: Tensor,
    solved: Tensor,
    sums: Tensor,
    strengths: Tensor,
    writes: Tensor,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape)

    return tuple(like(x) for x in (q, k, v, beta, log_decay, initial_state))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, beta, log_decay, scale, initial_state, cu_seqlens, keep = inputs
    if not keep:
        raise RuntimeError("latentcot::delta_rule_forward: a gradient is asked for, but keep is False")
    ctx.save_for_backward(q, k, v, beta, log_decay, initial_state, cu_seqlens, *output[1:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.scale = scale


def _gradients(ctx: Any, d_o: Tensor | None, d_last: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, beta, log_decay, initial_state, cu_seqlens, *kept = ctx.saved_tensors
    d_q, d_k, d_v, d_beta, d_decay, d_initial = _backward(
        d_o, d_last, q, k, v, beta, log_decay, ctx.scale, initial_state, cu_seqlens, *kept
    )
    return (
        d_q, d_k, d_v, d_beta, None if log_decay is None else d_decay, None,
        None if initial_state is None else d_initial, None, None,
    )  # fmt: skip


_forward.register_autograd(_gradients, setup_context=_setup)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Same as :func:`latentcot.kernels.delta_rule.reference.delta_rule` for S >= 1 and one reflection a token.

    q, k ``[B,S,H,K]``, v ``[B,S,H_v,V]`` with H_v a multiple of H, beta ``[B,S,H_v]``, log_decay None or ``[B,S,H_v]``
    (<= 0), initial_state ``[N,H_v,K,V]`` float32 or None (zero), cu_seqlens ``[N+1]`` int64 on the device or None.
    Returns o ``[B,S,H_v,V]`` in v's dtype and the last states ``[N,H_v,K,V]`` in float32. q, k, v are float32, float16
    or bfloat16; where they differ, all take the widest. First derivatives of everything, through both results.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, beta, log_decay, initial_state)
    )
    found = _forward(
        q.to(dtype), k.to(dtype), v.to(dtype), beta, log_decay, float(scale), initial_state, cu_seqlens, keep
    )
    return found[0].to(v.dtype), found[1]
