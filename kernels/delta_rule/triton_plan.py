"""What the launches of the delta rule share: launch shapes, pieces of sequences, tokens as the kernels take them."""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from latentcot.kernels.launch import Launch, flat, launch_shape, power_of_two, sequence_offsets

WINDOW = 256  # tokens between two kept states; the gradient of a gate is summed over one window
PRECISION = "ieee"  # of products of float32 inputs


def config(kernel: str, K: int, V: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The launch shape of ``delta_forward``, ``delta_reverse``, ``delta_left`` or ``delta_right``.

    With a decay per channel ``delta_channel_forward`` and so on. ``block`` is value columns for forward and reverse,
    key channels for left and right, which share one, and the chunk. The solve takes the forward's chunk and so does the
    reverse; the chunk of left and right divides it (with a decay per channel: is the same). Defaults keep a program's state within
    8192 numbers (64 registers a thread) and its tiles within 227 KB of shared memory.
    """
    K_wide, V_wide = power_of_two(K), power_of_two(V)
    short = dtype.itemsize == 2
    family = kernel.rpartition("_")[0]
    if not short:  # every product of float32 is unrolled into scalar steps: only small tiles fit the registers
        default = Launch(16, 16, 8, 1)
    elif family == "delta_channel":
        chunk = 32 if max(K_wide, V_wide) <= 128 else 16
        wide, narrow = (K_wide, V_wide) if kernel.endswith(("forward", "reverse")) else (V_wide, K_wide)
        default = Launch(chunk, min(narrow, max(16, 8192 // wide), 64), 4, 2 if wide <= 128 else 1)
    elif kernel in ("delta_forward", "delta_reverse"):
        # one stage with 32 columns is miscompiled for Hopper by Triton 3.6: shared memory is read out of bounds
        default = Launch(64, min(V_wide, 64 if K_wide <= 128 else 32), 4, 2)
    else:  # a tile of all value columns has to fit
        chunk = 64 if V_wide <= 128 else 32 if V_wide <= 256 else 16
        default = Launch(chunk, min(K_wide, max(16, 8192 // V_wide), 64), 4, 2 if V_wide <= 128 else 1)
        if (
            V_wide == 256 and K_wide >= 64
        ):  # twice the warps hold twice the state, and chunks of 64 feed Hopper's products
            default = Launch(64, 64, 8, 1)
    found = launch_shape(kernel, K, V, dtype, device, default)
    if kernel == f"{family}_forward":
        return found
    chunk = config(f"{family}_forward", K, V, dtype, device).chunk
    if kernel == "delta_left" or kernel == "delta_right":
        chunk = min(found.chunk, chunk)
    found = found._replace(chunk=chunk)
    if kernel == f"{family}_right":  # both walks over key channels read what is kept by blocks and chunks of the first
        left = config(f"{family}_left", K, V, dtype, device)
        found = found._replace(chunk=left.chunk, block=left.block)
    return found


def options(shape: Launch, dtype: torch.dtype) -> dict[str, int]:
    """Launch options. Unless told how many registers there are, ptxas settles for 32 in some float32 kernels and spills."""
    found = {"num_warps": shape.warps, "num_stages": shape.stages}
    return found | {"maxnreg": 255} if dtype == torch.float32 else found


def cut(offsets: Tensor, size: int, pieces: int) -> tuple[Tensor, Tensor]:
    """Pieces of ``size`` tokens: the first piece of each sequence ``[N+1]``, and the sequence of each of ``pieces``."""
    bases = F.pad(((offsets.diff() + size - 1) // size).cumsum(0), (1, 0))
    owners = torch.searchsorted(bases[1:], torch.arange(pieces, device=offsets.device), right=True)
    return bases, owners


@lru_cache(maxsize=64)
def cut_rows(B: int, S: int, size: int, pieces: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return cut(sequence_offsets(B, S, None, device), size, pieces)


def pieces(q: Tensor, cu_seqlens: Tensor | None, size: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """(offsets, first pieces, owners, an upper bound of the number of pieces), all on the device, without reading it."""
    B, S = q.shape[:2]
    offsets = sequence_offsets(B, S, cu_seqlens, q.device)
    if cu_seqlens is None:
        bound = B * triton.cdiv(S, size)
        return offsets, *cut_rows(B, S, size, bound, q.device), bound
    bound = piece_bound(B, S, cu_seqlens, size)
    return offsets, *cut(offsets, size, bound), bound


def piece_bound(B: int, S: int, cu_seqlens: Tensor | None, size: int) -> int:
    """At most so many pieces of ``size`` tokens: N sequences add at most one incomplete piece each."""
    return B * ((S + size - 1) // size) if cu_seqlens is None else S // size + cu_seqlens.shape[0] - 1


def tokens(x: Tensor) -> Tensor:
    """``x`` as kernels take it: evenly spaced tokens, so close that a chunk's offsets fit 32 bits, as its rows are."""
    x = flat(x)
    return x if x.shape[1] < 2 or 64 * x.stride(1) < 2**31 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int]:
    """Elements from a token to the next, and from a head to the next."""
    return x.stride(1), x.stride(2)


def sum_dtype(dtype: torch.dtype) -> Any:
    """Of the running sums of log-decays, whose differences are wanted."""
    return tl.float64 if dtype == torch.float32 else tl.float32


def inverse_precision(q: Tensor) -> str:
    """Of the products that invert: float32 throughout, three times a split product where the inputs are shorter."""
    return "ieee" if q.dtype == torch.float32 or not q.is_cuda else "tf32x3"


def count(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """N, the number of sequences."""
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
