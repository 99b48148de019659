"""Other implementations that the benchmark times beside this library, each from the same raw inputs.

A peer is asked for by name (``--against fla,transformers,sdpa``). What is not installed, or does not define a row, is
named in the row. Elementwise work that a mixer needs before its operator is part of the timed call, in the peer's own
way: it is what a layer pays.

``fla`` is flash-linear-attention 0.6 (its first call tunes for minutes an operator), ``transformers`` the plain-torch
chunk form of its Qwen3-Next model, ``sdpa`` PyTorch's softmax attention at the same B, S, H and width: another
function, the cost that linear attention is measured against.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.kernels.bench_cases import Row, Tensors

NAMES = ("fla", "transformers", "sdpa")
DISTRIBUTIONS = {"fla": "flash-linear-attention", "transformers": "transformers", "sdpa": "torch"}
GUARD_OFF = "guard off: fla refuses this gradient on this card with this Triton because it is wrong there; times only"


class PeerMissing(Exception):
    """A peer that is not installed here or does not define the row; the message says which."""


class Peer(NamedTuple):
    """A peer's call for one row.

    Attributes:
        label: what is called, for instance ``"fla.ops.gla.chunk_gla"``.
        run: ``tensors -> o``; None for a one-token row.
        step: ``(tensors, state) -> (o, state)``; None for a row over a sequence.
        same: whether it computes the row's function, so that its errors mean something.
        note: what a reader must know.
    """

    label: str
    run: Callable[[Tensors], Tensor] | None = None
    step: Callable[[Tensors, Tensor], tuple[Tensor, Tensor]] | None = None
    same: bool = True
    note: str = ""


def peer_version(name: str) -> str | None:
    """The installed version of the peer's distribution, None where it is not installed."""
    try:
        return version(DISTRIBUTIONS[name])
    except PackageNotFoundError:
        return getattr(torch, "__version__", None) if name == "sdpa" else None


def peers_for(name: str, row: Row) -> list[Peer]:
    """The peer's calls for a row; raises :class:`PeerMissing`, or ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"--against: {name!r} is no peer, expected some of {', '.join(NAMES)}")
    found = {"fla": _fla, "transformers": _transformers, "sdpa": _sdpa}[name](row)
    if not found:
        raise PeerMissing(f"{name} has nothing to compare with {row.name}")
    return found


def _load(module: str, attribute: str) -> Callable[..., Any]:
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise PeerMissing(f"{module}.{attribute} is not available: {error}") from error


def _fla(row: Row) -> list[Peer]:
    if row.visibility != "causal":
        return []
    if row.group == "token":
        return _fla_step(row)
    return {
        "retnet": _fla_retnet,
        "gla": _fla_gla,
        "simple_gate": _fla_simple_gate,
        "kda": _fla_kda,
        "hgrn2": _fla_hgrn2,
        "hgrn": _fla_hgrn,
        "deltanet": _fla_deltanet,
        "gated_deltanet": _fla_gated_deltanet,
    }[row.mixer]()


def _fla_retnet() -> list[Peer]:
    chunk = _load("fla.ops.retention", "chunk_retention")
    return [Peer("chunk_retention", lambda x: chunk(x["q"], x["k"], x["v"])[0])]


def _fla_gla() -> list[Peer]:
    chunk = _load("fla.ops.gla", "chunk_gla")
    return [Peer("chunk_gla", lambda x: chunk(x["q"], x["k"], x["v"], x["log_decay"])[0])]


def _fla_simple_gate() -> list[Peer]:
    chunk = _load("fla.ops.simple_gla", "chunk_simple_gla")
    note = GUARD_OFF if _switch_guard_off() else ""
    return [Peer("chunk_simple_gla", lambda x: chunk(x["q"], x["k"], x["v"], x["log_decay"])[0], note=note)]


def _fla_kda() -> list[Peer]:
    chunk = _load("fla.ops.kda", "chunk_kda")
    return [Peer("chunk_kda", lambda x: chunk(x["q"], x["k"], x["v"], x["log_decay"], x["beta"])[0])]


def _log_gate(f: Tensor, lower_bound: Tensor) -> Tensor:
    """The bounded gate formed from f in f's own dtype, then promoted by the float32 bound, as a layer there does it."""
    return torch.logaddexp(torch.log(lower_bound), torch.log1p(-lower_bound) + F.logsigmoid(f))


def _fla_hgrn2() -> list[Peer]:
    chunk = _load("fla.ops.gla", "chunk_gla")

    def run(x: Tensors) -> Tensor:
        g = _log_gate(x["f"], x["lower_bound"])
        return chunk(F.silu(x["q"]), (1 - g.exp()).to(x["i"].dtype), x["i"], g)[0]

    return [Peer("chunk_gla and its elementwise inputs", run)]


def _fla_hgrn() -> list[Peer]:
    found = []
    for name in ("chunk_hgrn", "fused_recurrent_hgrn"):
        scan = _load("fla.ops.hgrn", name)

        def run(x: Tensors, scan: Callable[..., Any] = scan) -> Tensor:
            g = _log_gate(x["f"], x["lower_bound"]).to(x["f"].dtype)
            return scan(F.silu(x["i"]) * (1 - g.exp()), g)[0]

        found.append(Peer(f"{name} and its elementwise inputs", run))
    return found


def _fla_deltanet() -> list[Peer]:
    chunk = _load("fla.ops.delta_rule", "chunk_delta_rule")
    return [Peer("chunk_delta_rule", lambda x: chunk(x["q"], x["k"], x["v"], x["beta"])[0])]


def _fla_gated_deltanet() -> list[Peer]:
    chunk = _load("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    note = GUARD_OFF if _switch_guard_off() else ""

    def run(x: Tensors) -> Tensor:
        return chunk(
            x["q"], x["k"], x["v"], g=x["a"], beta=x["b"], A_log=x["A_log"], dt_bias=x["dt_bias"],
            use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, use_qk_l2norm_in_kernel=True,
        )[0]  # fmt: skip

    return [Peer("chunk_gated_delta_rule from raw projections", run, note=note)]


def _switch_guard_off() -> bool:
    """Let fla run a gradient that it refuses on Hopper with Triton 3.4 to 3.7.0; returns whether it would refuse.

    The refusal reads a module's flag at every call, so setting the flag is enough; launch shapes were chosen from it
    when the module was imported and stay those of the card. With tilelang installed fla takes another path, the flag
    plays no part and nothing is switched.
    """
    import importlib.util

    module: Any = import_module("fla.ops.common.chunk_o")
    refuses = module.IS_NVIDIA_HOPPER and module.TRITON_ABOVE_3_4_0 and not module.TRITON_ABOVE_3_7_1
    if not refuses:
        return getattr(module, "_guard_was_on", False)
    if importlib.util.find_spec("tilelang") is not None:
        return False
    module.IS_NVIDIA_HOPPER = False
    module._guard_was_on = True
    return True


def _fla_step(row: Row) -> list[Peer]:
    if row.mixer == "gla":
        recurrent = _load("fla.ops.gla", "fused_recurrent_gla")

        def gates(x: Tensors) -> dict[str, Tensor]:
            return {"gk": x["log_decay"]}
    elif row.mixer == "deltanet":
        recurrent = _load("fla.ops.delta_rule", "fused_recurrent_delta_rule")

        def gates(x: Tensors) -> dict[str, Tensor]:
            return {"beta": x["beta"]}
    elif row.mixer == "gated_deltanet":
        recurrent = _load("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule")

        def gates(x: Tensors) -> dict[str, Tensor]:
            return {"g": x["log_decay"], "beta": x["beta"]}
    else:
        return []

    def step(x: Tensors, state: Tensor) -> tuple[Tensor, Tensor]:
        one = {name: value.unsqueeze(1) for name, value in gates(x).items()}
        q, k, v = x["q"].unsqueeze(1), x["k"].unsqueeze(1), x["v"].unsqueeze(1)
        o, last = recurrent(q, k, v, initial_state=state, output_final_state=True, **one)
        return o[:, 0], last

    return [Peer(getattr(recurrent, "__name__", "fused_recurrent"), step=step)]


def _transformers(row: Row) -> list[Peer]:
    if row.mixer not in ("deltanet", "gated_deltanet") or row.visibility != "causal" or row.group == "token":
        return []
    # unwrapped: some versions hand the call to fla where that is installed
    chunk = inspect.unwrap(_load("transformers.models.qwen3_next.modeling_qwen3_next", "torch_chunk_gated_delta_rule"))

    def run(x: Tensors) -> Tensor:
        if row.mixer == "deltanet":
            zero = torch.zeros_like(x["beta"], dtype=torch.float32)
            return chunk(x["q"], x["k"], x["v"], g=zero, beta=x["beta"])[0]
        gate = -x["A_log"].exp() * F.softplus(x["a"].float() + x["dt_bias"])
        beta = torch.sigmoid(x["b"])
        return chunk(x["q"], x["k"], x["v"], g=gate, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    return [Peer("torch_chunk_gated_delta_rule", run)]


def _sdpa(row: Row) -> list[Peer]:
    if row.group == "token" or row.visibility == "block" or row.mixer == "hgrn" or row.shape.K > 256:
        return []
    causal = row.visibility == "causal"

    def run(x: Tensors) -> Tensor:
        # HGRN2 names its inputs otherwise; any three tensors of the right shape cost the same
        k, v = x.get("k", x.get("f")), x.get("v", x.get("i"))
        q, k, v = (t.transpose(1, 2) for t in (x["q"], k, v) if t is not None)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    note = "softmax attention: another function"
    return [Peer("scaled_dot_product_attention", run, same=False, note=note)]
