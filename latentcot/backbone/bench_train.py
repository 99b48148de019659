r"""Times of a training step: ``python -m latentcot.backbone.bench_train``, one JSON object a line.

.. code-block:: text

    python -m latentcot.backbone.bench_train --preset gated_deltanet-340m-pure --batch 4 --length 4096
    python -m latentcot.backbone.bench_train --device cpu --layers 2 --vocab 512 --batch 1 --length 64 --steps 1   # dry run

A step is forward, next-token loss and backward on random tokens, weights in ``--dtype`` and without an optimiser. ``first_step_seconds``
is the first of the process, kernels compiled or read from their cache on the way; ``ms`` is the median of the ones after it.
``flops_fraction`` is three times the forward's FLOPs (backward counted as two forwards) over time and the rate of a large product,
measured by the same run. A row that fails says why in ``error``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from latentcot.backbone.bench_decode import PEAK_UNKNOWN, build, checked, common_parser, environment, positive
from latentcot.backbone.model import HybridForCausalLM
from latentcot.kernels.bench_measure import ceilings, launches, synchronize


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Settings from the command line; leaves with code 2 and a sentence for what does not fit."""
    parser = common_parser("bench_train", "Times of a training step.")
    parser.add_argument("--batch", type=positive, nargs="+", default=[4])
    parser.add_argument("--length", type=positive, nargs="+", default=[4096])
    parser.add_argument("--recompute-mlp", action="store_true", help="keep nothing of an MLP but its input")
    parser.add_argument("--loss-chunk", type=positive, help="positions whose logits exist at a time")
    parser.add_argument("--steps", type=positive, default=10, help="steps timed, after the first and one more")
    return checked(parser, arguments)


def measure(
    model: HybridForCausalLM, batch: int, length: int, settings: argparse.Namespace, matmul_rate: float
) -> dict[str, Any]:
    """One row. Gradients are freed when it ends."""
    device = torch.device(settings.device)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        loss = model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        synchronize(device)
        return time.perf_counter() - begin

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        first = step()
        step()
        taken = [step() for _ in range(settings.steps)]
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else PEAK_UNKNOWN
        count = launches(step, device)
    finally:
        model.zero_grad(set_to_none=True)
    seconds = statistics.median(taken)
    return {
        "ms": 1e3 * seconds,
        "ms_low": 1e3 * min(taken),
        "ms_high": 1e3 * max(taken),
        "tokens_a_second": batch * length / seconds,
        "flops_fraction": 3 * batch * model.flops(length) / seconds / matmul_rate,
        "first_step_seconds": first,
        "launches": count,
        "peak_bytes": peak,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    settings = parse(arguments)
    rate = ceilings(torch.device(settings.device), tiny=settings.device == "cpu")["matmul_flops_per_s"]
    for name in settings.preset:
        model = build(name, settings).train()
        for batch in settings.batch:
            for length in settings.length:
                row: dict[str, Any] = {"preset": name, "batch": batch, "length": length, **environment(settings)}
                row["matmul_flops_per_s"] = rate
                try:
                    row |= measure(model, batch, length, settings, rate)
                except (RuntimeError, ValueError) as error:
                    row["error"] = f"{type(error).__name__}: {error}"
                print(json.dumps(row), flush=True)
        del model


if __name__ == "__main__":
    main()
