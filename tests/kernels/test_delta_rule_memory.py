"""What makes the delta rule a memory: store, retrieve, overwrite, leave alone."""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import pytest
import torch

from latentcot.kernels import decay_attention, delta_rule

BACKENDS = pytest.mark.parametrize("backend", ["chunked", "reference"])


def orthonormal(S, K):
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(K, S, generator=generator, dtype=torch.float64))[0].T.view(1, S, 1, K)


@BACKENDS
def test_orthonormal_keys_store_and_retrieve_exactly(backend):
    k = orthonormal(80, 96)
    v = torch.randn(1, 80, 1, 7, dtype=torch.float64)
    ones = torch.ones(1, 80, 1, dtype=torch.float64)
    o, state = delta_rule(k, k, v, ones, scale=1.0, output_state=True, backend=backend)
    torch.testing.assert_close(o, v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.einsum("bshk,bhkv->bshv", k, state), v, rtol=1e-12, atol=1e-12)


@BACKENDS
def test_a_repeated_key_overwrites(backend):
    k = orthonormal(1, 8).expand(1, 5, 1, 8)
    v = torch.randn(1, 5, 1, 3, dtype=torch.float64)
    o, _ = delta_rule(k, k, v, torch.ones(1, 5, 1, dtype=torch.float64), scale=1.0, backend=backend)
    torch.testing.assert_close(o, v, rtol=1e-12, atol=1e-12)


@BACKENDS
def test_no_write_strength_leaves_the_state(backend, random_inputs):
    arguments = random_inputs("delta_rule", 2, 70, 2, 16, 12, gate="none")
    arguments["beta"] = torch.zeros_like(arguments["beta"])
    o, state = delta_rule(**arguments, scale=1.0, output_state=True, backend=backend)
    assert torch.equal(state, arguments["initial_state"])
    expected = torch.einsum("bshk,bhkv->bshv", arguments["q"], arguments["initial_state"])
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)


@BACKENDS
def test_orthogonal_keys_make_it_additive_with_scaled_values(backend):
    k, q = orthonormal(70, 80), torch.randn(1, 70, 1, 80, dtype=torch.float64)
    v, beta = torch.randn(1, 70, 1, 5, dtype=torch.float64), torch.rand(1, 70, 1, dtype=torch.float64)
    o, state = delta_rule(q, k, v, beta, output_state=True, backend=backend)
    expected, last = decay_attention(q, k, beta.unsqueeze(-1) * v, output_state=True, backend=backend)
    torch.testing.assert_close(o, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-12)


@BACKENDS
def test_negative_eigenvalues_stay_bounded(backend, random_inputs):
    """beta up to 2 keeps every erase a contraction or a reflection: the state never grows without writes."""
    arguments = random_inputs("delta_rule", 2, 200, 2, 16, 12, gate="none", dtype=torch.float32)
    arguments["beta"] = 2 * arguments["beta"]
    arguments["v"] = torch.zeros_like(arguments["v"])
    _, state = delta_rule(**arguments, output_state=True, backend=backend)
    before = torch.linalg.matrix_norm(arguments["initial_state"], ord=2)
    assert bool((torch.linalg.matrix_norm(state, ord=2) <= before * (1 + 1e-5)).all())


@BACKENDS
def test_two_reflections_swap_two_stored_values(backend):
    """Erasing along (e1 - e2)/sqrt(2) with beta = 2 exchanges what e1 and e2 hold: a permutation in one reflection."""
    state = torch.tensor([[[[1.0], [5.0]]]], dtype=torch.float64)
    k = torch.tensor([1.0, -1.0], dtype=torch.float64).div(2**0.5).view(1, 1, 1, 1, 2).expand(1, 1, 2, 1, 2)
    zero, twos = torch.zeros(1, 1, 2, 1, 1, dtype=torch.float64), torch.full((1, 1, 2, 1), 2.0, dtype=torch.float64)
    q = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    once = twos.clone()
    once[:, :, 1] = 0.0
    options = {"scale": 1.0, "initial_state": state, "output_state": True, "backend": backend}
    swapped_o, swapped = delta_rule(q, k, zero, once, **options)
    back_o, back = delta_rule(q, k, zero, twos, **options)
    torch.testing.assert_close(swapped.flatten(), torch.tensor([5.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(back.flatten(), torch.tensor([1.0, 5.0], dtype=torch.float64))
    assert swapped_o.item() == pytest.approx(5.0)
    assert back_o.item() == pytest.approx(1.0)
