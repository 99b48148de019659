"""Compile candidates of the tuner before it times them, several processes at once.

A candidate costs seconds to compile and a fraction of a second to time. Each process runs its share of the candidates
once on a smaller batch, which leaves their binaries in Triton's cache on disk; the tuner then finds them there. What a
candidate computes, or whether it fails, does not matter here: the tuner sees that for itself.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch

from latentcot.kernels import launch
from latentcot.kernels.bench_cases import Shape
from latentcot.kernels.launch import Launch

SMALL_BATCH = 2  # a kernel specialises for 1 and for multiples of 16: two rows compile what eight rows run


def default_processes() -> int:
    """Half of the cores, at most 8; 0 (compile when timed) where that would not be more than one."""
    half = (os.cpu_count() or 1) // 2
    return min(8, half) if half > 1 else 0


def shares(candidates: Sequence[Launch], processes: int) -> list[list[Launch]]:
    """The candidates dealt out to at most ``processes`` lists, none of them empty."""
    return [list(candidates[n::processes]) for n in range(min(processes, len(candidates)))]


def compile_ahead(
    kernel: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    candidates: Sequence[Launch],
    *,
    processes: int,
    timeout: float = 300.0,
) -> None:
    """Run every candidate once in other processes; returns when all have ended or ``timeout`` seconds are over."""
    small = shape._replace(B=min(shape.B, SMALL_BATCH))
    running = [
        subprocess.Popen(
            [
                sys.executable, "-m", "latentcot.kernels.tune_compile", kernel, ",".join(map(str, small)),
                str(dtype).removeprefix("torch."), device.type, *(",".join(map(str, one)) for one in share),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for share in shares(candidates, processes)
    ]  # fmt: skip
    try:
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


def main(kernel: str, sizes: str, dtype: str, device: str, *candidates: str) -> int:
    """Run the mixers of ``kernel`` once under each candidate; 1 when none of them ran through."""
    from latentcot.kernels.tune import KERNELS, Workload

    shape, tunable = Shape(*map(int, sizes.split(","))), KERNELS[kernel]
    where = torch.device(device)
    loads = [Workload(mixer, shape, getattr(torch, dtype), where, tunable.backward) for mixer in tunable.mixers]
    failed = 0
    for text in candidates:
        with launch.override(**{kernel: Launch(*map(int, text.split(",")))}):
            try:
                for load in loads:
                    load.results()
            except Exception:  # the tuner meets it again and records it
                failed += 1
    return int(failed == len(candidates))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
