"""Noise schedules and sampled times."""

import itertools
import math

import pytest
import torch
from numpy.polynomial.legendre import leggauss

from latentcot.diffusion_reasoning import SCHEDULES, NoiseSchedule, sample_times


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return NoiseSchedule(request.param)


def test_alpha_falls_and_is_a_probability(schedule: NoiseSchedule):
    alpha = schedule.alpha(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert (alpha.diff() < 0).all()
    assert alpha[0] > 0.9998
    assert -1e-15 < float(alpha[-1]) < 1.1e-3


def test_weight_is_the_derivative_by_autodiff(schedule: NoiseSchedule):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.weight(t.detach()), -slope / (1 - alpha.detach()), rtol=1e-6, atol=0)


def test_loglinear_weight_is_one_over_t():
    t = torch.rand(100) + 1e-3
    assert torch.equal(NoiseSchedule().weight(t), 1 / t)


def test_t_from_alpha_inverts_alpha_and_sigma_is_its_logarithm(schedule: NoiseSchedule):
    t = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    torch.testing.assert_close(schedule.t_from_alpha(schedule.alpha(t)), t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.sigma(t), -schedule.alpha(t).log(), rtol=1e-9, atol=1e-12)


def expected_loss(schedule: NoiseSchedule, costs: dict[tuple[bool, ...], float]) -> float:
    """Integral over t of sum over masks of P(mask | t) w(t) cost(mask), by quadrature on pieces that crowd near both
    ends."""
    edges = torch.cat([torch.logspace(-7, -1, 13), torch.linspace(0.1, 0.9, 9)[1:], 1 - torch.logspace(-1, -7, 13)[1:]])
    edges = torch.cat([torch.zeros(1), edges, torch.ones(1)]).double()
    x, weights = (torch.from_numpy(a) for a in leggauss(16))
    total = 0.0
    for low, high in itertools.pairwise(edges):
        t = low + (high - low) * (x + 1) / 2
        p, w = 1 - schedule.alpha(t), schedule.weight(t)
        value = sum(
            p ** sum(mask) * (1 - p) ** (len(mask) - sum(mask)) * w * cost for mask, cost in costs.items() if any(mask)
        )
        total += float((weights * value).sum() * (high - low) / 2)
    return total


def test_expected_loss_does_not_depend_on_the_schedule():
    torch.manual_seed(0)
    masks = list(itertools.product([False, True], repeat=4))
    costs = {mask: float(torch.rand(())) * sum(mask) for mask in masks}
    found = {}
    for name in SCHEDULES:
        floor = {} if name in ("linear_sigma", "geometric", "cosine_complement") else {"eps": 1e-5}
        found[name] = expected_loss(NoiseSchedule(name, **floor), costs)
    exact = sum(
        cost * math.factorial(sum(m) - 1) * math.factorial(4 - sum(m)) / math.factorial(4)
        for m, cost in costs.items()
        if any(m)
    )
    for name, value in found.items():
        assert value == pytest.approx(exact, rel=1e-3), name


@pytest.mark.parametrize(("n", "world"), [(1, 1), (7, 1), (64, 1), (8, 3)])
def test_antithetic_times_hit_every_stratum_once(n: int, world: int):
    generator = torch.Generator().manual_seed(3)
    t = torch.cat([sample_times(n, "antithetic", 1e-3, generator, rank, world) for rank in range(world)])
    assert t.dtype == torch.float32
    stratum = ((t.double() - 1e-3) / (1 - 1e-3) * (n * world)).floor().long()
    assert sorted(stratum.tolist()) == list(range(n * world))


def test_times_stay_in_range_and_repeat_with_the_generator():
    draws = [sample_times(10_000, "iid", 1e-3, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*draws)
    assert 1e-3 <= float(draws[0].min()) < 2e-3
    assert 0.999 < float(draws[0].max()) <= 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: NoiseSchedule("logliner"), "did you mean 'loglinear'"),
        (lambda: NoiseSchedule(eps=1.0), "eps"),
        (lambda: NoiseSchedule("geometric", sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
        (lambda: NoiseSchedule("cosine", sigma_min=0.1), "has none"),
        (lambda: sample_times(4, "fixed", times=torch.tensor([0.0, 0.1, 0.2, 0.3])), "0 < t <= 1"),
        (lambda: sample_times(1, "fixed", times=torch.tensor([1.5])), "0 < t <= 1"),
        (lambda: sample_times(2, "fixed", times=torch.tensor([0.5])), r"expected \[2\]"),
        (lambda: sample_times(2, "sobol"), "antithetic"),  # type: ignore[arg-type]
        (lambda: sample_times(2, rank=2, world_size=2), "rank"),
        (lambda: sample_times(2, eps=0.0), "eps"),
    ],
)
def test_bad_input_says_what_was_expected(make, says: str):
    with pytest.raises(ValueError, match=says):
        make()
