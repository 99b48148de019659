"""How the kernel benchmark measures: time, memory, launches, ceilings and errors, of any call on any device.

Times on a CUDA card come from events around each call. Before each call a buffer of several times the L2 cache is
written: no input of the call is cached, and the queue holds work while Python prepares the call, so that a call's time
is that of the card and not of the interpreter (which is stated beside it as ``host_ms``). Inputs rotate over several
sets besides. On a CPU times are wall-clock times.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
COPY_BYTES = 1 << 30
MATMUL_WIDTH = 8192
FLUSH_BYTES = 256 << 20
STEPS = 50  # one-token steps in one graph


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_rms(actual: Tensor, exact: Tensor) -> float:
    """``|actual - exact| / |exact|`` in float64; NaN where a value is NaN, infinite where ``exact`` is zero and not met."""
    if actual.shape != exact.shape:
        raise ValueError(f"relative_rms: shapes {tuple(actual.shape)} and {tuple(exact.shape)}, expected the same")
    difference = float((actual.detach().double() - exact.detach().double()).norm())
    size = float(exact.detach().double().norm())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def time_calls(
    calls: Sequence[Call], device: torch.device, *, seconds: float = 0.5, least: int = 5, most: int = 100
) -> dict[str, float | int]:
    """Milliseconds of one call, over repeats that take ``calls`` in turn (the same work on different tensors).

    Returns ``ms`` (median), ``ms_low`` and ``ms_high`` (fifth and ninety-fifth percentile), ``repeats``, and
    ``host_ms``, the median time until the call has returned to Python. As many repeats as fit ``seconds``, at least
    ``least`` and at most ``most``, after one unmeasured call of each.
    """
    for call in calls:
        call()
    synchronize(device)
    begin = time.perf_counter()
    calls[0]()
    synchronize(device)
    once = max(time.perf_counter() - begin, 1e-7)
    repeats = int(min(max(seconds / once, least), most))
    taken, host = (_events if device.type == "cuda" else _wall)(calls, device, repeats)
    ordered = sorted(taken)
    return {
        "ms": statistics.median(taken),
        "ms_low": ordered[int(0.05 * (repeats - 1))],
        "ms_high": ordered[-1 - int(0.05 * (repeats - 1))],
        "repeats": repeats,
        "host_ms": statistics.median(host),
    }


def _events(calls: Sequence[Call], device: torch.device, repeats: int) -> tuple[list[float], list[float]]:
    l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    flush = torch.empty(max(2 * l2, FLUSH_BYTES), dtype=torch.int8, device=device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin = time.perf_counter()
    calls[0]()
    slowest = 1e3 * (time.perf_counter() - begin)
    start.record()
    for _ in range(4):
        flush.zero_()
    end.record()
    torch.cuda.synchronize(device)
    ahead = 2 + int(2 * slowest / (start.elapsed_time(end) / 4))  # flushes that outlast Python's part of a call twice
    pairs, host = [], []
    for n in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(ahead):
            flush.zero_()
        start.record()
        begin = time.perf_counter()
        calls[n % len(calls)]()
        host.append(1e3 * (time.perf_counter() - begin))
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in pairs], host


def _wall(calls: Sequence[Call], device: torch.device, repeats: int) -> tuple[list[float], list[float]]:
    taken = []
    for n in range(repeats):
        begin = time.perf_counter()
        calls[n % len(calls)]()
        taken.append(1e3 * (time.perf_counter() - begin))
    return taken, taken


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Bytes that ``call`` needs at its peak beyond what was allocated before, its result included; None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del kept
    return peak


def launches(call: Call, device: torch.device) -> int | None:
    """Kernels that one call launches, copies and fills included; None on a CPU."""
    if device.type != "cuda":
        return None
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        call()
        torch.cuda.synchronize(device)
    events = watched.events() or []
    return sum(event.device_type == DeviceType.CUDA for event in events)


def ceilings(device: torch.device, *, tiny: bool = False) -> dict[str, float]:
    """What the device reaches now: ``copy_bytes_per_s`` (both directions of a large copy) and ``matmul_flops_per_s``.

    The copy is 1 GiB from device memory to device memory, the product 8192^3 in bfloat16 on random data (zeros would
    run faster than real data). ``tiny`` shrinks both for dry runs.
    """
    size, width = (1 << 20, 128) if tiny else (COPY_BYTES, MATMUL_WIDTH)
    source = torch.empty(size, dtype=torch.int8, device=device).random_(-128, 127)
    target = torch.empty_like(source)
    seconds = 0.01 if tiny else 0.5
    copied = time_calls([lambda: target.copy_(source)], device, seconds=seconds)
    a = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    b = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    multiplied = time_calls([lambda: a @ b], device, seconds=seconds)
    return {
        "copy_bytes_per_s": 2 * size / (1e-3 * copied["ms"]),
        "matmul_flops_per_s": 2 * width**3 / (1e-3 * multiplied["ms"]),
    }


def time_steps(
    step: Callable[[Tensor], Tensor],
    state: Tensor,
    device: torch.device,
    *,
    steps: int = STEPS,
    seconds: float = 0.5,
) -> dict[str, float | int]:
    """Milliseconds of one one-token step, ``steps`` of them captured in one CUDA graph, each on the state of the last.

    The state of a small batch stays in the L2 cache from step to step, as it does when decoding. On a CPU the steps are
    called one after the other.
    """
    if device.type != "cuda":

        def loop() -> None:
            now = state
            for _ in range(steps):
                now = step(now)

        result = time_calls([loop], device, seconds=seconds)
    else:
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # compile and warm up outside of the capture
            step(step(state))
        torch.cuda.current_stream(device).wait_stream(aside)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            now = state
            for _ in range(steps):
                now = step(now)
        result = time_calls([graph.replay], device, seconds=seconds)
    for name in ("ms", "ms_low", "ms_high", "host_ms"):
        result[name] = result[name] / steps
    return {**result, "steps": steps}


def against_ceilings(timing: dict[str, Any], nbytes: int, flops: int, rates: dict[str, float]) -> dict[str, Any]:
    """``timing`` with its floor (the larger of bytes / copy rate and operations / matmul rate) and its fractions."""
    seconds = 1e-3 * timing["ms"]
    copy_s, matmul_s = nbytes / rates["copy_bytes_per_s"], flops / rates["matmul_flops_per_s"]
    return {
        **timing,
        "bytes": nbytes,
        "flops": flops,
        "floor_ms": 1e3 * max(copy_s, matmul_s),
        "copy_fraction": copy_s / seconds,
        "matmul_fraction": matmul_s / seconds,
    }
