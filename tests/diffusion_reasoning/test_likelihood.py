"""Bounds of the log-probability, against enumeration of a table model with 4 positions and 3 symbols."""

import itertools
import math
from typing import Any

import pytest
import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from latentcot.diffusion_reasoning import exact_bound, guided_score, loglikelihood_bound
from latentcot.diffusion_reasoning.likelihood import best_of, order_logprob

LENGTH, SYMBOLS, MASK = 4, 3, 3
TABLE = torch.randn(4**LENGTH, LENGTH, SYMBOLS + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NONE, X = torch.zeros(0, dtype=torch.int64), torch.tensor([2, 0, 1, 1])


def network(z: Tensor, mask: Tensor) -> Tensor:
    """Any logits for each of the 4^4 canvases."""
    return TABLE[(z * 4 ** torch.arange(LENGTH)).sum(1)]


def bound(**changes: Any):
    arguments: dict[str, Any] = {"prompt": NONE, "answer": X, "mask_id": MASK, **changes}
    return loglikelihood_bound(arguments.pop("model", network), **arguments)


def test_the_three_forms_are_equal():
    orders, subsets, time = (exact_bound(network, NONE, X, mask_id=MASK, form=f) for f in ("orders", "subsets", "time"))  # type: ignore[arg-type]
    assert orders == pytest.approx(subsets, rel=1e-12)
    assert orders == pytest.approx(time, rel=1e-12)

    one_by_one = [
        order_logprob(network, NONE, X, list(order), mask_id=MASK) for order in itertools.permutations(range(LENGTH))
    ]
    assert sum(one_by_one) / 24 == pytest.approx(orders, rel=1e-12)

    # and the integral over t by quadrature, from the definition
    x, w = leggauss(12)
    total = 0.0
    for t, weight in zip((x + 1) / 2, w / 2, strict=True):
        for pattern in itertools.product([False, True], repeat=LENGTH):
            masked = torch.tensor(pattern)
            chance = math.prod(t if m else 1 - t for m in pattern)
            logits = network(X.masked_fill(masked, MASK)[None], masked[None])[0]
            logits[:, MASK] = -torch.inf
            total += weight * chance / t * float(logits.log_softmax(-1)[torch.arange(LENGTH), X][masked].sum())
    assert total == pytest.approx(orders, rel=1e-12)


@pytest.mark.parametrize("method", ["stratified", "iid", "llada"])
def test_estimates_lie_within_four_standard_errors(method: str):
    exact = exact_bound(network, NONE, X, mask_id=MASK)
    for seed in range(5):
        found = bound(n_samples=1024, method=method, generator=torch.Generator().manual_seed(seed))
        assert found.n_samples == 1024
        assert abs(found.mean - exact) < 4 * found.stderr
        assert set(found.by_length) == {1, 2, 3, 4}
        # n · mean over l of the mean cross-entropy at l is the bound again
        rebuilt = -sum(value for value, _ in found.by_length.values())
        assert rebuilt == pytest.approx(found.mean, abs=0.3)


def test_drawing_the_count_has_a_lower_variance_than_drawing_the_time():
    """4.48 against 67.0 a draw in another table; the order of magnitude is the same here."""
    spread = {}
    for method in ("iid", "time"):
        found = bound(n_samples=8192, method=method, generator=torch.Generator().manual_seed(0))
        spread[method] = found.stderr**2 * found.n_samples
    assert spread["time"] > 4 * spread["iid"]
    exact = exact_bound(network, NONE, X, mask_id=MASK)
    found = bound(n_samples=8192, method="time", generator=torch.Generator().manual_seed(1), time_eps=1e-4)
    assert abs(found.mean - exact) < 4 * found.stderr


def test_one_draw_is_exact_for_one_token():
    prompt, answer = X[:3], X[3:]
    exact = exact_bound(network, prompt, answer, mask_id=MASK)
    for method in ("stratified", "iid", "llada"):
        found = bound(prompt=prompt, answer=answer, n_samples=1, batch_size=1, method=method)
        assert found.mean == pytest.approx(exact, rel=1e-12)
        assert found.stderr == 0.0
        assert found.by_length[1][0] == pytest.approx(-exact, rel=1e-12)


def test_stratified_counts_are_even():
    counts = []

    def counting(z: Tensor, mask: Tensor) -> Tensor:
        counts.append((z == MASK).sum(1).sort().values.tolist())
        return network(z, mask)

    bound(model=counting, n_samples=32, batch_size=8, method="stratified")
    assert counts == [[1, 1, 2, 2, 3, 3, 4, 4]] * 4
    counts.clear()
    bound(model=counting, n_samples=32, batch_size=4, method="llada")
    assert counts == [[1, 2, 3, 4]] * 8


def test_a_given_mask_token_is_no_part_of_the_answer():
    prompt = torch.tensor([MASK, 1])
    found = bound(prompt=prompt, answer=X[:2], n_samples=512, generator=torch.Generator().manual_seed(0))
    assert abs(found.mean - exact_bound(network, prompt, X[:2], mask_id=MASK)) < 4 * found.stderr


def test_guidance_makes_a_score_and_says_so():
    prompt, answer = X[:2], X[2:]
    plain = bound(
        prompt=prompt, answer=answer, n_samples=64, generator=torch.Generator().manual_seed(0), method="llada"
    )

    def by_hand(z: Tensor, mask: Tensor) -> Tensor:
        bare = z.clone()
        bare[:, :2] = MASK
        c, u = network(z, mask), network(bare, mask)
        return u + 3.0 * (c - u)

    guided = guided_score(
        network, prompt, answer, mask_id=MASK, guidance=2.0, n_samples=64, generator=torch.Generator().manual_seed(0)
    )
    expected = bound(
        model=by_hand,
        prompt=prompt,
        answer=answer,
        n_samples=64,
        generator=torch.Generator().manual_seed(0),
        method="llada",
    )
    assert guided.mean == pytest.approx(expected.mean, rel=1e-12)
    assert plain.is_likelihood
    assert not guided.is_likelihood


def test_units():
    found = bound(n_samples=16)
    assert found.per_token == found.mean / 4
    assert found.bits_per_token == pytest.approx(-found.mean / 4 / math.log(2))
    assert found.perplexity == pytest.approx(math.exp(-found.mean / 4))
    assert bound(n_samples=17).n_samples == 32  # whole batches, and it says so
    assert best_of([bound(answer=X[:2], prompt=X[2:]), found]) in (0, 1)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"answer": NONE}, ValueError, "answer: it is empty"),
        ({"answer": torch.tensor([1, MASK])}, ValueError, "token 1 is the mask token"),
        ({"answer": X[None]}, ValueError, "answer: shape"),
        ({"prompt": X.float()}, ValueError, "prompt: shape"),
        ({"method": "exact"}, ValueError, "method"),
        ({"n_samples": 0}, ValueError, "n_samples"),
        ({"mask_id": -1}, ValueError, "mask_id"),
        ({"model": lambda z, m: torch.full((*z.shape, 4), torch.nan)}, FloatingPointError, "answer position"),
        ({"model": lambda z, m: torch.zeros(1, 2, 4)}, ValueError, "logits"),
    ],
)
def test_bad_input_says_what_was_expected(change: dict, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        bound(**change)


def test_bad_arguments_of_the_others():
    with pytest.raises(ValueError, match="form"):
        exact_bound(network, NONE, X, mask_id=MASK, form="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="longest = 3"):
        exact_bound(network, NONE, X, mask_id=MASK, longest=3)
    with pytest.raises(ValueError, match="permutation"):
        order_logprob(network, NONE, X, [0, 0, 1, 2], mask_id=MASK)
    with pytest.raises(ValueError, match="guidance"):
        guided_score(network, NONE, X, mask_id=MASK, guidance=0.0)
    with pytest.raises(ValueError, match="none given"):
        best_of([])
