"""The operators on a CUDA device, where all of them run in Triton, against float64 references on the CPU.

Bounds (relative RMS): 1e-5 in float32 and 5e-3 for bf16 inputs; gradients of gates, which are differences of sums, 1e-4
and 2e-2, and that of beta 1e-5 and 2e-2. In bf16 the gradients of parameters that all tokens share, sums of terms of both
signs, do not all reach their bound; a test whose only misses are such is an expected failure with the figures, not a pass.
"""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportOptionalOperand=false
# pyright: reportOperatorIssue=false

import os
import subprocess
import sys

import pytest
import torch

from latentcot.kernels import (
    Bidirectional,
    decay_attention,
    delta_rule,
    explain_backend,
    gated_delta_net,
    gated_scan,
    hgrn2_attention,
    hgrn_scan,
    l2_norm,
)
from latentcot.kernels.decay_attention.step import decay_attention_step
from latentcot.kernels.delta_rule.step import delta_rule_step
from latentcot.kernels.gated_scan.step import gated_scan_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OPERATORS = {"gated_scan": gated_scan, "decay_attention": decay_attention, "delta_rule": delta_rule}
CASES = [
    ("gated_scan", "token"),
    *(("decay_attention", gate) for gate in ("none", "head", "token", "channel")),
    *(("delta_rule", gate) for gate in ("none", "token", "channel")),
]
WIDTHS = [(128, 128), (256, 512), (64, 256)]
OF_GATES = ("d_log_decay", "d_f", "d_a", "d_lower_bound", "d_A_log", "d_dt_bias")
OF_STRENGTHS = ("d_beta", "d_b")
SHARED = ("d_lower_bound", "d_A_log", "d_dt_bias")  # and a decay per head
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def draw(operator, gate, S, dtype, B=2, H=2, K=60, V=48, N=None):
    generator = torch.Generator().manual_seed(S)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator).to(dtype)

    N = B if N is None else N
    if operator == "gated_scan":
        return {"x": normal(B, S, 200), "log_decay": -uniform(B, S, 200), "initial_state": normal(N, 200).float()}
    arguments = {"q": normal(B, S, H, K), "k": normal(B, S, H, K), "v": normal(B, S, H, V)}
    if operator == "delta_rule":
        arguments |= {"k": l2_norm(arguments["k"]), "beta": uniform(B, S, H)}
    shape = {"none": None, "head": (H,), "token": (B, S, H), "channel": (B, S, H, K)}[gate]
    arguments["log_decay"] = None if shape is None else -uniform(*shape)
    arguments["initial_state"] = normal(N, H, K, V).float()
    return arguments


def evaluate(function, arguments, device, dtype=None, **options):
    leaves = {n: t.to(device, dtype).detach().requires_grad_() for n, t in arguments.items() if t is not None}
    o, state = function(**(dict.fromkeys(arguments) | leaves), output_state=True, **options)
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(o.shape, generator=generator).bfloat16().to(o)
    state_upstream = torch.randn(state.shape, generator=generator).to(state)
    gradients = torch.autograd.grad([o, state], list(leaves.values()), [upstream, state_upstream])
    found = {"o": o, "state": state, **{f"d_{n}": g for n, g in zip(leaves, gradients, strict=True)}}
    return {n: t.detach().cpu().double() for n, t in found.items()}


def assert_same(actual, expected, dtype):
    assert set(actual) == set(expected)
    missed = []
    for name in expected:
        if dtype == torch.float32:
            bound = 1e-4 if name in OF_GATES else 1e-5
        else:
            bound = 2e-2 if name in OF_GATES + OF_STRENGTHS else 5e-3
        error = float((actual[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-30))
        shared = name in SHARED or (name == "d_log_decay" and expected[name].dim() == 1)
        if error >= bound and shared and dtype != torch.float32:
            missed.append(f"{name}: relative RMS {error:.2e}, bound {bound:.0e}")
        else:
            assert error < bound, f"{name}: relative RMS {error:.2e}"
    if missed:
        pytest.xfail("; ".join(missed) + " (docs/benchmarks/kernels.md, until these sums are formed more exactly)")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("S", [1, 7, 64, 65, 200])
@pytest.mark.parametrize(("operator", "gate"), CASES, ids=[f"{o}-{g}" for o, g in CASES])
def test_automatic_back_end_is_the_definition(operator, gate, S, dtype):
    arguments = draw(operator, gate, S, dtype)
    assert explain_backend(operator, device="cuda", dtype=dtype).chosen == "triton"
    actual = evaluate(OPERATORS[operator], arguments, "cuda")
    expected = evaluate(OPERATORS[operator], arguments, "cpu", torch.float64, backend="reference")
    assert_same(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("operator", "gate"), CASES, ids=[f"{o}-{g}" for o, g in CASES])
def test_packed(operator, gate, dtype):
    cuts = torch.tensor([0, 1, 30, 100])
    arguments = draw(operator, gate, 100, dtype, B=1, N=3)
    actual = evaluate(OPERATORS[operator], arguments, "cuda", cu_seqlens=cuts.cuda())
    options = {"cu_seqlens": cuts, "backend": "reference"}
    expected = evaluate(OPERATORS[operator], arguments, "cpu", torch.float64, **options)
    assert_same(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("K", "V"), WIDTHS)
@pytest.mark.parametrize(("operator", "gate"), CASES[1:], ids=[f"{o}-{g}" for o, g in CASES[1:]])
def test_wide_heads(operator, gate, K, V, dtype):
    """Widths of models and the widest that the kernels take: other launch shapes, other tiles."""
    arguments = draw(operator, gate, 150, dtype, B=1, H=2, K=K, V=V)
    actual = evaluate(OPERATORS[operator], arguments, "cuda")
    expected = evaluate(OPERATORS[operator], arguments, "cpu", torch.float64, backend="reference")
    assert_same(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("direction", ["own", "next"])
@pytest.mark.parametrize("gate", ["none", "head", "token", "channel"])
def test_both_directions(gate, direction, dtype):
    arguments = draw("decay_attention", gate, 70, dtype)
    arguments.pop("initial_state")

    def both(device, wide=None, **options):
        leaves = {n: t.to(device, wide).detach().requires_grad_() for n, t in arguments.items() if t is not None}
        o, _ = decay_attention(**leaves, visibility=Bidirectional(gate=direction), **options)
        upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(o)
        gradients = torch.autograd.grad(o, list(leaves.values()), upstream)
        found = {"o": o, **{f"d_{n}": g for n, g in zip(leaves, gradients, strict=True)}}
        return {n: t.detach().cpu().double() for n, t in found.items()}

    assert_same(both("cuda"), both("cpu", torch.float64, backend="reference"), dtype)


def draw_mixer(name, dtype, S=130, N=2, B=2):
    """Inputs of a mixer that makes its own gates; gate parameters and states in float32."""
    generator = torch.Generator().manual_seed(S)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def bound(*shape):
        return 0.1 + 0.8 * torch.rand(*shape, generator=generator)

    if name == "hgrn_scan":
        tokens = {"i": normal(B, S, 200), "f": normal(B, S, 200)}
        more = {"lower_bound": bound(200), "initial_state": normal(N, 200)}
    elif name == "hgrn2_attention":
        tokens = {"q": normal(B, S, 2, 64), "f": normal(B, S, 2, 64), "i": normal(B, S, 2, 96)}
        more = {"lower_bound": bound(2, 64), "initial_state": normal(N, 2, 64, 96)}
    else:
        tokens = {"q": normal(B, S, 2, 64), "k": normal(B, S, 2, 64), "v": normal(B, S, 4, 96)}
        tokens |= {"a": normal(B, S, 4), "b": normal(B, S, 4)}
        more = {"A_log": normal(4), "dt_bias": normal(4), "initial_state": normal(N, 4, 64, 96)}
    return {n: t.to(dtype) for n, t in tokens.items()} | more


MIXERS = {"hgrn_scan": hgrn_scan, "hgrn2_attention": hgrn2_attention, "gated_delta_net": gated_delta_net}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_are_the_definition(name, packed, dtype):
    """Gates, norms and activations made inside the kernels, against the composition step by step."""
    cuts = torch.tensor([0, 1, 66, 130]) if packed else None
    arguments = draw_mixer(name, dtype, N=3 if packed else 2, B=1 if packed else 2)
    actual = evaluate(MIXERS[name], arguments, "cuda", cu_seqlens=None if cuts is None else cuts.cuda())
    expected = evaluate(MIXERS[name], arguments, "cpu", torch.float64, cu_seqlens=cuts, backend="reference")
    assert_same(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_from_nothing_are_the_definition(name, dtype):
    """The same without an initial state, over several windows."""
    arguments = draw_mixer(name, dtype, S=600)
    del arguments["initial_state"]
    actual = evaluate(MIXERS[name], arguments, "cuda")
    expected = evaluate(MIXERS[name], arguments, "cpu", torch.float64, backend="reference")
    assert_same(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("operator", "gate"), CASES, ids=[f"{o}-{g}" for o, g in CASES])
def test_runs_repeat_to_the_bit(operator, gate, dtype):
    arguments = draw(operator, gate, 600, dtype)
    first, second = (evaluate(OPERATORS[operator], arguments, "cuda") for _ in range(2))
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", MIXERS)
def test_runs_of_mixers_repeat_to_the_bit(name, dtype):
    arguments = draw_mixer(name, dtype, S=600)
    first, second = (evaluate(MIXERS[name], arguments, "cuda") for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def scan_step(state, x, log_decay):
    return gated_scan_step(x, log_decay, state, in_place=True)


def attention_step(state, q, k, v, log_decay):
    return decay_attention_step(q, k, v, log_decay, 0.125, state, in_place=True)


def delta_step(state, q, k, v, beta, log_decay):
    k, v, beta = k.unsqueeze(1), v.unsqueeze(1), beta.unsqueeze(1)  # one reflection a token
    return delta_rule_step(q, k, v, beta, log_decay, 0.125, state, in_place=True)


STEPS = {"gated_scan": scan_step, "decay_attention": attention_step, "delta_rule": delta_step}


@pytest.mark.parametrize(("operator", "gate"), CASES, ids=[f"{o}-{g}" for o, g in CASES])
def test_a_captured_step_replays_into_its_state(operator, gate):
    """A CUDA graph of one token, replayed for every token of a sequence, is the operator over the sequence."""
    S = 6
    arguments = draw(operator, gate, S, torch.float32)
    scale = {} if operator == "gated_scan" else {"scale": 0.125}
    wide = {n: None if t is None else t.double() for n, t in arguments.items()}
    expected, last = OPERATORS[operator](**wide, **scale, output_state=True, backend="reference")
    state = arguments.pop("initial_state").cuda()
    tokens = {n: None if t is None else t.cuda() for n, t in arguments.items()}

    def token(t):
        return {n: x if x is None or x.dim() == 1 else x[:, t] for n, x in tokens.items()}

    with torch.no_grad():
        buffers = {n: None if x is None else x.clone() for n, x in token(0).items()}
        scratch = state.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles before the capture
            STEPS[operator](scratch, **buffers)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, written = STEPS[operator](state, **buffers)
        outputs = []
        for t in range(S):
            for name, x in token(t).items():
                if x is not None:
                    buffers[name].copy_(x)
            graph.replay()
            outputs.append(o.clone())
    found = {"o": torch.stack(outputs, 1).cpu().double(), "state": state.cpu().double()}
    assert written.data_ptr() == state.data_ptr()
    assert_same(found, {"o": expected, "state": last}, torch.float32)


def test_triton_gated_scan_equals_the_chunked_form():
    arguments = draw("gated_scan", "token", 1000, torch.float32)
    actual = evaluate(gated_scan, arguments, "cuda", backend="triton")
    assert_same(actual, evaluate(gated_scan, arguments, "cuda", backend="chunked"), torch.float32)


def test_K_2_gated_scan_beyond_two_to_the_31_elements(monkeypatch):
    """One call of 2^20 + 64 rows whose stride is 2048 equals the run cut at 2^20 with the state carried over.

    To the bit where time is not cut into parts, whose number depends on the length; up to rounding where it is.
    """
    from latentcot.kernels.gated_scan import triton as kernel

    S, cut, D = 2**20 + 64, 2**20, 64
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    wide = torch.empty(1, S, 2048, dtype=torch.bfloat16, device="cuda")
    x = wide[..., -D:]
    x.normal_()
    gate = -torch.rand(1, S, D, device="cuda") * 0.1
    with torch.no_grad():
        in_parts, end_of_parts = gated_scan(x, gate, output_state=True, backend="triton")
        monkeypatch.setattr(kernel, "ENOUGH_PROGRAMS", 0)
        whole, last = gated_scan(x, gate, output_state=True, backend="triton")
        _, state = gated_scan(x[:, :cut], gate[:, :cut], output_state=True, backend="triton")
        tail, end = gated_scan(x[:, cut:], gate[:, cut:], initial_state=state, output_state=True, backend="triton")
    assert torch.equal(whole[:, cut:], tail)
    assert torch.equal(last, end)
    assert (in_parts.float() - whole.float()).norm() < 1e-3 * whole.float().norm()
    assert (end_of_parts - end).norm() < 1e-5 * end.norm()


def test_W_1_import_does_not_initialise_cuda():
    program = "import torch, latentcot.kernels; assert not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


GROWING = """
import torch
from latentcot.kernels import decay_attention, delta_rule, gated_scan
x = torch.ones(1, 4, 2, 16, device="cuda")
g = torch.zeros(1, 4, 2, device="cuda")
g[0, 1, 0] = 0.1
calls = {
    "gated_scan": lambda: gated_scan(x[..., 0], g),
    "decay_attention": lambda: decay_attention(x, x, x, g),
    "delta_rule": lambda: delta_rule(x, x, x, g + 0.5, g),
}
"""


def run_alone(program, validate):
    environment = {n: v for n, v in os.environ.items() if n != "LATENTCOT_VALIDATE"}
    environment |= {"LATENTCOT_VALIDATE": "1"} if validate else {}
    done = subprocess.run(
        [sys.executable, "-c", GROWING + program], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_growth_is_caught_on_the_device():
    """A log-decay above zero is NaN from its token on, and maybe from its chunk on, in its head and no other: loud
    without a stall at every call.
    """
    run_alone(
        """
for name, call in calls.items():
    bad = call()[0].isnan()
    assert bad[0, 1:, 0].all(), (name, bad)
    assert not bad[0, :, 1].any(), (name, bad)
""",
        validate=False,
    )


def test_growth_raises_at_the_call_when_asked_to():
    run_alone(
        """
for name, call in calls.items():
    try:
        call()
    except ValueError as error:
        assert f"{name}: log_decay has the value 0.1, expected <= 0" in str(error), str(error)
    else:
        raise AssertionError(f"{name} did not raise")
""",
        validate=True,
    )
