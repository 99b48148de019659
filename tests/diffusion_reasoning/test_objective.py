"""Corruption, SUBS and the loss."""

import itertools
import math

import pytest
import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from latentcot.diffusion_reasoning import NoiseSchedule, corrupt, diffusion_loss, subs_logprobs

V, MASK = 9, 6
LOGLINEAR = NoiseSchedule()


def tokens(*shape: int) -> Tensor:
    """Random tokens other than the mask."""
    x = torch.randint(0, V - 1, shape)
    return x + (x >= MASK)


def random_model(z: Tensor, mask: Tensor) -> Tensor:
    """Logits that depend on the whole row, the mask token's among them."""
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(1))
    return table[z] + torch.tanh(table[z].mean(1, keepdim=True) * 3)


def test_only_maskable_positions_are_noised_and_a_given_mask_token_stays():
    torch.manual_seed(0)
    x0 = tokens(64, 20)
    maskable = torch.rand(64, 20) < 0.5
    x0 = torch.where(maskable | (torch.rand(64, 20) < 0.7), x0, MASK)  # given positions may hold the mask token
    out = corrupt(x0, torch.full((64,), 0.7), LOGLINEAR, MASK, maskable)
    assert torch.equal(out.z[~maskable], x0[~maskable])
    assert not (out.masked & ~maskable).any()
    assert (out.z[out.masked] == MASK).all()
    assert torch.equal(out.z[~out.masked], x0[~out.masked])
    share = float(out.masked.sum() / maskable.sum())
    assert abs(share - 0.7 * 0.999) < 4 * math.sqrt(0.25 / int(maskable.sum()))


def test_subs_is_a_distribution_with_nothing_on_the_mask_token():
    torch.manual_seed(0)
    z = torch.where(torch.rand(5, 7) < 0.5, MASK, tokens(5, 7))
    probs = subs_logprobs(torch.randn(5, 7, V), z, MASK).exp()
    torch.testing.assert_close(probs.sum(-1), torch.ones(5, 7), rtol=0, atol=1e-6)
    assert (probs[..., MASK] == 0).all()
    clean = z != MASK
    assert torch.equal(probs[clean], torch.nn.functional.one_hot(z[clean], V).float())


def test_subs_gradient_is_exactly_zero_at_clean_positions():
    torch.manual_seed(0)
    z = torch.where(torch.rand(5, 7) < 0.5, MASK, tokens(5, 7))
    logits = torch.randn(5, 7, V, requires_grad=True)
    logprobs = subs_logprobs(logits, z, MASK)
    (logprobs.gather(-1, tokens(5, 7)[..., None]).clamp(min=-1e4) * torch.randn(5, 7, 1)).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[z != MASK] == 0).all()
    assert (logits.grad[z == MASK].abs().sum(-1) > 0).all()
    assert (logits.grad[..., MASK] == 0).all()


def test_subs_carries_over_a_given_mask_token():
    z = torch.full((1, 2), MASK)
    maskable = torch.tensor([[False, True]])
    probs = subs_logprobs(torch.zeros(1, 2, V), z, MASK, maskable=maskable).exp()
    assert probs[0, 0, MASK] == 1
    torch.testing.assert_close(probs[0, 1, 0], torch.tensor(1 / (V - 1)))


@pytest.mark.parametrize("weight", ["elbo", "uniform"])
@pytest.mark.parametrize("normalise", ["elbo", "answer", "tokens", "masked"])
def test_loss_equals_its_formula(normalise: str, weight: str):
    torch.manual_seed(0)
    x0, times = tokens(4, 6), torch.tensor([0.2, 0.9, 0.5, 1.0])
    maskable = torch.tensor([[0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).bool()
    real = torch.ones(4, 6, dtype=torch.bool)
    real[0, 4:] = False
    out = diffusion_loss(
        random_model,
        x0,
        schedule=LOGLINEAR,
        mask_id=MASK,
        maskable=maskable,
        attention_mask=real,
        time=times,
        weight=weight,  # type: ignore[arg-type]
        normalise=normalise,  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(5),
    )
    z = corrupt(x0, times, LOGLINEAR, MASK, maskable, torch.Generator().manual_seed(5)).z
    logprobs = subs_logprobs(random_model(z, real), z, MASK)
    rows, nelbo, masked = [], [], 0
    for b in range(4):
        terms = [-float(logprobs[b, i, x0[b, i]]) for i in range(6) if z[b, i] == MASK]
        masked += len(terms)
        rows.append(sum(terms) * (1 / float(times[b]) if weight == "elbo" else 1))
        nelbo.append(sum(terms) / float(times[b]))
    expected = {
        "elbo": sum(rows) / (4 + 6 + 6),  # real tokens of the rows that have something to score
        "answer": (rows[0] / 2 + rows[1] / 5 + rows[3] / 3) / 3,
        "tokens": sum(rows) / 10,
        "masked": sum(rows) / masked,
    }[normalise]
    assert float(out.loss) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(out.nelbo_nats, torch.tensor(nelbo), rtol=1e-5, atol=1e-6)
    assert out.n_maskable.tolist() == [2, 5, 0, 3]
    assert torch.equal(out.per_token > 0, out.masked)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_focal_factor_has_a_gradient_where_a_token_is_certain(gamma: float):
    x0 = tokens(2, 3)
    logits = (60.0 * torch.nn.functional.one_hot(x0, V)).requires_grad_()  # a cross-entropy of exactly 0
    out = diffusion_loss(
        lambda z, mask: logits,
        x0,
        schedule=NoiseSchedule(),
        mask_id=MASK,
        time="discrete",
        discrete_steps=4,
        weight="mgdm",
        focal=(0.25, gamma),
    )
    out.loss.backward()
    assert out.masked.any()
    assert float(out.loss.detach()) == 0.0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_batch_where_nothing_was_masked_has_zero_loss_with_a_gradient():
    weight = torch.ones((), requires_grad=True)
    out = diffusion_loss(
        lambda z, mask: random_model(z, mask) * weight,
        tokens(2, 4),
        schedule=LOGLINEAR,
        mask_id=MASK,
        time=torch.full((2,), 1e-9),
    )
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert weight.grad == 0


def test_three_forms_of_the_bound_are_equal():
    """(a) every order of revealing, (b) subsets of a uniform size weighted L/l, (c) the time integral with w and alpha
    of the schedule: arXiv:2502.09992 and 2406.07524; exact enumeration for a table model with 4 positions and 3
    symbols."""
    length, symbols, mask_id = 4, 3, 3
    table = torch.randn(4**length, length, symbols + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.tensor([[2, 0, 1, 1]])

    def logprob(subset: frozenset[int]) -> list[float]:
        """Log-probability of the true token at each position of ``subset``, which is masked."""
        z = x.clone()
        z[0, list(subset)] = mask_id
        logits = table[int((z * 4 ** torch.arange(length)).sum())][None]
        return subs_logprobs(logits, z, mask_id)[0].gather(-1, x[0][:, None])[:, 0].tolist()

    positions = range(length)
    orders = list(itertools.permutations(positions))
    any_order = sum(sum(logprob(frozenset(order[k:]))[order[k]] for k in range(length)) for order in orders) / len(
        orders
    )
    by_subset = {
        subset: sum(logprob(subset)[i] for i in subset)
        for size in range(1, length + 1)
        for subset in map(frozenset, itertools.combinations(positions, size))
    }
    by_size = sum(value / len(s) / math.comb(length, len(s)) for s, value in by_subset.items())
    x16, w16 = leggauss(16)
    schedule = NoiseSchedule(eps=0.0)
    t = torch.from_numpy((x16 + 1) / 2)
    p, w = 1 - schedule.alpha(t), schedule.weight(t)
    integral = sum(
        float((torch.from_numpy(w16) / 2 * w * p ** len(s) * (1 - p) ** (length - len(s))).sum()) * v
        for s, v in by_subset.items()
    )
    assert any_order == pytest.approx(by_size, rel=1e-12)
    assert any_order == pytest.approx(integral, rel=1e-12)

    # and the loss itself, averaged over draws, within 4 standard errors
    def network(z: Tensor, mask: Tensor) -> Tensor:
        return table[(z * 4 ** torch.arange(length)).sum(1)]

    draws = diffusion_loss(
        network,
        x.expand(20_000, -1),
        schedule=LOGLINEAR,
        mask_id=mask_id,
        time_eps=1e-5,
        generator=torch.Generator().manual_seed(0),
    ).nelbo_nats
    assert abs(float(draws.mean()) + any_order) < 4 * float(draws.std()) / math.sqrt(20_000)


def loss_of(**change):
    arguments = {"model": random_model, "x0": tokens(2, 4), "schedule": LOGLINEAR, "mask_id": MASK} | change
    return diffusion_loss(arguments.pop("model"), arguments.pop("x0"), **arguments)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x0": torch.full((2, 4), MASK)}, ValueError, "mask token"),
        ({"mask_id": V, "model": lambda z, m: torch.zeros(2, 4, V)}, ValueError, "mask_id"),
        ({"mask_id": -1}, ValueError, "mask_id"),
        ({"weight": "focal"}, ValueError, "weight"),
        ({"weight": "mgdm"}, ValueError, "discrete"),
        ({"weight": "cart", "cart_p": 0.0}, ValueError, "cart_p"),
        ({"time": "discrete"}, ValueError, "discrete_steps"),
        ({"time": "importance"}, ValueError, "linear_sigma"),
        ({"carry": "hidden"}, ValueError, "built with .none."),
        ({"normalise": "mean"}, ValueError, "normalise"),
        ({"time": torch.zeros(2)}, ValueError, "0 < t"),
        ({"maskable": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, "nothing to score"),
        ({"maskable": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "maskable"),
        (
            {"maskable": torch.ones(2, 4, dtype=torch.bool), "attention_mask": torch.tensor([[1, 1, 1, 0]] * 2)},
            ValueError,
            "padded",
        ),
        ({"attention_mask": torch.ones(2, 5)}, ValueError, "attention_mask"),
        ({"model": lambda z, m: torch.zeros(2, 3, V)}, ValueError, "logits"),
        (
            {"model": lambda z, m: torch.full((2, 4, V), torch.nan), "time": torch.ones(2)},
            FloatingPointError,
            "row 0, position 0",
        ),
        ({"model": None}, TypeError, "callable"),
    ],
)
def test_bad_input_says_what_was_expected(change: dict, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        loss_of(**change)
