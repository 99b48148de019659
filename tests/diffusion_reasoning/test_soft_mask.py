"""What masked positions carry from pass to pass."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from latentcot.diffusion_reasoning import (
    DiffusionConfig,
    DiffusionLM,
    NoiseSchedule,
    SoftMask,
    diffusion_generate,
    diffusion_loss,
    low_confidence,
    make_carry,
)

V, MASK, D = 20, 6, 16


def model(carry: str, **changes) -> DiffusionLM:
    torch.manual_seed(0)
    config = DiffusionConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, mixer="attention", attention={"num_heads": 2},
        mask_token_id=MASK, carry=carry, **changes,
    )  # fmt: skip
    return DiffusionLM(config).double().eval()


def strengthened(carry: str) -> DiffusionLM:
    built = model(carry)
    with torch.no_grad():
        assert built.carry is not None
        for parameter in built.carry.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)
        if isinstance(built.carry, SoftMask):
            built.carry.scale.fill_(2.0)
            built.carry.centre.fill_(3.0)  # entropies of an untrained network are near log V
    return built


def ids(rows: int = 3, length: int = 6) -> Tensor:
    return torch.randint(7, V, (rows, length))


def test_soft_mask_equals_its_formula():
    torch.manual_seed(0)
    soft = SoftMask(k=3).double()
    nn.init.constant_(soft.scale, 0.7)
    logits, table = torch.randn(5, V, dtype=torch.float64) * 3, torch.randn(V, D, dtype=torch.float64)
    out = soft(table[MASK], logits, torch.zeros(5, D), table)
    for i in range(5):
        p = logits[i].softmax(0)
        entropy = -float((p * p.log()).sum())
        s = 1 / (1 + torch.exp(torch.tensor(-0.7, dtype=torch.float64)))
        share = s / (1 + torch.exp(torch.tensor(-(10 / 1.5) * (-entropy + 0.75), dtype=torch.float64)))
        best = logits[i].topk(3)
        mixed = (best.values.softmax(0)[:, None] * table[best.indices]).sum(0)
        torch.testing.assert_close(out[i], (1 - share) * table[MASK] + share * mixed, rtol=1e-5, atol=1e-6)


def test_soft_full_at_temperature_one_mixes_the_expected_embedding():
    torch.manual_seed(0)
    soft = SoftMask(k=None).double()
    nn.init.constant_(soft.scale, 50.0)
    nn.init.constant_(soft.centre, 100.0)
    logits, table = torch.randn(4, V, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    out = soft(table[MASK], logits, torch.zeros(4, D), table)
    torch.testing.assert_close(out, logits.softmax(-1) @ table, rtol=0, atol=1e-9)


@pytest.mark.parametrize("carry", ["soft_topk", "soft_full", "self_cond", "hidden"])
def test_without_strength_the_network_is_the_plain_one(carry: str):
    """Lambda or W at zero: the carried input is the mask's embedding, bit for bit, and so are the samples."""
    built = model(carry)
    if isinstance(built.carry, SoftMask):
        nn.init.constant_(built.carry.scale, -torch.inf)
    prompt = ids()
    config = low_confidence(8, steps=4)
    plain = diffusion_generate(built, prompt, config)
    carried = diffusion_generate(built, prompt, replace(config, carry=carry))
    assert torch.equal(plain.sequences, carried.sequences)
    z = torch.cat([prompt, torch.full((3, 4), MASK)], 1)
    denoise, masked, real = built.denoiser(), z == MASK, torch.ones_like(z, dtype=torch.bool)
    memory = denoise.carried(z, denoise.hidden(z, real), masked, MASK)
    embedded = denoise.embed_with(z, masked, memory)
    assert torch.equal(embedded, built.backbone.embed(z))


@pytest.mark.parametrize("carry", ["soft_topk", "soft_full", "self_cond", "hidden"])
def test_sampling_with_a_carry_is_two_forwards_by_hand(carry: str):
    built = strengthened(carry)
    prompt, seen = ids(2), []
    out = diffusion_generate(
        built, prompt, low_confidence(4, steps=2, carry=carry), hook=lambda n, r, z: seen.append(z.clone())
    )
    denoise, real = built.denoiser(), torch.ones(2, 10, dtype=torch.bool)
    first, second = seen
    held = first == MASK
    assert held.sum() == 8
    memory = torch.zeros(2, 10, D, dtype=torch.float64)
    memory[held] = denoise.carried(first, denoise.hidden(first, real), held, MASK)
    still = second == MASK
    embeddings = built.backbone.embed(second).clone()
    embeddings[still] = memory[still]  # revealed positions have the embedding of their token
    logits = built.backbone.lm_head(denoise.hidden(second, real, embeddings=embeddings))
    logits[..., MASK] = -torch.inf
    assert torch.equal(out.sequences[still], logits.argmax(-1)[still])
    assert not torch.allclose(embeddings[still], built.backbone.embed(second)[still])


def test_a_carried_row_alone_is_the_row_in_a_batch():
    built = strengthened("soft_topk")
    prompt, seeds = ids(4), torch.arange(4)
    config = low_confidence(7, steps=5, carry="soft_topk", order="random", temperature=0.9)
    together = diffusion_generate(built, prompt, config, row_seeds=seeds)
    for row in range(4):
        alone = diffusion_generate(built, prompt[row : row + 1], config, row_seeds=seeds[row : row + 1])
        assert torch.equal(alone.sequences[0], together.sequences[row])


@pytest.mark.parametrize("carry", ["soft_topk", "soft_full", "self_cond", "hidden"])
def test_gradients_reach_every_parameter_of_the_carry(carry: str):
    built = strengthened(carry)
    out = diffusion_loss(
        built,
        ids(),
        schedule=NoiseSchedule(),
        mask_id=MASK,
        carry=carry,
        carry_probability=1.0,
        time=torch.full((3,), 0.8),
        generator=torch.Generator().manual_seed(0),
    )
    out.loss.backward()
    assert built.carry is not None
    for name, parameter in built.carry.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    for name, parameter in built.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def test_the_first_pass_comes_with_its_probability():
    built = strengthened("hidden")
    passes = 0

    def count(*_) -> None:
        nonlocal passes
        passes += 1

    built.backbone.model.register_forward_hook(count)
    x0 = ids()
    for probability, expected in ((0.0, 1), (1.0, 2)):
        passes = 0
        diffusion_loss(
            built, x0, schedule=NoiseSchedule(), mask_id=MASK, carry="hidden", carry_probability=probability,
            time=torch.ones(3),
        )  # fmt: skip
        assert passes == expected
    passes, generator = 0, torch.Generator().manual_seed(0)
    for _ in range(100):
        diffusion_loss(
            built, x0[:1, :2], schedule=NoiseSchedule(), mask_id=MASK, carry="hidden", time=torch.ones(1), generator=generator
        )  # fmt: skip
    assert abs(passes - 180) < 5 * (100 * 0.8 * 0.2) ** 0.5


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_carry("state", 4), "only block models"),
        (lambda: make_carry("soft", 4), "valid: none"),
        (lambda: SoftMask(0), "k: expected"),
        (lambda: SoftMask(start=0.0), "start"),
        (lambda: model("none").denoiser().carried(ids(), torch.zeros(3, 6, D), ids() > 0, MASK), "carries nothing"),
        (
            lambda: diffusion_loss(model("hidden"), ids(), schedule=NoiseSchedule(), mask_id=MASK, carry="soft_topk"),
            "built with 'hidden'",
        ),
        (
            lambda: diffusion_loss(
                model("hidden"), ids(), schedule=NoiseSchedule(), mask_id=MASK, carry="hidden", carry_probability=2.0
            ),
            "carry_probability",
        ),
        (lambda: diffusion_generate(model("none"), ids(), low_confidence(2, carry="hidden")), "built with 'none'"),
    ],
)
def test_bad_input_says_what_was_expected(call, says: str):
    with pytest.raises(ValueError, match=says):
        call()
