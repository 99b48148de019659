r"""Denoising steps as depth: accuracy against passes, fixed points, and answers of unknown length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.diffusion_reasoning.corruption import check_maskable, without_mask_token
from latentcot.diffusion_reasoning.denoiser import BackboneDenoiser, as_denoiser
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig
from latentcot.diffusion_reasoning.likelihood import loglikelihood_bound
from latentcot.diffusion_reasoning.samplers import DiffusionOutput, diffusion_generate
from latentcot.training.budget import FlopCounter


@dataclass(frozen=True)
class DepthPoint:
    """One row of :func:`accuracy_by_steps`: ``steps`` asked for; ``accuracy``, with its binomial ``stderr``; mean
    ``nfe``; mean ``depth`` (blocks one after the other) and ``flops`` an example, NaN where the network can not be
    counted."""

    steps: int
    accuracy: float
    stderr: float
    nfe: float
    depth: float
    flops: float


@torch.no_grad()
def accuracy_by_steps(
    model: Any,
    input_ids: Tensor,
    correct: Callable[[Tensor], Tensor],
    config: DiffusionGenerationConfig,
    steps: Sequence[int],
    attention_mask: Tensor | None = None,
    maskable: Tensor | None = None,
    progress: bool = False,
) -> list[DepthPoint]:
    """Accuracy against the number of denoising steps, in the units of depth recurrence.

    Args:
        correct: ``sequences [B, P + n] -> [B]`` bool.
        config: the sampler; its ``steps`` are replaced.
        steps: 1, 2, 4, ... as many as there are tokens.
        progress: show a bar.
    """
    if not steps:
        raise ValueError("steps: none given")
    denoise = as_denoiser(model)
    layers, each = float("nan"), float("nan")
    if isinstance(denoise, BackboneDenoiser):
        layers = len(denoise.backbone.model.layers)
        real = input_ids.shape[1] if attention_mask is None else attention_mask.bool().sum(1).double().mean().item()
        length = real + config.max_new_tokens
        counted = FlopCounter(denoise.backbone, directions=2)(torch.tensor(length), head=torch.tensor(length))
        each = float(counted)
    points = []
    for count in _tracked(steps, progress):
        out = diffusion_generate(model, input_ids, replace(config, steps=count), attention_mask, maskable)
        right = correct(out.sequences)
        if right.shape != input_ids.shape[:1] or right.dtype != torch.bool:
            raise ValueError(
                f"correct: shape {list(right.shape)} of {right.dtype} returned, expected [{input_ids.shape[0]}] of bool"
            )
        share, nfe = float(right.double().mean()), float(out.nfe.double().mean())
        stderr = (share * (1 - share) / len(right)) ** 0.5
        points.append(DepthPoint(count, share, stderr, nfe, layers * nfe, each * nfe))
    return points


@torch.no_grad()
def fixed_point_residual(
    model: Any, z: Tensor, maskable: Tensor, *, mask_id: int, attention_mask: Tensor | None = None, batch_size: int = 64
) -> Tensor:
    """Share of maskable tokens that the network would change, ``[B]``: each is masked alone and predicted greedily from
    all others. 0 = ``z`` is a fixed point. One network row a maskable token; NaN for rows without one."""
    maskable = check_maskable(z, maskable)
    real = torch.ones_like(maskable) if attention_mask is None else attention_mask.bool()
    denoise = as_denoiser(model)
    rows, columns = maskable.nonzero(as_tuple=True)
    changed = torch.zeros(z.shape[0], dtype=torch.float64, device=z.device)
    for row, column in zip(rows.split(batch_size), columns.split(batch_size), strict=True):
        each = torch.arange(len(row), device=z.device)
        noisy = z[row].index_put((each, column), torch.tensor(mask_id, device=z.device))
        named = {}
        if getattr(denoise, "time_conditioning", False):
            named["sigma"] = torch.zeros(len(row), device=z.device)
        logits = denoise(noisy, real[row], **named)[each, column]
        guess = without_mask_token(logits, mask_id).argmax(-1)
        changed.index_add_(0, row, (guess != z[row, column]).double())
    return changed / maskable.sum(1)


@dataclass(frozen=True)
class LengthChoice:
    """``length [B]``: chosen length of each row; ``sequences``: each row's tokens ``[P + its length]``; ``bounds [C, B]``:
    nats a token of every candidate (higher is better); ``nfe [B]``: passes spent on all candidates, those of the bounds
    not counted."""

    length: Tensor
    sequences: list[Tensor]
    bounds: Tensor
    nfe: Tensor


@torch.no_grad()
def generate_best_length(
    model: Any,
    input_ids: Tensor,
    config: DiffusionGenerationConfig,
    candidate_lengths: Sequence[int],
    *,
    n_samples: int = 32,
    batch_size: int = 16,
    generator: torch.Generator | None = None,
) -> LengthChoice:
    """A canvas fixes its length; try several and keep, for each row, the one with the best bound per token.

    Bounds are estimated with :func:`~latentcot.diffusion_reasoning.likelihood.loglikelihood_bound` given the prompt. A
    ``steps`` of ``config`` that is more than a candidate has tokens is cut to it.

    Args:
        input_ids: prompts ``[B, P]`` without padding.
        candidate_lengths: each at least 1, without repetition.
    """
    lengths = list(candidate_lengths)
    if not lengths or len(set(lengths)) != len(lengths) or min(lengths) < 1:
        raise ValueError(f"candidate_lengths: {lengths} given, expected different lengths of at least 1")
    batch, prompt = input_ids.shape
    outputs: list[DiffusionOutput] = []
    bounds = torch.zeros(len(lengths), batch, dtype=torch.float64)
    for index, length in enumerate(lengths):
        steps = config.steps if config.steps is None else min(config.steps, length)
        out = diffusion_generate(model, input_ids, replace(config, max_new_tokens=length, steps=steps))
        outputs.append(out)
        for row in range(batch):
            bound = loglikelihood_bound(
                model,
                input_ids[row],
                out.sequences[row, prompt:],
                mask_id=config.mask_id,
                n_samples=n_samples,
                batch_size=batch_size,
                generator=generator,
            )
            bounds[index, row] = bound.per_token
    best = bounds.argmax(0)
    sequences = [outputs[int(choice)].sequences[row] for row, choice in enumerate(best)]
    return LengthChoice(torch.tensor(lengths)[best], sequences, bounds, torch.stack([o.nfe for o in outputs]).sum(0))


def pad_sequences(sequences: list[Tensor], pad_id: int) -> Tensor:
    """Rows of different lengths as ``[B, longest]``, filled with ``pad_id`` on the right."""
    longest = max(len(row) for row in sequences)
    return torch.stack([F.pad(row, (0, longest - len(row)), value=pad_id) for row in sequences])


def _tracked(steps: Sequence[int], progress: bool):
    if not progress:
        return steps
    from rich.progress import track

    return track(steps, description="denoising steps")
