"""Filling a canvas: :func:`diffusion_generate` with a whole network, :func:`fill_block` with any logits function.

The loop itself: :mod:`~latentcot.diffusion_reasoning.sampling_loop`.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.diffusion_reasoning.block_plan import plan_blocks
from latentcot.diffusion_reasoning.corruption import check_maskable
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig
from latentcot.diffusion_reasoning.noise import Noise, mix
from latentcot.diffusion_reasoning.sampler_network import BlockNetwork, LogitsFn, SamplerNetwork, WholeNetwork
from latentcot.diffusion_reasoning.sampling_loop import Allowed, Canvas, Hook, Hooks, LogitsHook, SamplerLoop
from latentcot.diffusion_reasoning.trajectory import Recorder, Trajectory

__all__ = [
    "Allowed",
    "DiffusionOutput",
    "Hook",
    "LogitsFn",
    "LogitsHook",
    "diffusion_generate",
    "fill_block",
    "lay_out",
]


@dataclass(frozen=True)
class DiffusionOutput:
    """``sequences [B, P + n]``; ``nfe [B]``: network passes of each row (a guided pass is two); ``stopped [B]``: ended
    before its plan did (by ``eos_block``, ``eos_or_degenerate``, ``fixed_point`` or ``max_nfe``); ``exact``: no cached
    approximation was used; ``trajectory``: with ``record``."""

    sequences: Tensor
    nfe: Tensor
    stopped: Tensor
    exact: bool = True
    trajectory: Trajectory | None = None


@torch.no_grad()
def diffusion_generate(
    model: Any,
    input_ids: Tensor,
    config: DiffusionGenerationConfig,
    attention_mask: Tensor | None = None,
    maskable: Tensor | None = None,
    allowed: Allowed | None = None,
    row_seeds: Tensor | None = None,
    hook: Hook | None = None,
    logits_hook: LogitsHook | None = None,
    tokens_hook: LogitsHook | None = None,
    infer_from_mask: bool = False,
) -> DiffusionOutput:
    """Fill the masked positions of a canvas.

    Args:
        model: callable ``(z, attention_mask) -> logits [B, L, V]``, a hybrid backbone, or a ``DiffusionLM``.
        input_ids: ``[B, P]``; ``config.max_new_tokens`` masked positions are put behind it.
        attention_mask: ``[B, P]``, True = real; padding may stand anywhere.
        maskable: ``[B, P]`` or ``[B, P + n]``: positions to fill (their ids are ignored); all others are given and
            returned as they are. Default: the new positions alone.
        allowed: ``[B, P + n, V]`` bool, or a callable ``(pass, z) -> [B, P + n, V]``: tokens that may be proposed.
        row_seeds: ``[B]`` int64; default: from ``config.seed`` and the row's number.
        hook: called as ``hook(pass, rows, z)`` in front of every network pass with the numbers ``[R]`` of its rows and
            what they hold.
        logits_hook: ``(pass, rows, z, logits [R, L, V]) -> logits``, behind every network pass.
        tokens_hook: ``(pass, rows, z, logits) -> z [R, L]``, behind every denoising step: may write tokens, or the mask
            again, at maskable positions. What it masks is predicted anew, in further passes if need be; in the last pass
            that ``max_nfe`` leaves a row it has no effect.
        infer_from_mask: fill what holds the mask token, as published samplers do; for input whose given tokens never
            include it.

    Returns:
        :class:`DiffusionOutput`. No maskable position is left masked. Rows without one come back unchanged with 0
        passes.

    Raises:
        ValueError: shapes that do not fit, nothing to fill, fewer steps than blocks, a position with no allowed token,
            a hook that changes what is given.
        FloatingPointError: NaN, or minus infinity everywhere, in the logits of a masked position; names pass and row.
        RuntimeError: a tokens hook that never stops masking.
    """
    if infer_from_mask:
        if maskable is not None:
            raise ValueError("infer_from_mask: maskable says already which positions to fill; give one of the two")
        maskable = check_maskable(input_ids, None) & (input_ids == config.mask_id)
    ids, real, maskable = lay_out(input_ids, config.max_new_tokens, attention_mask, maskable)
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    network = WholeNetwork(model, config, ids.shape[0])
    return _run(
        network,
        Canvas(ids, real, maskable, positions),
        config,
        allowed,
        row_seeds,
        Hooks(hook, logits_hook, tokens_hook),
        network.denoise,
    )


@torch.no_grad()
def fill_block(
    logits_fn: LogitsFn,
    block: Tensor,
    config: DiffusionGenerationConfig,
    *,
    maskable: Tensor | None = None,
    first_position: Tensor | int = 0,
    allowed: Allowed | None = None,
    row_seeds: Tensor | None = None,
    hook: Hook | None = None,
) -> DiffusionOutput:
    """Fill one block of a sequence: the same loop with the network as a function of the block alone.

    What comes before the block (keys, states) is ``logits_fn``'s to hold. Every policy of ``config`` works but
    ``block_length`` and ``max_new_tokens``, which are the caller's; ``steps`` are those of this block; guidance and
    carry need a whole network.

    Args:
        logits_fn: ``(z [R, b], pass, rows [R]) -> logits [R, b, V]``, position i's about token i; ``rows`` are the
            numbers within the batch of the rows that are not finished.
        block: ``[B, b]`` int64; ids at maskable positions are ignored.
        maskable: ``[B, b]``; default: all. A row without one comes back unchanged with 0 passes.
        first_position: number of real tokens before the block, for all rows or ``[B]``. Random numbers are drawn by
            position, so blocks of one sequence must not share theirs.
        allowed: ``[B, b, V]`` bool, or a callable ``(pass, z) -> [B, b, V]``.
        row_seeds: ``[B]`` int64, the same for all blocks of a sequence; default: from ``config.seed``.
        hook: called as ``hook(pass, rows, z)`` in front of every pass.

    Raises:
        ValueError: as for :func:`diffusion_generate`; guidance or carry asked for.
    """
    if config.guidance > 0 or config.carry != "none":
        raise ValueError(
            f"config: guidance = {config.guidance} and carry = {config.carry!r} given; both need a whole network"
        )
    maskable = check_maskable(block, maskable)
    batch, length = block.shape
    first = torch.as_tensor(first_position, device=block.device).reshape(-1, 1)
    positions = (first + torch.arange(length, device=block.device)).expand(batch, length)
    canvas = Canvas(block, torch.ones_like(maskable), maskable, positions)
    config = replace(config, max_new_tokens=0, block_length=None)
    return _run(BlockNetwork(logits_fn), canvas, config, allowed, row_seeds, Hooks(hook), None)


def _run(
    network: SamplerNetwork,
    canvas: Canvas,
    config: DiffusionGenerationConfig,
    allowed: Allowed | None,
    row_seeds: Tensor | None,
    hooks: Hooks,
    model: Any,
) -> DiffusionOutput:
    plan = plan_blocks(canvas.maskable, config.block_length, config.steps, config.make_quota(), config.parity)
    if plan.clamped:
        warnings.warn(
            f"steps: {config.steps} passes are more than there are tokens to reveal; each block takes one a token",
            stacklevel=3,
        )
    batch = canvas.ids.shape[0]
    noise = Noise(seeds_of_rows(row_seeds, config.seed, batch, canvas.ids.device))
    recorder = None
    if config.record is not None:
        recorder = Recorder(canvas.real, canvas.maskable, config.mask_id, config.record == "full", model)
    loop = SamplerLoop(network, canvas, config, plan, noise, allowed, hooks, recorder)
    loop.run()
    trajectory = None if recorder is None else recorder.finish(loop.z)
    return DiffusionOutput(loop.z, loop.nfe, loop.stopped, trajectory=trajectory)


def lay_out(
    input_ids: Tensor, new_tokens: int, attention_mask: Tensor | None, maskable: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(ids, real, maskable)``, each ``[B, P + n]``, checked against one another."""
    check_maskable(input_ids, None)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if real.shape != input_ids.shape:
        raise ValueError(f"attention_mask: shape {list(real.shape)} given, expected {list(input_ids.shape)}")
    batch, given = input_ids.shape
    if maskable is None and not new_tokens:
        raise ValueError(
            "maskable: with max_new_tokens = 0 it must say which positions to fill (for ids that mark them: "
            "infer_from_mask=True)"
        )
    ids, real = F.pad(input_ids, (0, new_tokens)), F.pad(real, (0, new_tokens), value=True)
    if maskable is None:
        maskable = (torch.arange(given + new_tokens, device=ids.device) >= given).expand(batch, -1)
    elif maskable.shape == input_ids.shape:
        maskable = F.pad(maskable, (0, new_tokens), value=True)
    maskable = check_maskable(ids, maskable)
    if bool((maskable & ~real).any()):
        raise ValueError("maskable: it is True at padded positions (attention_mask False)")
    return ids, real, maskable


def seeds_of_rows(row_seeds: Tensor | None, seed: int | None, batch: int, device: torch.device) -> Tensor:
    """One number a row ``[B]``: those given, or from ``seed`` and the row's number."""
    if row_seeds is not None:
        if row_seeds.shape != (batch,) or row_seeds.dtype != torch.int64:
            raise ValueError(
                f"row_seeds: shape {list(row_seeds.shape)} of {row_seeds.dtype} given, expected [{batch}] of int64"
            )
        return row_seeds.to(device)
    base = torch.randint(2**62, ()) if seed is None else torch.tensor(seed, dtype=torch.int64)
    return mix(torch.arange(batch) + mix(base)).to(device)  # few numbers: one copy instead of twenty launches
