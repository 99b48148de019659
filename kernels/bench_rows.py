"""All numbers of one implementation of one row: times, memory, launches, cold start, errors against float64."""

import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentcot.kernels import explain_backend
from latentcot.kernels.bench_cases import BLOCK, MIXERS, Row, Shape, Tensors, counted_bytes, counted_flops, token_inputs
from latentcot.kernels.bench_measure import (
    against_ceilings,
    launches,
    peak_bytes,
    relative_rms,
    synchronize,
    time_calls,
    time_steps,
)

SETS = 2  # sets of inputs in rotation
CHECK_LENGTH = 512  # tokens of the comparison with float64
COLD_MARK = "cold-start-seconds"


@dataclass(frozen=True)
class Settings:
    """What one run was asked for."""

    rows: tuple[Row, ...]
    device: torch.device
    dtype: torch.dtype
    against: tuple[str, ...] = ()
    backward: bool = True
    tiny: bool = False
    cold: bool = False
    check: bool = True
    budget_seconds: float | None = None
    out: Path | None = None

    @property
    def seconds(self) -> float:
        """How long one call is repeated."""
        return 0.01 if self.tiny else 0.5


@dataclass(frozen=True)
class Contender:
    """One implementation of a row: this library's or a peer's."""

    label: str
    run: Callable[[Tensors], Tensor] | None
    step: Callable[[Tensors, Tensor], tuple[Tensor, Tensor]] | None
    same: bool = True
    note: str = ""


def ours(row: Row, settings: Settings) -> Contender:
    """This library's call for a row, on the back end that ``"auto"`` chooses."""
    mixer, seen = MIXERS[row.mixer], row.seen(settings.tiny)
    label = str(explain_backend(mixer.operator, device=settings.device, dtype=torch.float32))
    if row.group == "token":
        return Contender(label, None, mixer.step)
    return Contender(label, lambda x: mixer.run(x, seen, "auto"), None)


def guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns, or its exception as an entry; memory that it held is given back either way."""
    try:
        return work()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        if torch.cuda.is_available():
            gc.collect()
            with suppress(RuntimeError):  # a lost device can not give memory back either
                torch.cuda.empty_cache()


def measure(
    row: Row,
    contender: Contender,
    settings: Settings,
    rates: dict[str, float],
    *,
    cold: bool = False,
) -> dict[str, Any]:
    """All numbers of one implementation of one row. What comes first survives a failure of what comes later."""
    entry: dict[str, Any] = {"label": contender.label, "note": contender.note}
    check = settings.check and contender.same
    measured = _measure_step if row.group == "token" else _measure_sequence
    parts: list[tuple[str, Callable[[], Any]]] = [("timing", lambda: measured(row, contender, settings, rates, entry))]
    if check:
        parts.append(("errors", lambda: errors_of(row, contender, settings)))
    if cold:
        parts.append(("cold_s", lambda: cold_start(row, settings)))
    for name, part in parts:
        found = guarded(part)
        if isinstance(found, dict) and "error" in found:
            entry["error"] = "; ".join(filter(None, [entry.get("error"), f"{name}: {found['error']}"]))
        elif name != "timing":  # that one fills the entry itself
            entry[name] = found
    return entry


def _leaves(row: Row, tensors: Tensors) -> list[Tensor]:
    constants = MIXERS[row.mixer].constants
    return [x.requires_grad_() for name, x in tensors.items() if name not in constants]


def _set_against(
    timing: dict[str, Any], counted: tuple[int, int], contender: Contender, rates: dict[str, float]
) -> dict[str, Any]:
    """The timing with its floor and fractions; alone where bytes and products are those of another function."""
    return against_ceilings(timing, *counted, rates) if contender.same else timing


def _measure_sequence(
    row: Row, contender: Contender, settings: Settings, rates: dict[str, float], entry: dict[str, Any]
) -> None:
    device, call = settings.device, contender.run
    assert call is not None
    sets = [MIXERS[row.mixer].inputs(row.shape, settings.dtype, device, seed) for seed in range(SETS)]
    nbytes, flops = counted_bytes(row, row.shape, sets[0]), counted_flops(row, row.shape, 4 if settings.tiny else BLOCK)
    synchronize(device)
    begin = time.perf_counter()
    upstream = torch.randn_like(call(sets[0]))
    synchronize(device)
    entry["first_forward_s"] = time.perf_counter() - begin

    def forward(x: Tensors) -> Tensor:
        with torch.no_grad():
            return call(x)

    calls = [lambda x=x: forward(x) for x in sets]
    entry["forward"] = {
        **_set_against(time_calls(calls, device, seconds=settings.seconds), (nbytes[0], flops[0]), contender, rates),
        "peak_bytes": peak_bytes(calls[0], device),
        "launches": launches(calls[0], device),
    }
    if not settings.backward:
        return
    leaves = [_leaves(row, x) for x in sets]

    def both(n: int) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(call(sets[n]), leaves[n], upstream, allow_unused=not contender.same)

    synchronize(device)
    begin = time.perf_counter()
    both(0)
    synchronize(device)
    entry["first_both_s"] = time.perf_counter() - begin
    calls = [lambda n=n: both(n) for n in range(SETS)]
    entry["both"] = {
        **_set_against(time_calls(calls, device, seconds=settings.seconds), (nbytes[1], flops[1]), contender, rates),
        "peak_bytes": peak_bytes(calls[0], device),
        "launches": launches(calls[0], device),
    }


def _measure_step(
    row: Row, contender: Contender, settings: Settings, rates: dict[str, float], entry: dict[str, Any]
) -> None:
    step, shape, device = contender.step, row.shape, settings.device
    assert step is not None
    x = token_inputs(row, shape, settings.dtype, device, 0)
    counted = counted_bytes(row, shape, x)[0], counted_flops(row, shape)[0]
    state = torch.randn(shape.B, shape.H, shape.K, shape.V, device=device)
    with torch.no_grad():
        timing = time_steps(lambda now: step(x, now)[1], state, device, seconds=settings.seconds)
        entry["forward"] = {
            **_set_against(timing, counted, contender, rates),
            "peak_bytes": peak_bytes(lambda: step(x, state), device),
            "launches": launches(lambda: step(x, state), device),
        }


def errors_of(row: Row, contender: Contender, settings: Settings) -> dict[str, float]:
    """Relative RMS errors of o and of every gradient against float64, at B = 1 and at most 512 tokens.

    Both see the same inputs, rounded to the dtype of the run. Heads stay those of the row: kernels specialise, and some
    peers tune, for their number, and the definition's time is that of its steps however many heads there are.
    """
    mixer, device = MIXERS[row.mixer], settings.device
    full = row.shape
    shape = full._replace(B=1, S=min(full.S, CHECK_LENGTH))
    if row.group == "token":
        return _step_errors(row, contender, settings, shape)
    call = contender.run
    assert call is not None
    given = mixer.inputs(shape, settings.dtype, device, 7)
    wide = {name: x.double() for name, x in given.items()}
    generator = torch.Generator(device).manual_seed(8)
    with torch.set_grad_enabled(settings.backward):
        names = [name for name in given if name not in mixer.constants] if settings.backward else []
        leaves = [given[name].requires_grad_() for name in names]
        wide_leaves = [wide[name].requires_grad_() for name in names]
        o, exact = call(given), mixer.exact(wide, row.seen(settings.tiny))
        errors = {"o": relative_rms(o, exact)}
        if names:
            upstream = torch.randn(o.shape, generator=generator, device=device).to(o.dtype)
            gradients = torch.autograd.grad(o, leaves, upstream)
            expected = torch.autograd.grad(exact, wide_leaves, upstream.double())
            for name, actual, wanted in zip(names, gradients, expected, strict=True):
                errors[f"d_{name}"] = relative_rms(actual, wanted)
    return errors


def _step_errors(row: Row, contender: Contender, settings: Settings, shape: Shape) -> dict[str, float]:
    """One step from a random state against the same step in float64."""
    from latentcot.kernels.decay_attention import reference as decay
    from latentcot.kernels.delta_rule import reference as delta

    assert contender.step is not None
    x = token_inputs(row, shape, settings.dtype, settings.device, 7)
    state = torch.randn(1, shape.H, shape.K, shape.V, device=settings.device)
    wide = {name: (t.double().unsqueeze(1) if t.dim() > 1 else t.double()) for name, t in x.items()}
    scale, g = shape.K**-0.5, wide.get("log_decay")
    with torch.no_grad():
        o, last = contender.step(x, state.clone())
        if row.mixer in ("deltanet", "gated_deltanet"):
            k, v, beta = (wide[n].unsqueeze(2) for n in ("k", "v", "beta"))
            exact, exact_last = delta.delta_rule(wide["q"], k, v, beta, g, scale, state.double())
        else:
            exact, exact_last = decay.decay_attention(wide["q"], wide["k"], wide["v"], g, scale, state.double())
    return {"o": relative_rms(o, exact[:, 0]), "state": relative_rms(last, exact_last)}


def cold_start(row: Row, settings: Settings) -> float | None:
    """Seconds of the first forward and backward of a fresh process whose kernel cache is empty; None for a step."""
    if row.group == "token":
        return None
    dtype = str(settings.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "latentcot.kernels.bench_cold", row.name, settings.device.type, dtype]
        command += ["tiny"] if settings.tiny else []
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the fresh process failed: {done.stderr.strip()[-300:]}")
    return float(done.stdout.split(COLD_MARK)[1].split()[0])
