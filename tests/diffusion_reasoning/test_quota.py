"""What each quota reveals, against its definition."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from latentcot.diffusion_reasoning import (
    Dream,
    EasyFirst,
    EntropyBudget,
    Factor,
    FirstHitting,
    PassView,
    Quota,
    ReMDM,
    Threshold,
    Uniform,
    diffusion_generate,
    dream,
    low_confidence,
    quota_table,
    register_order,
    register_quota,
    register_remask,
)
from latentcot.diffusion_reasoning.confidence import CONFIDENCES
from latentcot.diffusion_reasoning.quota import QUOTAS


def view(confidence: Tensor, candidates: Tensor | None = None, steps: int = 1, step: int = 0) -> PassView:
    candidates = torch.ones_like(confidence, dtype=torch.bool) if candidates is None else candidates
    rows = confidence.shape[0]
    generator = torch.Generator().manual_seed(0)
    return PassView(
        confidence.masked_fill(~candidates, -torch.inf),
        candidates,
        candidates.sum(1),
        torch.full((rows,), steps),
        torch.full((rows,), step),
        torch.zeros(rows),
        lambda: torch.rand(confidence.shape, generator=generator, dtype=torch.float64),
    )


def test_dream_quota_wastes_the_first_pass_and_doubles_the_last():
    assert quota_table(8, Dream(), 8) == [[0, 1, 1, 1, 1, 1, 1, 2]]
    assert quota_table(16, Dream(), 8) == [[1, 2, 2, 2, 2, 2, 2, 3]]
    for n in range(1, 30):
        for steps in range(1, n + 1):
            (counts,) = quota_table(n, Dream(), steps)
            assert sum(counts) == n


def test_a_step_of_dream_that_reveals_nothing_costs_no_pass():
    out = diffusion_generate(
        lambda z, m: torch.zeros(*z.shape, 9), torch.zeros(2, 1).long(), dream(8, 8, alg="entropy")
    )
    assert out.nfe.tolist() == [7, 7]


def factor_by_definition(confidences: list[float], factor: float, quirk: bool) -> int:
    """The largest n such that (j + 1)(1 - c_(j)) <= f for every 2 <= j <= n."""
    c = sorted(confidences, reverse=True)
    best = 1
    for n in range(1, len(c) + 1):
        fails = [j for j in range(2, n + 1) if (j + 1) * (1 - c[j - 1]) > factor]
        if not fails or (quirk and n == len(c) and fails == [n]):
            best = n
    return best


@pytest.mark.parametrize("quirk", [False, True])
def test_factor_equals_its_definition(quirk: bool):
    generator = torch.Generator().manual_seed(3)
    several = quirky = 0
    for _ in range(20):  # 20 batches of 500 rows: 10 000 cases
        factor = float(torch.rand((), generator=generator) * 1.5 + 0.01)
        sharp = torch.rand(500, 1, generator=generator, dtype=torch.float64) * 6
        confidence = torch.rand(500, 7, generator=generator, dtype=torch.float64) ** (1 / (1 + sharp * sharp))
        candidates = torch.rand(500, 7, generator=generator) < 0.8
        candidates[:, 0] = True
        revealed = Factor(factor, quirk).reveal(view(confidence, candidates))
        assert not (revealed & ~candidates).any()
        for row in range(500):
            values = confidence[row][candidates[row]].tolist()
            count = factor_by_definition(values, factor, quirk)
            assert int(revealed[row].sum()) == count
            several += count > 1
            quirky += count != factor_by_definition(values, factor, not quirk)
            if count < len(values):  # the most confident ones
                assert confidence[row][revealed[row]].min() >= confidence[row][candidates[row] & ~revealed[row]].max()
    assert several > 1000
    assert quirky > 20


def test_threshold_zero_takes_one_pass_and_one_takes_the_best():
    confidence = torch.tensor([[0.2, 0.95, 0.9, 0.1]], dtype=torch.float64)
    assert Threshold(0.9).reveal(view(confidence)).tolist() == [[False, True, True, False]]
    assert Threshold(1.0).reveal(view(confidence)).tolist() == [[False, True, False, False]]
    assert Threshold(0.0).reveal(view(confidence)).all()


def test_entropy_budget_reveals_what_fits():
    entropy = torch.tensor([[0.5, 0.1, 0.3, 2.0], [3.0, 4.0, 5.0, 6.0]], dtype=torch.float64)
    revealed = EntropyBudget(0.95).reveal(view(-entropy))
    assert revealed.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert EntropyBudget(0.0).reveal(view(torch.zeros(1, 3, dtype=torch.float64))).all()  # certainty is free


def test_first_hitting_reveals_one_uniformly():
    candidates = torch.tensor([[False, True, True, False, True]]).expand(6000, -1)
    revealed = FirstHitting().reveal(view(torch.rand(6000, 5, dtype=torch.float64), candidates))
    assert (revealed.sum(1) == 1).all()
    counts = revealed.sum(0).double()
    assert counts[[0, 3]].sum() == 0
    assert float(((counts[[1, 2, 4]] - 2000).square() / 2000).sum()) < 18.4  # chi-square, 2 degrees, p > 1e-4


def test_easy_first_keeps_all_but_the_least_certain_share():
    confidence = torch.tensor([[0.9, 0.2, 0.6, 0.4, 0.8]], dtype=torch.float64)
    for step in range(4):
        kept = EasyFirst(noise=0.0).reveal(view(confidence, steps=4, step=step))
        assert int(kept.sum()) == 5 - (5 * (3 - step)) // 4
        assert confidence[kept].min() > confidence[~kept].max() if not kept.all() else step == 3
    noisy = EasyFirst(noise=0.5).reveal(view(confidence.expand(400, -1), steps=4, step=1))
    assert (noisy.sum(1) == 3).all()
    assert len(noisy.unique(dim=0)) > 3  # chance decides which
    last = EasyFirst(noise=0.5).reveal(view(confidence, steps=4, step=3))
    assert last.all()


@pytest.fixture
def names_of_this_test():
    """What is registered is forgotten afterwards, or the tests behind would know it."""
    with patch.dict(CONFIDENCES), patch.dict(QUOTAS):
        yield


def test_own_values_have_names(names_of_this_test):
    class Two(Quota):
        def reveal(self, view: PassView) -> Tensor:
            return view.candidates & (view.ranks < 2)

    register_quota("two", Two)
    register_order("middle_first", lambda p: -(p.positions - 4).abs().double())
    seen = []
    config = low_confidence(6, quota="two", order="middle_first")
    out = diffusion_generate(
        lambda z, m: torch.zeros(*z.shape, 9), torch.zeros(1, 1).long(), config, hook=lambda n, r, z: seen.append(z[0])
    )
    assert out.nfe.tolist() == [3]
    assert (seen[1] != 6).nonzero().squeeze(1).tolist() == [0, 3, 4]
    for taken in (
        lambda: register_quota("two", Two),
        lambda: register_quota("uniform", Uniform),
        lambda: register_order("prob", lambda p: p.uniform),
        lambda: register_remask("cap", ReMDM),
    ):
        with pytest.raises(ValueError, match="already"):
            taken()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Factor(0.0), "factor"),
        (lambda: Dream(0.0), "eps"),
        (lambda: EntropyBudget(-1.0), "entropy_budget"),
        (lambda: EasyFirst(-1.0), "noise"),
        (lambda: low_confidence(4, quota="factor"), "needs one"),
        (lambda: low_confidence(4, quota="entropy_budget", entropy_budget=1.0), "neg_entropy"),
        (lambda: low_confidence(4, factor=1.0, threshold=0.5), "give one"),
        (lambda: low_confidence(4, factor=1.0, order="neg_entropy"), "no factor fits"),
        (lambda: low_confidence(4, quota="easy_first", order="left_to_right"), "no easyfirst fits"),
        (lambda: low_confidence(4, threshold=0.5, order_temperature=1.0), "order_temperature"),
        (lambda: low_confidence(4, order_temperature=-1.0), "order_temperature"),
        (lambda: quota_table(4, EasyFirst()), "quota"),
        (lambda: dream(4, alg="best"), "valid: origin"),
    ],
)
def test_bad_input_says_what_was_expected(call, says: str):
    with pytest.raises(ValueError, match=says):
        call()
