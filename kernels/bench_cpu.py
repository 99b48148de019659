"""Time the CPU back ends beside other implementations: ``python -m latentcot.kernels.bench_cpu [--json FILE] [--quick]``.

H = 4 heads of K = V = 64 (the scan: D = 256), float32, at B = 1 and 4, S = 1024 and 4096. All sides of a row take turns
in one process, so that a busy machine slows all of them; the best and the median of the turns are kept. ``error`` is
the relative RMS of the outputs against the definition in float64. ``of copy rate``: the bytes that must be read and
written at least once (inputs, outputs, and for the backward pass their gradients), per second, over what the machine
reaches when it copies 256 MiB: sampled before every row, the best sample counts, because one taken on a busy machine is
too low and flatters every fraction. Tensors that fit the last-level cache may exceed it. Peers:

* ``loop``: the definition step by step in PyTorch, the only form that GLA and HGRN2 have elsewhere on a CPU. It keeps
  gigabytes of states at B = 4 and is timed at B = 1 only, in fewer turns than the others (``turns`` says how many);
* ``transformers``: the chunked delta rule of its Qwen3-Next, and the lightning attention of its MiniMax with
  projections, norm and activation replaced by the identity (what is left of its gate is one multiplication);
* ``associative_scan``: PyTorch's own, compiled;
* ``sdpa``: causal softmax attention of the same sizes, another operator, for scale.

A peer that cannot be run is listed with the reason.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.kernels.cpu_threads import missing_for_compiled
from latentcot.kernels.decay_attention import chunked as decay_chunked
from latentcot.kernels.decay_attention import reference as decay_reference
from latentcot.kernels.decay_attention.step import decay_attention_step
from latentcot.kernels.delta_rule import chunked as delta_chunked
from latentcot.kernels.delta_rule import reference as delta_reference
from latentcot.kernels.delta_rule.step import delta_rule_step
from latentcot.kernels.gated_scan import chunked as scan_chunked
from latentcot.kernels.gated_scan import reference as scan_reference

H, K = 4, 64
SHAPES = [(1, 1024), (1, 4096), (4, 1024), (4, 4096)]
FAMILIES = ("hgrn", "retnet", "gla", "hgrn2", "delta_net", "gated_delta_net")
Side = Callable[..., Tensor]


def operator(family: str) -> str:
    if family == "hgrn":
        return "gated_scan"
    return "delta_rule" if "delta" in family else "decay_attention"


def inputs(family: str, B: int, S: int, heads: int = H, width: int = K) -> dict[str, Tensor]:
    """Tensors of one call, with gates as the family's initialisation makes them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if family == "hgrn":
        return {"x": normal(B, S, heads * width), "log_decay": F.logsigmoid(normal(B, S, heads * width) + 2)}
    tensors = {"q": normal(B, S, heads, width), "k": normal(B, S, heads, width), "v": normal(B, S, heads, width)}
    if operator(family) == "delta_rule":
        tensors["q"], tensors["k"] = F.normalize(tensors["q"], dim=-1), F.normalize(tensors["k"], dim=-1)
        tensors["beta"] = normal(B, S, heads).sigmoid()
    gate = {
        "retnet": lambda: torch.log1p(-(2.0 ** (-5 - torch.arange(heads)))),
        "gla": lambda: F.logsigmoid(normal(B, S, heads, width)) / 16,
        "hgrn2": lambda: F.logsigmoid(normal(B, S, heads, width) + 2),
        "gated_delta_net": lambda: F.logsigmoid(normal(B, S, heads) + 2),
    }.get(family)
    return tensors if gate is None else tensors | {"log_decay": gate()}


def ours(family: str, backend: str) -> Side:
    """One of this library's back ends, without the checks of the public function."""
    name, scale = operator(family), K**-0.5
    module: Any
    if backend == "compiled":
        from latentcot.kernels import cpu_decay_attention, cpu_delta_rule, cpu_gated_scan

        module = {
            "gated_scan": cpu_gated_scan,
            "decay_attention": cpu_decay_attention,
            "delta_rule": cpu_delta_rule,
        }[name]
    else:
        module = {"gated_scan": scan_chunked, "decay_attention": decay_chunked, "delta_rule": delta_chunked}[name]
    function = getattr(module, name)
    if name == "gated_scan":
        return lambda x, log_decay: function(x, log_decay)[0]
    if name == "decay_attention":
        return lambda q, k, v, log_decay: function(q, k, v, log_decay, scale, output_state=False)[0]
    return lambda q, k, v, beta, log_decay=None: function(q, k, v, beta, log_decay, scale, output_state=False)[0]


def loop(family: str) -> Side:
    """The definition."""
    name, scale = operator(family), K**-0.5
    if name == "gated_scan":
        return lambda x, log_decay: scan_reference.gated_scan(x, log_decay)[0]
    if name == "decay_attention":
        return lambda q, k, v, log_decay: decay_reference.decay_attention(q, k, v, log_decay, scale)[0]
    return lambda q, k, v, beta, log_decay=None: delta_reference.delta_rule(
        q, k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2), log_decay, scale
    )[0]


def softmax_attention(**tensors: Tensor) -> Tensor:
    q, k, v = (tensors[n].transpose(1, 2) for n in ("q", "k", "v"))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def chunked_of_transformers() -> Side:
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    # the function as it is written, without whatever a hub kernel may put in its place
    function = getattr(qwen.torch_chunk_gated_delta_rule, "__wrapped__", qwen.torch_chunk_gated_delta_rule)

    def side(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Tensor:
        g = torch.zeros_like(beta) if log_decay is None else log_decay  # it has no form without a gate
        return function(q, k, v, g=g, beta=beta)[0]

    return side


def lightning_of_transformers() -> Side:
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(hidden_size=H * K, num_attention_heads=H, head_dim=K, num_hidden_layers=2)
    layer: Any = MiniMaxLightningAttention(config, layer_idx=0)

    class Open(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.new_full((), 30.0)  # its sigmoid is one

    layer.qkv_proj, layer.out_proj, layer.norm = (torch.nn.Identity() for _ in range(3))
    layer.act_fn, layer.output_gate = torch.nn.Identity(), Open()

    def side(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        layer.slope_rate = -log_decay.detach().view(-1, 1, 1)
        layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(layer.slope_rate)
        packed = torch.cat([q * K**-0.5, k, v], dim=-1).flatten(2)
        return layer(packed, (packed, packed), None)[0].unflatten(2, (H, K))

    return side


def associative_scan() -> Side:
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    def combine(first: Any, second: Any) -> Any:
        return second[0] * first[0], second[0] * first[1] + second[1]

    @torch.compile
    def side(x: Tensor, log_decay: Tensor) -> Tensor:
        return scan(combine, (log_decay.exp(), x), dim=1, combine_mode="generic")[1]

    return side


def peers(family: str) -> dict[str, Callable[[], Side]]:
    found: dict[str, Callable[[], Side]] = {"loop": lambda: loop(family)}
    if operator(family) == "delta_rule":
        found["transformers"] = chunked_of_transformers
    if family == "retnet":
        found["transformers"] = lightning_of_transformers
        found["sdpa"] = lambda: softmax_attention
    if family == "hgrn":
        found["associative_scan"] = associative_scan
    return found


def one_turn(side: Side, tensors: dict[str, Tensor], backward: bool) -> float:
    """Milliseconds of one call; gradients of all inputs but constant gates."""
    if not backward:
        with torch.no_grad():
            begin = time.perf_counter()
            side(**tensors)
            return (time.perf_counter() - begin) * 1e3
    leaves = {n: t.detach().requires_grad_(t.dim() > 1) for n, t in tensors.items()}
    upstream = torch.ones(next(iter(tensors.values())).shape)
    begin = time.perf_counter()
    o = side(**leaves)
    torch.autograd.grad(o, [t for t in leaves.values() if t.requires_grad], upstream, allow_unused=True)
    return (time.perf_counter() - begin) * 1e3


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def least_bytes(tensors: dict[str, Tensor], backward: bool) -> int:
    read = sum(4 * t.numel() for t in tensors.values())
    written = 4 * next(iter(tensors.values())).numel()
    return 3 * read + 2 * written if backward else read + written


def copy_rate() -> float:
    """Bytes a second, read and written, of copying 256 MiB."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(8):
        begin = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.numel() * 4 / best


def rows_of(family: str, B: int, S: int, turns: int) -> list[dict[str, Any]]:
    tensors = inputs(family, B, S)
    with torch.no_grad():
        expected = loop(family)(**{n: t.double() for n, t in tensors.items()})
    builders: dict[str, Callable[[], Side]] = {
        "compiled": lambda: ours(family, "compiled"),
        "chunked": lambda: ours(family, "chunked"),
        **peers(family),
    }
    sides, rows = {}, []
    for name, build in builders.items():
        row: dict[str, Any] = {"family": family, "B": B, "S": S, "side": name}
        rows.append(row)
        try:
            missing = missing_for_compiled() if name == "compiled" else None
            if name == "loop" and B > 1:
                missing = "timed at B = 1 only"
            if missing is not None:
                raise RuntimeError(missing)
            side = build()
            with torch.no_grad():
                row["error"] = None if name == "sdpa" else relative_error(side(**tensors), expected)
            if name != "loop":  # nothing to warm up, and seconds each
                one_turn(side, tensors, True)
            sides[name] = side
        except Exception as error:  # a peer that is absent or refuses is part of the result
            row["not_run"] = f"{type(error).__name__}: {error}".splitlines()[0]
    times: dict[tuple[str, bool], list[float]] = {(n, b): [] for n in sides for b in (False, True)}
    for turn in range(turns):
        for name, side in sides.items():
            if name == "loop" and turn >= 3:
                continue
            for backward in (False, True):
                times[name, backward].append(one_turn(side, tensors, backward))
    for row in rows:
        for backward, label in ((False, "forward"), (True, "forward_backward")):
            found = times.get((row["side"], backward))
            if found:
                own = min(times["compiled", backward]) if ("compiled", backward) in times else math.nan
                row[f"{label}_ms"], row[f"{label}_median_ms"] = min(found), median(found)
                row[f"{label}_over_compiled"] = min(found) / own
                row[f"{label}_GB_per_s"] = least_bytes(tensors, backward) / min(found) / 1e6
                row["turns"] = len(found)
    return rows


def peak_MiB() -> float:
    """The peak of this process by the kernel's own count (Linux).

    Not ``ru_maxrss``: that one is inherited from the process that started this one, whose peak hides everything.
    """
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory_of(family: str, S: int, backend: str) -> float:
    """MiB by which a forward and backward pass raises the peak of a fresh process, its inputs not counted."""
    program = (
        "from latentcot.kernels import bench_cpu as b\n"
        f"side = b.ours({family!r}, {backend!r})\n"
        f"b.one_turn(side, b.inputs({family!r}, 1, 64), True)\n"
        f"t = b.inputs({family!r}, 1, {S})\n"
        "before = b.peak_MiB()\n"
        "b.one_turn(side, t, True)\n"
        "print(b.peak_MiB() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


def one_token() -> dict[str, float]:
    """Microseconds of one step at B = 1, H = 4, K = V = 64."""
    q, v, state = torch.randn(1, H, K), torch.randn(1, H, K), torch.randn(1, H, K, K)
    g, beta = -torch.rand(1, H), torch.rand(1, 1, H)
    calls = {
        "decay_attention": lambda: decay_attention_step(q, q, v, g, 1.0, state),
        "delta_rule": lambda: delta_rule_step(q, q.unsqueeze(1), v.unsqueeze(1), beta, g, 1.0, state),
    }
    found = {}
    for name, call in calls.items():
        best = math.inf
        with torch.no_grad():
            for _ in range(20):
                begin = time.perf_counter()
                for _ in range(50):
                    call()
                best = min(best, (time.perf_counter() - begin) / 50)
        found[name] = best * 1e6
    return found


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the CPU back ends beside other implementations.")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--turns", type=int, default=9, help="turns of each side; the loop takes three")
    parser.add_argument("--quick", action="store_true", help="B = 1, S = 1024 only, three turns")
    options = parser.parse_args()
    rates, rows = [], []
    for family in options.families:
        for B, S in SHAPES[:1] if options.quick else SHAPES:
            rates.append(copy_rate() / 1e9)
            found = rows_of(family, B, S, 3 if options.quick else options.turns)
            rows += found
            for row in found:
                where = f"{family:16s} B={B} S={S:5d} {row['side']:17s}"
                if "not_run" in row:
                    print(f"{where} not run: {row['not_run']}", flush=True)
                    continue
                error = "" if row["error"] is None else f"{row['error']:.1e}"
                print(
                    f"{where} {row['forward_ms']:9.2f} ms {row['forward_over_compiled']:7.1f}x"
                    f" {row['forward_backward_ms']:9.2f} ms {row['forward_backward_over_compiled']:7.1f}x"
                    f"  {row['forward_GB_per_s']:5.1f} {row['forward_backward_GB_per_s']:5.1f} GB/s"
                    f"  error {error}",
                    flush=True,
                )
    for row in rows:
        for label in ("forward", "forward_backward"):
            if f"{label}_GB_per_s" in row:
                row[f"{label}_of_copy_rate"] = row[f"{label}_GB_per_s"] / max(rates)
    print(f"copy rate: best {max(rates):.1f}, median {median(rates):.1f}, worst {min(rates):.1f} GB/s")
    memory = []
    backends = ["chunked"] if missing_for_compiled() else ["compiled", "chunked"]
    for family in [] if options.quick else options.families:
        for backend in backends:
            small, large = memory_of(family, 8192, backend), memory_of(family, 16384, backend)
            memory.append({"family": family, "side": backend, "MiB_at_8192": small, "MiB_at_16384": large})
            print(f"{family:16s} {backend:9s} peak +{small:.0f} MiB at S=8192, +{large:.0f} MiB at S=16384", flush=True)
    steps = one_token()
    print("one token:", ", ".join(f"{n} {t:.0f} us" for n, t in steps.items()))
    result = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "copy_rate_GB_per_s": {"best": max(rates), "median": median(rates), "worst": min(rates)},
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "versions": {n: installed(n) for n in ("torch", "numba", "transformers", "numpy")}
        | {"python": platform.python_version()},
        "sizes": {"H": H, "K": K, "V": K, "D": H * K, "dtype": "float32"},
        "rows": rows,
        "memory": memory,
        "one_token_us": steps,
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
