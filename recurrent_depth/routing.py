r"""Who goes on: the rules of routed recursion (Mixture-of-Recursions, arXiv:2507.10524), and blocks run on chosen tokens alone.

Shapes: logits, selections and real-token masks ``[B, S]``.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone import HybridConfig, HybridForCausalLM, ModelState, SequenceContext
from latentcot.recurrent_depth.ragged_state import put_rows


@dataclass(frozen=True)
class MaskedContext(SequenceContext):
    """A context whose attention sees exactly ``seen [B, 1, S, T + S]``: T stored keys first, the new tokens' own behind them."""

    seen: Tensor | None = None

    @property
    def attention_mask(self) -> Tensor | None:  # type: ignore[override]
        return self.seen


def top_share(logits: Tensor, active: Tensor, real: Tensor, share: float) -> Tensor:
    """The ``share`` of a row's real tokens (rounded up) with the largest logits, among ``active`` ones; bool.

    It compares tokens with later ones, so it is for training: what is chosen depends on the future.
    """
    count = torch.ceil(real.sum(1, keepdim=True) * share - 1e-9)
    order = torch.sort(logits.masked_fill(~active, -torch.inf), dim=1, descending=True, stable=True).indices
    rank = order.argsort(1)
    return active & (rank < count)


def selection_loss(logits: Tensor, selected: Tensor, among: Tensor) -> Tensor:
    """Mean binary cross-entropy of a router's logits against what it selected ``among`` these tokens: after it, a threshold at one
    half stands in for the top-k."""
    each = F.binary_cross_entropy_with_logits(logits, selected.to(logits.dtype), reduction="none")
    return each[among].mean()


def balance_loss(probability: Tensor, depth: Tensor) -> Tensor:
    r""":math:`\sum_i P_i f_i` over N depths: ``probability [P, N]``, ``depth [P]`` from 0. :math:`P_i` the mean probability,
    :math:`f_i` N times the share of tokens sent to i. It is 1 where both are uniform."""
    options = probability.shape[-1]
    share = F.one_hot(depth, options).to(probability.dtype).mean(0)
    return (probability.mean(0) * options * share).sum()


def z_loss(logits: Tensor) -> Tensor:
    r"""Mean of :math:`(\log \sum_i e^{l_i})^2` over ``[P, N]``: keeps logits small."""
    return logits.logsumexp(-1).square().mean()


def run_selected(
    model: HybridForCausalLM,
    hidden: Tensor,
    selected: Tensor,
    positions: Tensor,
    blocks: slice,
    state: ModelState | None = None,
    keep: bool = False,
) -> tuple[Tensor, ModelState | None]:
    """Blocks on the selected tokens alone, which see only one another (and those that the state holds).

    Args:
        hidden: ``[B, S, D]``.
        selected: ``[B, S]``; the others are neither computed nor seen.
        positions: rotary positions ``[B, S]``, kept by the tokens that are left.
        state: earlier tokens that were selected; entries at places ``(b, 0)``.
        keep: return the new state.

    Returns:
        ``[B, S, D]`` with zeros where nothing was selected, and the state.
    """
    batch, length = selected.shape
    out = torch.zeros_like(hidden)
    if state is not None and length == 1 and not state.is_fresh:
        rows = selected[:, 0].nonzero()[:, 0]
        if not len(rows):
            return out, put_rows(state, None, rows)
        part = state if len(rows) == batch else state.select(rows)
        context = SequenceContext.build(len(rows), 1, hidden.device, state=part, keep_state=True)
        context = replace(context, positions=positions[rows])
        found, part = model.run(hidden[rows], context, blocks, part)
        return out.index_copy(0, rows, found), put_rows(state, part, rows)
    width = max(1, int(selected.sum(1).max()))
    order = torch.argsort((~selected).to(torch.uint8), dim=1, stable=True)[:, :width]
    chosen = selected.gather(1, order)
    context = SequenceContext.build(
        batch, width, hidden.device, attention_mask=chosen, state=state, keep_state=keep or state is not None
    )
    context = replace(context, positions=positions.gather(1, order))
    found, state = model.run(hidden.take_along_dim(order[..., None], 1), context, blocks, state)
    place = order[..., None].expand_as(found)
    out = out.scatter(1, place, found * chosen[..., None])
    return out, None if state is None else state.advance(context)


def run_on_shared_keys(
    model: HybridForCausalLM,
    hidden: Tensor,
    selected: Tensor,
    positions: Tensor,
    blocks: slice,
    first: ModelState,
) -> Tensor:
    """Blocks on the selected tokens, reading the keys and values of ``first``: all real tokens so far, these included, as the first
    recursion left them. Softmax attention alone.

    Returns:
        ``[B, S, D]`` with zeros where nothing was selected.
    """
    assert first.valid is not None
    batch, length = selected.shape
    past = first.valid.shape[1] - length
    width = max(1, int(selected.sum(1).max()))
    order = torch.argsort((~selected).to(torch.uint8), dim=1, stable=True)[:, :width]
    chosen = selected.gather(1, order)
    column = torch.arange(past + length, device=hidden.device)
    seen = (column <= past + order[..., None]) & first.valid[:, None]
    own = torch.eye(width, dtype=torch.bool, device=hidden.device).expand(batch, width, width)
    # Its own new keys are hidden; a column that only fills up sees itself, so that no softmax runs over nothing.
    mask = torch.cat([seen & chosen[..., None], own & ~chosen[..., None]], 2)[:, None]
    context = MaskedContext(positions=positions.gather(1, order), mask=chosen, seen=mask)
    found, _ = model.run(hidden.take_along_dim(order[..., None], 1), context, blocks, first)
    return torch.zeros_like(hidden).scatter(1, order[..., None].expand_as(found), found * chosen[..., None])


def check_routable(config: HybridConfig, blocks: slice, attention_only: bool, why: str) -> None:
    """``ValueError`` where routed tokens would be wrong: windows count tokens that are not there, and some caches need attention."""
    mixers = config.mixers[blocks]
    options: dict[str, Any] = config.attention  # type: ignore[assignment]
    if "attention" in mixers and options.get("window_size") is not None:
        raise ValueError(
            f"attention: window_size = {options['window_size']} given, but routed tokens leave gaps in a window"
        )
    linear = sorted(set(mixers) - {"attention"})
    if attention_only and linear:
        raise ValueError(f"{why}, but the routed blocks mix with {', '.join(map(repr, linear))}")
