"""The values of depth recurrence: their laws, their limits and what they refuse."""

import math

import pytest
import torch

from latentcot.recurrent_depth import (
    ExitRule,
    GradientWindow,
    InitialState,
    Injection,
    Readout,
    StepSampler,
    relative_residual,
    state_rms,
    token_correlation,
)
from latentcot.recurrent_depth.exit_rule import DECODED, THRESHOLDS
from latentcot.recurrent_depth.step_sampler import ramp


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- step sampler --------------------------------------------------------------------------------------------------


def test_lognormal_poisson_has_the_published_statistics():
    r = StepSampler(mean=32).draw(100_000, generator()).double()
    assert abs(r.mean() - 33) < 0.3
    assert r.median() == 29
    assert abs(r.long().bincount().argmax() - 24) <= 2
    assert r.min() >= 1
    assert (r < 8).double().mean().item() == pytest.approx(0.009, abs=0.001)
    # variance of a Poisson law whose rate is log-normal: E[rate] + Var[rate]
    assert r.var().item() == pytest.approx(32 + 32**2 * (math.exp(0.25) - 1), rel=0.05)


@pytest.mark.parametrize(
    ("sampler", "mean"),
    [
        (StepSampler("poisson", 8), 9),
        (StepSampler("geometric", 5), 5),
        (StepSampler("uniform", 4), 4),
        (StepSampler("fixed", 6), 6),
        (StepSampler("geometric", 1), 1),
    ],
    ids=lambda value: value.kind if isinstance(value, StepSampler) else str(value),
)
def test_sampler_mean_and_lower_end(sampler: StepSampler, mean: float):
    r = sampler.draw(50_000, generator()).double()
    assert r.mean().item() == pytest.approx(mean, abs=0.1)
    assert r.min() >= 1


def test_uniform_covers_one_to_twice_the_mean():
    assert StepSampler("uniform", 3).draw(2000, generator()).unique().tolist() == [1, 2, 3, 4, 5]


def test_every_worker_draws_the_same_number_at_a_step():
    sampler = StepSampler(mean=8)
    torch.manual_seed(3)
    first = [sampler.at_step(step) for step in range(20)]
    torch.manual_seed(4)  # the global generator of another worker stands elsewhere
    assert [sampler.at_step(step) for step in range(20)] == first
    assert len(set(first)) > 5


def test_most_cuts_the_tail():
    r = StepSampler(mean=8, most=10).draw(2000, generator())
    assert r.max() == 10


# -- initial state -------------------------------------------------------------------------------------------------


def test_like_init_is_a_normal_cut_at_three_deviations():
    s = InitialState().draw(torch.empty(64, 64, 64), generator())
    assert s.abs().max() <= 3 * math.sqrt(0.4)
    # variance left after the cut: 1 - 6 phi(3) / (2 Phi(3) - 1)
    left = 0.4 * (1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))
    assert s.var().item() == pytest.approx(left, rel=0.01)


def test_other_initial_states():
    like = torch.randn(2, 50, 300, dtype=torch.float64)
    assert InitialState("zeros").draw(like).count_nonzero() == 0
    assert InitialState("embedding").draw(like) is like
    assert InitialState("unit_normal").draw(like, generator()).var().item() == pytest.approx(1, rel=0.05)
    assert InitialState("scaled", 4.0).draw(like, generator()).var().item() == pytest.approx(4, rel=0.05)


def test_single_and_double_precision_start_alike():
    a = InitialState().draw(torch.empty(2, 3, 8), generator(5))
    b = InitialState().draw(torch.empty(2, 3, 8, dtype=torch.float64), generator(5))
    assert torch.equal(a.double(), b)


# -- injection -----------------------------------------------------------------------------------------------------


def test_linear_injection_takes_the_state_first():
    adapter = Injection().build(4)
    with torch.no_grad():
        adapter.weight.copy_(torch.cat([torch.eye(4), 10 * torch.eye(4)], 1))
    s, e = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(adapter(s, e), s + 10 * e)


def test_add_gate_and_none():
    s, e = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(Injection("add").build(4)(s, e), s + e)
    assert torch.equal(Injection("none").build(4)(s, e), s)
    gate = Injection("gate").build(4)
    with torch.autocast("cpu", torch.bfloat16):  # the product comes out in 16 bits, state and input stay in 32
        assert gate(s, e).dtype == torch.float32
    with torch.no_grad():
        gate.weight.zero_()
    torch.testing.assert_close(gate(s, e), (s + e) / 2)


def test_ffn_injection_is_two_maps_with_silu_between():
    adapter = Injection("ffn").build(4)
    s, e = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    inner = torch.cat([s, e], -1) @ adapter.weight.T
    torch.testing.assert_close(adapter(s, e), (inner * inner.sigmoid()) @ adapter.output.T)
    assert adapter.flops_per_token == 2 * (8 * 8 + 4 * 8)
    assert [Injection(kind).build(4).flops_per_token for kind in ("linear", "add")] == [2 * 4 * 8, 0]


# -- curricula -----------------------------------------------------------------------------------------------------


def test_ramps_rise_from_one_to_the_mean():
    linear = StepSampler("fixed", 9, ramp="linear", ramp_share=0.5)
    assert [linear.at_progress(p).mean for p in (0, 0.25, 0.5, 1)] == [1, 5, 9, 9]
    assert [linear.at_step(3, progress=p) for p in (0, 0.25, 1)] == [1, 5, 9]
    assert ramp("one_minus_sqrt", 0.75) == 0.5
    assert [ramp(kind, p) for kind in ("linear", "one_minus_sqrt") for p in (-1, 0, 1, 2)] == [0, 0, 1, 1] * 2
    drawn = StepSampler(mean=32, ramp="one_minus_sqrt").at_progress(0.375)
    assert (drawn.ramp, drawn.mean) == ("none", pytest.approx(1 + 31 * (1 - math.sqrt(0.5))))
    plain = StepSampler(mean=32)
    assert plain.at_progress(0.1) is plain
    assert StepSampler(mean=32, ramp="linear").at_step(7) == plain.at_step(7)  # without a progress: the end
    assert GradientWindow(8, "linear", 1.0).at_progress(0.5).split(20) == (16, 4)
    assert GradientWindow(8, "linear").at_progress(0).last == 1


# -- gradient window -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "r", "split"), [(8, 12, (4, 8)), (8, 8, (0, 8)), (8, 3, (0, 3)), (0, 3, (3, 0)), (None, 9, (0, 9))]
)
def test_gradient_window_splits(last: int | None, r: int, split: tuple[int, int]):
    assert GradientWindow(last).split(r) == split


# -- exit criteria -------------------------------------------------------------------------------------------------


def test_divergence_runs_from_previous_to_current_and_starts_at_uniform():
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    rule, s = ExitRule("kl"), torch.zeros(1, 1, 2)
    value, memory = rule.measure(s, s, p.log()[None, None], None)
    assert value.item() == pytest.approx((1 / 3 * (1 / 3 / p).log()).sum().item())
    value, _ = rule.measure(s, s, q.log()[None, None], memory)
    assert value.item() == pytest.approx((p * (p / q).log()).sum().item())
    assert value.item() != pytest.approx((q * (q / p).log()).sum().item(), rel=0.01)


def test_min_p_flattens_the_tail():
    s = torch.zeros(1, 1, 2)
    a = torch.tensor([0.9, 0.08, 0.02]).log().double()[None, None]
    b = torch.tensor([0.9, 0.02, 0.08]).log().double()[None, None]
    rule = ExitRule("min_p_kl")
    value, _ = rule.measure(s, s, b, rule.measure(s, s, a, None)[1])
    assert value.item() == pytest.approx(0, abs=1e-12)  # both become (0.9, 1/3, 1/3) / (0.9 + 2/3)


def test_entropy_and_argmax():
    s, logits = torch.zeros(1, 1, 2), torch.tensor([[[2.0, 0.0]]])
    rule = ExitRule("entropy")
    value, memory = rule.measure(s, s, logits, None)
    assert value.item() > 99
    assert rule.measure(s, s, logits, memory)[0].item() == 0
    rule, memory, mask = ExitRule("argmax", 3), None, torch.ones(1, 1, dtype=torch.bool)
    settled = []
    for flip in (1, 1, -1, -1, -1):
        value, memory = rule.measure(s, s, flip * logits, memory)
        settled.append(bool(rule.settled(value, mask)))
    assert settled == [False, False, False, False, True]


def test_latent_difference_and_cosine():
    before, now = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 0.0]]])
    assert ExitRule("latent_difference").measure(before, now, None, None)[0].item() == pytest.approx(4 / 3)
    assert ExitRule("cosine").measure(before, now, None, None)[0].item() == pytest.approx(1 - 0.6)


def test_last_mean_and_max_positions():
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    value = torch.tensor([[9.0, 0.1, 0.2, 9.0], [0.4, 0.0, 0.0, 0.1]])
    last = ExitRule("latent_difference", 0.15)
    assert last.view(value, mask).tolist() == [[pytest.approx(0.2)], [pytest.approx(0.1)]]
    assert last.settled(last.view(value, mask), mask).tolist() == [False, True]
    assert ExitRule("latent_difference", 0.15, positions="max").settled(value, mask).tolist() == [False, False]
    assert ExitRule("latent_difference", 0.16, positions="mean").settled(value, mask).tolist() == [True, True]


def test_default_thresholds_are_the_published_ones():
    assert THRESHOLDS | {"none": 0.0} == THRESHOLDS
    assert (ExitRule("kl").limit, ExitRule("latent_difference").limit) == (5e-4, 0.03)
    assert {kind for kind in THRESHOLDS if ExitRule(kind).decoded} == set(DECODED)


# -- monitors ------------------------------------------------------------------------------------------------------


def test_monitors():
    same = torch.ones(1, 5, 8)
    assert token_correlation(same).item() == pytest.approx(1)
    torch.manual_seed(0)
    s, mask = torch.randn(2, 6, 8).double(), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    unit = torch.nn.functional.normalize(s[1, :4], dim=-1)
    pairs = unit @ unit.T
    expected = (pairs.sum() - pairs.trace()) / 12
    torch.testing.assert_close(token_correlation(s, mask)[1], expected)
    torch.testing.assert_close(state_rms(s, mask)[1], s[1, :4].square().mean().sqrt())
    assert relative_residual(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3)).item() == 0


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ExitRule("latent_diference"), "latent_difference"),
        (lambda: ExitRule("kl", -1.0), "threshold"),
        (lambda: ExitRule("kl", float("nan")), "threshold"),
        (lambda: ExitRule("kl", min_steps=0), "min_steps"),
        (lambda: ExitRule("argmax", 0), "threshold"),
        (lambda: ExitRule("kl", positions="first"), "positions"),
        (lambda: StepSampler("poison"), "poisson"),
        (lambda: StepSampler(mean=0), "mean"),
        (lambda: StepSampler("uniform", 2.5), "mean"),
        (lambda: StepSampler(spread=-1), "spread"),
        (lambda: InitialState("zero"), "zeros"),
        (lambda: InitialState(variance=0.0), "variance"),
        (lambda: Injection("concat"), "injection"),
        (lambda: GradientWindow(-1), "gradient_window"),
        (lambda: GradientWindow(None, "linear"), "ramp"),
        (lambda: StepSampler(ramp="linar"), "linear"),
        (lambda: StepSampler(ramp_share=0), "ramp_share"),
        (lambda: Readout("inside"), "loop_norm"),
        (lambda: relative_residual(torch.zeros(1, 2, 3), torch.zeros(1, 3, 3)), r"\[1, 2, 3\]"),
        (lambda: state_rms(torch.zeros(1, 2, 3), torch.ones(1, 3)), r"\[1, 3\]"),
    ],
)
def test_bad_values_are_refused_by_name(make, words: str):
    with pytest.raises(ValueError, match=words):
        make()
