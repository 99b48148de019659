"""The law of exits and its losses against their definitions, written as loops in fp64."""

import math

import pytest
import torch

from latentcot.recurrent_depth.exit_law import (
    entropy_loss,
    exit_law,
    expected_steps,
    gate_loss,
    geometric_law,
    ponder_loss,
    quantile_step,
)


def law_by_hand(gate: torch.Tensor) -> torch.Tensor:
    chance, reached, rows = torch.sigmoid(gate), torch.ones_like(gate[0]), []
    for t in range(len(gate) - 1):
        rows.append(chance[t] * reached)
        reached = reached * (1 - chance[t])
    return torch.stack([*rows, reached])


@pytest.fixture
def gate() -> torch.Tensor:
    return torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


def test_law_is_the_product_of_its_chances_and_sums_to_one(gate):
    p = exit_law(gate).exp()
    torch.testing.assert_close(p, law_by_hand(gate), atol=1e-12, rtol=0)
    torch.testing.assert_close(p.sum(0), torch.ones_like(p[0]), atol=1e-12, rtol=0)
    mean = sum((t + 1) * p[t] for t in range(5))
    torch.testing.assert_close(expected_steps(exit_law(gate)), mean, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("value", "step"), [(-1e4, 3), (1e4, 0)], ids=["never", "at once"])
def test_gates_that_are_sure(value, step):
    log_p = exit_law(torch.full((4, 2), value))
    assert log_p.exp().argmax(0).tolist() == [step, step]
    assert log_p.exp()[step].tolist() == [1.0, 1.0]
    assert bool(torch.isfinite(entropy_loss(torch.ones(4, 2), log_p, 0.1)))


def test_long_products_keep_their_gradient():
    gate = torch.full((400, 1), 3.0, requires_grad=True)
    exit_law(gate)[-1].sum().backward()
    assert gate.grad is not None
    assert (gate.grad[:-1] < 0).all()
    assert float(gate.grad[-1]) == 0  # the last chance does not matter


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_quantile_is_the_first_step_that_reaches_q(gate, q):
    p = law_by_hand(gate).cumsum(0)
    expected = [next((m + 1 for m in range(4) if column[m] >= q), 5) for column in p.flatten(1).T]
    assert quantile_step(exit_law(gate), q).flatten().tolist() == expected


def test_quantile_of_one_is_never_early():
    assert quantile_step(exit_law(torch.full((4, 2), 1e4)), 1).tolist() == [4, 4]
    assert quantile_step(exit_law(torch.full((4, 2), -1e4)), 0).tolist() == [1, 1]
    for q in (-0.1, 1.1, float("nan"), True, "0.5"):
        with pytest.raises(ValueError, match=r"q: .* expected a number within \[0, 1\]"):
            quantile_step(exit_law(torch.zeros(2)), q)  # type: ignore[arg-type]


def test_stage_one(gate):
    losses = torch.rand(5, 3, 4, dtype=torch.float64)
    p = law_by_hand(gate)
    total = 0.0
    for i in range(3):
        for j in range(4):
            total += float((p[:, i, j] * losses[:, i, j]).sum() + 0.1 * (p[:, i, j] * p[:, i, j].log()).sum())
    assert float(entropy_loss(losses, exit_law(gate), 0.1)) == pytest.approx(total / 12, abs=1e-12)


@pytest.mark.parametrize("pairing", ["after", "before"])
def test_stage_two(gate, pairing):
    losses = torch.rand(5, 3, 4, dtype=torch.float64) / 50
    losses.requires_grad_()
    gate = gate.clone().requires_grad_()
    loss = gate_loss(losses, gate, pairing=pairing)
    total = 0.0
    for i in range(3):
        for j in range(4):
            for t in range(1, 5):
                gained = max(0.0, float((losses[t - 1, i, j] - losses[t, i, j]).detach()))
                target = 1 / (1 + math.exp(-50 * (gained - 0.005)))
                go = 1 - float(torch.sigmoid(gate[t if pairing == "after" else t - 1, i, j]).detach())
                total -= (target * math.log(go) + (1 - target) * math.log(1 - go)) / 5
    assert loss.item() == pytest.approx(total / 12, abs=1e-10)
    loss.backward()
    assert losses.grad is None  # detached
    untaught = 0 if pairing == "after" else 4
    assert [bool((g != 0).any()) for g in gate.grad] == [t != untaught for t in range(5)]  # type: ignore[union-attr]


def test_stage_two_needs_a_second_step():
    with pytest.raises(ValueError, match="at least two"):
        gate_loss(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"shape \[2, 2\] given, expected that of the gate, \[3, 2\]"):
        gate_loss(torch.ones(2, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="did you mean 'after'"):
        gate_loss(torch.ones(2, 2), torch.ones(2, 2), pairing="aftr")


def test_geometric_prior_and_ponder_loss(gate):
    last = geometric_law(5, 0.4, like=gate).exp()
    plain = torch.tensor([0.4 * 0.6**t for t in range(5)], dtype=torch.float64)
    torch.testing.assert_close(last[:-1], plain[:-1])
    assert float(last[-1]) == pytest.approx(0.6**4)
    torch.testing.assert_close(geometric_law(5, 0.4, "renormalise", gate).exp(), plain / plain.sum())
    # A gate whose chance is the prior's everywhere costs nothing.
    same = torch.full((5, 2), math.log(0.4 / 0.6), dtype=torch.float64)
    assert float(ponder_loss(torch.zeros(5, 2), exit_law(same), 0.2, 0.4)) == pytest.approx(0, abs=1e-12)
    p, losses = law_by_hand(gate), torch.rand(5, 3, 4, dtype=torch.float64)
    by_hand = (p * losses).sum(0) + 0.2 * (p * (p / last[:, None, None]).log()).sum(0)
    assert float(ponder_loss(losses, exit_law(gate), 0.2, 0.4)) == pytest.approx(float(by_hand.mean()), abs=1e-12)
    with pytest.raises(ValueError, match=r"rate: 1.0 given"):
        geometric_law(3, 1.0)
