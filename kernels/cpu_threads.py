"""Threads and requirements of the compiled CPU kernels; importing this file needs neither Numba nor a kernel."""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingImports]

# multiply-adds below which a second thread costs more than it brings (waking one takes tens of microseconds)
WORTH_A_THREAD = 500_000
PIECES = 4  # for each thread
# tokens below which batched products of one chunk are faster than compiled steps; per-channel gates have no such length
SHORT = {"gated_scan": 1, "decay_attention": 64, "delta_rule": 32}


@lru_cache(maxsize=1)
def _numba_installed() -> bool:
    return find_spec("numba") is not None


def missing_for_compiled(*tensors: Tensor | None) -> str | None:
    """What keeps a call on these CPU tensors from running compiled, as a clause; None if nothing does.

    Without tensors: what holds for every call.
    """
    if torch.compiler.is_compiling():
        return "torch.compile traces the call, and Numba kernels cannot be traced"
    if not _numba_installed():
        return "Numba is not installed (pip install 'latentcot[cpu]')"
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"an argument is a {type(tensor).__name__}, which has no memory that a Numba kernel could read"
        if is_functorch_wrapped_tensor(tensor):
            return "a transform of torch.func traces the call, and Numba kernels cannot be traced"
    return None


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="latentcot-cpu")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def spread(kernel: Callable[..., Any], count: int, work: float, *arguments: Any) -> None:
    """``kernel(first, last, *arguments)`` over the items 0 … count-1, in as many threads as torch uses.

    Each item is computed by one thread in one order, so the number of threads changes no digit. Threads take a few
    items at a time until none are left, the caller among them: one that the system runs late, because the other cores
    are busy, delays nothing but what it holds. ``work``: multiply-adds of all items together.
    """
    threads = min(torch.get_num_threads(), count, os.cpu_count() or 1, 1 + int(work / WORTH_A_THREAD))
    if threads <= 1:
        kernel(0, count, *arguments)
        return
    pieces = min(count, PIECES * threads)
    edges = [count * n // pieces for n in range(pieces + 1)]
    taken = itertools.count()  # next() is one step under the interpreter lock: no piece is taken twice

    def take() -> None:
        while (n := next(taken)) < pieces:
            kernel(edges[n], edges[n + 1], *arguments)

    others = [_pool().submit(take) for _ in range(1, threads)]
    try:
        take()
    finally:
        for other in others:
            if not other.cancel():  # it has begun, and may hold a piece
                other.result()


def array(tensor: Tensor) -> Any:
    """The tensor as a contiguous NumPy array, a view where it can be one."""
    return tensor.detach().contiguous().numpy()


def worth_compiling(operator: str, S: int, log_decay: Tensor | None) -> bool:
    """Whether compiled steps are the faster form for this length and gate, by measurement: what "auto" should ask."""
    return SHORT[operator] <= S or (log_decay is not None and log_decay.dim() == 4)
