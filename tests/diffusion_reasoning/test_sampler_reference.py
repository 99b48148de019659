"""The vectorised loop against samplers written token by token and row by row, at temperature 0."""

import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latentcot.diffusion_reasoning import diffusion_generate, dream, easy_first, low_confidence

V, MASK = 9, 6


def network(z: Tensor, mask: Tensor) -> Tensor:
    """Logits from every real token of the row and the place of each, fp64."""
    table = torch.randn(4, V, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    row = (table[0][z] * mask[..., None]).sum(1, keepdim=True) / 3
    return 2 * (table[1][z] + table[2][mask.long().cumsum(1) % V] + torch.tanh(row) @ table[3])


def seen_by(z: list[int]) -> list[list[float]]:
    """Probabilities at each position of one row, the mask token's zero."""
    canvas = torch.tensor([z])
    logits = network(canvas, torch.ones_like(canvas))[0]
    logits[:, MASK] = -torch.inf
    return logits.softmax(-1).tolist()


def certainty(order: str, p: list[float], position: int) -> float:
    best = sorted(p, reverse=True)
    return {
        "prob": best[0],
        "margin": best[0] - best[1],
        "neg_entropy": sum(x * math.log(x + 1e-10) for x in p),
        "left_to_right": -position,
    }[order]


def blocks_of(n: int, length: int | None, steps: int | None) -> list[tuple[int, int, int]]:
    """(first, size, steps) of each block; steps are shared out, the first blocks get one more, at most one a token."""
    length = n if length is None else length
    starts = range(0, n, length)
    found = []
    for number, first in enumerate(starts):
        size = min(length, n - first)
        share = size if steps is None else steps // len(starts) + (number < steps % len(starts))
        found.append((first, size, min(share, size)))
    return found


def count_of(quota: str, value: float, step: int, steps: int, size: int, sure: list[float]) -> int:
    """Tokens that a pass reveals; ``sure``: confidences of what is masked, from high to low."""
    now = len(sure)
    if quota == "uniform":
        return size // steps + (step < size % steps)
    if quota == "dream":
        t, s = (1 - (1 - 1e-3) * k / steps for k in (step, step + 1))
        return now if step == steps - 1 else int(now * (1 - s / t))
    if quota == "threshold":
        return max(1, sum(c >= value for c in sure))
    assert quota == "factor"
    n = 1
    while n < now and (n + 2) * (1 - sure[n]) <= value:
        n += 1
    return n


def slow(prompt: list[int], n: int, length, steps, order: str, quota: str, value: float = 0.0) -> list[int]:
    z = prompt + [MASK] * n
    for first, size, share in blocks_of(n, length, steps):
        places, step = range(len(prompt) + first, len(prompt) + first + size), 0
        while any(z[i] == MASK for i in places):
            p = seen_by(z)
            masked = sorted((i for i in places if z[i] == MASK), key=lambda i: (-certainty(order, p[i], i), i))
            sure = [certainty(order, p[i], i) for i in masked]
            for i in masked[: count_of(quota, value, step, share, size, sure)]:
                z[i] = p[i].index(max(p[i]))
            step += 1
    return z


def prompts() -> Tensor:
    x = torch.randint(0, V - 1, (3, 4), generator=torch.Generator().manual_seed(0))
    return x + (x >= MASK)


CASES = [
    *itertools.product([None, 3, 4], [3, 5, 8], ["prob", "margin", "neg_entropy", "left_to_right"], ["uniform"]),
    *itertools.product([None], [3, 8], ["prob", "neg_entropy"], ["dream"]),
    *itertools.product([None, 3], [None], ["prob", "margin"], ["threshold", "factor"]),
]


@pytest.mark.parametrize(("length", "steps", "order", "quota"), CASES)
def test_the_loop_equals_its_slow_reference(length, steps, order: str, quota: str):
    if quota == "dream":
        config = dream(8, steps, alg={"prob": "maskgit_plus", "neg_entropy": "entropy"}[order])
    else:
        named = {"threshold": {"threshold": 0.5}, "factor": {"factor": 1.2}}.get(quota, {})
        config = low_confidence(8, steps, length, order=order, **named)
    value = {"threshold": 0.5, "factor": 1.2}.get(quota, 0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="steps:")
        out = diffusion_generate(network, prompts(), replace(config, seed=1))
    for row, prompt in enumerate(prompts().tolist()):
        assert out.sequences[row].tolist() == slow(prompt, 8, length, steps, order, quota, value)


@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_easy_first_equals_its_slow_reference(steps: int):
    out = diffusion_generate(network, prompts(), easy_first(8, steps, noise=0.0))
    for row, prompt in enumerate(prompts().tolist()):
        z, places = prompt + [MASK] * 8, range(4, 12)
        for k in reversed(range(steps)):
            p = seen_by(z)
            least = sorted(places, key=lambda i: (max(p[i]), -i))[: 8 * k // steps]
            for i in places:
                z[i] = MASK if i in least else p[i].index(max(p[i]))
        assert out.sequences[row].tolist() == z
        assert int(out.nfe[row]) == steps
