"""ReMDM's schedules: the exact reverse step keeps mass and marginal, and a run follows the schedule."""

import itertools

import pytest
import torch
from torch import Tensor

from latentcot.diffusion_reasoning import NoiseSchedule, ReMDM, ancestral, diffusion_generate, low_confidence, posterior
from latentcot.diffusion_reasoning.remasking import REMDM_VARIANTS, sigma_max

V, MASK = 6, 5
LOGLINEAR = NoiseSchedule(eps=0.0)


def flat(z: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(*z.shape, V)


@pytest.mark.parametrize("variant", REMDM_VARIANTS)
def test_mass_and_marginal_of_every_variant(variant: str):
    remask = ReMDM(variant=variant)  # type: ignore[arg-type]
    torch.manual_seed(0)
    logprobs = torch.randn(1, 3, V, dtype=torch.float64)
    logprobs = logprobs.masked_fill(torch.arange(V) == MASK, -torch.inf).log_softmax(-1)
    z, revealed = torch.tensor([[2, 4, MASK]]), torch.tensor([[True, True, False]])
    times = torch.linspace(1, 0.01, 41, dtype=torch.float64)
    for t, s in itertools.pairwise(times):
        alpha_t, alpha_s = (remask.alpha(x[None], LOGLINEAR) for x in (t, s))
        sigma = remask.sigma(alpha_t, alpha_s, t[None], torch.tensor([[0.9, 0.2, 1.0]]).double(), revealed)
        highest = sigma_max(alpha_t, alpha_s)
        assert (sigma >= 0).all()
        assert (sigma <= highest + 1e-15).all()
        if variant == "conf":  # all of sigma_max, shared out over what is revealed
            assert float(sigma.sum()) == pytest.approx(float(highest), abs=1e-12)
            assert sigma[0, 1] > sigma[0, 0]
            assert sigma[0, 2] == 0
            continue
        q = posterior(logprobs, z, float(alpha_t), float(alpha_s), float(sigma), MASK)
        torch.testing.assert_close(q.sum(-1), torch.ones(1, 3, dtype=torch.float64), rtol=0, atol=1e-12)
        to_mask = float(alpha_t) * float(q[0, 0, MASK]) + (1 - float(alpha_t)) * float(q[0, 2, MASK])
        assert to_mask == pytest.approx(1 - float(alpha_s), abs=1e-12)


def test_loop_schedule_rises_holds_and_finishes():
    remask = ReMDM(variant="loop")
    t = torch.tensor([1.0, 0.775, 0.55, 0.3, 0.0500001, 0.05, 0.025, 0.0], dtype=torch.float64)
    expected = [0.0, 0.45, 0.9, 0.9, 0.9, 0.9, 0.95, 1.0]
    assert remask.alpha(t, LOGLINEAR).tolist() == pytest.approx(expected, abs=1e-12)
    alpha = torch.full((8,), 0.9, dtype=torch.float64)
    assert remask.sigma(alpha, alpha, t).tolist() == [0, 0, 0.02, 0.02, 0.02, 0, 0, 0]


def test_forward_backward_and_the_other_formulas_by_hand():
    alpha_t, alpha_s = torch.tensor([0.5]).double(), torch.tensor([0.6]).double()
    assert float(ReMDM(variant="forward_backward").sigma(alpha_t, alpha_s)) == pytest.approx(0.2)
    assert float(ReMDM(0.5, "rescale").sigma(alpha_t, alpha_s)) == pytest.approx(0.4)
    assert float(ReMDM(0.9, "cap").sigma(alpha_t, alpha_s)) == pytest.approx(0.8)
    assert float(ReMDM(variant="forward_backward").sigma(torch.zeros(1), torch.tensor([0.1]))) == 1.0
    assert (ReMDM().strength, ReMDM(variant="rescale").strength, ReMDM(variant="loop").strength) == (0.008, 0.015, 0.02)


@pytest.mark.parametrize("variant", ["cap", "rescale", "loop", "forward_backward"])
def test_the_share_of_clean_tokens_follows_the_schedule(variant: str):
    """In front of each pass of 20 steps the mean share of masks over 2,000 tokens is 1 - alpha(t)."""
    after: dict[int, Tensor] = {}

    def remember(number: int, rows: Tensor, z: Tensor, logits: Tensor) -> Tensor:
        if len(rows) == 50:
            after[number] = z.clone()
        return z

    remask = ReMDM(variant=variant)  # type: ignore[arg-type]
    config = ancestral(20, 40, remask=remask, schedule=LOGLINEAR, t_end=0.0, mask_id=MASK)
    out = diffusion_generate(flat, torch.zeros(50, 1).long(), config, tokens_hook=remember)
    assert (out.sequences[:, 1:] != MASK).all()
    assert len(after) >= 18
    for number, z in after.items():
        s = torch.tensor([max(1 - (number + 1) / 20, 0.0)], dtype=torch.float64)
        expected = 1 - float(remask.alpha(s, LOGLINEAR))
        share = float((z[:, 1:] == MASK).double().mean())
        assert abs(share - expected) <= 5 * (expected * (1 - expected) / 2000) ** 0.5 + 1e-9, number


def test_conf_sends_back_sigma_max_tokens_a_step():
    """Masked positions reveal as without re-masking, so given m masks E[m'] = m (1 - rate) + sigma_max, once any token
    is there: the share of clean tokens falls behind the schedule."""
    counts: list[Tensor] = []

    def remember(number: int, rows: Tensor, z: Tensor, logits: Tensor) -> Tensor:
        if len(rows) == 400:
            counts.append((z[:, 1:] == MASK).sum(1).double())
        return z

    config = ancestral(20, 40, remask="conf", schedule=LOGLINEAR, t_end=0.0, mask_id=MASK)
    diffusion_generate(flat, torch.zeros(400, 1).long(), config, tokens_hook=remember)
    assert len(counts) >= 19
    for number, (before, after) in enumerate(itertools.pairwise(counts[:19]), start=1):
        alpha_t, alpha_s = number / 20, (number + 1) / 20
        highest = min(1.0, (1 - alpha_s) / alpha_t)
        expected = before * (1 - (alpha_s - alpha_t) / (1 - alpha_t)) + highest * (before < 40)
        off = after - expected
        assert abs(float(off.mean())) < 5 * float(off.std()) / 20


def test_names_and_strengths():
    assert ancestral(4, remask="rescale", eta=0.3).make_remask() == ReMDM(0.3, "rescale")
    assert ancestral(4, remask="loop").make_remask() == ReMDM(variant="loop")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ReMDM(0.1, "conf"), "has none"),
        (lambda: ReMDM(variant="mean"), "variant"),  # type: ignore[arg-type]
        (lambda: ReMDM(variant="loop", t_on=0.01), "t_off < t_on"),
        (lambda: ReMDM(variant="loop").sigma(torch.zeros(1), torch.ones(1)), "time before the step"),
        (lambda: ReMDM(variant="conf").sigma(torch.zeros(1), torch.ones(1)), "needs both"),
        (lambda: ancestral(4, remask="sometimes"), "valid: cap"),
        (lambda: ancestral(4, remask=ReMDM(), eta=0.1), "by name"),
        (lambda: ancestral(4, remask="conf", eta=0.1), "has none"),
        (lambda: low_confidence(4, remask="revise", eta=0.1), "has none"),
        (lambda: ancestral(4, remask=7), "expected a name"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_says_what_was_expected(call, says: str):
    with pytest.raises(ValueError, match=says):
        call()
