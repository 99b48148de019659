"""Shared by the operator tests: random inputs, and one call with everything that can be compared."""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import pytest
import torch

from latentcot.kernels import l2_norm

TOLERANCE = {  # relative RMS: (outputs and state, gradients)
    torch.float64: (1e-12, 1e-10),
    torch.float32: (1e-5, 1e-5),
}


def relative_rms(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def _random_inputs(
    operator, B, S, H, K, V, *, gate="token", dtype=torch.float64, seed=0, strength=1.0, R=None, Hv=None, N=None
):
    """Keyword arguments of one call: tensors of ``operator``; ``gate`` is none, head, token or channel."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    N = B if N is None else N
    if operator == "gated_scan":
        return {
            "x": normal(B, S, K),
            "log_decay": -strength * uniform(B, S, K),
            "initial_state": normal(N, K),
        }
    Hv = H if Hv is None else Hv
    middle = () if R is None else (R,)
    arguments = {"q": normal(B, S, H, K), "k": normal(B, S, *middle, H, K), "v": normal(B, S, *middle, Hv, V)}
    if operator == "delta_rule":
        arguments["k"] = l2_norm(arguments["k"])
        arguments["beta"] = uniform(B, S, *middle, Hv)
    shape = {"none": None, "head": (Hv,), "token": (B, S, Hv), "channel": (B, S, Hv, K)}[gate]
    arguments["log_decay"] = None if shape is None else -strength * uniform(*shape)
    arguments["initial_state"] = normal(N, Hv, K, V)
    return arguments


def _evaluate(function, arguments, *, with_state=True, seed=1, **options):
    """Outputs, last state and the gradients of a random projection of both, by name."""
    leaves = {n: t.clone().requires_grad_() for n, t in arguments.items() if t is not None}
    if not with_state:
        leaves.pop("initial_state", None)
    inputs = {n: leaves.get(n) for n in arguments}
    o, state = function(**inputs, output_state=True, **options)
    generator = torch.Generator().manual_seed(seed)
    loss = (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)).sum()
    loss = loss + (state * torch.randn(state.shape, generator=generator, dtype=torch.float64).to(state)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o, "state": state, **{f"d_{n}": g for n, g in zip(leaves, gradients, strict=True)}}


def _assert_same(actual, expected, dtype):
    outputs, gradients = TOLERANCE[dtype]
    assert set(actual) == set(expected)
    for name in expected:
        error = relative_rms(actual[name], expected[name])
        assert error < (gradients if name.startswith("d_") else outputs), f"{name}: relative RMS {error:.2e}"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are tiny: a second thread costs more than it brings, many times more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def random_inputs():
    return _random_inputs


@pytest.fixture(scope="session")
def evaluate():
    return _evaluate


@pytest.fixture(scope="session")
def assert_same():
    return _assert_same
