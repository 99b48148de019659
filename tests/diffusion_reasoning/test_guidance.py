"""Guidance, end-of-text options, hooks, stopping and everything else a sampler can be told beside its policies."""

import math

import pytest
import torch
from torch import Tensor

from latentcot.diffusion_reasoning import (
    DiffusionGenerationConfig,
    NoiseSchedule,
    accuracy_by_steps,
    ancestral,
    diffusion_generate,
    dream,
    easy_first,
    exact_bound,
    fill_block,
    first_hitting,
    fixed_point_residual,
    generate_best_length,
    low_confidence,
    named_sampler,
    unigram_entropy,
)
from latentcot.diffusion_reasoning.confidence import filter_logits
from latentcot.diffusion_reasoning.samplers import LogitsHook
from latentcot.diffusion_reasoning.stopping import degenerate

V, MASK, EOS = 9, 6, 2


def network(z: Tensor, mask: Tensor) -> Tensor:
    """Logits from the token at a position, its number and the row's real tokens, fp64."""
    table = torch.randn(4, V, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    row = (table[0][z] * mask[..., None]).sum(1, keepdim=True) / 3
    return 2 * (table[1][z] + table[2][mask.long().cumsum(1) % V] + torch.tanh(row) @ table[3])


def tokens(*shape: int) -> Tensor:
    x = torch.randint(0, V - 1, shape)
    return x + (x >= MASK)


def test_guidance_is_the_formula_in_one_batch_and_counts_two_passes():
    torch.manual_seed(0)
    ids, w = tokens(3, 4), 1.5

    def guided(z: Tensor, mask: Tensor) -> Tensor:
        bare = z.clone()
        bare[:, :4] = MASK
        c, u = network(z, mask), network(bare, mask)
        return u + (w + 1) * (c - u)

    by_hand = diffusion_generate(guided, ids, low_confidence(6, steps=3))
    out = diffusion_generate(network, ids, low_confidence(6, steps=3, guidance=w))
    assert torch.equal(out.sequences, by_hand.sequences)
    assert out.nfe.tolist() == [6, 6, 6]
    assert not torch.equal(out.sequences, diffusion_generate(network, ids, low_confidence(6, steps=3)).sequences)
    bounded = diffusion_generate(network, ids, low_confidence(6, guidance=w, max_nfe=5))
    assert bounded.nfe.tolist() == [4, 4, 4]
    assert bounded.stopped.all()


def test_a_network_that_rules_tokens_out_can_be_guided():
    def ruled(z: Tensor, mask: Tensor) -> Tensor:
        return network(z, mask).masked_fill(torch.arange(V) == 3, -torch.inf)

    out = diffusion_generate(ruled, tokens(2, 3), low_confidence(5, guidance=1.0))
    assert (out.sequences[:, 3:] != 3).all()


def prefers_eos(z: Tensor, mask: Tensor) -> Tensor:
    logits = torch.zeros(*z.shape, V)
    logits[..., EOS] = 4.0
    logits[:, 3, EOS] = 0.0
    logits[:, 3, 1] = 1.0
    return logits


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_end_of_text_is_revealed_last_or_never(temperature: float):
    ids, seen = torch.ones(1, 2, dtype=torch.int64), []
    config = low_confidence(4, confidence_eos_eot_inf=True, temperature=temperature)
    diffusion_generate(prefers_eos, ids, config, hook=lambda n, r, z: seen.append(z[0]))
    assert seen[1][3] not in (MASK, EOS)  # the one token that is no end comes first, though it is less certain
    plain: list[Tensor] = []
    diffusion_generate(prefers_eos, ids, low_confidence(4), hook=lambda n, r, z: plain.append(z[0]))
    assert plain[1][3] == MASK
    never = diffusion_generate(prefers_eos, ids, low_confidence(4, logits_eos_inf=True, temperature=temperature))
    assert (never.sequences[:, 2:] != EOS).all()


def test_masks_are_found_in_the_input_when_asked_for():
    ids = torch.tensor([[1, MASK, 3, MASK], [MASK, 1, 1, 1]])
    given = diffusion_generate(network, ids, low_confidence(), maskable=ids == MASK)
    found = diffusion_generate(network, ids, low_confidence(), infer_from_mask=True)
    assert torch.equal(found.sequences, given.sequences)
    with pytest.raises(ValueError, match="give one"):
        diffusion_generate(network, ids, low_confidence(), maskable=ids == MASK, infer_from_mask=True)


def test_hooks_change_logits_and_tokens_but_nothing_that_is_given():
    ids = tokens(2, 3)

    def only_four(number: int, rows: Tensor, z: Tensor, logits: Tensor) -> Tensor:
        return logits.masked_fill(torch.arange(V) != 4, -1e9)

    out = diffusion_generate(network, ids, low_confidence(4), logits_hook=only_four)
    assert (out.sequences[:, 3:] == 4).all()

    def write_five(number: int, rows: Tensor, z: Tensor, logits: Tensor) -> Tensor:
        return z.masked_fill(torch.arange(7) == 6, 5)

    out = diffusion_generate(network, ids, low_confidence(4), tokens_hook=write_five)
    assert (out.sequences[:, 6] == 5).all()
    assert (out.nfe <= 4).all()
    with pytest.raises(ValueError, match="position 0 of row 0, which is given"):
        diffusion_generate(network, ids, low_confidence(4), tokens_hook=lambda n, r, z, _: (z + 1) % 6)
    with pytest.raises(ValueError, match="tokens_hook: shape"):
        diffusion_generate(network, ids, low_confidence(4), tokens_hook=lambda n, r, z, _: z[:, 1:])


def test_easy_first_stops_at_a_fixed_point():
    def settled(z: Tensor, mask: Tensor) -> Tensor:  # the same prediction whatever the canvas holds
        return (
            torch.eye(V)[torch.arange(z.shape[1]) % 5].expand(*z.shape, V) * torch.linspace(3, 4, z.shape[1])[:, None]
        )

    ids = torch.zeros(2, 1, dtype=torch.int64)
    whole = diffusion_generate(settled, ids, easy_first(10, steps=10))
    early = diffusion_generate(settled, ids, easy_first(10, steps=10, stop="fixed_point"))
    assert torch.equal(whole.sequences, early.sequences)
    assert whole.nfe.tolist() == [10, 10]
    assert early.nfe.tolist() == [2, 2]
    assert early.stopped.all()
    maskable = torch.arange(11).expand(2, -1) > 0
    assert fixed_point_residual(settled, early.sequences, maskable, mask_id=MASK).tolist() == [0, 0]
    other = early.sequences.clone()
    other[0, 4:9] = 7
    assert fixed_point_residual(settled, other, maskable, mask_id=MASK).tolist() == pytest.approx([0.5, 0])


def test_degenerate_rows_stop_and_varied_ones_do_not():
    torch.manual_seed(0)
    loop = torch.arange(600).remainder(8)[None]
    varied = torch.randint(0, 400, (1, 600))
    both = torch.cat([loop, varied])
    assert degenerate(both, torch.ones_like(both, dtype=torch.bool)).tolist() == [True, False]
    assert not degenerate(both[:, :256], torch.ones(2, 256, dtype=torch.bool)).any()  # not yet long enough
    assert unigram_entropy(torch.tensor([[1, 1, 2, 2], [5, 5, 5, 5]])).tolist() == pytest.approx([math.log(2), 0.0])
    held = torch.tensor([[True, True, False, True]])
    assert float(unigram_entropy(torch.tensor([[1, 1, 2, 1]]), held)) == pytest.approx(0.0)

    def repeats(z: Tensor, mask: Tensor) -> Tensor:
        return torch.eye(V)[torch.ones_like(z)] * 9

    config = low_confidence(300, block_length=100, steps=9, stop="eos_or_degenerate")
    out = diffusion_generate(repeats, torch.ones(1, 160, dtype=torch.int64), config)
    assert out.stopped.all()
    assert (out.sequences[0, 160:260] == 1).all()
    assert (out.sequences[0, 260:] == EOS).all()
    assert out.nfe.tolist() == [3]


def test_short_gumbel_noise_is_the_long_one_rounded():
    ids = torch.zeros(3000, 1, dtype=torch.int64)
    outs = [
        diffusion_generate(network, ids, low_confidence(3, temperature=1.0, gumbel_dtype=kind)).sequences  # type: ignore[arg-type]
        for kind in ("float64", "float32")
    ]
    assert (outs[0] == outs[1]).double().mean() > 0.95  # the same address, 24 of its 52 bits


def test_top_p_rules():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    assert (filter_logits(logits, None, 0.6, "drop_crossing") > -torch.inf).tolist() == [[True, False, False, False]]
    assert (filter_logits(logits, None, 0.85, "drop_crossing") > -torch.inf).tolist() == [[True, True, False, False]]
    assert (filter_logits(logits, None, 0.1, "drop_crossing") > -torch.inf).tolist() == [[True, False, False, False]]


def test_drawn_orders_follow_their_temperature():
    """The first position revealed, of two with confidences a and b, is a's with probability e^(a/T) / (e^(a/T) + e^(b/T))."""
    confidence = {"a": 0.9, "b": 0.6}
    logits = torch.zeros(1, 3, V).double()
    for position, c in ((1, confidence["a"]), (2, confidence["b"])):
        logits[0, position] = math.log((1 - c) / (V - 2))
        logits[0, position, 1] = math.log(c)
        logits[0, position, MASK] = -torch.inf
    first: list[Tensor] = []
    config = low_confidence(2, order="prob_tempered", order_temperature=0.2)
    diffusion_generate(
        lambda z, m: logits.expand(len(z), -1, -1),
        torch.zeros(4000, 1, dtype=torch.int64),
        config,
        hook=lambda n, r, z: first.append(z) if ((z == MASK).sum(1) == 1).all() else None,
    )
    share = float((first[0][:, 1] != MASK).double().mean())
    expected = 1 / (1 + math.exp((confidence["b"] - confidence["a"]) / 0.2))
    assert abs(share - expected) < 5 * (expected * (1 - expected) / 4000) ** 0.5


def test_time_conditioned_networks_are_told_the_noise_and_asked_in_every_step():
    seen: list[Tensor] = []

    class Timed:
        time_conditioning = True

        def __call__(self, z: Tensor, mask: Tensor, sigma: Tensor) -> Tensor:
            seen.append(sigma)
            return torch.zeros(*z.shape, V)

    schedule = NoiseSchedule("linear_sigma", sigma_min=0.1, sigma_max=5.0)
    ids = torch.zeros(3, 1, dtype=torch.int64)
    out = diffusion_generate(Timed(), ids, ancestral(5, 40, schedule=schedule, t_end=0.0))
    assert torch.stack(seen[:5])[:, 0].tolist() == pytest.approx([5.0, 4.02, 3.04, 2.06, 1.08])
    assert out.nfe.tolist() == [6, 6, 6]  # five steps, and the argmax of what is left
    seen.clear()
    diffusion_generate(Timed(), ids, low_confidence(4))
    assert torch.stack(seen)[:, 0].tolist() == pytest.approx([-math.log(1e-3), *(-math.log(k / 4) for k in (1, 2, 3))])
    seen.clear()
    diffusion_generate(
        Timed(), torch.zeros(2000, 1, dtype=torch.int64), first_hitting(3, schedule=NoiseSchedule(eps=0.0))
    )
    p = [1 - (-sigma).exp() for sigma in seen]  # products of u^{1/n}: means 3/4, 3/4 · 2/3, 3/4 · 2/3 · 1/2
    for value, mean in zip(p, (0.75, 0.5, 0.25), strict=True):
        assert abs(float(value.mean()) - mean) < 5 * float(value.std()) / 2000**0.5


def test_a_block_alone_is_filled_as_in_a_canvas():
    torch.manual_seed(0)
    prompt = tokens(4, 3)
    config = low_confidence(6, steps=4, block_length=3, temperature=0.8, seed=5)
    whole = diffusion_generate(network, prompt, config)
    rows_seen = []

    def first_block(z: Tensor, number: int, rows: Tensor) -> Tensor:
        rows_seen.append(rows.tolist())
        canvas = torch.cat([prompt[rows], z, torch.full((len(rows), 3), MASK)], 1)
        return network(canvas, torch.ones_like(canvas, dtype=torch.bool))[:, 3:6]

    block = torch.zeros(4, 3, dtype=torch.int64)
    alone = fill_block(first_block, block, low_confidence(steps=2, temperature=0.8, seed=5), first_position=3)
    assert torch.equal(alone.sequences, whole.sequences[:, 3:6])
    assert alone.nfe.tolist() == [2] * 4
    maskable = torch.tensor([True, False, True, True])[:, None].expand(-1, 3)
    some = fill_block(first_block, block, low_confidence(), maskable=maskable)
    assert some.nfe.tolist() == [3, 0, 3, 3]
    assert some.sequences[1].tolist() == [0, 0, 0]
    assert rows_seen[-1] == [0, 2, 3]
    with pytest.raises(ValueError, match="whole network"):
        fill_block(first_block, block, low_confidence(guidance=1.0))
    with pytest.raises(TypeError, match="logits_fn"):
        fill_block(None, block, low_confidence())  # type: ignore[arg-type]


def test_samplers_by_name():
    assert named_sampler("threshold", max_new_tokens=4).threshold == 0.9
    assert named_sampler("factor", max_new_tokens=4, factor=0.5).factor == 0.5
    assert named_sampler("remdm", steps=8, variant="loop").remask == "loop"
    assert named_sampler("dream", alg="topk_margin").order == "margin"
    with pytest.raises(ValueError, match="valid: ancestral"):
        named_sampler("greedy")


def test_dream_origin_reveals_everything_in_its_last_step():
    out = diffusion_generate(network, tokens(50, 2), dream(12, 5))
    assert (out.sequences != MASK).all()
    assert int(out.nfe.max()) <= 5


def test_candidate_lengths_take_the_best_bound_a_token():
    prompt = tokens(3, 2)
    found = generate_best_length(network, prompt, low_confidence(), [1, 3, 4], n_samples=64)
    assert found.bounds.shape == (3, 3)
    for row in range(3):
        index = int(found.bounds[:, row].argmax())
        assert int(found.length[row]) == [1, 3, 4][index]
        assert len(found.sequences[row]) == 2 + [1, 3, 4][index]
    # the bound of the one-token candidate is exact
    one = diffusion_generate(network, prompt, low_confidence(1)).sequences
    assert float(found.bounds[0, 0]) == pytest.approx(exact_bound(network, prompt[0], one[0, 2:], mask_id=MASK))
    assert found.nfe.tolist() == [8, 8, 8]
    with pytest.raises(ValueError, match="candidate_lengths"):
        generate_best_length(network, prompt, low_confidence(), [2, 2])


def test_accuracy_by_steps_counts_passes():
    ids = tokens(20, 3)
    wanted = diffusion_generate(network, ids, low_confidence(4)).sequences
    points = accuracy_by_steps(network, ids, lambda s: (s == wanted).all(1), low_confidence(4), [1, 2, 4])
    assert [p.nfe for p in points] == [1, 2, 4]
    assert points[-1].accuracy == 1.0
    assert points[-1].stderr == 0.0
    assert math.isnan(points[0].flops)
    with pytest.raises(ValueError, match="correct: shape"):
        accuracy_by_steps(network, ids, lambda s: s == wanted, low_confidence(4), [1])
    with pytest.raises(ValueError, match="none given"):
        accuracy_by_steps(network, ids, lambda s: (s == wanted).all(1), low_confidence(4), [])


def test_a_network_that_predicts_the_mask_is_an_error_when_it_may_not():
    def masks(z: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros(*z.shape, V).index_fill(2, torch.tensor([MASK]), 5.0)

    ids = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"predicted the mask token 6 in pass 1, row 0"):
        diffusion_generate(masks, ids, low_confidence(2, forbid_mask_token=False))
    assert (diffusion_generate(masks, ids, low_confidence(2)).sequences != MASK).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: low_confidence(4, guidance=-1.0), "guidance"),
        (lambda: low_confidence(4, guidance=1.0, carry="hidden"), "guidance"),
        (lambda: low_confidence(4, guidance=1.0, max_nfe=1), "max_nfe"),
        (lambda: low_confidence(4, carry="state"), "carry"),
        (lambda: low_confidence(4, record="all"), "record"),
        (lambda: low_confidence(4, stop="fixed_point"), "easy_first"),
        (lambda: low_confidence(4, top_p_rule="most"), "top_p_rule"),
        (lambda: low_confidence(4, gumbel_dtype="bfloat16"), "gumbel_dtype"),
        (lambda: low_confidence(4, eot_id=MASK), "eot_id"),
        (lambda: easy_first(4, remask="revise"), "sends tokens back"),
        (lambda: easy_first(4, confidence_eos_eot_inf=True), "no order of revealing"),
        (lambda: first_hitting(4, steps=3), "max_nfe"),
        (lambda: DiffusionGenerationConfig(4, quota="bernoulli", steps=4, order="prob", remask="cap", eta=-1.0), "eta"),
        (
            lambda: diffusion_generate(network, torch.zeros(1, 1).long(), low_confidence(2, carry="hidden")),
            "built with 'none'",
        ),
        (
            lambda: diffusion_generate(
                network, torch.zeros(1, 1).long(), low_confidence(2, order=lambda p: p.uniform * torch.nan)
            ),
            "NaN",
        ),
    ],
)
def test_bad_input_says_what_was_expected(call, says: str):
    with pytest.raises(ValueError, match=says):
        call()


def masking_again(times: int, column: int) -> LogitsHook:
    """A hook that masks one position behind the first ``times`` denoising steps."""

    def hook(number: int, rows: Tensor, z: Tensor, logits: Tensor) -> Tensor:
        if number < times:
            z[:, column] = MASK
        return z

    return hook


@pytest.mark.parametrize("block_length", [None, 2])
@pytest.mark.parametrize("times", [2, 4, 9])
def test_what_a_tokens_hook_masks_again_is_predicted_again(times: int, block_length: int | None):
    ids = tokens(2, 3)
    config = low_confidence(4, block_length=block_length)
    out = diffusion_generate(network, ids, config, tokens_hook=masking_again(times, 3))
    assert not (out.sequences == MASK).any()
    assert torch.equal(out.sequences[:, :3], ids)
    assert (out.nfe >= max(4, times + 1)).all()


def test_a_tokens_hook_that_masks_for_ever_is_bounded_by_max_nfe_and_named_without():
    ids = tokens(2, 3)
    hook = masking_again(10**6, 4)
    out = diffusion_generate(network, ids, low_confidence(4, max_nfe=6), tokens_hook=hook)
    assert not (out.sequences == MASK).any()
    assert out.nfe.tolist() == [6, 6]
    assert out.stopped.all()
    with pytest.raises(RuntimeError, match=r"tokens_hook: it still masks tokens again after"):
        diffusion_generate(network, ids, low_confidence(4), tokens_hook=hook)
