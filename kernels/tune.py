"""Choose launch shapes by measurement: ``python -m latentcot.kernels.tune [--kernels ...] [--shapes ...] [--write]``.

For each kernel and shape class the search starts at the launch shape that runs now and changes one of chunk, block,
warps and stages at a time, as long as something gets faster. A candidate must give the same outputs and gradients as
the present shape, up to rounding, before it is timed. Every trial is kept in ``--out``; ``--write`` puts the winners
into ``launch_shapes.json``, which the kernels read. Nothing is searched when a kernel is called.

The operator's call is timed as a whole, forward or forward + backward, so a candidate that speeds up its kernel and
slows the next one down does not win.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentcot.kernels import Causal, launch
from latentcot.kernels.bench_cases import MIXERS, Shape
from latentcot.kernels.bench_measure import relative_rms, time_calls
from latentcot.kernels.launch import Launch
from latentcot.kernels.tune_compile import compile_ahead, default_processes

GAIN = 0.98  # a candidate must need less than this share of the time: a smaller difference is noise
# Launch shapes of one kernel differ in rounding alone: relative RMS of outputs and of gradients of gates, per element size
SAME = {2: (5e-3, 2e-2), 4: (1e-5, 1e-4)}
GATES = ("log_decay", "beta", "f", "a", "b", "A_log", "dt_bias", "lower_bound")
NOTE = (
    "Per architecture, kernel and shape class: chunk, block, warps, stages. Found by python -m latentcot.kernels.tune on "
    "the architectures listed under 'measured'; entries of every other architecture are untested guesses derived from them."
)


@dataclass(frozen=True)
class Tunable:
    """A kernel that looks its launch shape up, what exercises it and which values are tried.

    Attributes:
        mixers: rows of the benchmark whose calls run it; a candidate is judged by the mean over them.
        backward: whether it runs in the backward pass, or its shape matters there.
        chunks, blocks, warps, stages: the values of each part. A single 0 leaves that part alone: the kernel takes it
            from another one.
    """

    mixers: tuple[str, ...]
    backward: bool
    chunks: tuple[int, ...]
    blocks: tuple[int, ...]
    warps: tuple[int, ...] = (2, 4, 8)
    stages: tuple[int, ...] = (1, 2, 3, 4)

    def neighbours(self, at: Launch) -> Iterator[Launch]:
        """Every launch shape that differs from ``at`` in one part."""
        for part, values in zip(Launch._fields, (self.chunks, self.blocks, self.warps, self.stages), strict=True):
            if values == (0,):
                continue
            for value in values:
                if value != getattr(at, part):
                    yield at._replace(**{part: value})


KERNELS: dict[str, Tunable] = {
    "decay_forward": Tunable(("retnet", "simple_gate"), True, (16, 32, 64, 128), (16, 32, 64, 128)),
    "decay_overlap": Tunable(("simple_gate",), True, (16, 32, 64, 128), (16, 32, 64)),
    "decay_pairs": Tunable(("gla",), True, (16, 32, 64), (32, 64, 128)),
    "hgrn2_pairs": Tunable(("hgrn2",), True, (32,), (16, 32, 64, 128), (1, 2, 4)),  # the chunk is that of decay_pairs
    "decay_values": Tunable(("gla", "hgrn2"), True, (0,), (16, 32, 64, 128)),
    "decay_gradients": Tunable(("gla", "hgrn2"), True, (0,), (16, 32, 64, 128)),
    "delta_forward": Tunable(("deltanet", "gated_deltanet"), True, (16, 32, 64), (16, 32, 64, 128)),
    "delta_reverse": Tunable(("deltanet", "gated_deltanet"), True, (0,), (16, 32, 64, 128)),
    "delta_left": Tunable(("deltanet", "gated_deltanet"), True, (16, 32, 64), (16, 32, 64, 128)),
    "delta_right": Tunable(("deltanet", "gated_deltanet"), True, (16, 32, 64), (0,)),
    "delta_channel_forward": Tunable(("kda",), True, (16, 32, 64), (16, 32, 64, 128)),
    "delta_channel_reverse": Tunable(("kda",), True, (0,), (16, 32, 64, 128)),
    "delta_channel_left": Tunable(("kda",), True, (0,), (16, 32, 64, 128)),
    "delta_channel_right": Tunable(("kda",), True, (0,), (0,)),
    "gated_scan_forward": Tunable(("hgrn",), False, (8, 16, 32, 64), (32, 64, 128, 256), (1, 2, 4)),
    "gated_scan_backward": Tunable(("hgrn",), True, (8, 16, 32, 64), (32, 64, 128, 256), (1, 2, 4)),
}
SHAPES = ("64x64", "128x128", "256x256", "128x256", "256x512")


@contextmanager
def watched() -> Iterator[dict[str, dict[str, Launch]]]:
    """Record every lookup of a launch shape inside: kernel -> shape class -> what it was given."""
    seen: dict[str, dict[str, Launch]] = {}
    original = launch.launch_shape

    def looked_up(
        kernel: str, K: int, V: int, dtype: torch.dtype, device: torch.device, default: Launch
    ) -> Launch:  # fmt: skip
        found = original(kernel, K, V, dtype, device, default)
        seen.setdefault(kernel, {})[launch.shape_class(K, V, dtype)] = found
        return found

    # the kernels' modules hold the function under its own name
    holders = [m for name, m in sys.modules.items() if name.startswith("latentcot.kernels") and m is not None]
    holders = [m for m in holders if getattr(m, "launch_shape", None) is original]
    for module in holders:
        module.launch_shape = looked_up  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield seen
    finally:
        for module in holders:
            module.launch_shape = original  # pyright: ignore[reportAttributeAccessIssue]


class Workload:
    """Calls of one mixer at one shape: its results, to compare candidates with, and its time."""

    def __init__(self, mixer: str, shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool) -> None:
        self.mixer, self.device, self.backward, self.dtype = MIXERS[mixer], device, backward, dtype
        self.x = self.mixer.inputs(shape, dtype, device, 0)
        self.names = [name for name in self.x if name not in self.mixer.constants] if backward else []
        self.leaves = [self.x[name].requires_grad_() for name in self.names]
        self.upstream: Tensor | None = None

    def results(self) -> dict[str, Tensor]:
        """o, and the gradients of every input by name if the backward pass counts."""
        with torch.set_grad_enabled(self.backward):
            o = self.mixer.run(self.x, Causal(), "triton")
            if not self.backward:
                return {"o": o}
            if self.upstream is None:
                self.upstream = torch.randn_like(o)
            gradients = torch.autograd.grad(o, self.leaves, self.upstream)
        return {"o": o.detach(), **dict(zip(self.names, gradients, strict=True))}

    def milliseconds(self) -> float:
        """Median time of one call."""
        return float(time_calls([self.results], self.device, seconds=0.2, most=50)["ms"])


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype) -> str | None:
    """What is not the same up to rounding, in words; None when everything is."""
    plain, gates = SAME[dtype.itemsize]
    for name, wanted in expected.items():
        error = relative_rms(found[name], wanted)
        bound = gates if name in GATES else plain
        if not error < bound:  # NaN fails too
            return f"{name} differs by {error:.1e}, allowed {bound:.0e}"
    return None


def search(
    tunable: Tunable,
    start: Launch,
    judge: Callable[[Launch], float],
    spent: Callable[[], bool] = lambda: False,
    prepare: Callable[[list[Launch]], None] = lambda candidates: None,
) -> tuple[Launch, float]:
    """The best launch shape reached from ``start`` by changing one part at a time, and its score.

    ``judge`` returns the time of a candidate as a share of the present time, or infinity where it fails or is wrong.
    ``prepare`` is given the candidates of a round before the first of them is judged.
    """
    best, score = start, 1.0
    tried = {start}
    improved = True
    while improved and not spent():
        improved = False
        around = [candidate for candidate in tunable.neighbours(best) if candidate not in tried]
        prepare(around)
        for candidate in around:
            if spent():
                break
            tried.add(candidate)
            found = judge(candidate)
            if found < score * GAIN:
                best, score, improved = candidate, found, True
    return best, score


def tune(
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    trials: list[dict[str, Any]],
    spent: Callable[[], bool],
    done: set[tuple[str, str]],
    workload: Callable[..., Any] = Workload,
    processes: int = 0,
) -> dict[str, Launch]:
    """Shape class -> launch shape of one kernel where something faster than the present shape was found.

    A shape with K and V apart is looked up both ways round in one call; one launch shape then serves both classes.
    """
    tunable = KERNELS[name]
    work, before, expected = [], [], []
    classes: dict[str, Launch] = {}
    for mixer in tunable.mixers:
        this = workload(mixer, shape, dtype, device, tunable.backward)
        this.results()  # imports the kernels, so that their lookups can be watched
        with watched() as seen:
            results = this.results()
        if name in seen:
            classes = {**seen[name], **classes}
            work.append(this)
            expected.append(results)
            before.append(this.milliseconds())
    if not work:
        raise RuntimeError(f"{name}: no call of {', '.join(tunable.mixers)} at {tuple(shape)} looks it up")
    if all((name, key) in done for key in classes):
        return {}
    done.update((name, key) for key in classes)

    def judge(candidate: Launch) -> float:
        trial: dict[str, Any] = {"kernel": name, "classes": sorted(classes), "launch": list(candidate)}
        trials.append(trial)
        shares = []
        try:
            with launch.override(**{name: candidate}):
                for this, wanted, ms in zip(work, expected, before, strict=True):
                    wrong = differences(this.results(), wanted, dtype)
                    if wrong is not None:
                        trial["wrong"] = wrong
                        return math.inf
                    shares.append(this.milliseconds() / ms)
        except Exception as error:  # too much shared memory, a shape the compiler refuses
            trial["failed"] = f"{type(error).__name__}: {error}"[:200]
            return math.inf
        trial["share"] = math.exp(sum(map(math.log, shares)) / len(shares))
        return trial["share"]

    start = classes.get(launch.shape_class(shape.K, shape.V, dtype), next(iter(classes.values())))

    def prepare(candidates: list[Launch]) -> None:
        if processes > 1 and len(candidates) > 1:
            compile_ahead(name, shape, dtype, device, candidates, processes=processes)

    best, score = search(tunable, start, judge, spent, prepare)
    trials.append(
        {"kernel": name, "classes": sorted(classes), "launch": list(best), "share": score, "before": list(start),
         "before_ms": before, "best": True}
    )  # fmt: skip
    return dict.fromkeys(classes, best) if score < 1.0 else {}


def merge(table: dict[str, Any], architecture: str, found: Mapping[str, Mapping[str, Launch]]) -> dict[str, Any]:
    """``table`` with the entries of one architecture added or replaced, and guesses for architectures never measured.

    sm_100 takes the entries of sm_90 as they are; sm_80 those with at most two stages, because its shared memory is
    smaller. The kernels ignore the keys ``note`` and ``measured``.
    """
    new = {key: value for key, value in table.items() if key not in ("note", "measured")}
    measured = sorted({*table.get("measured", []), architecture})
    own = new.setdefault(architecture, {})
    for kernel, classes in found.items():
        own.setdefault(kernel, {}).update({key: list(shape) for key, shape in classes.items()})
    if architecture == "sm_90":
        for other, stages in (("sm_100", 99), ("sm_80", 2)):
            if other not in measured:
                new[other] = {
                    kernel: {key: [c, b, w, min(s, stages)] for key, (c, b, w, s) in classes.items()}
                    for kernel, classes in own.items()
                }
    return {"note": NOTE, "measured": measured, **{key: new[key] for key in sorted(new)}}


def _write(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with code 2 and a sentence for what does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m latentcot.kernels.tune", description="Choose launch shapes by measurement."
    )
    parser.add_argument("--kernels", default=",".join(KERNELS), help="names separated by commas")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="KxV separated by commas")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="try nothing new after this time")
    parser.add_argument("--processes", type=int, default=default_processes(), help="that compile ahead; 0: none")
    parser.add_argument("--out", type=Path, help="JSON file of all trials, rewritten after every kernel and shape")
    parser.add_argument("--write", action="store_true", help=f"put the winners into {launch.TABLE.name}")
    given = parser.parse_args(arguments)
    given.kernels = [name for name in given.kernels.split(",") if name]
    for name in given.kernels:
        if name not in KERNELS:
            parser.error(f"--kernels: {name!r} is no kernel, expected some of {', '.join(KERNELS)}")
    try:
        given.shapes = [tuple(map(int, text.split("x"))) for text in given.shapes.split(",") if text]
        if any(len(shape) != 2 or min(shape) < 1 for shape in given.shapes):
            raise ValueError
    except ValueError:
        parser.error("--shapes: expected KxV separated by commas, for instance 128x128,256x512")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on the current CUDA device; 1 when a kernel could not be exercised."""
    given = parse(arguments)
    if not torch.cuda.is_available():
        print("python -m latentcot.kernels.tune: PyTorch sees no CUDA device, and there is nothing to time without one")
        return 2
    device, dtype = torch.device("cuda"), getattr(torch, given.dtype)
    begin, failed = time.monotonic(), 0
    trials: list[dict[str, Any]] = []
    found: dict[str, dict[str, Launch]] = {}
    done: set[tuple[str, str]] = set()

    def spent() -> bool:
        return time.monotonic() - begin > given.budget_seconds

    for K, V in given.shapes:
        for name in given.kernels:
            if spent():
                print(f"left out: {name} at {K}x{V} (the time was used up)")
                continue
            shape = Shape(8, 4096, max(1, 2048 // max(K, V)), K, V)
            try:
                winners = tune(name, shape, dtype, device, trials, spent, done, processes=given.processes)
            except Exception as error:
                failed = 1
                print(f"{name} {K}x{V}: FAILED {type(error).__name__}: {error}", flush=True)
                continue
            finally:
                torch.cuda.empty_cache()
                if given.out is not None:
                    _write(given.out, trials)
            found.setdefault(name, {}).update(winners)
            last = trials[-1] if trials else {}
            print(f"{name} {K}x{V}: {winners or 'kept'} ({last.get('share', 1.0):.3f} of the time)", flush=True)
            if given.write and winners:
                table = json.loads(launch.TABLE.read_text()) if launch.TABLE.exists() else {}
                _write(launch.TABLE, merge(table, launch.architecture(device), {name: winners}))
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
