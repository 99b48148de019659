r"""The one loop behind every sampler of masked diffusion.

::

    while anything is masked:
        logits = network(z)                                  one pass (NFE) of the rows that are not finished
        y, c   = proposed tokens and their confidence        at masked positions of the current block only
        z[U]   = y[U]                                        U chosen by the quota
        z[R]   = mask                                        R chosen by the re-masking, if any

What is masked is a boolean state of its own, never read off ``z == mask``: a given token may be the mask token. A row's
result does not depend on the other rows: random numbers are drawn by address
(:mod:`~latentcot.diffusion_reasoning.noise`), counts are per row, finished rows leave the batch. Per pass the loop
waits for the device a fixed number of times, whatever the number of rows.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone import HybridForCausalLM
from latentcot.diffusion_reasoning.confidence import Proposal, filter_logits, find_confidence
from latentcot.diffusion_reasoning.corruption import check_logits, check_maskable, without_mask_token
from latentcot.diffusion_reasoning.denoiser import Denoiser, as_denoiser
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig
from latentcot.diffusion_reasoning.noise import Noise, mix
from latentcot.diffusion_reasoning.quota import Bernoulli, PassView, plan_blocks
from latentcot.diffusion_reasoning.remasking import ReMDM, Revise

Allowed = Tensor | Callable[[int, Tensor], Tensor]
Hook = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class DiffusionOutput:
    """``sequences [B, P + n]``; ``nfe [B]``: network passes of each row; ``stopped [B]``: ended before its plan did (by
    ``eos_block`` or ``max_nfe``); ``exact``: no cached approximation was used."""

    sequences: Tensor
    nfe: Tensor
    stopped: Tensor
    exact: bool = True


@torch.no_grad()
def diffusion_generate(
    model: Denoiser | HybridForCausalLM,
    input_ids: Tensor,
    config: DiffusionGenerationConfig,
    attention_mask: Tensor | None = None,
    maskable: Tensor | None = None,
    allowed: Allowed | None = None,
    row_seeds: Tensor | None = None,
    hook: Hook | None = None,
) -> DiffusionOutput:
    """Fill the masked positions of a canvas.

    Args:
        model: callable ``(z, attention_mask) -> logits [B, L, V]``, or a hybrid backbone.
        input_ids: ``[B, P]``; ``config.max_new_tokens`` masked positions are put behind it.
        attention_mask: ``[B, P]``, True = real; padding may stand anywhere.
        maskable: ``[B, P]`` or ``[B, P + n]``: positions to fill (their ids are ignored); all others are given and
            returned as they are. Default: the new positions alone.
        allowed: ``[B, P + n, V]`` bool, or a callable ``(pass, z) -> [B, P + n, V]``: tokens that may be proposed.
        row_seeds: ``[B]`` int64; default: from ``config.seed`` and the row's number.
        hook: called as ``hook(pass, rows, z)`` in front of every network pass with the numbers ``[R]`` of its rows and
            what they hold.

    Returns:
        :class:`DiffusionOutput`. No maskable position is left masked. Rows without one come back unchanged with 0
        passes.

    Raises:
        ValueError: shapes that do not fit, nothing to fill, fewer steps than blocks, a position with no allowed token.
        FloatingPointError: NaN, or minus infinity everywhere, in the logits of a masked position; names pass and row.
    """
    denoise = as_denoiser(model)
    ids, real, maskable = lay_out(input_ids, config.max_new_tokens, attention_mask, maskable)
    quota, order = config.make_quota(), find_confidence(config.order)
    revise = config.remask if isinstance(config.remask, Revise) else None
    remdm = config.remask if isinstance(config.remask, ReMDM) else None
    plan = plan_blocks(maskable, config.block_length, config.steps, quota, config.parity)
    if plan.clamped:
        warnings.warn(
            f"steps: {config.steps} passes are more than there are tokens to reveal; each block takes one a token",
            stacklevel=2,
        )
    batch = ids.shape[0]
    noise = Noise(_row_seeds(row_seeds, config.seed, batch, ids.device))
    positions = (real.long().cumsum(1) - 1).clamp(min=0)

    masked = maskable.clone()
    z = ids.masked_fill(masked, config.mask_id)
    settled = torch.full(z.shape, torch.inf, dtype=torch.float64, device=z.device)  # confidence at the last reveal
    block, step, extra, nfe = (torch.zeros(batch, dtype=torch.int64, device=z.device) for _ in range(4))
    stopped = torch.zeros(batch, dtype=torch.bool, device=z.device)
    stale = ~stopped  # whether the row changed since the network saw it
    outputs: Tensor | None = None

    for number in range(_most_passes(maskable, plan.n_blocks, config, revise)):
        rows = (block < plan.n_blocks).nonzero().squeeze(1)
        if not rows.numel():
            break
        here = (plan.block_of[rows] == block[rows, None]) & maskable[rows]
        size, steps = plan.size[rows, block[rows]], plan.steps[rows, block[rows]]
        closing, refilling = quota.closing(steps, step[rows]), extra[rows] > 0
        if config.max_nfe is None:
            ending = torch.zeros_like(closing)
        else:
            ending = nfe[rows] + stale[rows].long() >= config.max_nfe
        candidates = masked[rows] & (here | ending[:, None])

        # -- one network pass ------------------------------------------------------------------------------------------
        seen = rows[stale[rows] & candidates.any(1)] if quota.may_wait else rows
        if seen.numel():
            if hook is not None:
                hook(number, seen, z[seen])
            fresh = denoise(z[seen], real[seen])
            check_logits(fresh, z[seen], config.mask_id)
            nfe[seen] += 1
            stale[seen] = False
            if quota.may_wait:
                outputs = fresh.new_zeros(batch, *fresh.shape[1:]) if outputs is None else outputs
                outputs[seen] = fresh
            else:
                outputs = fresh
        assert outputs is not None
        logits = outputs[rows] if quota.may_wait else outputs

        # -- proposals at the candidates -------------------------------------------------------------------------------
        r, column = candidates.nonzero(as_tuple=True)
        chosen = logits[r, column].double()  # fp64 for masked positions only
        if config.forbid_mask_token:
            chosen = without_mask_token(chosen, config.mask_id)
        _check_finite(chosen, number, rows[r], column)
        if allowed is not None:
            chosen = _constrain(chosen, allowed, number, z, rows[r], column)
        where = positions[rows[r], column]
        proposal = _propose(chosen, config, closing[r], noise, rows[r], where, number)
        y = z[rows].index_put((r, column), proposal.tokens)
        confidence = torch.full(y.shape, -torch.inf, dtype=torch.float64, device=y.device)
        confidence[r, column] = order(proposal).double()

        # -- reveal ----------------------------------------------------------------------------------------------------
        sigma = torch.zeros(len(rows), dtype=torch.float64, device=z.device)
        if remdm is not None:
            assert isinstance(quota, Bernoulli)
            sigma = remdm.sigma(*quota.alphas(steps, step[rows])).masked_fill(closing, 0.0)
        view = PassView(
            confidence.masked_fill(~here, -torch.inf),
            candidates & here,
            size,
            steps,
            step[rows],
            sigma,
            lambda: noise.positions(rows, number, "reveal", positions[rows]),  # noqa: B023
        )
        reveal = candidates & here & (quota.reveal(view) | (closing | refilling)[:, None])
        forced = candidates & ending[:, None] & ~reveal
        stopped[rows] |= forced.any(1)
        y = torch.where(forced, y.index_put((r, column), chosen.argmax(-1)), y)
        reveal = reveal | forced
        held = masked[rows]
        after, left = torch.where(reveal, y, z[rows]), held & ~reveal
        settled[rows] = torch.where(reveal, confidence, settled[rows])

        # -- re-mask, finish blocks, stop ------------------------------------------------------------------------------
        changed = reveal.any(1)
        if remdm is not None:
            back = (
                here
                & ~held
                & (noise.positions(rows, number, "remask", positions[rows]) < sigma[:, None])
                & ~ending[:, None]
            )
            after, left, changed = after.masked_fill(back, config.mask_id), left | back, changed | back.any(1)
        done = ~(left & here).any(1)
        if remdm is not None:
            done = (done & closing) | ending  # until then a revealed token may still go back
        if revise is not None:
            again = done & (extra[rows] < revise.passes) & ~ending
            low = revise.pick(settled[rows], here) & again[:, None]
            after, left = after.masked_fill(low, config.mask_id), left | low
            extra[rows] = torch.where(done & ~again, 0, extra[rows] + again)
            done = done & ~again
        finished = ending
        if config.stop == "eos_block":
            ended = done & ((after == config.eos_id) & here).any(1)
            stopped[rows] |= ended & left.any(1)
            after = torch.where(left & ended[:, None], config.eos_id, after)
            left = left & ~ended[:, None]
            finished = finished | ended
        z[rows], masked[rows] = after, left
        stale[rows] |= changed
        step[rows] = torch.where(done, 0, step[rows] + 1)
        block[rows] = torch.where(finished, plan.n_blocks[rows], block[rows] + done)

    if bool(masked.any()):
        raise RuntimeError(
            f"quota: {quota} revealed too little; masks are left in rows "
            f"{masked.any(1).nonzero().squeeze(1).tolist()[:8]}"
        )
    if config.stop == "eos_truncate":
        behind = (((z == config.eos_id) & maskable).long().cumsum(1) > 0) & maskable
        z = z.masked_fill(behind, config.eos_id)
    return DiffusionOutput(z, nfe, stopped)


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
            "maskable: with max_new_tokens = 0 it must say which positions to fill (for ids that mark them: input_ids "
            "== mask_id)"
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


def _row_seeds(row_seeds: Tensor | None, seed: int | None, batch: int, device: torch.device) -> Tensor:
    if row_seeds is not None:
        if row_seeds.shape != (batch,) or row_seeds.dtype != torch.int64:
            raise ValueError(
                f"row_seeds: shape {list(row_seeds.shape)} of {row_seeds.dtype} given, expected [{batch}] of int64"
            )
        return row_seeds.to(device)
    base = int(torch.randint(2**62, ())) if seed is None else seed
    return mix(torch.arange(batch, device=device) + mix(torch.full((), base, dtype=torch.int64, device=device)))


def _most_passes(maskable: Tensor, n_blocks: Tensor, config: DiffusionGenerationConfig, revise: Revise | None) -> int:
    """No row can need more turns of the loop than this."""
    tokens, blocks = (int(n.max()) if n.numel() else 0 for n in (maskable.sum(1), n_blocks))
    return max(tokens, config.steps or 0) + blocks * (1 + (revise.passes if revise else 0))


def _check_finite(chosen: Tensor, number: int, rows: Tensor, columns: Tensor) -> None:
    highest = (
        chosen.amax(-1) if chosen.shape[0] else chosen[:, 0]
    )  # NaN and +inf come through, -inf only when nothing else is there
    if bool(highest.isfinite().all()):
        return
    at = int((~highest.isfinite()).nonzero()[0])
    value = "NaN or +inf" if not bool(highest[at] == -torch.inf) else "-inf for every token"
    raise FloatingPointError(f"logits: {value} in pass {number + 1}, row {int(rows[at])}, position {int(columns[at])}")


def _constrain(chosen: Tensor, allowed: Allowed, number: int, z: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    table = allowed if isinstance(allowed, Tensor) else allowed(number, z)
    expected = [*z.shape, chosen.shape[-1]]
    if list(table.shape) != expected or table.dtype != torch.bool:
        raise ValueError(f"allowed: shape {list(table.shape)} of {table.dtype} given, expected {expected} of bool")
    chosen = chosen.masked_fill(~table[rows, columns], -torch.inf)
    if bool((none := (chosen == -torch.inf).all(-1)).any()):
        at = int(none.nonzero()[0])
        raise ValueError(
            f"allowed: no token is left for row {int(rows[at])}, position {int(columns[at])} in pass {number + 1}"
        )
    return chosen


def _propose(
    chosen: Tensor,
    config: DiffusionGenerationConfig,
    greedy: Tensor,
    noise: Noise,
    rows: Tensor,
    positions: Tensor,
    number: int,
) -> Proposal:
    """A token for each of n candidates: argmax, or a draw from the tempered and filtered distribution by the Gumbel
    trick.

    Written with logarithms: the published form exp(logits) / (-log u)^T is the same number until it overflows.
    """
    filtered = chosen / config.temperature if config.temperature > 0 else chosen
    filtered = filter_logits(filtered, config.top_k, config.top_p)
    tokens = chosen.argmax(-1)
    if config.temperature > 0:
        u = noise.tokens(rows, number, "token", positions, chosen.shape[-1])
        tokens = torch.where(greedy, tokens, (filtered - torch.log(-torch.log(u))).argmax(-1))
    # [n, 1] positions of rows [n]: one number a candidate
    uniform = noise.positions(rows, number, "order", positions[:, None])[:, 0]
    return Proposal(chosen, filtered, tokens, positions, uniform)
