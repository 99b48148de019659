"""What every kernel launch needs besides the kernel: flat views of the tokens, offsets of sequences, launch shapes.

A kernel sees ``[B,S,H,X]`` as T = B·S tokens of H rows; ``offsets [N+1]`` says where sequences begin and end, so that
rows of a batch and pieces of a packed row are the same thing to it.

Launch shapes (chunk length, block width, warps, pipeline stages) are looked up, never searched: ``launch_shapes.json``
beside this file holds, per architecture and shape class, what ``python -m latentcot.kernels.tune`` found to be the
fastest; a shape class that is not in it takes the kernel's own default.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("launch_shapes.json")


class Launch(NamedTuple):
    """One launch shape: tokens a chunk, columns a program, warps a program, stages of the load pipeline."""

    chunk: int
    block: int
    warps: int
    stages: int


def flat(x: Tensor) -> Tensor:
    """``x [B,S,...]`` itself if its tokens are evenly spaced and its last axis contiguous, else a contiguous copy."""
    even = x.shape[0] <= 1 or x.shape[1] == 0 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if even and (x.stride(-1) == 1 or x.shape[-1] == 1) else x.contiguous()


@lru_cache(maxsize=64)
def _regular_offsets(B: int, S: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(B + 1, device=device, dtype=torch.int64) * S


def sequence_offsets(B: int, S: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """``[N+1]`` int64 on ``device``: the given offsets, or those of B rows of S tokens (kept for the next call)."""
    if cu_seqlens is None:
        return _regular_offsets(B, S, device)
    return cu_seqlens.to(device=device, dtype=torch.int64)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and ``least`` (a dot product's tiles have 16 rows and more)."""
    return max(least, 1 << max(n - 1, 0).bit_length())


@lru_cache(maxsize=8)
def architecture(device: torch.device) -> str:
    """``sm_90`` and so on; ``cpu`` where the interpreter runs the kernels."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, dict[str, Sequence[int]]]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def shape_class(K: int, V: int, dtype: torch.dtype) -> str:
    """The key of a launch shape: padded widths and bits of an element, for instance ``"k128-v128-16bit"``."""
    return f"k{power_of_two(K)}-v{power_of_two(V)}-{8 * dtype.itemsize}bit"


_overrides: dict[str, Launch] = {}


def launch_shape(kernel: str, K: int, V: int, dtype: torch.dtype, device: torch.device, default: Launch) -> Launch:
    """The launch shape of ``kernel`` for this shape class and card: a tuner's override, the table's entry or ``default``."""
    if kernel in _overrides:
        return _overrides[kernel]
    found: Any = _table().get(architecture(device), {}).get(kernel, {}).get(shape_class(K, V, dtype))
    return default if found is None else Launch(*found)


class override:
    """``with override(kernel=Launch(...)):`` runs with given launch shapes; the tuner's tool, not for use in programs."""

    def __init__(self, **shapes: Launch) -> None:
        self.shapes = shapes

    def __enter__(self) -> None:
        self.before = dict(_overrides)
        _overrides.update(self.shapes)

    def __exit__(self, *_: object) -> None:
        _overrides.clear()
        _overrides.update(self.before)


WINDOW = 256  # tokens between two stored states; every chunk length divides it


@lru_cache(maxsize=64)
def _regular_spans(B: int, S: int, length: int, device: torch.device) -> Tensor:
    return _spans(_regular_offsets(B, S, device), length, B * -(-S // length))


def _spans(offsets: Tensor, length: int, count: int) -> Tensor:
    with torch.inference_mode(False):
        begin, end = offsets[:-1], offsets[1:]
        pieces = torch.cumsum((end - begin + length - 1) // length, 0)
        index = torch.arange(count, device=offsets.device)
        n = torch.searchsorted(pieces, index, right=True)
        used = n < begin.numel()
        n = n.clamp_max(begin.numel() - 1)
        first = torch.where(n > 0, pieces[(n - 1).clamp_min(0)], 0)
        start = torch.minimum(begin[n] + (index - first) * length, end[n])
        start = torch.where(used, start, end[n])
        stop = torch.where(used, torch.minimum(start + length, end[n]), start)
        return torch.stack([start, stop, n, used & (stop == end[n])], 1)


def spans(B: int, S: int, cu_seqlens: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Pieces of ``length`` tokens of every sequence, ``[pieces,4]`` int64: first token, end, sequence, whether the last.

    Their number is known from shapes alone (nothing is read back from the device), so with packed rows some are empty
    (first token = end).
    """
    if cu_seqlens is None:
        return _regular_spans(B, S, length, device)
    offsets = sequence_offsets(B, S, cu_seqlens, device)
    return _spans(offsets, length, B * S // length + offsets.numel() - 1)


@lru_cache(maxsize=64)
def _regular_bases(B: int, S: int, length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(B, device=device, dtype=torch.int64) * -(-S // length)


def span_bases(B: int, S: int, cu_seqlens: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Index in :func:`spans` of the first piece of each sequence, ``[N]`` int64."""
    if cu_seqlens is None:
        return _regular_bases(B, S, length, device)
    offsets = sequence_offsets(B, S, cu_seqlens, device)
    pieces = (offsets[1:] - offsets[:-1] + length - 1) // length
    return torch.cumsum(pieces, 0) - pieces


def span_count(B: int, S: int, cu_seqlens: Tensor | None, length: int) -> int:
    """How many pieces :func:`spans` has."""
    return B * -(-S // length) if cu_seqlens is None else B * S // length + cu_seqlens.numel() - 1
