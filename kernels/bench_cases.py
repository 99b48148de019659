"""Rows of the kernel benchmark: which mixer at which shape, its inputs, its bytes and its matrix products.

A :class:`Mixer` says how inputs are drawn, which call of this library is timed, and what the call must equal in
float64. A :class:`Row` puts a mixer at a shape and, where there are any, sets the bars beside it. Shape letters: B batch,
S sequence, H heads, K key width, V value width, C chunk, L block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.kernels import (
    Bidirectional,
    BlockCausal,
    Causal,
    decay_attention,
    delta_rule,
    gated_scan,
    l2_norm,
)
from latentcot.kernels.decay_attention.step import decay_attention_step
from latentcot.kernels.delta_rule.step import delta_rule_step
from latentcot.kernels.dispatch import Backend
from latentcot.kernels.visibility import Visibility

Tensors = dict[str, Tensor]
Group = Literal["anchor", "more", "visibility", "study", "long", "token"]
BLOCK = 64  # tokens of a block in the block-causal rows


class Shape(NamedTuple):
    """Sizes of one row; the gated scan is D = H·V wide and has no K."""

    B: int
    S: int
    H: int
    K: int
    V: int


class Pair(NamedTuple):
    """One number for the forward pass, one for forward and backward together."""

    forward: float
    both: float


@dataclass(frozen=True)
class Mixer:
    """One token mixer as it is timed.

    Attributes:
        operator: the family, as :func:`latentcot.kernels.explain_backend` knows it.
        inputs: ``(shape, dtype, device, seed) -> tensors``; every tensor but those of ``constants`` gets a gradient.
        run: ``(tensors, visibility, backend) -> o``: the call that is timed.
        exact: ``(tensors, visibility) -> o``: the same function composed of elementwise operations and the
            step-by-step reference; called with float64 tensors.
        products: floating-point operations of the matrix products that the recurrence itself needs, in units of K·V
            for a token and head: forward, and backward with the state formed once more.
        step: ``(tensors of one token, state) -> (o, state)``, for the one-token rows.
        constants: inputs without a gradient.
    """

    operator: str
    inputs: Callable[[Shape, torch.dtype, torch.device, int], Tensors]
    run: Callable[[Tensors, Visibility, Backend], Tensor]
    exact: Callable[[Tensors, Visibility], Tensor]
    products: tuple[int, int]
    step: Callable[[Tensors, Tensor], tuple[Tensor, Tensor]] | None = None
    constants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A mixer at a shape. ``bar`` and ``given`` are milliseconds: what is aimed at, and what fla 0.6.0 is said to take."""

    name: str
    mixer: str
    group: Group
    shape: Shape
    visibility: Literal["causal", "bidirectional", "block"] = "causal"
    bar: Pair | None = None
    given: Pair | None = None
    given_peak_mib: int | None = None
    given_cold_s: int | None = None
    given_step_us: str | None = None

    def seen(self, tiny: bool = False) -> Visibility:
        """The visibility to call with; blocks of the tiny shapes are four tokens long."""
        if self.visibility == "bidirectional":
            return Bidirectional()
        return BlockCausal(4 if tiny else BLOCK) if self.visibility == "block" else Causal()


class _Draw:
    """Random tensors of one seed, drawn in float32 on the device and rounded."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(*shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return x.to(dtype or self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        x = torch.rand(*shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return low + (high - low) * x


def _qkv(draw: _Draw, s: Shape) -> Tensors:
    return {
        "q": draw.normal(s.B, s.S, s.H, s.K),
        "k": draw.normal(s.B, s.S, s.H, s.K),
        "v": draw.normal(s.B, s.S, s.H, s.V),
    }


def _retnet_inputs(s: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    heads = torch.arange(s.H, dtype=torch.float32, device=device)
    return {**_qkv(_Draw(dtype, device, seed), s), "log_decay": torch.log1p(-torch.exp2(-5.0 - heads))}


def _gla_inputs(s: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    draw = _Draw(dtype, device, seed)
    gate = F.logsigmoid(draw.normal(s.B, s.S, s.H, s.K, dtype=torch.float32)) / 16
    return {**_qkv(draw, s), "log_decay": gate}


def _simple_gate_inputs(s: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    draw = _Draw(dtype, device, seed)
    return {**_qkv(draw, s), "log_decay": F.logsigmoid(draw.normal(s.B, s.S, s.H, dtype=torch.float32)) / 16}


def _hgrn2_inputs(s: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    draw = _Draw(dtype, device, seed)
    q, f, i = (draw.normal(s.B, s.S, s.H, width) for width in (s.K, s.K, s.V))
    return {"q": q, "f": f, "i": i, "lower_bound": draw.uniform(0.1, 0.9, s.H, s.K)}


def _hgrn_inputs(s: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    draw = _Draw(dtype, device, seed)
    D = s.H * s.V
    return {
        "i": draw.normal(s.B, s.S, D),
        "f": draw.normal(s.B, s.S, D),
        "lower_bound": draw.uniform(0.1, 0.9, D),
    }


def _deltanet_inputs(s: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    draw = _Draw(dtype, device, seed)
    x = _qkv(draw, s)
    beta = torch.sigmoid(draw.normal(s.B, s.S, s.H, dtype=torch.float32)).to(dtype)
    return {"q": l2_norm(x["q"]), "k": l2_norm(x["k"]), "v": x["v"], "beta": beta}


def _kda_inputs(s: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    draw = _Draw(dtype, device, seed + 1000)
    gate = F.logsigmoid(draw.normal(s.B, s.S, s.H, s.K, dtype=torch.float32)) / 16
    return {**_deltanet_inputs(s, dtype, device, seed), "log_decay": gate}


def _gated_deltanet_inputs(s: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    draw = _Draw(dtype, device, seed)
    dt = torch.exp(draw.uniform(math.log(1e-3), math.log(1e-1), s.H))
    return {
        **_qkv(draw, s),
        "a": draw.normal(s.B, s.S, s.H),
        "b": draw.normal(s.B, s.S, s.H),
        "A_log": torch.log(draw.uniform(1.0, 16.0, s.H)),
        "dt_bias": dt + torch.log(-torch.expm1(-dt)),  # the inverse of softplus
    }


def _decay(x: Tensors, visibility: Visibility, backend: Backend) -> Tensor:
    return decay_attention(x["q"], x["k"], x["v"], x["log_decay"], visibility=visibility, backend=backend)[0]


def _delta(x: Tensors, visibility: Visibility, backend: Backend) -> Tensor:
    return delta_rule(
        x["q"], x["k"], x["v"], x["beta"], x.get("log_decay"), visibility=visibility, backend=backend
    )[0]  # fmt: skip


def bounded_gate(f: Tensor, lower_bound: Tensor) -> tuple[Tensor, Tensor]:
    """``(log a, 1 - a)`` of the gate a = lb + (1 - lb) sigmoid(f), without cancellation near a = 1."""
    g = torch.logaddexp(torch.log(lower_bound), torch.log1p(-lower_bound) + F.logsigmoid(f))
    return g, (1 - lower_bound) * torch.sigmoid(-f)


def _hgrn2_run(x: Tensors, visibility: Visibility, backend: Backend) -> Tensor:
    from latentcot.kernels.decay_attention.fused import hgrn2_attention  # pyright: ignore[reportMissingImports]

    return hgrn2_attention(x["q"], x["f"], x["i"], x["lower_bound"], backend=backend)[0]


def _hgrn2_exact(x: Tensors, visibility: Visibility) -> Tensor:
    g, k = bounded_gate(x["f"], x["lower_bound"])
    return decay_attention(F.silu(x["q"]), k, x["i"], g, visibility=visibility, backend="reference")[0]


def _hgrn_run(x: Tensors, visibility: Visibility, backend: Backend) -> Tensor:
    from latentcot.kernels.gated_scan.fused import hgrn_scan  # pyright: ignore[reportMissingImports]

    return hgrn_scan(x["i"], x["f"], x["lower_bound"], backend=backend)[0]


def _hgrn_exact(x: Tensors, visibility: Visibility) -> Tensor:
    g, written = bounded_gate(x["f"], x["lower_bound"])
    return gated_scan(F.silu(x["i"]) * written, g, backend="reference")[0]


def _gated_delta_parts(x: Tensors) -> Tensors:
    """The plain operator's inputs from the raw projections: unit q and k, write strength and log-decay."""
    gate = -torch.exp(x["A_log"]) * F.softplus(x["a"].to(x["A_log"].dtype) + x["dt_bias"])
    return {
        "q": l2_norm(x["q"]),
        "k": l2_norm(x["k"]),
        "v": x["v"],
        "beta": torch.sigmoid(x["b"]),
        "log_decay": gate,
    }


def _gated_delta_run(x: Tensors, visibility: Visibility, backend: Backend) -> Tensor:
    if not isinstance(visibility, Causal):  # the fused entry is causal; the other forms compose it
        return _delta(_gated_delta_parts(x), visibility, backend)
    from latentcot.kernels.delta_rule.fused import gated_delta_net  # pyright: ignore[reportMissingImports]

    return gated_delta_net(x["q"], x["k"], x["v"], x["a"], x["b"], x["A_log"], x["dt_bias"], backend=backend)[0]


def _decay_one(x: Tensors, state: Tensor) -> tuple[Tensor, Tensor]:
    return decay_attention_step(x["q"], x["k"], x["v"], x["log_decay"], x["q"].shape[-1] ** -0.5, state)


def _delta_one(x: Tensors, state: Tensor) -> tuple[Tensor, Tensor]:
    k, v, beta = x["k"].unsqueeze(1), x["v"].unsqueeze(1), x["beta"].unsqueeze(1)  # one reflection
    return delta_rule_step(x["q"], k, v, beta, x.get("log_decay"), x["q"].shape[-1] ** -0.5, state)


def token_inputs(row: Row, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    """Inputs of a one-token row: what the step takes, without the axis S; the gated delta rule's parts ready made."""
    with torch.no_grad():
        drawn = MIXERS[row.mixer].inputs(shape, dtype, device, seed)
        if row.mixer == "gated_deltanet":
            drawn = _gated_delta_parts(drawn)
        return {name: (x[:, 0].contiguous() if x.dim() > 1 else x) for name, x in drawn.items()}


MIXERS = {
    "retnet": Mixer(
        "decay_attention", _retnet_inputs, _decay, lambda x, seen: _decay(x, seen, "reference"),
        (4, 10), _decay_one, ("log_decay",),
    ),
    "gla": Mixer(
        "decay_attention", _gla_inputs, _decay, lambda x, seen: _decay(x, seen, "reference"), (4, 10), _decay_one
    ),
    "simple_gate": Mixer(
        "decay_attention", _simple_gate_inputs, _decay, lambda x, seen: _decay(x, seen, "reference"), (4, 10), _decay_one
    ),
    "hgrn2": Mixer("decay_attention", _hgrn2_inputs, _hgrn2_run, _hgrn2_exact, (4, 10)),
    "hgrn": Mixer("gated_scan", _hgrn_inputs, _hgrn_run, _hgrn_exact, (0, 0)),
    "deltanet": Mixer(
        "delta_rule", _deltanet_inputs, _delta, lambda x, seen: _delta(x, seen, "reference"), (6, 14), _delta_one
    ),
    "kda": Mixer(
        "delta_rule", _kda_inputs, _delta, lambda x, seen: _delta(x, seen, "reference"), (6, 14), _delta_one
    ),
    "gated_deltanet": Mixer(
        "delta_rule", _gated_deltanet_inputs, _gated_delta_run,
        lambda x, seen: _delta(_gated_delta_parts(x), seen, "reference"), (6, 14), _delta_one,
    ),
}  # fmt: skip

ANCHOR = Shape(8, 4096, 16, 128, 128)
LONG = Shape(1, 32768, 16, 128, 128)


def _token(mixer: str, batch: int, given: str | None) -> Row:
    return Row(f"{mixer}-token-{batch}", mixer, "token", Shape(batch, 1, 16, 128, 128), given_step_us=given)


ROWS: tuple[Row, ...] = (
    Row("retnet", "retnet", "anchor", ANCHOR, "causal", Pair(0.38, 1.4), Pair(0.575, 2.236), 1536, 148),
    Row("gla", "gla", "anchor", ANCHOR, "causal", Pair(0.8, 3.3), Pair(1.624, 6.577), 3072, 290),
    Row("hgrn2", "hgrn2", "anchor", ANCHOR, "causal", Pair(0.8, 3.3), Pair(1.626, 6.588), 3072, 287),
    Row("hgrn", "hgrn", "anchor", ANCHOR, "causal", Pair(0.25, 0.8), Pair(0.707, 1.739), 1024, 7),
    Row("deltanet", "deltanet", "anchor", ANCHOR, "causal", Pair(0.85, 2.6), Pair(1.221, 3.546), 1857, 121),
    Row("gated_deltanet", "gated_deltanet", "anchor", ANCHOR, "causal", Pair(0.8, 2.7), Pair(1.031, 3.959), 1863, 108),
    Row("simple_gate", "simple_gate", "more", ANCHOR),
    Row("kda", "kda", "more", ANCHOR),
    Row("gla-bidirectional", "gla", "visibility", ANCHOR, "bidirectional"),
    Row("gla-block", "gla", "visibility", ANCHOR, "block"),
    Row("gated_deltanet-bidirectional", "gated_deltanet", "visibility", ANCHOR, "bidirectional"),
    Row("gated_deltanet-block", "gated_deltanet", "visibility", ANCHOR, "block"),
    Row("gated_deltanet-256x256", "gated_deltanet", "study", Shape(8, 4096, 8, 256, 256)),
    Row("retnet-256x512", "retnet", "study", Shape(8, 4096, 8, 256, 512)),
    Row("gla-128x256", "gla", "study", Shape(8, 4096, 4, 128, 256)),
    Row("gla-256x512", "gla", "study", Shape(8, 4096, 4, 256, 512)),
    *(Row(f"{mixer}-long", mixer, "long", LONG) for mixer in ("retnet", "gla", "gated_deltanet", "hgrn")),
    _token("gla", 1, "5.8 to 6.0"),
    _token("gla", 64, "58"),
    _token("deltanet", 1, "2.6"),
    _token("deltanet", 64, None),
    _token("gated_deltanet", 1, "2.8"),
    _token("gated_deltanet", 64, None),
)


def tiny(row: Row) -> Row:
    """The row at a shape for dry runs on a CPU: the code is exercised, the numbers say nothing. Bars are dropped."""
    B, S = min(row.shape.B, 2), 1 if row.group == "token" else 10
    return Row(row.name, row.mixer, row.group, Shape(B, S, 2, 8, 8), row.visibility)


def _size(tensors: Tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())


def counted_bytes(row: Row, shape: Shape, tensors: Tensors) -> tuple[int, int]:
    """Bytes of (forward, forward + backward) with every input read once and every output written once in each pass.

    Forward: inputs and o. Backward: inputs and the gradient of o read, one gradient written for every input that has
    one. A one-token row reads and writes the float32 state besides and has no backward: both numbers are the same.
    """
    v = tensors["v"] if "v" in tensors else tensors["i"]  # o has the shape and dtype of the values
    o = v.numel() * v.element_size()
    forward = _size(tensors) + o
    if row.group == "token":
        forward += 2 * 4 * shape.B * shape.H * shape.K * shape.V
        return forward, forward
    constants = {name: x for name, x in tensors.items() if name in MIXERS[row.mixer].constants}
    return forward, forward + _size(tensors) + o + _size(tensors) - _size(constants)


def counted_flops(row: Row, shape: Shape, block: int = BLOCK) -> tuple[int, int]:
    """Operations (a multiply and an add are two) of (forward, forward + backward), by matrix products alone.

    Those of the recurrence only, which a chunk of any length needs: reading a state q·S, writing kᵀv and, for the delta
    rule, erasing k·S take 2·K·V each for a token and head. Two directions count twice. Inside a block of L tokens
    softmax attention adds 2·L·(K + V) forward and two and a half times that backward.
    """
    forward, backward = MIXERS[row.mixer].products
    heads = shape.B * shape.S * shape.H
    one, two = forward * shape.K * shape.V, backward * shape.K * shape.V
    if row.group == "token":
        return heads * one, heads * one
    if row.visibility == "bidirectional":
        one, two = 2 * one, 2 * two
    if row.visibility == "block":
        inside = 2 * block * (shape.K + shape.V)
        one, two = one + inside, two + 5 * inside // 2
    return heads * one, heads * (one + two)
