"""Faults that users of other masked-diffusion projects reported, as cases with values derived by hand."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from latentcot.diffusion_reasoning import (
    ReMDM,
    Revise,
    Uniform,
    ancestral,
    diffusion_generate,
    low_confidence,
    posterior,
    quota_table,
)

V, MASK = 6, 5  # five real tokens and the mask


def network(z: Tensor, mask: Tensor) -> Tensor:
    """Some logits for every position, the mask token's the highest: it must be kept out."""
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
    logits = table[z] + torch.arange(z.shape[1])[None, :, None] * table[0] / 5
    logits[..., MASK] = 20.0
    return logits


def run(ids: Tensor, config, **named):
    """The output, and what the single row held in front of each pass and at the end."""
    seen: list[Tensor] = []
    out = diffusion_generate(network, ids, config, hook=lambda number, rows, z: seen.append(z[0].clone()), **named)
    return out, [*seen, out.sequences[0]]


def test_D_1_quotas_are_made_for_each_block():
    """furiosa-ai/ParallelBench#7: the schedule was made for the whole answer and consumed block by block."""
    prompt = torch.tensor([[MASK, 1, 2]])  # a prompt may hold the mask token
    assert quota_table(10, Uniform(), steps=6, block_length=4) == [[2, 2], [2, 2], [1, 1]]
    out, held = run(prompt, low_confidence(10, steps=6, block_length=4, mask_id=MASK))
    left = [int((z[3:] == MASK).sum()) for z in held]
    assert [a - b for a, b in pairwise(left)] == [2, 2, 2, 2, 1, 1]
    assert out.nfe.tolist() == [6]
    assert len(held) - 1 == 6
    for finished, z in ((4, held[2]), (8, held[4])):
        assert (z[3 : 3 + finished] != MASK).all()
        assert (z[3 + finished :] == MASK).all()

    with pytest.raises(ValueError, match="1 given for 3 blocks"):
        run(prompt, low_confidence(10, steps=1, block_length=4, mask_id=MASK))

    with pytest.warns(UserWarning, match="40 passes are more than there are tokens") as caught:
        out, held = run(prompt, low_confidence(10, steps=40, block_length=4, mask_id=MASK))
    assert len(caught) == 1
    assert quota_table(10, Uniform(), steps=40, block_length=4) == [[1] * 4, [1] * 4, [1] * 2]
    assert out.nfe.tolist() == [10]
    assert len(held) - 1 == 10

    config = low_confidence(10, steps=6, block_length=4, remask=Revise(passes=2, count=1), mask_id=MASK)
    out, held = run(prompt, config)
    assert out.nfe.tolist() == [12]
    assert len(held) - 1 == 12
    assert (out.sequences[0, 3:] != MASK).all()
    for number, z in enumerate(held):
        block = min(number // 4, 2)  # four passes a block: two that fill it, two that revise it
        done = 3 + 4 * block
        assert torch.equal(z[:3], prompt[0])
        assert torch.equal(z[3:done], held[-1][3:done])
    # a block that is complete is revised: one token of it is masked again in front of each revising pass
    assert [int((held[n][3:7] == MASK).sum()) for n in range(5)] == [4, 2, 1, 1, 0]


def test_D_2_a_revealed_token_stays_or_is_masked():
    """kuleshov-group/remdm#8: the network's prediction was mixed in at positions that already hold a token."""
    z = torch.tensor([[3, MASK]])
    logprobs = torch.full((1, 2, V), 1 / 5, dtype=torch.float64).log()
    logprobs[..., MASK] = -torch.inf
    q = posterior(logprobs, z, alpha_t=0.5, alpha_s=0.6, sigma=0.2, mask_id=MASK)
    clean, masked = torch.zeros(V, dtype=torch.float64), torch.full((V,), 0.08, dtype=torch.float64)
    clean[3], clean[MASK], masked[MASK] = 0.8, 0.2, 0.6
    torch.testing.assert_close(q[0, 0], clean, rtol=0, atol=1e-15)
    torch.testing.assert_close(q[0, 1], masked, rtol=0, atol=1e-15)
    assert (q[0, 0, [0, 1, 2, 4]] == 0).all()
    share_clean = 0.5 * float(1 - q[0, 0, MASK]) + 0.5 * float(1 - q[0, 1, MASK])
    assert share_clean == pytest.approx(0.6, abs=1e-12)

    draws = torch.multinomial(q[0], 10_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert set(draws[0].tolist()) == {3, MASK}
    assert abs(float((draws[0] == MASK).double().mean()) - 0.2) < 4 * (0.2 * 0.8 / 10_000) ** 0.5
    assert abs(float((draws[1] == MASK).double().mean()) - 0.6) < 4 * (0.6 * 0.4 / 10_000) ** 0.5

    with pytest.raises(ValueError, match=r"sigma: expected 0 <= sigma <= 0\.8"):
        posterior(logprobs, z, 0.5, 0.6, 0.81, MASK)


@pytest.mark.parametrize("eta", [0.2, 1.0])
def test_D_2_the_sampler_never_swaps_one_token_for_another(eta: float):
    """10 000 position steps and more of the re-masking sampler, read between consecutive passes."""
    seen: list[tuple[Tensor, Tensor]] = []
    config = ancestral(40, 30, remask=ReMDM(eta), mask_id=MASK)
    out = diffusion_generate(network, torch.zeros(12, 1).long(), config, hook=lambda n, rows, z: seen.append((rows, z)))
    last: dict[int, Tensor] = {}
    steps = returned = 0
    for rows, z in [*seen, (torch.arange(12), out.sequences)]:
        for row, held in zip(rows.tolist(), z, strict=True):
            if row in last:
                before = last[row]
                both = (before != MASK) & (held != MASK)
                assert torch.equal(before[both], held[both])
                returned += int(((before != MASK) & (held == MASK)).sum())
                steps += held.numel()
            last[row] = held.clone()
    assert steps > 10_000
    assert returned > 50
    assert (out.sequences != MASK).all()
