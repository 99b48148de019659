"""What diffusion adds to the network: ``python -m latentcot.diffusion_reasoning.bench_shares``.

* **Training**: a step (forward and backward) of block diffusion on two streams against one of next-token prediction, of one hybrid
  stack with one attention layer in four.
* **Sampling**: what a pass of the sampler costs besides the network, and what recording a trajectory adds. The sampler is handed logits
  that lie ready; the network's pass is that of a block of ``--block-length`` tokens behind an empty past, head included.

Variants take turns within a repetition; times are medians, on a CPU of the process on one thread. *Kept* are the bytes of tensors that
autograd keeps for the backward pass (on any device; parameters are not counted), *peak* those that CUDA allocated at most.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.diffusion_reasoning.bench import DTYPES, MASK, environment, positive, publish, published, seconds_of
from latentcot.diffusion_reasoning.block_diffusion import BlockDiffusionModel, block_diffusion_loss
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig
from latentcot.diffusion_reasoning.samplers import fill_block

SAMPLERS: dict[str, dict[str, Any]] = {
    "confidence, eight a pass": {"steps": 4},
    "threshold 0.9": {"quota": "threshold", "max_nfe": 4},
    "temperature 1, eight a pass": {"steps": 4, "temperature": 1.0},
    "entropy, top-p 0.95, temperature 1": {"steps": 4, "order": "neg_entropy", "temperature": 1.0, "top_p": 0.95},
}
KEPT = ("width", "layers", "length", "train_rows", "block_length", "rows", "vocab", "repeats")
AIMS = {"time": 2.4, "memory": 2.3, "sampler": 0.10, "trajectory": 0.03}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Settings from the command line; leaves with code 2 and a sentence for what does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m latentcot.diffusion_reasoning.bench_shares", description="What diffusion adds to the network."
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--width", type=positive, default=1024 if cuda else 256, help="a multiple of 64")
    parser.add_argument("--layers", type=positive, default=8 if cuda else 4, help="a multiple of 4")
    parser.add_argument("--length", type=positive, default=4096 if cuda else 512, help="tokens of a training row")
    parser.add_argument("--train-rows", type=positive, default=4 if cuda else 2)
    parser.add_argument("--block-length", type=positive, default=32)
    parser.add_argument("--rows", type=positive, default=8, help="rows that are sampled together")
    parser.add_argument("--vocab", type=positive, default=131_072 if cuda else 8192, help="of the sampled model")
    parser.add_argument("--repeats", type=positive, default=21)
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/diffusion-shares.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks/diffusion-shares.md"))
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not cuda:
        parser.error("--device: no CUDA device here; --device cpu runs on this machine")
    given.dtype = given.dtype or ("bfloat16" if given.device == "cuda" else "float32")
    if given.width % 64 or given.layers % 4:
        parser.error(f"--width, --layers: multiples of 64 and 4 are needed, got {given.width} and {given.layers}")
    for path in (given.json, given.page):
        if not path.parent.is_dir():
            parser.error(f"--json, --page: there is no folder {path.parent}")
    return given


def make(given: argparse.Namespace, vocab: int) -> BlockDiffusionModel:
    """A hybrid of Gated DeltaNet with one attention layer in four, random weights."""
    heads = given.width // 64
    config = HybridConfig(
        vocab_size=vocab,
        hidden_size=given.width,
        num_hidden_layers=given.layers,
        mixer="gated_deltanet",
        period=4,
        attention={"num_heads": heads},
        gated_deltanet={"num_heads": heads, "head_dim": 64},
    )
    torch.manual_seed(0)
    with torch.device(given.device):
        return BlockDiffusionModel(HybridForCausalLM(config).to(DTYPES[given.dtype]), given.block_length, MASK)


# -- training ----------------------------------------------------------------------------------------------------------


def measure_training(given: argparse.Namespace, tick: Callable[[], None]) -> dict[str, Any]:
    """Seconds, kept bytes and peak of a step of each kind."""
    model = make(given, 512)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 512, (given.train_rows, given.length), generator=generator).to(given.device)

    def next_token() -> Tensor:
        logits = model.backbone(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def two_streams() -> Tensor:
        return block_diffusion_loss(model, ids, generator=torch.Generator(given.device).manual_seed(0)).loss

    losses = {"next token": next_token, "two streams": two_streams}
    found: dict[str, Any] = {
        name: {"seconds": [], **_memory(loss, model, given.device)} for name, loss in losses.items()
    }
    for _ in range(given.repeats):
        for name, loss in losses.items():
            model.backbone.zero_grad(set_to_none=True)
            found[name]["seconds"].append(seconds_of(lambda f=loss: f().backward(), given.device))
        tick()
    return found


def _memory(loss: Callable[[], Tensor], model: BlockDiffusionModel, device: str) -> dict[str, float]:
    own = {p.untyped_storage().data_ptr() for p in model.backbone.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss()
    value.backward()
    found = {"kept_bytes": float(sum(kept.values()))}
    if device == "cuda":
        found["peak_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


# -- sampling ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_sampling(given: argparse.Namespace, tick: Callable[[], None]) -> dict[str, Any]:
    """Seconds of the network's pass, and of the sampler's own work a pass, without and with a light trajectory."""
    model = make(given, given.vocab)
    shape = (given.rows, given.block_length)
    empty = model.init_state(given.rows)
    noisy = torch.full(shape, MASK, device=given.device)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(*shape, given.vocab, generator=generator)).to(given.device, DTYPES[given.dtype])
    network: list[float] = []
    found = {name: {"sampler": [], "light": []} for name in SAMPLERS}
    model.denoise(noisy, empty)
    for repeat in range(given.repeats):
        network.append(seconds_of(lambda: model.denoise(noisy, empty), given.device))
        for name, options in SAMPLERS.items():
            for kind, record in (
                (("sampler", None), ("light", "light")) if repeat % 2 else (("light", "light"), ("sampler", None))
            ):
                config = DiffusionGenerationConfig(mask_id=MASK, record=record, **options)  # type: ignore[arg-type]
                passes = 0

                def ready(z: Tensor, number: int, rows: Tensor) -> Tensor:
                    nonlocal passes
                    passes += 1
                    return logits if len(rows) == given.rows else logits[rows]

                spent = seconds_of(lambda f=ready, c=config: fill_block(f, noisy, c), given.device)
                found[name][kind].append(spent / passes)
        tick()
    return {"network": network, "samplers": found}


# -- the page ----------------------------------------------------------------------------------------------------------


def summarise(training: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """Medians and ratios."""
    one, two = training["next token"], training["two streams"]
    step = {name: statistics.median(row["seconds"]) for name, row in training.items()}
    network = statistics.median(sampling["network"])
    rows = {}
    for name, spent in sampling["samplers"].items():
        alone, light = statistics.median(spent["sampler"]), statistics.median(spent["light"])
        share = {"sampler": alone / network, "trajectory": (light - alone) / (network + alone)}
        rows[name] = {"sampler_ms": 1e3 * alone, "light_ms": 1e3 * light, **share}
    return {
        "next_token_ms": 1e3 * step["next token"],
        "two_streams_ms": 1e3 * step["two streams"],
        "time": step["two streams"] / step["next token"],
        "kept": two["kept_bytes"] / one["kept_bytes"],
        "peak": two["peak_bytes"] / one["peak_bytes"] if "peak_bytes" in two else None,
        "network_ms": 1e3 * network,
        "samplers": rows,
    }


def render(runs: Sequence[dict[str, Any]]) -> str:
    """The page."""
    lines = [
        "---",
        "hide: [navigation]",
        "description: What two streams, the sampler and trajectories cost beside the network",
        "---",
        "",
        "# Diffusion: what comes on top of the network",
        "",
        "`python -m latentcot.diffusion_reasoning.bench_shares` measures it and writes this page. Variants take turns; times are medians, "
        "on a CPU of the process on one thread.",
        "",
    ]
    for run in runs:
        s, found = run["settings"], run["found"]
        memory = (
            ""
            if found["peak"] is None
            else f", {found['peak']:.2f} times the peak of allocated memory (aim {AIMS['memory']})"
        )
        lines += [
            f"## {run['machine']} ({run['device']})",
            "",
            f"{run['date']}, {run['dtype']}, PyTorch {run['torch']}, {s['layers']} layers of width {s['width']}, Gated DeltaNet with one "
            f"attention layer in four, {s['repeats']} repeats.",
            "",
            f"**Training**, {s['train_rows']} rows of {s['length']} tokens, blocks of {s['block_length']}: a step on two streams "
            f"takes {found['two_streams_ms']:.1f} ms, one of next-token prediction {found['next_token_ms']:.1f} ms: {found['time']:.2f} "
            f"times (aim {AIMS['time']}); {found['kept']:.2f} times the bytes kept for the backward pass{memory}.",
            "",
            f"**Sampling**, {s['rows']} rows, blocks of {s['block_length']}, vocabulary {s['vocab']:,}; the network's pass takes "
            f"{found['network_ms']:.1f} ms. Aims: {AIMS['sampler']:.0%} of a pass for the sampler, {AIMS['trajectory']:.0%} for a light "
            "trajectory.",
            "",
            "| sampler | its work a pass, ms | of the network's | with a light trajectory, ms | the trajectory's share |",
            "| --- | ---: | ---: | ---: | ---: |",
            *(
                f"| {name} | {row['sampler_ms']:.2f} | {row['sampler']:.1%} | {row['light_ms']:.2f} | {row['trajectory']:.1%} |"
                for name, row in found["samplers"].items()
            ),
            "",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write both files, print the page."""
    given = parse(arguments)
    if given.device == "cpu":
        torch.set_num_threads(1)
    runs = published(given.json)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        training = bar.add_task("training steps", total=given.repeats)
        sampling = bar.add_task("sampler passes", total=given.repeats)
        found = summarise(
            measure_training(given, lambda: bar.advance(training)),
            measure_sampling(given, lambda: bar.advance(sampling)),
        )
    run = environment(given) | {"settings": {name: getattr(given, name) for name in KEPT}, "found": found}
    publish(run, runs, given, render)


if __name__ == "__main__":
    main()
