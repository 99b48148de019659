"""Cost of a denoising pass against the length of the context: ``python -m latentcot.diffusion_reasoning.bench``.

.. code-block:: text

    python -m latentcot.diffusion_reasoning.bench                                  # CUDA if there is one, else this CPU
    python -m latentcot.diffusion_reasoning.bench --device cpu --quick             # a dry run of seconds
    python -m latentcot.diffusion_reasoning.bench --width 2048 --layers 24 --contexts 1024 8192 32768 131072

Three block-diffusion models of one size, in one run: linear layers alone, one attention layer in four, attention alone with its keys and
values cached. For every context: milliseconds of a denoising pass and of a commit, tokens a second of whole blocks, bytes of the state
beside the cost model. Weights are random: speed does not depend on them. The runs go round the contexts and models again and again, so
that what else the machine does meets all of them; times are medians. On a CPU they are the process's own on one thread, not by the wall
clock. Keys and values of a long context are copies of a short one's.

Writes one JSON file, a run a machine, and a page from it.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from latentcot.backbone import HybridConfig, HybridForCausalLM, LayerState
from latentcot.backbone.presets import state_bytes
from latentcot.diffusion_reasoning.block_diffusion.cost import block_cost
from latentcot.diffusion_reasoning.block_diffusion.model import BlockDiffusionModel, BlockState
from latentcot.files import write_text

MASK, VOCAB = 6, 512
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
STACKS = ("linear", "hybrid", "softmax")
READ = 1024  # tokens that are really read before keys and values are copied out to the wanted length


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Settings from the command line; leaves with code 2 and a sentence for what does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m latentcot.diffusion_reasoning.bench",
        description="Cost of a denoising pass against the context.",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--contexts", type=positive, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--block-length", type=positive, default=32)
    parser.add_argument("--passes", type=positive, default=8, help="denoising passes a block, for tokens a second")
    parser.add_argument("--rows", type=positive, default=1)
    parser.add_argument("--width", type=positive, default=256, help="a multiple of 64")
    parser.add_argument("--layers", type=positive, default=4, help="a multiple of 4")
    parser.add_argument("--mixer", default="gated_deltanet", choices=("gated_deltanet", "deltanet", "gla", "retnet"))
    parser.add_argument("--repeats", type=positive, default=25)
    parser.add_argument("--quick", action="store_true", help="two short contexts, three repeats, a narrow model")
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/diffusion.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks/diffusion.md"))
    given = parser.parse_args(arguments)
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: no CUDA device here; --device cpu runs on this machine")
    given.dtype = given.dtype or ("bfloat16" if given.device == "cuda" else "float32")
    if given.quick:
        given.contexts, given.repeats, given.width = [64, 256], 3, 64
    if given.width % 64 or given.layers % 4:
        parser.error(f"--width, --layers: multiples of 64 and 4 are needed, got {given.width} and {given.layers}")
    for path in (given.json, given.page):
        if not path.parent.is_dir():
            parser.error(f"--json, --page: there is no folder {path.parent}")
    given.contexts = sorted(set(given.contexts))
    return given


def positive(text: str) -> int:
    """An option's number, from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return number


def build(stack: str, settings: argparse.Namespace) -> BlockDiffusionModel:
    """A model of the stack with random weights."""
    heads = settings.width // 64
    config = HybridConfig(
        vocab_size=VOCAB,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        mixer="attention" if stack == "softmax" else settings.mixer,
        period=4 if stack == "hybrid" else None,
        attention={"num_heads": heads},
        gated_deltanet={"num_heads": heads, "head_dim": 64},
        deltanet={"num_heads": heads},
        gla={"num_heads": heads},
        retnet={"num_heads": heads},
    )
    torch.manual_seed(0)
    with torch.device(settings.device):
        backbone = HybridForCausalLM(config).to(DTYPES[settings.dtype]).eval()
    return BlockDiffusionModel(backbone, settings.block_length, MASK)


@torch.no_grad()
def read_context(
    model: BlockDiffusionModel, context: int, settings: argparse.Namespace, shorter: BlockState | None = None
) -> BlockState:
    """The state behind ``context`` tokens; a pure linear model reads all of them, going on from a ``shorter`` context where one is given;
    keys and values are copied from a short past."""
    linear = "attention" not in model.backbone.config.mixers
    read = context if linear else min(context, READ)
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(7, VOCAB, (settings.rows, read), generator=generator).to(settings.device)
    if linear and shorter is not None and shorter.lengths is not None:
        done = int(shorter.lengths[0])
        return model.commit(ids[:, done:], shorter)
    state = model.commit(ids, model.init_state(settings.rows))
    if read == context:
        return state

    def longer(t: Tensor) -> Tensor:
        return t.repeat(1, 1, -(-context // read), 1)[:, :, :context].contiguous()

    memory = state.memory
    entries = {
        place: LayerState(e.mixer, {n: longer(t) if n in ("keys", "values") else t for n, t in e.tensors.items()})
        for place, e in memory.entries.items()
    }
    assert memory.valid is not None
    assert memory.lengths is not None
    valid = memory.valid.new_ones(settings.rows, context)
    memory = replace(memory, entries=entries, valid=valid, lengths=torch.full_like(memory.lengths, context))
    return replace(state, memory=memory)


@torch.no_grad()
def measure(settings: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """One row a model and context."""
    rows, cases = [], []
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(7, VOCAB, (settings.rows, settings.block_length), generator=generator).to(settings.device)
    noisy = torch.full_like(clean, MASK)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        reading = bar.add_task("reading contexts", total=len(STACKS) * len(settings.contexts))
        for stack in STACKS:
            model, state = build(stack, settings), None
            for context in settings.contexts:
                state = read_context(model, context, settings, state)
                cases.append((stack, context, model, state, [], []))
                model.denoise(noisy, state)  # compiles and warms up
                model.commit(clean, state)
                bar.advance(reading)
        timing = bar.add_task("timing", total=settings.repeats)
        for _ in range(settings.repeats):
            for _, _, model, state, denoise, commit in cases:
                denoise.append(seconds_of(lambda m=model, s=state: m.denoise(noisy, s), settings.device))
                commit.append(seconds_of(lambda m=model, s=state: m.commit(clean, s), settings.device))
            bar.advance(timing)
    for stack, context, model, state, denoise, commit in cases:
        config, dtype = model.backbone.config, DTYPES[settings.dtype]
        cost = block_cost(config, settings.block_length, context, dtype)
        once, committed = statistics.median(denoise), statistics.median(commit)
        low, _, high = statistics.quantiles(denoise, n=4)
        rows.append(
            {
                "stack": stack,
                "context": context,
                "denoise_ms": 1e3 * once,
                "denoise_ms_low": 1e3 * low,
                "denoise_ms_high": 1e3 * high,
                "commit_ms": 1e3 * committed,
                "tokens_a_second": settings.rows * settings.block_length / (settings.passes * once + committed),
                "state_bytes": state.nbytes,
                "state_bytes_model": state_bytes(config, context, settings.rows, dtype),
                "past_read_flops": settings.rows * cost.past_read,
                "denoise_flops": settings.rows * cost.denoise,
            }
        )
    return rows


def seconds_of(call: Any, device: str) -> float:
    """Of one call: by the wall clock on a GPU, which is waited for, else of the process."""
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    begin = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def environment(settings: argparse.Namespace) -> dict[str, Any]:
    """What the numbers belong to."""
    name = torch.cuda.get_device_name() if settings.device == "cuda" else _processor()
    return {
        "machine": name,
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "dtype": settings.dtype,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def flatness(rows: Sequence[dict[str, Any]], stack: str) -> float:
    """Longest over shortest denoising pass of a stack, over its contexts."""
    times = [row["denoise_ms"] for row in rows if row["stack"] == stack]
    return max(times) / min(times)


def crossing(rows: Sequence[dict[str, Any]], stack: str) -> str:
    """From which context on a stack makes more tokens a second than attention, in words."""
    speed = {(row["stack"], row["context"]): row["tokens_a_second"] for row in rows}
    contexts = sorted({row["context"] for row in rows})
    slower = [c for c in contexts if speed[stack, c] <= speed["softmax", c]]
    if not slower:
        return f"The {stack} model is faster than attention at every context."
    later = [c for c in contexts if c > slower[-1]]
    if not later:
        return f"The {stack} model is never faster than attention here."
    return f"Up to {slower[-1]} tokens attention is faster than the {stack} model, from {later[0]} on it is slower."


def render(runs: Sequence[dict[str, Any]]) -> str:
    """The page."""
    parts = [
        "---\nhide: [navigation]\ndescription: What a denoising pass of block diffusion costs against the length of its context\n---\n",
        "# Block diffusion: cost against context\n",
        "A block-diffusion model looks at a block several times before it commits it. In attention layers every look reads the keys and "
        "values of the whole past; in linear layers it reads one state, whose size does not depend on the past. "
        "`python -m latentcot.diffusion_reasoning.bench` measures it and writes this page.\n",
        "Three models of one size ran in turns: linear layers alone, one attention layer in four, attention alone with cached keys and "
        "values. Times are medians with their quartiles, on a CPU those of the process on one "
        "thread; *tokens a second* are those of whole blocks, denoising passes and commit. "
        "Compare numbers of one run only.\n",
    ]
    for run in runs:
        s, rows = run["settings"], run["rows"]
        where = f"{run['machine']}, {run['threads']} thread(s)" if run["device"] == "cpu" else run["machine"]
        parts.append(f"## {run['machine']} ({run['device']})\n")
        parts.append(
            f"{run['date']}, {where}, {run['dtype']}, PyTorch {run['torch']}, Python {run['python']}. {s['layers']} layers of width "
            f"{s['width']}, mixer `{s['mixer']}`, blocks of {s['block_length']} tokens, {s['passes']} denoising passes a block, "
            f"{s['rows']} row(s), {s['repeats']} repeats.\n"
        )
        parts.append(
            "| model | context | denoising pass, ms | × the shortest | commit, ms | tokens a second | past read, MFLOP | state, bytes | "
            "by the cost model |\n"
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
        )
        for row in rows:
            first = next(r for r in rows if r["stack"] == row["stack"])
            parts.append(
                f"| {row['stack']} | {row['context']} | {row['denoise_ms']:.2f} ({row['denoise_ms_low']:.2f} to "
                f"{row['denoise_ms_high']:.2f}) | {row['denoise_ms'] / first['denoise_ms']:.2f} | {row['commit_ms']:.2f} | "
                f"{row['tokens_a_second']:.1f} | {row['past_read_flops'] / 1e6:.1f} | {row['state_bytes']} | {row['state_bytes_model']} |"
            )
        longest = max(row["context"] for row in rows)
        at = {row["stack"]: row for row in rows if row["context"] == longest}
        parts.append(
            f"\nFrom {min(r['context'] for r in rows)} to {longest} tokens the slowest denoising pass of the linear model is "
            f"{flatness(rows, 'linear'):.2f} times the fastest, of the hybrid {flatness(rows, 'hybrid'):.2f}, of attention "
            f"{flatness(rows, 'softmax'):.2f}. At {longest} tokens the linear model makes "
            f"{at['linear']['tokens_a_second'] / at['softmax']['tokens_a_second']:.1f} times the tokens a second of attention, the hybrid "
            f"{at['hybrid']['tokens_a_second'] / at['softmax']['tokens_a_second']:.1f} times. {crossing(rows, 'linear')} "
            f"{crossing(rows, 'hybrid')}\n"
        )
    if not any(run["device"] == "cuda" for run in runs):
        parts.append("No run on a GPU has been published yet.\n")
    return "\n".join(parts)


def published(path: Path) -> list[dict[str, Any]]:
    """Runs that a benchmark's file holds; leaves with code 2 and a sentence where it holds something else."""
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (json.JSONDecodeError, KeyError, TypeError):
        print(f"--json: {path} holds no runs of this benchmark; move it away", file=sys.stderr)
        raise SystemExit(2) from None


def publish(
    run: dict[str, Any],
    runs: Sequence[dict[str, Any]],
    settings: argparse.Namespace,
    render: Callable[[Sequence[dict[str, Any]]], str],
) -> None:
    """Write ``run`` beside ``runs``, in place of one of the same machine, to ``settings.json``, and the page to ``settings.page``."""
    same = (run["machine"], run["device"])
    kept = [*(r for r in runs if (r["machine"], r["device"]) != same), run]
    write_text(settings.json, json.dumps({"runs": kept}, indent=1) + "\n")
    page = render(kept)
    write_text(settings.page, page)
    print(page)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write both files, print the page."""
    settings = parse(arguments)
    if settings.device == "cpu":
        torch.set_num_threads(1)
    runs = published(settings.json)
    console = Console(stderr=True)
    kept = ("contexts", "block_length", "passes", "rows", "width", "layers", "mixer", "repeats")
    run = environment(settings) | {"settings": {name: getattr(settings, name) for name in kept}}
    run["rows"] = measure(settings, console)
    publish(run, runs, settings, render)


if __name__ == "__main__":
    main()
