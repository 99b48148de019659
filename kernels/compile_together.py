"""Kernels of an operator compiled side by side: its first call waits for the slowest of them, not for their sum.

An operator's launches follow one another, and Triton compiles a kernel when it is first launched; most of that time is
spent in LLVM and in the assembler, outside of Python. :func:`compile_together` walks through the launches once without
launching anything, forward and backward, and compiles what they ask for in threads. It changes no result: a kernel that
it misses is compiled at its launch, as ever.
"""

import os
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor

_collecting: ContextVar[bool] = ContextVar("latentcot_collecting_kernels", default=False)
_done: set[Hashable] = set()


class Entry:
    """A kernel that the host launches, ``kernel[grid](...)``; compiled instead while kernels are collected."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        if not _collecting.get():
            return self.kernel[grid]

        def compile_only(*arguments: Any, **options: Any) -> None:
            self.kernel.warmup(*arguments, grid=grid, **options)

        return compile_only

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)


def signature(*arguments: Any) -> Hashable:
    """What compiling depends on, roughly: dtypes, numbers of axes and the last two sizes of tensors, what is None, flags."""
    return tuple(
        (x.dtype, x.dim(), tuple(x.shape[-2:])) if isinstance(x, Tensor) else x if isinstance(x, bool) else x is None
        for x in arguments
    )


def compile_together(key: Hashable, device: torch.device, *launches: Callable[[], Any]) -> None:
    """Compile what ``launches`` would launch on ``device``, all of it at once; only the first time for each ``key``.

    They run with real tensors, so that alignment and strides are those of the call that follows, and their results are
    thrown away. Nothing happens on a CPU, where the interpreter runs the kernels.
    """
    if device.type != "cuda" or key in _done:
        return
    _done.add(key)
    token = _collecting.set(True)
    try:
        with (
            torch.no_grad(),
            ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1), thread_name_prefix="triton") as threads,
            triton.AsyncCompileMode(threads),
        ):
            for launch in launches:
                launch()
    finally:
        _collecting.reset(token)
