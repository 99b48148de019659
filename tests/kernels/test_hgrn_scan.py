"""HGRN's scan from its projections, on the back ends that compose it, against the formula step by step.

The Triton form is in test_gated_scan_triton.py.
"""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import pytest
import torch
import torch.nn.functional as F

from latentcot.kernels.gated_scan.fused import hgrn_scan


def by_formula(i, f, bound, h):
    outputs = []
    for t in range(i.shape[1]):
        alpha = bound + (1 - bound) * torch.sigmoid(f[:, t])
        h = alpha * h + (1 - bound) * torch.sigmoid(-f[:, t]) * F.silu(i[:, t])
        outputs.append(h)
    return torch.stack(outputs, 1), h


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def data(S=7, D=5, dtype=torch.float64, spread=2.0):
    bound = draw(D, seed=2).sigmoid()
    bound[0] = 0.0  # a channel without a bound beside bounded ones
    return [draw(2, S, D, seed=0, dtype=dtype), spread * draw(2, S, D, seed=1, dtype=dtype), bound.to(dtype),
            draw(2, D, seed=3, dtype=dtype)]  # fmt: skip


def evaluate(function, tensors):
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    o, state = function(*leaves)
    total = (o * draw(*o.shape, seed=8).to(o)).sum() + (state * draw(*state.shape, seed=9).to(state)).sum()
    return [o, state, *torch.autograd.grad(total, [t for t in leaves if t is not None])]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("spread", [0.1, 2.0, 30.0])
def test_is_the_formula(backend, spread):
    tensors = data(spread=spread)
    actual = evaluate(
        lambda i, f, b, h: hgrn_scan(i, f, b, initial_state=h, output_state=True, backend=backend), tensors
    )
    for a, e in zip(actual, evaluate(by_formula, tensors), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_without_a_bound_and_a_state():
    i, f, _, _ = data()
    zero = torch.zeros(2, 5, dtype=torch.float64)
    expected = by_formula(i, f, torch.zeros(5, dtype=torch.float64), zero)
    o, state = hgrn_scan(i, f, output_state=True)
    torch.testing.assert_close(o, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected[1], rtol=1e-12, atol=1e-12)
    assert hgrn_scan(i, f)[1] is None


@pytest.mark.parametrize("value", [-300.0, 300.0])
def test_saturated_gates_stay_finite(value):
    """alpha is the bound to the last digit, or 1 to the last digit; zero bounds and gradients included."""
    i, f, bound, h = data(dtype=torch.float32)
    results = evaluate(
        lambda i, f, b, h: hgrn_scan(i, f, b, initial_state=h, output_state=True),
        (i, torch.full_like(f, value), bound, h),
    )
    assert all(bool(t.isfinite().all()) for t in results)


def test_packed_is_the_loop():
    i, f, bound, _ = data(S=9)
    i, f, h = i[:1], f[:1], draw(2, 5, seed=5)
    o, state = hgrn_scan(i, f, bound, initial_state=h, output_state=True, cu_seqlens=torch.tensor([0, 2, 9]))
    for n, (a, b) in enumerate(((0, 2), (2, 9))):
        expected, last = by_formula(i[:, a:b], f[:, a:b], bound, h[n : n + 1])
        torch.testing.assert_close(o[:, a:b], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state[n : n + 1], last, rtol=1e-12, atol=1e-12)


def test_narrow_and_empty():
    i, f, bound, h = data(dtype=torch.bfloat16)
    o, state = hgrn_scan(i, f, bound, initial_state=h, output_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    o, state = hgrn_scan(i[:, :0], f[:, :0], bound, initial_state=h, output_state=True)
    assert o.shape == (2, 0, 5)
    assert torch.equal(state, h.float())


def test_bad_arguments():
    i, f, bound, h = data()
    with pytest.raises(ValueError, match=r"hgrn_scan: f has shape \(2, 6, 5\), expected \[B,S,D\] = \(2, 7, 5\)"):
        hgrn_scan(i, f[:, 1:], bound)
    with pytest.raises(ValueError, match=r"hgrn_scan: lower_bound has shape \(4,\), expected \[D\] = \(5,\)"):
        hgrn_scan(i, f, bound[1:])
    with pytest.raises(ValueError, match=r"initial_state has shape \(1, 5\), expected \[N,D\] = \(2, 5\)"):
        hgrn_scan(i, f, bound, initial_state=h[:1])
