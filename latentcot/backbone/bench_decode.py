r"""Times of decoding: ``python -m latentcot.backbone.bench_decode``, one JSON object a line.

.. code-block:: text

    python -m latentcot.backbone.bench_decode --preset gated_deltanet-340m-pure --batch 1 64 --context 1024 4096
    python -m latentcot.backbone.bench_decode --device cpu --layers 2 --vocab 512 --tokens 4   # dry run

Weights are random: speed does not depend on them. A row is one (batch, context): the prompt is read in chunks, then ``tokens`` steps
of a :class:`~latentcot.backbone.engine.DecodeEngine` are timed from the first to the last, the host's part included.

``bytes_a_token`` is the least that a step has to move, for all rows together: every weight but the embedding table once, states of
linear mixers read and written, keys and values of the context read. ``floor_ms`` is that at the rate of a large copy, measured by the
same run, and ``fraction_of_floor`` is ``floor_ms / ms_a_token``: 1 would be perfect. A row that fails says why in ``error``.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch

from latentcot.backbone.engine import DecodeEngine
from latentcot.backbone.engine_steps import AttentionStep
from latentcot.backbone.model import HybridForCausalLM
from latentcot.backbone.presets import preset
from latentcot.kernels.bench_measure import ceilings, launches, synchronize

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PEAK_UNKNOWN = None  # PyTorch keeps no count of a CPU's memory


def common_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The options that decoding and training share."""
    parser = argparse.ArgumentParser(prog=f"python -m latentcot.backbone.{name}", description=description)
    parser.add_argument("--preset", nargs="+", default=["gated_deltanet-340m-pure"], help="names of stacks")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES))
    parser.add_argument("--layers", type=positive, help="instead of the preset's, for dry runs")
    parser.add_argument("--vocab", type=positive, help="instead of the preset's, for dry runs")
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Settings from the command line; leaves with code 2 and a sentence for what does not fit."""
    parser = common_parser("bench_decode", "Times of decoding beside the memory floor.")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=positive, nargs="+", default=[1024], help="tokens of the prompt of every row")
    parser.add_argument("--tokens", type=positive, default=200, help="steps timed, after as many that are not")
    parser.add_argument("--prefill-chunk", type=positive, default=2048)
    parser.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, default=True)
    return checked(parser, arguments)


def checked(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments, whose device exists and whose presets have names; else it leaves with code 2."""
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: no CUDA device here; --device cpu makes a dry run")
    for name in given.preset:
        try:
            preset(name)
        except ValueError as error:
            parser.error(f"--preset: {error}")
    return given


def build(name: str, settings: argparse.Namespace) -> HybridForCausalLM:
    """The stack of that name with random weights, in the dtype and on the device asked for."""
    changes: dict[str, Any] = {"eos_token_id": None}
    for option in ("recompute_mlp", "loss_chunk"):  # of training
        if getattr(settings, option, None):
            changes[option] = getattr(settings, option)
    if settings.layers:
        changes["num_hidden_layers"] = settings.layers
        if preset(name).period and preset(name).period > settings.layers:
            changes["period"] = settings.layers  # a dry run of few layers keeps a full one
    if settings.vocab:
        changes["vocab_size"] = settings.vocab
    torch.manual_seed(0)
    with torch.device(settings.device):
        return HybridForCausalLM(preset(name, **changes)).to(DTYPES[settings.dtype]).eval()


def environment(settings: argparse.Namespace) -> dict[str, Any]:
    """What a number belongs to: card, dtype, versions."""
    card = torch.cuda.get_device_name() if settings.device == "cuda" else platform.processor() or platform.machine()
    return {"device": card, "dtype": settings.dtype, "torch": torch.__version__, "python": platform.python_version()}


def bytes_a_token(engine: DecodeEngine, context: int) -> dict[str, int]:
    """Least bytes of one step of all rows behind ``context`` tokens: ``weights``, ``states``, ``keys_and_values``."""
    model = engine.model
    table = model.model.embeddings.weight
    shared = table is model.lm_head.weight  # a tied table is read as the head
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p is not table or shared)
    states = past = 0
    for block in engine.blocks:
        held = sum(b.numel() * b.element_size() for b in block.mixer.buffers.values())
        if isinstance(block.mixer, AttentionStep):
            past += held * context // engine.clock.max_length
        else:
            states += 2 * held
    return {"weights": weights, "states": states, "keys_and_values": past}


@torch.no_grad()
def measure(
    model: HybridForCausalLM, batch: int, context: int, settings: argparse.Namespace, copy_rate: float
) -> dict[str, Any]:
    """One row."""
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    engine = DecodeEngine(model, batch, context + 2 * settings.tokens + 2, cuda_graph=settings.cuda_graph, seed=0)
    synchronize(device)
    built = time.perf_counter() - begin
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=device)
    begin = time.perf_counter()
    engine.prefill(ids, chunk=settings.prefill_chunk)
    synchronize(device)
    read = time.perf_counter() - begin
    for _ in range(settings.tokens):
        engine.step()
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(settings.tokens):
        engine.step()
    synchronize(device)
    seconds = (time.perf_counter() - begin) / settings.tokens
    least = bytes_a_token(engine, context + 3 * settings.tokens // 2)
    floor = sum(least.values()) / copy_rate
    window = engine.clock.window
    return {
        "ms_a_token": 1e3 * seconds,
        "tokens_a_second": batch / seconds,
        "bytes_a_token": least,
        "floor_ms": 1e3 * floor,
        "fraction_of_floor": floor / seconds,
        "launches": launches(lambda: engine._forward(window), device),
        "engine_seconds": built,
        "prefill_seconds": read,
        "state_bytes": engine.nbytes,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else PEAK_UNKNOWN,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    settings = parse(arguments)
    rate = ceilings(torch.device(settings.device), tiny=settings.device == "cpu")["copy_bytes_per_s"]
    for name in settings.preset:
        model = build(name, settings)
        for batch in settings.batch:
            for context in settings.context:
                row: dict[str, Any] = {"preset": name, "batch": batch, "context": context, **environment(settings)}
                row |= {"cuda_graph": settings.cuda_graph and settings.device == "cuda", "copy_bytes_per_s": rate}
                try:
                    row |= measure(model, batch, context, settings, rate)
                except (RuntimeError, ValueError) as error:  # out of memory in one row is no reason to lose the others
                    row["error"] = f"{type(error).__name__}: {error}"
                print(json.dumps(row), flush=True)
        del model


def positive(text: str) -> int:
    """An option's number, from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return number


if __name__ == "__main__":
    main()
