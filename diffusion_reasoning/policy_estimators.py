r"""What a diffusion model thinks of a completion: estimators of its log-probability, token by token.

The likelihood of a masked-diffusion model is an intractable mean over orders; every policy gradient puts an estimate in its place.

================ ========================================================================================== ===========
value            log-probability of token i of completion o, and what it costs in passes                    bias
================ ========================================================================================== ===========
OneStep          :math:`\log p(o_i \mid \tilde q)`, all of o masked, a share of the prompt too; 1           mean field
Elbo(n)          :math:`\frac1n\sum_j \frac{A}{l_j} 1[i \in M_j] \log p(o_i \mid o_{\setminus M_j})`; n     none: the ELBO
Coupled(n)       of the one of a random mask and its complement that hides i, mean over n pairs; 2n         mean field
PathProbability  :math:`\log p(o_i \mid z)` in the pass that revealed i; as many as the sampler             none: its path
================ ========================================================================================== ===========

Sources: diffu-GRPO's ``OneStep`` (d1, arXiv:2504.12216); arXiv:2512.03759 reports in its abstract that sequence ratios of ELBOs do far
better. Masks follow from (seed, row number, position): the policy, the old policy and the reference see the same ones, and so does a
part of the batch. Block models take all of them by one two-stream pass in place of each pass; their ELBO draws a count for every block.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from latentcot.diffusion_reasoning.block_diffusion.model import BlockDiffusionModel
from latentcot.diffusion_reasoning.corruption import precise, without_mask_token
from latentcot.diffusion_reasoning.denoiser import as_denoiser
from latentcot.diffusion_reasoning.noise import Noise, mix


@dataclass(frozen=True)
class Rollout:
    """Completions of prompts; N rows of L positions.

    ``sequences [N, L]``; ``completion [N, L]`` bool: positions that were sampled; ``real [N, L]``: not padding; ``valid [N, L]``:
    completion tokens up to and including the first end of text; ``prompt_of [N]``: which prompt; ``row [N]``: number within the whole
    batch; ``path``: of every pass what its rows held, ``(rows [R], z [R, L])``, if it was recorded.
    """

    sequences: Tensor
    completion: Tensor
    real: Tensor
    valid: Tensor
    prompt_of: Tensor
    row: Tensor
    path: tuple[tuple[Tensor, Tensor], ...] | None = None

    def select(self, rows: Tensor) -> "Rollout":
        """A part of the batch (for micro-batches): row indices ``[M]``. Its estimates are those of the whole."""
        path = None
        if self.path is not None:
            where = torch.full((len(self.row),), -1, device=rows.device)
            where[rows] = torch.arange(len(rows), device=rows.device)
            kept = [(where[r], z) for r, z in self.path if bool((where[r] >= 0).any())]
            path = tuple((r[r >= 0], z[r >= 0]) for r, z in kept)
        return Rollout(
            self.sequences[rows],
            self.completion[rows],
            self.real[rows],
            self.valid[rows],
            self.prompt_of[rows],
            self.row[rows],
            path,
        )


Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(z, clean, real, at) -> log-probabilities [n, V]`` of the positions ``at``; ``clean`` is what a block model's clean stream holds."""


def scorer(model: object, mask_id: int, temperature: float = 1.0) -> Score:
    """Log-probabilities of a network's logits with the mask token left out, in fp32 or better."""
    if isinstance(model, BlockDiffusionModel):

        def logits(z: Tensor, clean: Tensor, real: Tensor, at: Tensor) -> Tensor:
            return model.forward_two_stream(z, clean, None, real, at=at)
    else:
        denoise = as_denoiser(model)
        if getattr(denoise, "time_conditioning", False):
            raise ValueError(
                "model: it reads the time, and a masked completion says none; take a network without time_conditioning"
            )
        chosen = getattr(denoise, "at", None)

        def logits(z: Tensor, clean: Tensor, real: Tensor, at: Tensor) -> Tensor:
            return denoise(z, real)[at] if chosen is None else chosen(z, real, at)

    def score(z: Tensor, clean: Tensor, real: Tensor, at: Tensor) -> Tensor:
        found = without_mask_token(precise(logits(z, clean, real, at)), mask_id)
        return torch.log_softmax(found / temperature, -1)

    return score


class LogprobEstimator(Protocol):
    """``(model, rollout, mask_id, seed) -> [N, L]``: 0 outside the completion; summed over a row it is the estimate of log pi(o)."""

    def __call__(self, model: object, rollout: Rollout, mask_id: int, seed: int) -> Tensor: ...


def _at_tokens(score: Score, z: Tensor, clean: Tensor, rollout: Rollout, at: Tensor) -> Tensor:
    """Log-probabilities of the sampled tokens at the positions ``at``, ``[N, L]``, 0 elsewhere."""
    found = score(z, clean, rollout.real, at).gather(-1, rollout.sequences[at][:, None])[:, 0]
    return torch.zeros(z.shape, dtype=found.dtype, device=z.device).masked_scatter(at, found)


def _uniform(rollout: Rollout, seed: int, draw: int, stream: str, places: int | None = None) -> Tensor:
    """U(0, 1) numbers ``[N, L]`` that follow from seed, row number and position; or one for each of a number of places."""
    rows = torch.arange(len(rollout.row), device=rollout.row.device)
    seeds = mix(rollout.row + mix(torch.full_like(rollout.row, seed)))
    if places is None:
        position = (rollout.real.long().cumsum(1) - 1).clamp(min=0)
    else:
        position = torch.arange(places, device=rows.device).expand(len(rows), places)
    return Noise(seeds).positions(rows, draw, stream, position)


@dataclass(frozen=True)
class OneStep:
    """All completion tokens masked, and each prompt token with probability ``prompt_mask``: one pass (arXiv:2504.12216)."""

    prompt_mask: float = 0.15

    def __post_init__(self) -> None:
        if not 0.0 <= self.prompt_mask < 1.0:
            raise ValueError(f"prompt_mask: expected a probability below 1, got {self.prompt_mask}")

    def prompt(self, rollout: Rollout, mask_id: int, seed: int) -> Tensor:
        """The sequences with the prompt as a seed masks it."""
        hidden = rollout.real & ~rollout.completion & (_uniform(rollout, seed, 0, "remask") < self.prompt_mask)
        return rollout.sequences.masked_fill(hidden, mask_id)

    def __call__(self, model: object, rollout: Rollout, mask_id: int, seed: int) -> Tensor:
        clean = self.prompt(rollout, mask_id, seed)
        z = clean.masked_fill(rollout.completion, mask_id)
        return _at_tokens(scorer(model, mask_id), z, clean, rollout, rollout.completion)


@dataclass(frozen=True)
class Elbo:
    """Mean over ``n`` masks of exactly l_j tokens, l_j stratified over 1 ... A, weight A / l_j: unbiased for the ELBO."""

    n: int = 4

    def __post_init__(self) -> None:
        _check_draws(self.n)

    def __call__(self, model: object, rollout: Rollout, mask_id: int, seed: int) -> Tensor:
        score, total = scorer(model, mask_id), None
        block = _blocks(model, rollout)
        size = _per_block(rollout.completion.long(), block)
        start = _uniform(rollout, seed, 0, "order", size.shape[1])
        for j in range(self.n):
            count = (((start + j / self.n) % 1.0) * size).floor().long() + 1
            hidden = rollout.completion & (
                _rank(_uniform(rollout, seed, j, "reveal"), rollout.completion, block) < count.gather(1, block)
            )
            found = _at_tokens(
                score, rollout.sequences.masked_fill(hidden, mask_id), rollout.sequences, rollout, hidden
            )
            weighted = found * (size.double() / count).gather(1, block).to(found.dtype) / self.n
            total = weighted if total is None else total + weighted
        assert total is not None
        return total


@dataclass(frozen=True)
class Coupled:
    """``n`` pairs of a random mask, of a level of its own, and its complement: every token is counted once a pair."""

    n: int = 1

    def __post_init__(self) -> None:
        _check_draws(self.n)

    def __call__(self, model: object, rollout: Rollout, mask_id: int, seed: int) -> Tensor:
        score, total = scorer(model, mask_id), None
        level = _uniform(rollout, seed, 0, "order", 1)
        for j in range(self.n):
            first = rollout.completion & (_uniform(rollout, seed, j, "reveal") < (level + j / self.n) % 1.0)
            for hidden in (first, rollout.completion & ~first):
                z = rollout.sequences.masked_fill(hidden, mask_id)
                found = _at_tokens(score, z, rollout.sequences, rollout, hidden) / self.n
                total = found if total is None else total + found
        assert total is not None
        return total


@dataclass(frozen=True)
class PathProbability:
    """Log-probability of each token in the pass that revealed it, at the sampler's temperature: exact for the path that was taken, the
    choice of positions left out. Needs a rollout with a recorded path, without re-masking, over a whole canvas, whose tokens are plain
    draws: no top-k or top-p, guidance, carry, or tokens filled in by argmax."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a finite number above 0, got {self.temperature}")

    def __call__(self, model: object, rollout: Rollout, mask_id: int, seed: int) -> Tensor:
        if rollout.path is None:
            raise ValueError("rollout: its path was not recorded; ask for rollout(..., record=True)")
        if isinstance(model, BlockDiffusionModel):
            raise ValueError("model: paths are recorded over a whole canvas; a block model takes another estimator")
        score = scorer(model, mask_id, self.temperature)
        total = torch.zeros(rollout.sequences.shape, dtype=torch.float32, device=rollout.sequences.device)
        after, passes = rollout.sequences.clone(), []
        plain = replace(rollout, path=None)  # choosing rows of it does not walk over all passes each time
        for rows, z in reversed(rollout.path):  # what a pass revealed is known from what its rows held afterwards
            revealed = rollout.completion[rows] & (z == mask_id) & (after[rows] != mask_id)
            after[rows] = z
            passes.append((rows, z, revealed))
        for rows, z, revealed in reversed(passes):
            if bool(revealed.any()):
                found = _at_tokens(score, z, rollout.sequences[rows], plain.select(rows), revealed)
                total = total.to(found.dtype).index_add(0, rows, found)
        return total


ESTIMATORS: dict[str, Callable[[], LogprobEstimator]] = {
    "one_step": OneStep,
    "elbo": Elbo,
    "coupled": Coupled,
    "path": PathProbability,
}


def find_estimator(estimator: str | LogprobEstimator) -> LogprobEstimator:
    """By name with its defaults, or a value as it is."""
    if callable(estimator):
        return estimator
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: unknown {estimator!r}; valid: {', '.join(ESTIMATORS)}, or a value")
    return ESTIMATORS[estimator]()


def _check_draws(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n: expected at least one draw, got {n!r}")


def _blocks(model: object, rollout: Rollout) -> Tensor:
    """Number of each position's block ``[N, L]``: all 0 but for a block model."""
    if not isinstance(model, BlockDiffusionModel):
        return torch.zeros_like(rollout.sequences)
    return (rollout.real.long().cumsum(1) - 1).clamp(min=0) // model.block_length


def _per_block(counts: Tensor, block: Tensor) -> Tensor:
    """Sums over blocks, ``[N, blocks]``."""
    total = counts.new_zeros(len(counts), int(block.max()) + 1)
    return total.scatter_add(1, block, counts)


def _rank(u: Tensor, completion: Tensor, block: Tensor) -> Tensor:
    """Rank of each completion token's number within its block, from 0; large elsewhere."""
    blocks = int(block.max()) + 1
    key = torch.where(completion, block.double() + u, float(blocks + 1))
    order = key.argsort(1)
    place = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=u.device).expand_as(order))
    before = _per_block(completion.long(), block).cumsum(1)
    start = torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], 1)
    return torch.where(completion, place - start.gather(1, block), order.shape[1])
