r"""What leaving early saves: ``python -m latentcot.recurrent_depth.bench``, wall time and FLOPs beside the formula and a floor.

A pass of r recurrences whose rows leave after :math:`\bar n` of them on average should cost, of the pass at full depth,

.. math:: \frac{P + \bar n\, C + k\,(Q + H) + Q + H}{P + r\, C + Q + H}

(FLOPs of prelude P, adapter and core C, coda Q, head H; k checks that decode). Every row of the page has this *formula*, the ratio of
FLOPs that PyTorch counts, and ratios of time; the bar is 1.15 times the formula. One thread computes, so that its CPU time is the wall
time of a machine that does nothing else; the wall time of the run itself stands beside it. The formula, which is the bar's, decodes a row
once more after its last check; what runs does not.

* ``full``: the same model at full depth, as one decodes without exits (``full`` step cache, or no exit rule).
* ``floor``: the same blocks on exactly the rows at work, recurrence by recurrence, on states that lie ready: no criterion, no choice of
  rows, no writing. What the floor misses is the hardware's: a product with 16 rows may take as long as one with 32.

Variants take turns within a repetition, and the shortest time of each counts. Weights are random, and the threshold is set so that the mean
depth of the first token (or of the sequences) is about half of r: what is measured is the machinery, not when a trained model stops.
"""

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from latentcot.backbone import HybridConfig, HybridForCausalLM, ModelState, SequenceContext, lay_out_for_decoding
from latentcot.backbone.mixers.attention import AttendedState
from latentcot.files import write_text
from latentcot.recurrent_depth.bench_page import page
from latentcot.recurrent_depth.columns import ATTENTION
from latentcot.recurrent_depth.exit_law import exit_law, quantile_step
from latentcot.recurrent_depth.exit_rule import NO_EXIT, ExitRule
from latentcot.recurrent_depth.loop import DepthLoop
from latentcot.recurrent_depth.ouro import Ouro
from latentcot.recurrent_depth.step_cache import StepCache
from latentcot.training.budget import FlopCounter

BAR = 1.15
REPEATED = 8
FOLDER = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


@dataclass(frozen=True)
class Sizes:
    """What is run: ``rows`` B, ``prompt`` S, ``width`` D, ``recurrences`` r, ``tokens`` decoded and timed, ``repeats``."""

    rows: int = 32
    prompt: int = 128
    width: int = 256
    vocab: int = 512
    recurrences: int = 12
    tokens: int = 4
    repeats: int = 5


Variant = Callable[[], tuple[Tensor, Tensor]]
"""One run: seconds ``[2]`` by the two clocks of :func:`now`, and recurrences that each row (or token and row) took."""


def now() -> Tensor:
    """Seconds of this process's CPU time and of the wall clock, ``[2]``."""
    return torch.tensor([time.process_time(), time.perf_counter()], dtype=torch.float64)


def parse(arguments: Sequence[str] | None = None) -> tuple[Sizes, Path, list[str]]:
    """Sizes, the folder to write to and the names of the cases; leaves with code 2 for what does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m latentcot.recurrent_depth.bench", description="Cost of leaving early."
    )
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=_positive, default=value, help=f"default {value}")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of depth.json and depth.md")
    parser.add_argument("--case", default="", help="run the cases whose name holds this alone")
    given = vars(parser.parse_args(arguments))
    out: Path = given.pop("out")
    wanted: str = given.pop("case")
    if not out.is_dir():
        parser.error(f"--out: there is no folder {out}")
    if given["width"] % 8:
        parser.error(f"--width: {given['width']} given, expected a multiple of 8 (4 heads of an even width)")
    names = [name for name in cases(Sizes(**given)) if wanted in name]
    if not names:
        parser.error(f"--case: no name holds {wanted!r}; there are {', '.join(cases(Sizes(**given)))}")
    return Sizes(**given), out, names


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return number


# -- models ------------------------------------------------------------------------------------------------------------


@cache
def make_loop(sizes: Sizes, mixer: str) -> DepthLoop:
    """Prelude 1, core 2, coda 1; the core of ``mixer``. The adapter forgets the state, so that rows settle as trained ones do."""
    torch.manual_seed(0)
    config = _config(sizes, [ATTENTION, mixer, mixer, ATTENTION])
    loop = DepthLoop(HybridForCausalLM(config), {"prelude": 1, "core": 2, "coda": 1}).eval()
    with torch.no_grad():
        loop.adapter.weight[:, : sizes.width] *= 0.3
    return lay_out_for_decoding(loop)


@cache
def make_ouro(sizes: Sizes, mixer: str) -> Ouro:
    """Two looped blocks and a gate that says something else of every token."""
    torch.manual_seed(0)
    config = _config(sizes, [mixer] * 2, norm_placement="sandwich_pre_residual")
    model = Ouro(HybridForCausalLM(config), {"steps": sizes.recurrences}).eval()
    with torch.no_grad():
        model.gate.weight.normal_(0, 1 / sizes.width**0.5)
        model.gate.bias.fill_(-2.5)
    return lay_out_for_decoding(model)


def _config(sizes: Sizes, mixers: list[str], **more: Any) -> HybridConfig:
    return HybridConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        num_hidden_layers=len(mixers),
        mixers=mixers,
        attention={"num_heads": 4},
        gated_deltanet={"num_heads": 4, "head_dim": sizes.width // 4},
        intermediate_size=3 * sizes.width,
        initializer_range=0.06,
        **more,
    )


# -- depth recurrence --------------------------------------------------------------------------------------------------


@cache
def sequences(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, S]`` and initial states ``[B, S, D]``."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, sizes.vocab, (sizes.rows, sizes.prompt), generator=generator)
    return ids, 0.6 * torch.randn(*ids.shape, sizes.width, generator=generator)


@cache
def behind_prompt(sizes: Sizes, mixer: str) -> ModelState:
    """The state after them at full depth, which every look-up rule here can go on with. Few rows are read and repeated: speed does not
    depend on what a state holds, and the tokens behind it are those of each row."""
    few = -(-sizes.rows // REPEATED)
    ids, start = (t[:few] for t in sequences(sizes))
    output = make_loop(sizes, mixer).recur(
        ids, sizes.recurrences, initial_state=start, use_cache=True, step_cache=StepCache(), logits_to_keep=1
    )
    assert output.state is not None
    return output.state.expand(REPEATED).select(slice(0, sizes.rows))


class LoopCase:
    """A depth loop, decoding behind a prompt or reading whole sequences."""

    def __init__(self, sizes: Sizes, mixer: str, rule: ExitRule, policy: StepCache | None):
        self.sizes, self.policy = sizes, policy
        self.loop = make_loop(sizes, mixer)
        self.ids, self.start = sequences(sizes)
        generator = torch.Generator().manual_seed(2)
        shape = (sizes.tokens + 1, sizes.rows, 1)
        self.tokens = torch.randint(0, sizes.vocab, shape, generator=generator)
        self.begins = 0.6 * torch.randn(*shape, sizes.width, generator=generator)
        self.state = None if policy is None else behind_prompt(sizes, mixer)
        self.rule = replace(rule, threshold=self._threshold(rule))

    def _threshold(self, rule: ExitRule) -> float:
        """The threshold under which the first token, or the sequences, take half of the recurrences on average."""
        watched: list[Tensor] = []

        class Watch(ExitRule):
            def settled(self, value: Tensor, mask: Tensor) -> Tensor:
                watched.append(value[:, 0])
                return torch.zeros(len(value), dtype=torch.bool)

        watch = Watch(rule.kind, check_every=rule.check_every)
        _ = self._read(watch) if self.policy is None else self._decode(self.policy, watch, self.state, 0, 1)
        values = torch.stack(watched).cummin(0).values  # a row has left once it was below
        limits = values.flatten().sort().values
        taken = rule.check_every * (1 + (values[None] >= limits[:, None, None]).sum(1))
        mean = taken.clamp(max=self.sizes.recurrences).double().mean(1)
        return float(limits[(mean - self.sizes.recurrences / 2).abs().argmin()])

    def _read(self, rule: ExitRule) -> tuple[Tensor, Tensor]:
        begin = now()
        output = self.loop.recur(
            self.ids, self.sizes.recurrences, initial_state=self.start, exit_rule=rule, logits_to_keep=1
        )
        return now() - begin, output.recurrences

    def _decode(
        self, policy: StepCache, rule: ExitRule, state: ModelState | None, first: int, last: int
    ) -> tuple[Tensor, Tensor, ModelState | None]:
        """Tokens ``first`` to ``last - 1`` behind ``state``: seconds, recurrences, and the state after them."""
        taken, begin = [], now()
        for number in range(first, last):
            output = self.loop.recur(
                self.tokens[number],
                self.sizes.recurrences,
                initial_state=self.begins[number],
                exit_rule=rule,
                state=state,
                step_cache=policy,
            )
            state = output.state
            taken.append(output.recurrences)
        return now() - begin, torch.stack(taken), state

    def _policy(self, name: str) -> StepCache | None:
        return StepCache() if name == "full" and self.policy is not None else self.policy

    def ready(self, name: str) -> ModelState | None:
        """The state that is decoded from: behind the prompt and one token at full depth, which finds the room to grow in for the state of
        every recurrence."""
        policy = self._policy(name)
        return None if policy is None else self._decode(policy, NO_EXIT, self.state, 0, 1)[2]

    def run(self, name: str, start: ModelState | None) -> tuple[Tensor, Tensor]:
        """``full``, ``same path`` or ``exits``, from :meth:`ready` on."""
        rule, policy = self.rule if name == "exits" else NO_EXIT, self._policy(name)
        if policy is None:
            return self._read(rule)
        return self._decode(policy, rule, start, 1, self.sizes.tokens + 1)[:2]

    def variants(self, taken: Tensor) -> dict[str, Variant]:
        """What is timed; the floor is that of depths ``taken``."""
        names = ("full", "exits") if self.policy is None else ("full", "same path", "exits")
        floor = taken[None] if self.policy is None else taken
        return {**{name: partial(_from_start, self, name) for name in names}, "floor": lambda: self._floor(floor)}

    def _floor(self, taken: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks alone, on the first n rows where n are at work."""
        loop, decoding = self.loop, self.policy is not None
        state = self.state
        ids, s = (self.tokens[0], self.begins[0]) if decoding else (self.ids, self.start)
        ready = {} if state is None else {n: _lying_ready(state, n) for n in _sizes(taken)}
        begin = now()
        for steps in taken:
            embedded = self._run(loop.embed(ids), slice(0, 1), 0, ready)
            for i in range(int(steps.max())):
                n = int((steps > i).sum())
                hidden = self._run(loop.adapter(s[:n], embedded[:n]), loop.core, i, ready)
                if self.rule.decoded and self.rule.due(i + 1) and i + 1 < self.sizes.recurrences:
                    loop.backbone.head(self._run(loop.backbone.model.norm(hidden), loop.coda, 0, ready)[:, -1:])
            loop.backbone.head(self._run(loop.backbone.model.norm(s), loop.coda, 0, ready)[:, -1:])
        return now() - begin, taken

    def _run(self, hidden: Tensor, blocks: slice, recurrence: int, ready: dict[int, ModelState]) -> Tensor:
        state = ready.get(len(hidden))
        context = SequenceContext.build(len(hidden), hidden.shape[1], state=state)
        return self.loop.backbone.run(hidden, context, blocks, state, recurrence)[0]

    def formula(self, taken: Tensor) -> float:
        """Cost by the formula; ``taken`` of tokens and rows, or of rows."""
        new, past = (1, self.sizes.prompt + 1) if self.policy is not None else (self.sizes.prompt, 0)
        r = self.sizes.recurrences
        checks = self.rule.checks(taken.clamp(max=r - 1)).double().mean() if self.rule.decoded else 0  # type: ignore[union-attr]
        flops = self.loop.flops(new, past, recurrences=taken.double().mean(), head=1, checks=checks)
        return float(flops) / float(self.loop.flops(new, past, recurrences=r, head=1))


# -- looped stacks -----------------------------------------------------------------------------------------------------


class StackCase:
    """Ouro with its own exits."""

    def __init__(self, sizes: Sizes, mixer: str, decoding: bool):
        self.sizes, self.decoding, self.model = sizes, decoding, make_ouro(sizes, mixer)
        self.ids, generator = sequences(sizes)[0], torch.Generator().manual_seed(2)
        self.tokens = torch.randint(0, sizes.vocab, (sizes.tokens + 1, sizes.rows, 1), generator=generator)
        few = self.ids[: -(-sizes.rows // REPEATED)] if decoding else self.ids
        read = self.model.unroll(few, use_cache=decoding)
        self.states = None
        if read.states is not None:
            self.states = read.states.select(torch.arange(len(few)).repeat_interleave(REPEATED)[: sizes.rows])
        # the quantile at which half of the steps are taken on average, from the gate behind the prompt
        law = exit_law(read.gate[:, :, -1])
        grid = torch.linspace(0, 1, 201)
        means = torch.stack([quantile_step(law, float(q)).double().mean() for q in grid])
        self.q = float(grid[(means - sizes.recurrences / 2).abs().argmin()])

    def _run(self, q: float) -> tuple[Tensor, Tensor]:
        begin = now()
        if self.states is None:
            out = self.model.recur(self.ids, q, logits_to_keep=1)
            return now() - begin, out.steps
        states, taken = self.states, []
        for number, token in enumerate(self.tokens):
            if number == 1:
                begin = now()
            hidden, states, steps = self.model.read_token(token, states, q)
            self.model.backbone.lm_head(hidden)
            taken.append(steps)
        return now() - begin, torch.stack(taken[1:] or taken)

    def ready(self, name: str) -> None:
        """Nothing: the first token is part of a run and not timed."""

    def run(self, name: str, start: None = None) -> tuple[Tensor, Tensor]:
        """``full`` or ``exits``."""
        return self._run(self.q if name == "exits" else 1.0)

    def variants(self, taken: Tensor) -> dict[str, Variant]:
        """What is timed; the floor is that of depths ``taken``."""
        steps = taken if self.decoding else taken[None]
        names = ("full", "exits")
        return {**{name: partial(_from_start, self, name) for name in names}, "floor": lambda: self._floor(steps)}

    def _floor(self, taken: Tensor) -> tuple[Tensor, Tensor]:
        backbone, ready = self.model.backbone, {}
        if self.states is not None:
            whole = self.states.steps[0]
            entries = {place: e for step in self.states.steps for place, e in step.entries.items()}
            ready = {n: _lying_ready(replace(whole, entries=entries), n) for n in _sizes(taken)}
        ids = self.tokens[0] if self.decoding else self.ids
        begin = now()
        for steps in taken:
            hidden = backbone.embed(ids)
            for i in range(int(steps.max())):
                n = int((steps > i).sum())
                state = ready.get(n)
                context = SequenceContext.build(n, hidden.shape[1], state=state)
                backbone.model.norm(backbone.run(hidden[:n], context, slice(None), state, i if state else 0)[0])
            backbone.lm_head(hidden[:, -1:])
        return now() - begin, taken

    def formula(self, taken: Tensor) -> float:
        new, past = (1, self.sizes.prompt + 1) if self.decoding else (self.sizes.prompt, 0)
        count = FlopCounter(self.model.backbone)
        one = count(new, past) + self.model.gate_flops * new
        return float(
            (taken.double().mean() * one + count.head) / (self.sizes.recurrences * one + count.head)  # type: ignore[operator]
        )


# -- the floor's states ------------------------------------------------------------------------------------------------


class _Ready(AttendedState):
    """Keys and values that are read and not written."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, self["keys"], self["values"])


def _lying_ready(state: ModelState, rows: int) -> ModelState:
    kept = state.select(slice(0, rows))
    entries = {p: _Ready(ATTENTION, e.tensors) if e.mixer == ATTENTION else e for p, e in kept.entries.items()}
    return replace(kept, entries=entries)


def _sizes(taken: Tensor) -> set[int]:
    """Numbers of rows at work that come up."""
    return {int((steps > i).sum()) for steps in taken for i in range(int(steps.max()))} | {taken.shape[1]}


def _from_start(case: "LoopCase | StackCase", name: str) -> tuple[Tensor, Tensor]:
    return case.run(name, case.ready(name))  # type: ignore[arg-type]


# -- measuring ---------------------------------------------------------------------------------------------------------


def cases(sizes: Sizes) -> dict[str, Callable[[], LoopCase | StackCase]]:
    """Name -> how to make it."""
    latent, kl = ExitRule("latent_difference"), ExitRule("kl", check_every=4)
    latest, skip = StepCache("latest"), StepCache("skip")
    delta = "gated_deltanet"
    return {
        "decoding, latent difference": lambda: LoopCase(sizes, ATTENTION, latent, latest),
        "decoding, latent difference, skip": lambda: LoopCase(sizes, ATTENTION, latent, skip),
        "decoding, KL every 4": lambda: LoopCase(sizes, ATTENTION, kl, latest),
        "decoding, linear core, hold": lambda: LoopCase(sizes, delta, latent, StepCache("latest", gaps="hold")),
        "decoding, linear core, copy": lambda: LoopCase(sizes, delta, latent, StepCache("latest", gaps="copy")),
        "decoding, looped stack": lambda: StackCase(sizes, ATTENTION, True),
        "sequences, latent difference": lambda: LoopCase(sizes, ATTENTION, latent, None),
        "sequences, KL every 4": lambda: LoopCase(sizes, ATTENTION, kl, None),
        "sequences, looped stack": lambda: StackCase(sizes, ATTENTION, False),
    }


@torch.no_grad()
def measure(case: LoopCase | StackCase, repeats: int) -> dict[str, Any]:
    """One row: depths, ratios of time and of FLOPs, and what they are held against."""
    counted, taken = {}, torch.empty(0)
    for name in ("full", "exits"):
        start = case.ready(name)
        with FlopCounterMode(display=False) as counter:
            taken = case.run(name, start)[1]  # type: ignore[arg-type]
        counted[name] = counter.get_total_flops()
    variants = case.variants(taken)
    shortest = {name: torch.full((2,), torch.inf, dtype=torch.float64) for name in variants}
    for _ in range(repeats if taken.dim() == 2 else -(-repeats // 4)):  # a pass over sequences is long enough by itself
        for name, run in variants.items():
            shortest[name] = torch.minimum(shortest[name], run()[0])
    seconds = {name: float(found[0]) for name, found in shortest.items()}
    wall = {name: float(found[1]) for name, found in shortest.items()}
    formula = case.formula(taken)
    row: dict[str, Any] = {"mean_depth": float(taken.double().mean()), "deepest": int(taken.max())}
    row |= {"depths": taken.flatten().bincount().tolist(), "formula": formula}
    row |= {"flops": counted["exits"] / counted["full"], "milliseconds": {n: 1e3 * s for n, s in seconds.items()}}
    row |= {"wall": wall["exits"] / wall["full"], "wall_milliseconds": {n: 1e3 * s for n, s in wall.items()}}
    for name in variants:
        if name != "full":
            row[name] = seconds[name] / seconds["full"]
    row |= {"of_formula": row["exits"] / formula, "of_floor": seconds["exits"] / seconds["floor"]}
    if "same path" in row:
        row["of_formula_same_path"] = row["exits"] / row["same path"] / formula
    return row


def environment() -> dict[str, Any]:
    """What the numbers belong to."""
    name = next((l.split(":")[1].strip() for l in _cpuinfo() if l.startswith("model name")), platform.processor())
    return {
        "date": datetime.date.today().isoformat(),
        "machine": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": "float32",
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def kept_rows(path: Path, sizes: Sizes) -> dict[str, Any]:
    """Rows that the file holds of the same sizes, machine and versions: a run of some cases leaves the others as they are."""
    if not path.is_file():
        return {}
    held = json.loads(path.read_text())
    here = {**environment(), "date": held["environment"]["date"]}
    return held["rows"] if (held["environment"], held["sizes"]) == (here, vars(sizes)) else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the page and its numbers."""
    sizes, out, names = parse(arguments)
    torch.set_num_threads(1)
    rows = kept_rows(out / "depth.json", sizes)
    with Progress() as progress:
        task = progress.add_task("cost of leaving early", total=len(names))
        for name in names:
            progress.update(task, description=name)
            with torch.no_grad():
                case = cases(sizes)[name]()
            rows[name] = {"date": environment()["date"], **measure(case, sizes.repeats)}
            # after every case, so that a run that is stopped has what it measured
            result = {"environment": environment(), "sizes": vars(sizes), "bar": BAR, "rows": rows}
            result["rows"] = {known: rows[known] for known in cases(sizes) if known in rows}
            write_text(out / "depth.json", json.dumps(result, indent=1) + "\n")
            write_text(out / "depth.md", page(result))
            progress.advance(task)


if __name__ == "__main__":
    main()
