"""The sampling loop and its policies, on small table networks."""

import math
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from latentcot.diffusion_reasoning import (
    CONFIDENCES,
    Bernoulli,
    Cosine,
    DiffusionGenerationConfig,
    NoiseSchedule,
    ReMDM,
    Revise,
    Threshold,
    Uniform,
    ancestral,
    diffusion_generate,
    dream,
    easy_first,
    first_hitting,
    low_confidence,
    posterior,
    quota_table,
)
from latentcot.diffusion_reasoning.confidence import filter_logits
from latentcot.diffusion_reasoning.noise import Noise, seeds_from_tokens

V, MASK, EOS = 9, 6, 2


def network(z: Tensor, mask: Tensor) -> Tensor:
    """Logits from the tokens around a position, the number of real tokens before it and the row's real tokens; in
    fp64."""
    table = torch.randn(4, V, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    position = mask.long().cumsum(1) % V
    row = (table[0][z] * mask[..., None]).sum(1, keepdim=True) / 3
    return 2 * (table[1][z] + table[2][position] + torch.tanh(row) @ table[3])


def tokens(*shape: int) -> Tensor:
    x = torch.randint(0, V - 1, shape)
    return x + (x >= MASK)


SAMPLERS = {
    "confidence": low_confidence(steps=4),
    "semi_autoregressive": low_confidence(steps=6, block_length=3),
    "cosine": low_confidence(steps=4, quota="cosine", order="margin"),
    "threshold": low_confidence(threshold=0.3),
    "random_tempered": low_confidence(steps=5, order="random", temperature=0.7, top_p=0.9),
    "entropy": low_confidence(steps=5, order="neg_entropy", temperature=1.0, top_k=3),
    "revise": low_confidence(steps=4, block_length=6, remask=Revise(2, 2)),
    "ancestral": ancestral(12),
    "ancestral_cosine": ancestral(6, schedule=NoiseSchedule("cosine_complement")),
    "remdm": ancestral(12, remask=ReMDM(0.1)),
    "max_nfe": low_confidence(max_nfe=3),
    "factor": low_confidence(factor=1.0),
    "entropy_budget": low_confidence(quota="entropy_budget", order="neg_entropy", entropy_budget=2.0),
    "first_hitting": first_hitting(),
    "dream_origin": dream(steps=8, alg="origin", temperature=0.8),
    "dream_entropy": dream(steps=8, alg="entropy", alg_temp=0.3, temperature=0.5),
    "easy_first": easy_first(steps=5),
    "remdm_conf": ancestral(8, remask="conf"),
    "remdm_loop": ancestral(12, remask="loop", schedule=NoiseSchedule(eps=0.0)),
    "guided": low_confidence(steps=4, guidance=0.5, confidence_eos_eot_inf=True),
}


@pytest.fixture(params=SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> DiffusionGenerationConfig:
    return SAMPLERS[request.param]


def generate(*arguments, **named):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="steps:")  # clamping has a test of its own
        return diffusion_generate(*arguments, **named)


def test_given_positions_never_change_and_no_mask_is_left(sampler: DiffusionGenerationConfig):
    torch.manual_seed(0)
    ids = torch.randint(0, V, (100, 12))  # the mask token among them: also at given positions
    maskable = torch.rand(100, 12) < torch.rand(100, 1)
    maskable[0] = False
    per_block = sampler.block_length
    if sampler.steps is not None and per_block is not None:
        sampler = replace(sampler, steps=max(sampler.steps, -(-12 // per_block)))
    out = generate(network, ids, sampler, maskable=maskable)
    assert torch.equal(out.sequences[~maskable], ids[~maskable])
    assert (out.sequences[maskable] != MASK).all()
    assert out.nfe[0] == 0
    assert (out.nfe[maskable.any(1)] > 0).all()
    assert out.exact


def test_a_row_alone_is_the_row_in_a_batch(sampler: DiffusionGenerationConfig):
    torch.manual_seed(1)
    ids, seeds = tokens(6, 5), torch.arange(6) * 77
    config = replace(sampler, max_new_tokens=8)
    together = generate(network, ids, config, row_seeds=seeds)
    for row in range(6):
        alone = generate(network, ids[row : row + 1], config, row_seeds=seeds[row : row + 1])
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert alone.nfe[0] == together.nfe[row]


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_does_not_change_a_row(sampler: DiffusionGenerationConfig, side: str):
    torch.manual_seed(2)
    row = tokens(1, 10)
    maskable = torch.tensor([[0, 1, 0, 1, 1, 1, 0, 1, 1, 1]]).bool()
    columns = {"left": range(3, 13), "right": range(10), "middle": [0, 1, 2, 3, 7, 8, 9, 10, 11, 12]}[side]
    ids, real, wide = torch.zeros(1, 13, dtype=torch.int64), torch.zeros(1, 13).bool(), torch.zeros(1, 13).bool()
    ids[:, columns], real[:, columns], wide[:, columns] = row, True, maskable
    plain = generate(network, row, sampler, maskable=maskable)
    padded = generate(network, ids, sampler, real, wide)
    assert torch.equal(padded.sequences[:, columns], plain.sequences)
    assert torch.equal(padded.nfe, plain.nfe)


@pytest.mark.parametrize("quota", [Uniform(), Cosine()], ids=["uniform", "cosine"])
def test_counted_quotas_sum_to_the_tokens_and_waste_no_pass(quota):
    for n in range(1, 40):
        for steps in range(1, n + 1):
            (counts,) = quota_table(n, quota, steps)
            assert sum(counts) == n
            assert len(counts) == steps
            assert min(counts) >= 1


def test_uniform_quota_gives_the_first_passes_one_more():
    assert quota_table(10, Uniform(), 4) == [[3, 3, 2, 2]]
    assert quota_table(11, Uniform(), 7, 4) == [[2, 1, 1], [2, 2], [2, 1]]
    assert quota_table(8, Cosine(), 8) == [[1, 1, 1, 1, 1, 1, 1, 1]] or min(quota_table(8, Cosine(), 8)[0]) == 1
    assert quota_table(16, Cosine(), 4) == [[2, 3, 5, 6]]


def recorded(config: DiffusionGenerationConfig, ids: Tensor, **named) -> tuple[list[Tensor], Tensor]:
    """What a single row held in front of each pass, and at the end."""
    seen: list[Tensor] = []
    out = generate(network, ids, config, hook=lambda number, rows, z: seen.append(z[0].clone()), **named)
    return [*seen, out.sequences[0]], out.nfe


def test_every_revealed_token_but_one_a_pass_reaches_the_threshold():
    torch.manual_seed(0)
    several = 0
    for _ in range(20):
        steps, _ = recorded(low_confidence(8, threshold=0.4), tokens(1, 4))
        for before, after in pairwise(steps):
            new = ((before == MASK) & (after != MASK)).nonzero().squeeze(1)
            logits = network(before[None], torch.ones(1, 12).bool())[0]
            logits[:, MASK] = -torch.inf
            confidence = logits.softmax(-1).amax(-1)
            assert int((confidence[new] < 0.4).sum()) <= 1
            assert (confidence[new].max() >= confidence[before == MASK]).all()
            left = (after == MASK).nonzero().squeeze(1)
            assert (confidence[left] < 0.4).all()
            several += len(new) > 1
    assert several > 0
    out = generate(network, tokens(3, 4), low_confidence(8, threshold=0.0))
    assert out.nfe.tolist() == [1, 1, 1]


def test_left_to_right_reveals_the_next_token_each_pass():
    torch.manual_seed(0)
    steps, nfe = recorded(low_confidence(6, order="left_to_right"), tokens(1, 3))
    assert nfe.tolist() == [6]
    for count, held in enumerate(steps):
        assert (held[: 3 + count] != MASK).all()
        assert (held[3 + count :] == MASK).all()


def test_ties_go_to_the_lower_position():
    seen = []
    diffusion_generate(
        lambda z, mask: torch.zeros(*z.shape, V),
        torch.zeros(1, 1, dtype=torch.int64),
        low_confidence(5),
        hook=lambda n, r, z: seen.append(z[0]),
    )
    assert [int((z == MASK).nonzero()[0]) for z in seen] == [1, 2, 3, 4, 5]


def test_one_pass_at_temperature_one_draws_from_the_network():
    """Frequencies of 20 000 rows with seeds of their own against the softmax: chi-square, 7 degrees of freedom, p >
    1e-4."""
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -0.5, 9.0, 0.2, 0.1])  # the mask token would be likeliest
    config = low_confidence(1, steps=1, temperature=1.0)
    out = diffusion_generate(
        lambda z, mask: logits.expand(*z.shape, V), torch.zeros(20_000, 1, dtype=torch.int64), config
    )
    counts = out.sequences[:, 1].bincount(minlength=V).double()
    expected = 20_000 * logits.masked_fill(torch.arange(V) == MASK, -torch.inf).double().softmax(-1)
    assert counts[MASK] == 0
    kept = torch.arange(V) != MASK
    assert float(((counts - expected).square() / expected)[kept].sum()) < 29.9


def test_the_seed_decides_and_other_seeds_differ():
    torch.manual_seed(0)
    ids = tokens(4, 5)
    config = ancestral(10, 8, seed=3)
    first, again = (diffusion_generate(network, ids, config).sequences for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, diffusion_generate(network, ids, replace(config, seed=4)).sequences)
    assert not torch.equal(*(diffusion_generate(network, ids, replace(config, seed=None)).sequences for _ in range(2)))


def test_ancestral_pass_count_is_what_chance_says():
    """A step without a reveal costs no pass: about T (1 - (1 - 1/T)^L) of T steps do reveal."""
    steps, length = 20, 12
    out = diffusion_generate(network, torch.zeros(500, 1, dtype=torch.int64), ancestral(steps, length))
    expected = steps * (1 - (1 - 1 / steps) ** length)
    assert abs(float(out.nfe.double().mean()) - expected) < 4 * float(out.nfe.double().std()) / 500**0.5 + 0.01
    assert int(out.nfe.max()) <= min(steps + 1, length)


def test_remdm_without_remasking_is_the_ancestral_sampler_bit_for_bit():
    torch.manual_seed(0)
    ids = tokens(8, 4)
    plain, zero = (diffusion_generate(network, ids, ancestral(16, 9, remask=r)) for r in (None, ReMDM(0.0)))
    assert torch.equal(plain.sequences, zero.sequences)


@pytest.mark.parametrize("sigma_share", [0.0, 0.3, 1.0])
def test_posterior_has_mass_one_and_keeps_the_marginal(sigma_share: float):
    torch.manual_seed(0)
    alpha_t, alpha_s = 0.35, 0.6
    sigma = sigma_share * min(1.0, (1 - alpha_s) / alpha_t)
    logprobs = (
        torch.randn(2, 3, V, dtype=torch.float64).masked_fill(torch.arange(V) == MASK, -torch.inf).log_softmax(-1)
    )
    z = torch.tensor([[1, MASK, MASK], [MASK, 3, MASK]])
    maskable = torch.tensor([[True, True, False], [True, True, True]])
    q = posterior(logprobs, z, alpha_t, alpha_s, sigma, MASK, maskable)
    torch.testing.assert_close(q.sum(-1), torch.ones(2, 3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert q[0, 2, MASK] == 1  # given, whatever it holds
    to_mask = alpha_t * q[0, 0, MASK] + (1 - alpha_t) * q[0, 1, MASK]
    assert float(to_mask) == pytest.approx(1 - alpha_s, abs=1e-12)


def test_from_full_noise_any_remasking_is_admissible():
    logprobs = torch.zeros(1, 1, V).masked_fill(torch.arange(V) == MASK, -torch.inf).log_softmax(-1)
    q = posterior(logprobs, torch.full((1, 1), MASK), 0.0, 0.3, 1.0, MASK)
    assert float(q[0, 0, MASK]) == pytest.approx(0.7)


def test_constraints_hold_in_every_pass(sampler: DiffusionGenerationConfig):
    torch.manual_seed(0)
    allowed = torch.rand(5, 12, V) < 0.4
    allowed[..., 0] = True
    out = generate(network, tokens(5, 4), replace(sampler, max_new_tokens=8), allowed=allowed)
    new = out.sequences[:, 4:]
    assert allowed[:, 4:].gather(-1, new[..., None]).all()
    same = generate(network, tokens(5, 4), replace(sampler, max_new_tokens=8), allowed=lambda number, z: allowed)
    assert allowed[:, 4:].gather(-1, same.sequences[:, 4:, None]).all()


def ends_early(z: Tensor, mask: Tensor) -> Tensor:
    logits = torch.zeros(*z.shape, V)
    logits[..., 1] = 1.0
    logits[:, 4, EOS] = 5.0
    return logits


def test_eos_stops_rows():
    ids = torch.ones(2, 2, dtype=torch.int64)
    block = diffusion_generate(ends_early, ids, low_confidence(9, block_length=3, stop="eos_block"))
    assert block.sequences[0, 2:].tolist() == [1, 1, EOS] + [EOS] * 6
    assert block.nfe.tolist() == [3, 3]
    assert block.stopped.all()
    cut = diffusion_generate(ends_early, ids, low_confidence(9, stop="eos_truncate"))
    assert torch.equal(cut.sequences, block.sequences)
    assert cut.nfe.tolist() == [9, 9]
    assert not cut.stopped.any()


def test_the_pass_limit_holds_and_says_so():
    torch.manual_seed(0)
    out = diffusion_generate(network, tokens(3, 4), low_confidence(8, block_length=4, max_nfe=3))
    assert out.nfe.tolist() == [3, 3, 3]
    assert out.stopped.all()
    assert not diffusion_generate(network, tokens(3, 4), low_confidence(8, max_nfe=8)).stopped.any()
    for nfe in (1, 4):
        assert int(diffusion_generate(network, tokens(3, 4), ancestral(50, 8, max_nfe=nfe)).nfe.max()) <= nfe


def test_confidences_by_hand():
    from latentcot.diffusion_reasoning import Proposal

    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]], dtype=torch.float64).log()
    sharp = logits * 2
    proposal = Proposal(logits, sharp, torch.tensor([0, 2]), torch.tensor([4, 7]), torch.tensor([0.3, 0.6]))
    tempered = torch.tensor([[0.25, 0.09, 0.04], [0.01, 0.64, 0.01]], dtype=torch.float64)
    tempered = tempered / tempered.sum(-1, keepdim=True)
    expected = {
        "prob": [0.5, 0.1],
        "prob_tempered": [float(tempered[0, 0]), float(tempered[1, 2])],
        "margin": [float(tempered[0, 0] - tempered[0, 1]), float(tempered[1, 1] - tempered[1, 0])],
        "neg_entropy": [sum(p * math.log(p + 1e-10) for p in row) for row in tempered.tolist()],
        "random": [0.3, 0.6],
        "left_to_right": [-4.0, -7.0],
    }
    assert set(expected) == set(CONFIDENCES)
    for name, values in expected.items():
        assert CONFIDENCES[name](proposal).tolist() == pytest.approx(values, rel=1e-6), name


def test_filters_keep_the_token_that_crosses_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    assert (filter_logits(logits, None, 0.6) > -torch.inf).tolist() == [[True, True, False, False]]
    assert (filter_logits(logits, None, 0.01) > -torch.inf).tolist() == [[True, False, False, False]]
    assert (filter_logits(logits, 3, None) > -torch.inf).tolist() == [[True, True, True, False]]
    assert torch.equal(filter_logits(logits, None, 1.0), logits)


def test_noise_is_uniform_and_addressed():
    noise = Noise(seeds_from_tokens(torch.arange(40).view(10, 4), torch.ones(10, 4).bool(), 5))
    u = noise.tokens(torch.arange(10).repeat_interleave(20), 3, "token", torch.arange(20).repeat(10), 500)
    assert 0 < float(u.min()) < float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / u.numel())
    counts = (u * 20).long().flatten().bincount(minlength=20).double()
    assert float((counts - 5000).square().sum() / 5000) < 50  # chi-square, 19 degrees of freedom, p > 1e-4
    assert len(u.flatten().unique()) == u.numel()
    assert not torch.equal(noise.tokens(torch.tensor([0]), 4, "token", torch.tensor([0]), 500)[0], u[0])
    one = Noise(noise.seeds[3:4]).tokens(torch.tensor([0]), 3, "token", torch.tensor([7]), 500)
    assert torch.equal(one[0], u[67])


def nan_in_row_one(z: Tensor, mask: Tensor) -> Tensor:
    logits = torch.zeros(*z.shape, V)
    if int((z == MASK).sum()) < 8 and len(z) > 1:  # not in the first pass
        logits[1] = torch.nan
    return logits


def test_logits_without_a_number_name_pass_and_row():
    ids = torch.ones(2, 2, dtype=torch.int64)
    with pytest.raises(FloatingPointError, match=r"NaN.*pass 2, row 1"):
        diffusion_generate(nan_in_row_one, ids, low_confidence(4))
    with pytest.raises(FloatingPointError, match="-inf for every token in pass 1, row 0"):
        diffusion_generate(lambda z, m: torch.full((*z.shape, V), -torch.inf), ids, low_confidence(4))


ONES = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: low_confidence(4, steps=0), "steps"),
        (lambda: low_confidence(4, block_length=0), "block_length"),
        (lambda: low_confidence(4, threshold=1.2), "threshold"),
        (lambda: Threshold(-0.1), "threshold"),
        (lambda: low_confidence(4, threshold=0.5, steps=3), "max_nfe"),
        (lambda: low_confidence(4, threshold=0.5, order="neg_entropy"), "order"),
        (lambda: low_confidence(4, temperature=-1.0), "temperature"),
        (lambda: low_confidence(4, top_p=0.0), "top_p"),
        (lambda: low_confidence(4, top_k=0), "top_k"),
        (lambda: low_confidence(4, order="entropy"), "valid: prob"),
        (lambda: low_confidence(4, quota="dreams"), "valid: uniform"),
        (lambda: low_confidence(4, stop="eos"), "stop"),
        (lambda: low_confidence(4, mask_id=2), "eos_id"),
        (lambda: low_confidence(4, remask=ReMDM()), "bernoulli"),
        (lambda: DiffusionGenerationConfig(4, quota="bernoulli"), "needs a number of steps"),
        (lambda: ReMDM(-0.1), "eta"),
        (lambda: ReMDM(1.5, "rescale"), "eta"),
        (lambda: Revise(0), "passes"),
        (lambda: Bernoulli(t_end=1.0), "t_end"),
        (lambda: diffusion_generate(network, ONES, low_confidence(9, steps=2, block_length=3)), "2 given for 3 blocks"),
        (
            lambda: diffusion_generate(network, ONES, low_confidence(8, block_length=3, parity="llada")),
            "does not divide",
        ),
        (
            lambda: diffusion_generate(network, ONES, low_confidence(6, steps=3, block_length=3, parity="llada")),
            "multiple",
        ),
        (lambda: diffusion_generate(network, ONES, low_confidence()), "maskable"),
        (lambda: diffusion_generate(network, ONES.float(), low_confidence(2)), "int64"),  # type: ignore[arg-type]
        (lambda: diffusion_generate(network, ONES, low_confidence(2), torch.ones(2, 4)), "attention_mask"),
        (lambda: diffusion_generate(network, ONES, low_confidence(2), maskable=torch.ones(2, 4).bool()), "maskable"),
        (
            lambda: diffusion_generate(network, ONES, low_confidence(), torch.zeros(2, 3), torch.ones(2, 3).bool()),
            "padded",
        ),
        (
            lambda: diffusion_generate(lambda z, m: torch.zeros(*z.shape, V), ONES, low_confidence(2, mask_id=50)),
            "mask_id",
        ),
        (lambda: diffusion_generate(network, ONES, low_confidence(2), row_seeds=torch.zeros(3)), "row_seeds"),
        (
            lambda: diffusion_generate(network, ONES, low_confidence(2), allowed=torch.zeros(2, 5, V).bool()),
            "no token is left",
        ),
        (lambda: diffusion_generate(network, ONES, low_confidence(2), allowed=torch.ones(2, 3, V).bool()), "allowed"),
        (lambda: posterior(torch.zeros(1, 1, V), torch.zeros(1, 1).long(), 0.5, 0.6, 0.9, MASK), "sigma"),
        (lambda: posterior(torch.zeros(1, 1, V), torch.zeros(1, 1).long(), 0.6, 0.5, 0.0, MASK), "alpha"),
        (lambda: posterior(torch.zeros(1, 1, V), torch.full((1, 1), MASK), 0.5, 0.6, 0.0, MASK), "never predicted"),
        (lambda: quota_table(4, Threshold()), "quota"),
    ],
)
def test_bad_input_says_what_was_expected(call, says: str):
    with pytest.raises(ValueError, match=says):
        call()
