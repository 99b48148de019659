"""The model as transformers sees it, and the training recipes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from latentcot.diffusion_reasoning import (
    RECIPES,
    DiffusionConfig,
    DiffusionLM,
    NoiseSchedule,
    answer_rows,
    diffusion_loss,
    dream,
    find_recipe,
    low_confidence,
    random_length,
    sample_times,
)
from latentcot.diffusion_reasoning.objective import cart_weights

V, MASK = 20, 6


def config(**changes) -> DiffusionConfig:
    options = {
        "vocab_size": V,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "mixers": ["gated_deltanet", "attention"],
        "attention": {"num_heads": 2},
        "gated_deltanet": {"num_heads": 1, "head_dim": 8},
        "mask_token_id": MASK,
    }
    return DiffusionConfig(**(options | changes))


def model(**changes) -> DiffusionLM:
    torch.manual_seed(0)
    return DiffusionLM(config(**changes)).eval()


def ids(rows: int = 2, length: int = 5) -> Tensor:
    return torch.randint(7, V, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"carry": "soft_full", "schedule": "cosine2", "block_length": 2},
        {"carry": "self_cond", "shift": True, "tie_word_embeddings": True},
        {"modulation": 4, "time_conditioning": True, "schedule": "geometric", "sigma_max": 10.0},
        {"combine": "gate", "in_block": "decayed", "max_position_embeddings": 64},
    ],
    ids=["plain", "soft", "self_cond", "time", "gate"],
)
def test_saved_and_loaded_bit_for_bit(changes: dict, tmp_path):
    built = model(**changes)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter))
    built.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is DiffusionLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is DiffusionConfig
    for name, value in changes.items():
        assert getattr(again.config, name) == value
    assert again.config.noise_schedule == built.config.noise_schedule
    assert again.state_dict().keys() == built.state_dict().keys()
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in built.state_dict().items())
    out = [m.diffusion_generate(ids(), max_new_tokens=4, temperature=0.5).sequences for m in (built, again)]
    assert torch.equal(*out)


def test_forward_is_the_denoiser_or_the_loss():
    built, x = model(), ids()
    assert torch.equal(built(x).logits, built.denoiser()(x, torch.ones_like(x)))
    labels = x.clone()
    labels[:, :2] = -100
    out = built(x, labels=labels, generator=torch.Generator().manual_seed(0))
    expected = diffusion_loss(
        built,
        x,
        schedule=NoiseSchedule(),
        mask_id=MASK,
        maskable=labels != -100,
        attention_mask=torch.ones_like(x),
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.nats_per_token, expected.nats_per_token)
    assert out.logits is None


def test_generate_delegates():
    built, x = model(), ids()
    expected = built.diffusion_generate(x, low_confidence(4, steps=2)).sequences
    assert torch.equal(built.generate(x, max_new_tokens=4, steps=2), expected)
    assert torch.equal(built.generate(input_ids=x, max_length=9, steps=2, do_sample=False, use_cache=True), expected)
    sampled = built.generate(x, max_new_tokens=4, do_sample=True)
    assert torch.equal(sampled, built.diffusion_generate(x, low_confidence(4, temperature=1.0)).sequences)
    blocks = model(block_length=2)
    assert blocks.diffusion_generate(x, max_new_tokens=4, steps=2).nfe.tolist() == [2, 2]


def test_dream_arguments_are_understood():
    built, x = model(), ids()
    for alg in ("origin", "maskgit_plus", "topk_margin", "entropy"):
        out = built.diffusion_generate(x, max_length=9, steps=3, alg=alg, alg_temp=0.1 if alg != "origin" else None,
                                       output_history=True)  # fmt: skip
        assert out.sequences.shape == (2, 9)
        assert out.trajectory is not None
    by_name = built.diffusion_generate(x, max_new_tokens=4, steps=3, alg="entropy").sequences
    assert torch.equal(by_name, built.diffusion_generate(x, dream(4, 3, alg="entropy")).sequences)


def test_infilling_through_the_public_call():
    built, x = model(), ids(3, 8)
    maskable = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    out = built.diffusion_generate(x, max_new_tokens=0, maskable=maskable).sequences
    assert torch.equal(out[~maskable], x[~maskable])
    assert (out[maskable] != MASK).all()
    holes = x.masked_fill(maskable, MASK)
    assert torch.equal(built.generate(holes, infer_from_mask=True), out)


def test_a_shifted_model_is_aligned():
    """A network that says its own input's next token has no loss exactly when it is shifted once."""
    successor = torch.full((V, V), -50.0)
    successor[torch.arange(V - 1), torch.arange(1, V)] = 50.0

    class Chain(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return successor[hidden[..., 0].round().long()]

    class Position(torch.nn.Module):  # hidden states that say which token stands there in the clean text
        def forward(self, z: Tensor, mask: Tensor, **_: object) -> tuple[Tensor, None]:
            return (torch.arange(8, 14).expand(len(z), -1)[..., None].float(), None)

    x, maskable = torch.arange(8, 14).repeat(3, 1), torch.arange(6).expand(3, -1) > 0
    for shift in (False, True):
        built = model(shift=shift, mixer="attention", mixers=None)
        built.backbone.model, built.backbone.lm_head = Position(), Chain()  # type: ignore[assignment]
        out = diffusion_loss(built, x, schedule=NoiseSchedule(), mask_id=MASK, maskable=maskable, time=torch.ones(3))
        assert (float(out.loss) < 1e-6) == shift


def test_length_limits():
    built = model(max_position_embeddings=8)
    with pytest.raises(ValueError, match="9 tokens with the new ones"):
        built.diffusion_generate(ids(), max_new_tokens=4)
    assert built.diffusion_generate(ids(), max_new_tokens=4, allow_extrapolation=True).sequences.shape == (2, 9)
    linear = model(max_position_embeddings=8, mixers=None, mixer="gated_deltanet")
    with pytest.warns(UserWarning, match="9 tokens are more than the 8"):
        linear.diffusion_generate(ids(), max_new_tokens=4)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: config(mask_token_id=V), ValueError, "mask_id: expected a token id within 0..19"),
        (lambda: config(mask_token_id=2), ValueError, "also eos_token_id"),
        (lambda: config(pad_token_id=MASK), ValueError, "also pad_token_id"),
        (lambda: config(schedule="cosin"), ValueError, "did you mean 'cosine'"),
        (lambda: config(carry="state"), ValueError, "only block models"),
        (lambda: config(in_block="none"), ValueError, "in_block"),
        (lambda: config(time_conditioning=True), ValueError, "modulation"),
        (lambda: config(block_length=0), ValueError, "block_length"),
        (lambda: config(shfit=True), TypeError, "did you mean 'shift'"),
        (lambda: model().generate(ids(), num_beams=4), TypeError, "num_beams"),
        (lambda: model().generate(), ValueError, "input_ids"),
        (lambda: model().diffusion_generate(ids(), nucleus=1), TypeError, "nucleus"),
        (lambda: model().diffusion_generate(ids(), alg="best", max_new_tokens=2), ValueError, "valid: origin"),
        (lambda: model().diffusion_generate(ids(), low_confidence(2), alg="entropy"), ValueError, "give one"),
        (lambda: model().diffusion_generate(ids(), low_confidence(2, mask_id=7)), ValueError, "mask token 6"),
        (lambda: model()(ids(), labels=ids() + 1), ValueError, "labels"),
        (lambda: model()(ids(), labels=ids()[:, 1:]), ValueError, "labels: shape"),
        (lambda: model()(ids(), past_key_values=3), TypeError, "past_key_values"),
    ],
)
def test_bad_input_says_what_was_expected(call, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        call()


# -- recipes -------------------------------------------------------------------------------------------------------------


def logits_of(z: Tensor, mask: Tensor) -> Tensor:
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return table[z] + torch.tanh(table[z].mean(1, keepdim=True))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_its_formula(name: str):
    x, maskable = ids(6, 9), torch.arange(9).expand(6, -1) >= 3
    x = torch.where(x == MASK, 7, x)
    out = diffusion_loss(
        logits_of, x, mask_id=MASK, maskable=maskable, generator=torch.Generator().manual_seed(0),
        **find_recipe(name).arguments,
    )  # fmt: skip
    z = x.masked_fill(out.masked, MASK)
    logits = logits_of(z, z)
    logits[..., MASK] = -torch.inf
    ce = -logits.log_softmax(-1).gather(-1, x[..., None])[..., 0]
    total, per_row = 0.0, torch.zeros(6, dtype=torch.float64)
    for b in range(6):
        for i in range(9):
            if not out.masked[b, i]:
                continue
            value = float(ce[b, i])
            if name == "mgdm":
                k = round(float(out.t[b]) * 20) - 1
                value *= (20 - k) * 0.25 * (1 - math.exp(-value))
            elif name == "dream":
                value *= sum(0.5 * 0.3 * 0.7 ** (abs(i - j) - 1) for j in range(9) if j != i and not out.masked[b, j])
            else:
                value /= float(out.t[b])
            total += value
            per_row[b] += value
    expected = {
        "mdlm": total / 54,
        "llada_pretraining": total / 54,
        "llada_sft": float((per_row / 6).mean()),
        "d1_sft": total / 36,
        "diffullama": total / int(out.masked.sum()),
        "mgdm": total / int(out.masked.sum()),
        "dream": total / int(out.masked.sum()),
    }[name]
    assert float(out.loss) == pytest.approx(expected, rel=1e-6)


def test_the_focal_factor_has_a_gradient():
    logits = torch.zeros(1, 2, V, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[8, 9]])
    out = diffusion_loss(
        lambda z, m: logits, x, schedule=NoiseSchedule(eps=0.0), mask_id=MASK, time="discrete", discrete_steps=1,
        weight="mgdm", normalise="masked",
    )  # fmt: skip
    out.loss.backward()
    ce = torch.tensor(math.log(V - 1), dtype=torch.float64, requires_grad=True)
    (0.25 * (1 - torch.exp(-ce)) * ce).backward()
    assert logits.grad is not None
    assert ce.grad is not None
    p = 1 / (V - 1)  # d CE / d logit of the true token is p - 1, and there are two tokens
    assert float(logits.grad[0, 0, 8]) == pytest.approx(float(ce.grad) * (p - 1) / 2)


def test_cart_weights_by_hand():
    masked = torch.tensor([[False, True, True, False], [True, True, True, True]])
    real = torch.ones(2, 4, dtype=torch.bool)
    weights = cart_weights(masked, real, 0.3)
    assert weights[0].tolist() == pytest.approx(
        [0.5 * 0.3 * 0.7**2, 0.5 * (0.3 + 0.3 * 0.7), 0.5 * (0.3 * 0.7 + 0.3), 0.5 * 0.3 * 0.7**2]
    )
    assert (weights[1] == 0).all()
    padded = cart_weights(
        torch.tensor([[False, True, False, True, False]]), torch.tensor([[True, True, False, True, True]]), 0.3
    )
    assert padded[0, 1] == pytest.approx(0.5 * (0.3 + 0.3 * 0.7))  # padding is no distance
    floored = diffusion_loss(
        logits_of, ids(1, 4), schedule=NoiseSchedule(eps=0.0), mask_id=MASK, weight="cart", cart_floor=0.1, time=torch.ones(1)
    )  # fmt: skip
    assert float(floored.loss) > 0


def test_importance_times_make_the_weight_constant():
    schedule = NoiseSchedule("linear_sigma", sigma_min=1e-2, sigma_max=8.0)
    t = sample_times(20_000, "importance", schedule=schedule, generator=torch.Generator().manual_seed(0)).double()
    # the share of draws below a time is the share of the integral of w below it
    grid = torch.tensor([0.001, 0.01, 0.1, 0.5], dtype=torch.float64)
    below = torch.log(1 - schedule.alpha(grid)) - torch.log(1 - schedule.alpha(torch.zeros(1, dtype=torch.float64)))
    share = (t[:, None] < grid).double().mean(0)
    torch.testing.assert_close(share, below / schedule.total_weight(), rtol=0, atol=2e-4)
    estimates = {}
    for time in ("importance", "antithetic"):
        found = diffusion_loss(
            logits_of, ids(1, 6).expand(20_000, -1), schedule=schedule, mask_id=MASK, time=time, time_eps=1e-6,
            generator=torch.Generator().manual_seed(1),
        ).nelbo_nats  # fmt: skip
        estimates[time] = (float(found.mean()), float(found.std()) / 20_000**0.5)
    (a, sa), (b, sb) = estimates.values()
    assert abs(a - b) < 5 * (sa**2 + sb**2) ** 0.5


def test_discrete_times_and_their_bound():
    t = sample_times(9000, "discrete", discrete_steps=5, generator=torch.Generator().manual_seed(0))
    counts = (t * 5).round().long().bincount(minlength=6)
    assert counts[0] == 0
    assert float((counts[1:] - 1800).double().square().sum() / 1800) < 23.5  # chi-square, 4 degrees, p > 1e-4
    for name in ("loglinear", "cosine"):  # the weight of many steps is that of infinitely many
        schedule = NoiseSchedule(name)
        times = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
        torch.testing.assert_close(schedule.step_weight(times, 10**5), schedule.weight(times), rtol=1e-3, atol=1e-3)


def test_answers_are_filled_with_ends_that_are_learned():
    x, maskable = answer_rows(
        [torch.tensor([8, 9]), torch.tensor([8])], [torch.tensor([10]), torch.tensor([11, 12, 13])], eos_id=2
    )
    assert x.tolist() == [[8, 9, 10, 2], [8, 11, 12, 13]]
    assert maskable.tolist() == [[False, False, True, True], [False, True, True, True]]
    for prompts, answers, says in (([x[0]], [], "as many of both"), ([x[0]], [x[0][:0]], r"rows \[0\] are empty")):
        with pytest.raises(ValueError, match=says):
            answer_rows(prompts, answers, 2)


def test_one_batch_in_a_hundred_is_cut():
    x, generator = ids(2, 50), torch.Generator().manual_seed(0)
    lengths = [random_length(x, generator, longest=40).shape[1] for _ in range(3000)]
    cut = [n for n in lengths if n < 50]
    assert abs(len(cut) - 30) < 5 * 30**0.5
    assert max(cut) <= 40
    assert random_length(x, generator, probability=0.0).shape == (2, 50)
    with pytest.raises(ValueError, match="probability"):
        random_length(x, probability=2.0)
    with pytest.raises(ValueError, match="valid: mdlm"):
        find_recipe("llada")


@pytest.mark.parametrize("eos", [[8, 9], None])
def test_an_end_of_text_is_not_made_up_where_the_model_has_none_or_several(eos):
    lm = model(eos_token_id=eos)
    assert lm.diffusion_generate(ids(), max_new_tokens=2).sequences.shape == (2, 7)
    asking: list[dict[str, Any]] = [{"stop": "eos_block"}, {"logits_eos_inf": True}, {"confidence_eos_eot_inf": True}]
    for wanted in asking:
        with pytest.raises(ValueError, match="eos_id: the sampler looks for the end of a text"):
            lm.diffusion_generate(ids(), max_new_tokens=2, **wanted)
        lm.diffusion_generate(ids(), max_new_tokens=2, eos_id=9, **wanted)
