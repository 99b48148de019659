"""One forward and backward of a fresh process, timed: ``python -m latentcot.kernels.bench_cold ROW DEVICE DTYPE [tiny]``.

The benchmark starts it with an empty kernel cache. Inputs are on the device before the clock starts, so the context of
the card does not count; importing and compiling kernels does.
"""

import sys
import time

import torch

from latentcot.kernels.bench_cases import MIXERS, ROWS, tiny
from latentcot.kernels.bench_rows import COLD_MARK


def main(name: str, device_name: str, dtype_name: str, size: str = "full") -> None:
    """Print the seconds behind a mark that the parent looks for."""
    row = next(row for row in ROWS if row.name == name)
    row = tiny(row) if size == "tiny" else row
    device, mixer = torch.device(device_name), MIXERS[row.mixer]
    x = mixer.inputs(row.shape, getattr(torch, dtype_name), device, 0)
    leaves = [t.requires_grad_() for key, t in x.items() if key not in mixer.constants]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    o = mixer.run(x, row.seen(size == "tiny"), "auto")
    torch.autograd.grad(o, leaves, torch.ones_like(o))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(f"{COLD_MARK} {time.perf_counter() - begin:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
