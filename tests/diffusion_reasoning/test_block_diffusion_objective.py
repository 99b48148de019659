"""The loss of block diffusion: levels, clipped intervals, the bound by enumeration, autoregressive limit, bad input."""

# Options go through dictionaries of mixed types, and weights of modules are tensors: a type checker can not know either.
# pyright: reportArgumentType=false, reportIndexIssue=false

import itertools
import math

import pytest
import torch
from torch import Tensor

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.diffusion_reasoning.block_diffusion import (
    BlockDiffusionModel,
    block_diffusion_loss,
    block_levels,
    corrupt_blocks,
    least_variance_interval,
)
from latentcot.diffusion_reasoning.block_diffusion.objective import WHOLE

MASK, VOCAB = 6, 19


def make(block_length=4, mixers=("gla", "attention"), **settings) -> BlockDiffusionModel:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=len(mixers),
        mixers=list(mixers),
        initializer_range=0.3,
        attention={"num_heads": 2},
        gla={"num_heads": 2},
        deltanet={"num_heads": 2},
    )
    return BlockDiffusionModel(HybridForCausalLM(config).double().eval(), block_length, MASK, **settings)


def text(rows=3, length=11, seed=0) -> Tensor:
    return torch.randint(7, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("interval", [WHOLE, (0.3, 0.8)])
def test_every_part_of_the_interval_holds_one_level(interval):
    """Over all blocks of a batch, and over the batches of all ranks together."""
    low, high = interval
    found = torch.cat([block_levels(3, 5, interval, seeded(r), r, 4) for r in range(4)]).double().flatten()
    parts = ((found - low) / (high - low) * 60).floor().long()
    assert torch.equal(parts.sort().values, torch.arange(60))


def test_clipped_blocks_have_a_share_within_the_interval():
    x = text(64, 22)
    real = torch.ones_like(x, dtype=torch.bool)
    noisy = corrupt_blocks(x, 8, MASK, maskable=real, real=real, interval=(0.3, 0.6), generator=seeded())
    shares = torch.stack([noisy.masked[:, a : a + 8].double().mean(1) for a in (0, 8, 16)])
    assert ((shares >= 0.3) & (shares <= 0.6)).all()
    assert ((noisy.p >= 0.3) & (noisy.p <= 0.6)).all()
    assert torch.equal(noisy.z == MASK, noisy.masked)
    assert noisy.block_of[0].tolist() == [0] * 8 + [1] * 8 + [2] * 6
    whole = corrupt_blocks(x, 8, MASK, maskable=real, real=real, generator=seeded())
    shares = whole.masked[:, :8].double().mean(1)
    assert shares.min() == 0  # nothing is drawn again on the whole interval
    assert shares.max() == 1
    # a block of which no number of tokens is a share within keeps its draw: 2 maskable tokens, none or one of them
    part = torch.arange(22) % 8 < 2
    few = corrupt_blocks(x, 8, MASK, maskable=part & real, real=real, interval=(0.6, 0.9), generator=seeded())
    assert not (few.masked & ~part).any()
    # four of five tokens, where the end of the interval is a rounding error below four fifths
    four = corrupt_blocks(x[:, :5], 5, MASK, maskable=real[:, :5], real=real[:, :5], interval=(0.7, 0.1 + 0.7))
    assert (four.masked.sum(1) == 4).all()
    with pytest.raises(ValueError, match="no number of 4 tokens is a share"):
        corrupt_blocks(x, 4, MASK, maskable=real, real=real, interval=(0.3, 0.45))


def test_the_loss_is_the_bound_by_enumeration():
    """Mean over many draws against the sum over all mask patterns of two blocks of two tokens, within 4 standard errors."""
    model, x = make(2), text(1, 4)
    logits = {}
    for pattern in itertools.product((False, True), repeat=4):
        masked = torch.tensor([pattern])
        with torch.no_grad():
            out = model.forward_two_stream(x.masked_fill(masked, MASK), x)
        out[..., MASK] = -torch.inf
        logits[pattern] = out.log_softmax(-1).gather(-1, x[..., None])[0, :, 0]
    # integral of p^(k-1) (1-p)^(2-k) over the levels, for k masked tokens of a block of two
    low = WHOLE[0]
    weight = {1: (1 - low) - (1 - low**2) / 2, 2: (1 - low**2) / 2}
    expected = 0.0
    for block in (0, 1):
        for own in itertools.product((False, True), repeat=2):
            if any(own):
                pattern = [False] * 4
                pattern[2 * block : 2 * block + 2] = own
                # the other block's noise does not matter to this one
                found = logits[tuple(pattern)][2 * block : 2 * block + 2][list(own)].sum()
                expected -= weight[sum(own)] / (1 - low) * float(found)
    with torch.no_grad():
        out = block_diffusion_loss(model, x.expand(6000, -1), generator=seeded())
    error = float(out.nelbo_nats.std() / math.sqrt(6000))
    assert abs(float(out.nelbo_nats.mean()) - expected) < 4 * error
    assert out.is_bound
    assert float(out.loss) == pytest.approx(float(out.nats_per_token))


def test_blocks_of_one_token_give_the_exact_likelihood():
    """b = 1: always masked, so one pass is the NLL; shifted and with rho = 0 that of the causal backbone."""
    model, x = make(1, ("deltanet", "attention"), inside="decayed", shift=True, rho=0.0), text()
    out = block_diffusion_loss(model, x)
    logits = model.backbone(x).logits[:, :-1].clone()
    logits[..., MASK] = -torch.inf
    nll = -logits.log_softmax(-1).gather(-1, x[:, 1:, None])[..., 0].sum(1)
    torch.testing.assert_close(out.nelbo_nats, nll, rtol=0, atol=1e-5)
    assert out.is_bound
    assert out.n_maskable.tolist() == [10] * 3


def test_normalisations_and_what_is_given():
    """By hand from the weighted cross-entropies; padding and given tokens are neither masked nor counted."""
    model, x = make(), text()
    real = torch.arange(11) < torch.tensor([11, 8, 5])[:, None]
    maskable = real & (torch.arange(11) >= 3)
    maskable[2] = False
    named = {"maskable": maskable, "attention_mask": real}
    found = {
        n: block_diffusion_loss(model, x, normalise=n, generator=seeded(), **named)
        for n in ("elbo", "answer", "tokens", "masked")
    }
    out = found["elbo"]
    assert not (out.masked & ~maskable).any()
    total = out.per_token.sum(1)
    torch.testing.assert_close(out.nelbo_nats, total)
    assert out.n_maskable.tolist() == [8, 5, 0]
    expected = {
        "elbo": total.sum() / 19,
        "answer": (total[0] / 8 + total[1] / 5) / 2,
        "tokens": total.sum() / 13,
        "masked": total.sum() / out.masked.sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name].loss.detach(), value)


def test_growing_blocks_take_another_length():
    model, x = make(4), text()
    longer = block_diffusion_loss(model, x, block_length=8, generator=seeded())
    expected = block_diffusion_loss(make(8), x, generator=seeded())
    torch.testing.assert_close(longer.loss, expected.loss)
    assert longer.p.shape == (3, 2)


def test_the_head_sees_masked_positions_only(monkeypatch):
    model, x, seen = make(), text(), []
    forward = model.backbone.lm_head.forward

    def count(hidden: Tensor) -> Tensor:
        seen.append(tuple(hidden.shape))
        return forward(hidden)

    monkeypatch.setattr(model.backbone.lm_head, "forward", count)
    out = block_diffusion_loss(model, x, generator=seeded())
    assert seen == [(int(out.masked.sum()), 16)]


def test_a_clipped_loss_is_no_bound_and_says_so():
    model, x = make(), text()
    out = block_diffusion_loss(model, x, interval=(0.4, 0.9), generator=seeded())
    assert not out.is_bound
    with pytest.raises(ValueError, match="bounds no likelihood"):
        _ = out.nats_per_token
    best, tried = least_variance_interval(model, [x, x], widths=(0.5, 0.8), lows=3, generator=seeded())
    assert set(tried) == {(0.001, 0.501), (0.25, 0.75), (0.5, 1.0), (0.001, 0.801), (0.1, 0.9), (0.2, 1.0)}
    assert tried[best] == min(tried.values())


def test_bad_input_is_named():
    model, x = make(), text()
    holding = x.clone()
    holding[1, 4] = MASK
    with pytest.raises(ValueError, match="row 1 holds the mask token 6 at maskable position 4"):
        block_diffusion_loss(model, holding)
    keep = torch.ones_like(x, dtype=torch.bool)
    keep[1, 4] = False
    block_diffusion_loss(model, holding, maskable=keep, generator=seeded())  # a given one may
    with pytest.raises(ValueError, match="no row has a maskable position"):
        block_diffusion_loss(model, x, maskable=torch.zeros_like(keep))
    with pytest.raises(ValueError, match="True at padded positions"):
        block_diffusion_loss(model, x, maskable=keep, attention_mask=torch.arange(11).expand(3, -1) < 4)
    with pytest.raises(ValueError, match="0 < lo < hi <= 1"):
        block_diffusion_loss(model, x, interval=(0.5, 0.4))
    with pytest.raises(ValueError, match="normalise: 'mean'"):
        block_diffusion_loss(model, x, normalise="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first token of a row"):
        block_diffusion_loss(make(shift=True), x, maskable=keep)
    with pytest.raises(ValueError, match="rank, world_size"):
        block_levels(2, 2, rank=2, world_size=2)
    with pytest.raises(ValueError, match="at least two rows"):
        least_variance_interval(model, [x[:1]])
    with torch.no_grad():
        model.backbone.lm_head.weight[9] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite at row 0"):
        block_diffusion_loss(model, x, generator=seeded())
