"""Checks of arguments, shared by the operators: each raises before any computation, naming given and expected."""

import os
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from latentcot.kernels.visibility import BlockCausal, Visibility


def check_tensors(operator: str, **tensors: Tensor | None) -> None:
    """Every given tensor is floating and on the device of the first one."""
    first_name, first = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} is a {type(tensor).__name__}, expected a torch.Tensor")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{operator}: {name} has dtype {tensor.dtype}, expected a floating dtype")
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise ValueError(f"{operator}: {name} is on {tensor.device} but {first_name} is on {first.device}")


def check_shape(operator: str, name: str, tensor: Tensor, letters: str, expected: Sequence[int]) -> None:
    """``tensor`` has exactly the shape ``expected``; ``letters`` names its axes, for instance ``"[B,S,H,K]"``."""
    if tensor.shape != torch.Size(expected):
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {letters} = {tuple(expected)}")


def check_dims(operator: str, name: str, tensor: Tensor, letters: str) -> None:
    """``tensor`` has as many axes as ``letters`` names."""
    if tensor.dim() != letters.count(",") + 1:
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {letters}")


def check_decay(operator: str, log_decay: Tensor, *, in_kernel: bool = False) -> None:
    """No log-decay is above zero; ``in_kernel``: the kernels that follow look themselves.

    One reduction on a CPU. On a GPU reading the answer back would stall the queue at every call: there the Triton
    kernels turn a positive log-decay into NaN and the other back ends make a device-side assertion, unless the
    environment variable ``LATENTCOT_VALIDATE=1`` asks for the error at the call. NaN passes: it shows in the output and
    is not for this check to hide or to explain.
    """
    if log_decay.numel() == 0 or torch.compiler.is_compiling():
        return
    log_decay = log_decay.detach()
    if log_decay.is_cuda and os.environ.get("LATENTCOT_VALIDATE") != "1":
        if not in_kernel:
            torch._assert_async(~(log_decay > 0).any(), f"{operator}: log_decay must be <= 0")  # pyright: ignore
        return
    largest = float(log_decay.amax())
    if largest > 0:
        raise ValueError(
            f"{operator}: log_decay has the value {largest:.4g}, expected <= 0 everywhere "
            f"(a positive log-decay means growth; pass log(alpha) with alpha in [0, 1])"
        )


def check_offsets(operator: str, cu_seqlens: Tensor, batch: int, length: int) -> list[int]:
    """The packed offsets as a list: one row, starting at 0, strictly increasing, ending at S."""
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.dim() != 1
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        given = (
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
            if isinstance(cu_seqlens, Tensor)
            else type(cu_seqlens).__name__
        )
        raise ValueError(f"{operator}: cu_seqlens is {given}, expected an int32 or int64 tensor of shape [N+1]")
    if batch != 1:
        raise ValueError(f"{operator}: cu_seqlens packs sequences into one row, so B must be 1; it is {batch}")
    offsets: list[int] = cu_seqlens.tolist()
    if len(offsets) < 2:
        raise ValueError(f"{operator}: cu_seqlens is {offsets}, expected N+1 offsets with N >= 1")
    if offsets[0] != 0:
        raise ValueError(f"{operator}: cu_seqlens starts at {offsets[0]}, expected 0")
    if offsets[-1] != length:
        raise ValueError(f"{operator}: cu_seqlens ends at {offsets[-1]}, expected S = {length}")
    for n, (start, end) in enumerate(pairwise(offsets)):
        if end <= start:
            raise ValueError(
                f"{operator}: cu_seqlens[{n}] = {start} and cu_seqlens[{n + 1}] = {end}, expected increasing"
            )
    return offsets


WIDEST_KEY, WIDEST_VALUE = 256, 512


def check_widths(operator: str, K: int, V: int) -> None:
    """The Triton kernels hold a head's state on chip: K up to 256, V up to 512."""
    if K > WIDEST_KEY or V > WIDEST_VALUE:
        raise ValueError(
            f"{operator}: q, k have K = {K} and v has V = {V}; the Triton kernels take K <= {WIDEST_KEY} and "
            f"V <= {WIDEST_VALUE}; use more heads, or backend='chunked'"
        )


_counted: WeakIdKeyDictionary = WeakIdKeyDictionary()  # offsets that were checked -> (their version, S)


def check_block_lengths(
    operator: str, lengths: Tensor | None, batch: int, visibility: Visibility, cu_seqlens: Tensor | None
) -> None:
    """Lengths of right-padded rows: whole numbers, one a row, and only where a block form asks for them."""
    if lengths is None:
        return
    if not isinstance(visibility, BlockCausal):
        raise ValueError(f"{operator}: lengths belong to BlockCausal, got visibility {visibility}")
    if cu_seqlens is not None:
        raise ValueError(f"{operator}: cu_seqlens and lengths describe the same thing two ways; give one")
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        given = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{operator}: lengths is {given}, expected an int32 or int64 tensor of shape [B]")
    check_shape(operator, "lengths", lengths, "[B]", (batch,))


def offset_count(operator: str, cu_seqlens: Tensor | None, batch: int, length: int) -> int:
    """The number of sequences N, for kernels that read the offsets on the device.

    Offsets are checked as by :func:`check_offsets`, once: the layers of a model share them, and every look at a CUDA
    tensor waits for the device. Under ``torch.compile`` only their number counts.
    """
    if cu_seqlens is None:
        return batch
    if torch.compiler.is_compiling():
        return cu_seqlens.numel() - 1
    if isinstance(cu_seqlens, Tensor) and _counted.get(cu_seqlens) == (cu_seqlens._version, length) and batch == 1:
        return cu_seqlens.numel() - 1
    count = len(check_offsets(operator, cu_seqlens, batch, length)) - 1
    _counted[cu_seqlens] = (cu_seqlens._version, length)
    return count


def kernel_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which kernels read their matrices: autocast's where it is on, else what holds all of ``tensors``."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if a tensor is float64, else float32: 16-bit inputs are computed in float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
