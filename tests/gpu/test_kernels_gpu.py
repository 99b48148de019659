"""The operators on a CUDA device: the Triton gated scan and the chunked forms, against float64 references on the CPU.

Bounds (relative RMS): float32 1e-5; bf16 inputs 5e-3 for outputs and most gradients, 2e-2 for those of gates and beta.
"""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import subprocess
import sys

import pytest
import torch

from latentcot.kernels import Bidirectional, decay_attention, delta_rule, explain_backend, gated_scan, l2_norm

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
    for name in expected:
        bound = 1e-5 if dtype == torch.float32 else 2e-2 if name in ("d_log_decay", "d_beta") else 5e-3
        error = float((actual[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-30))
        assert error < bound, f"{name}: relative RMS {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("S", [1, 7, 64, 65, 200])
@pytest.mark.parametrize(("operator", "gate"), CASES, ids=[f"{o}-{g}" for o, g in CASES])
def test_automatic_back_end_is_the_definition(operator, gate, S, dtype):
    arguments = draw(operator, gate, S, dtype)
    chosen = explain_backend(operator, device="cuda", dtype=dtype).chosen
    assert chosen == ("triton" if operator == "gated_scan" else "chunked")
    actual = evaluate(OPERATORS[operator], arguments, "cuda")
    expected = evaluate(OPERATORS[operator], arguments, "cpu", torch.float64, backend="reference")
    assert_same(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("operator", "gate"), CASES, ids=[f"{o}-{g}" for o, g in CASES])
def test_packed(operator, gate, dtype):
    cuts = torch.tensor([0, 1, 30, 100])
    arguments = draw(operator, gate, 100, dtype, B=1, N=3)
    actual = evaluate(OPERATORS[operator], arguments, "cuda", cu_seqlens=cuts.cuda())
    expected = evaluate(OPERATORS[operator], arguments, "cpu", torch.float64, cu_seqlens=cuts, backend="reference")
    assert_same(actual, expected, dtype)


@pytest.mark.parametrize("gate", ["own", "next"])
def test_both_directions(gate):
    arguments = draw("decay_attention", "channel", 70, torch.float32)
    arguments.pop("initial_state")
    visibility = Bidirectional(gate=gate)
    actual, _ = decay_attention(**{n: t.cuda() for n, t in arguments.items()}, visibility=visibility)
    expected, _ = decay_attention(
        **{n: t.double() for n, t in arguments.items()}, visibility=visibility, backend="reference"
    )
    assert float((actual.cpu().double() - expected).norm() / expected.norm()) < 1e-5


def test_triton_gated_scan_equals_the_chunked_form():
    arguments = draw("gated_scan", "token", 1000, torch.float32)
    actual = evaluate(gated_scan, arguments, "cuda", backend="triton")
    assert_same(actual, evaluate(gated_scan, arguments, "cuda", backend="chunked"), torch.float32)


def test_K_2_gated_scan_beyond_two_to_the_31_elements():
    """One call of 2^20 + 64 rows whose stride is 2048 equals the run cut at 2^20 with the state carried over."""
    S, cut, D = 2**20 + 64, 2**20, 64
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    wide = torch.empty(1, S, 2048, dtype=torch.bfloat16, device="cuda")
    x = wide[..., -D:]
    x.normal_()
    gate = -torch.rand(1, S, D, device="cuda") * 0.1
    with torch.no_grad():
        whole, last = gated_scan(x, gate, output_state=True, backend="triton")
        _, state = gated_scan(x[:, :cut], gate[:, :cut], output_state=True, backend="triton")
        tail, end = gated_scan(x[:, cut:], gate[:, cut:], initial_state=state, output_state=True, backend="triton")
    assert torch.equal(whole[:, cut:], tail)
    assert torch.equal(last, end)


def test_W_1_import_does_not_initialise_cuda():
    program = "import torch, latentcot.kernels; assert not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_growth_is_caught_on_the_device():
    """On a GPU the sign of the gate is a device-side assertion: loud, without a stall at every call. It ends the
    process.
    """
    program = (
        "import torch; from latentcot.kernels import gated_scan; x = torch.ones(1, 4, 8, device='cuda');"
        "gated_scan(x, x); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "assert" in done.stderr.lower()
