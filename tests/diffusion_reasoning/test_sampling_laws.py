"""Distributions that samplers draw from, against enumeration of a table model with 4 positions and 3 symbols."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.diffusion_reasoning import (
    DiffusionGenerationConfig,
    NoiseSchedule,
    ancestral,
    diffusion_generate,
    first_hitting,
    low_confidence,
    posterior,
    shift_right,
    subs_logprobs,
)
from latentcot.diffusion_reasoning.likelihood import order_logprob

LENGTH, SYMBOLS, MASK = 4, 3, 3
TABLE = torch.randn(4**LENGTH, LENGTH, SYMBOLS + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CANVASES = torch.tensor(list(itertools.product(range(4), repeat=LENGTH)))  # 256, mask = 3
CODE = 4 ** torch.arange(LENGTH)
ALL_MASKED = torch.full((LENGTH,), MASK)


def network(z: Tensor, mask: Tensor) -> Tensor:
    return TABLE[(z * CODE).sum(1)]


LOGPROBS = subs_logprobs(network(CANVASES, CANVASES), CANVASES, MASK)
ROW = {tuple(z): i for i, z in enumerate(CANVASES.tolist())}
START = ROW[tuple(ALL_MASKED.tolist())]
FULL = [i for i, z in enumerate(CANVASES.tolist()) if MASK not in z]


def any_order_law() -> Tensor:
    """Reveal one uniformly random masked position with a draw from the network, until none is left: ``[81]``."""
    mass = torch.zeros(256, dtype=torch.float64)
    mass[START] = 1.0
    for _ in range(LENGTH):
        after = torch.zeros_like(mass)
        for i, z in enumerate(CANVASES.tolist()):
            masked = [p for p in range(LENGTH) if z[p] == MASK]
            if mass[i] == 0 or not masked:
                continue
            for p in masked:
                for v in range(SYMBOLS):
                    chance = float(LOGPROBS[i, p, v].exp()) / len(masked)
                    after[ROW[(*z[:p], v, *z[p + 1 :])]] += mass[i] * chance
        mass = after
    return mass[FULL]


LAW = any_order_law()


def counted(sequences: Tensor) -> Tensor:
    codes = {tuple(CANVASES[i].tolist()): n for n, i in enumerate(FULL)}
    found, times = sequences.unique(dim=0, return_counts=True)
    counts = torch.zeros(len(FULL), dtype=torch.float64)
    for row, count in zip(found.tolist(), times, strict=True):
        counts[codes[tuple(row)]] = float(count)
    return counts


def chi_square(counts: Tensor, law: Tensor) -> float:
    expected = counts.sum() * law
    return float(((counts - expected).square() / expected).sum())


def test_random_order_is_the_average_over_permutations():
    assert float(LAW.sum()) == pytest.approx(1.0, abs=1e-12)
    none = torch.zeros(0, dtype=torch.int64)
    for index in (0, 17, 80):
        x = CANVASES[FULL[index]]
        orders = [
            math.exp(order_logprob(network, none, x, list(order), mask_id=MASK))
            for order in itertools.permutations(range(LENGTH))
        ]
        assert sum(orders) / 24 == pytest.approx(float(LAW[index]), rel=1e-12)


@pytest.mark.parametrize(
    ("config", "draws"),
    [
        (first_hitting(mask_id=MASK), 200_000),
        (low_confidence(order="random", temperature=1.0, mask_id=MASK), 50_000),
    ],
    ids=["first_hitting", "random_order"],
)
def test_one_random_token_a_pass_has_the_any_order_law(config: DiffusionGenerationConfig, draws: int):
    """Chi-square with 80 degrees of freedom: 124.8 is exceeded once in a thousand times."""
    ids = ALL_MASKED.expand(draws, -1)
    out = diffusion_generate(network, ids, config, maskable=torch.ones_like(ids, dtype=torch.bool))
    assert (out.nfe == LENGTH).all()
    assert chi_square(counted(out.sequences), LAW) < 124.8


def ancestral_law(steps: int) -> Tensor:
    """The law of the reverse process in ``steps`` equal steps to t = 0, from the exact step: ``[81]``."""
    schedule = NoiseSchedule(eps=0.0)
    alpha = schedule.alpha(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()
    mass = torch.zeros(256, dtype=torch.float64)
    mass[START] = 1.0
    for alpha_t, alpha_s in itertools.pairwise(alpha):
        q = posterior(LOGPROBS, CANVASES, alpha_t, min(alpha_s, 1.0), 0.0, MASK)  # [256, 4, 4]
        moves = torch.ones(256, 256, dtype=torch.float64)
        for p in range(LENGTH):
            moves = moves * q[:, p][:, CANVASES[:, p]]
        mass = mass @ moves
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-12)
    return mass[FULL]


def test_ancestral_tends_to_the_any_order_law_like_one_over_the_steps():
    distance = [float((ancestral_law(steps) - LAW).abs().sum() / 2) for steps in (4, 16, 64, 256)]
    for coarse, fine in itertools.pairwise(distance):
        assert 3 < coarse / fine < 5


def test_the_ancestral_sampler_draws_from_its_law():
    ids = ALL_MASKED.expand(50_000, -1)
    config = ancestral(4, schedule=NoiseSchedule(eps=0.0), t_end=0.0, mask_id=MASK)
    out = diffusion_generate(network, ids, config, maskable=torch.ones_like(ids, dtype=torch.bool))
    law = ancestral_law(4)
    assert chi_square(counted(out.sequences), law) < 124.8
    assert chi_square(counted(out.sequences), LAW) > 1000  # which is another one


def test_left_to_right_on_a_causal_network_is_autoregressive_decoding():
    torch.manual_seed(0)
    model = HybridForCausalLM(
        HybridConfig(vocab_size=19, hidden_size=32, num_hidden_layers=2, attention={"num_heads": 2}, mixer="attention")
    ).eval()
    prompt = torch.randint(7, 19, (3, 5))

    def causal(z: Tensor, mask: Tensor) -> Tensor:
        logits = model.lm_head(shift_right(model.model(z, mask)[0], mask))
        logits[..., 2] = -torch.inf  # no end
        return logits

    filled = diffusion_generate(causal, prompt, low_confidence(8, order="left_to_right"))
    expected = prompt
    for _ in range(8):
        logits = model(expected).logits[:, -1]
        logits[:, [2, 6]] = -torch.inf
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(filled.sequences, expected)
    assert filled.nfe.tolist() == [8, 8, 8]
