"""Token sequences out of task batches: what the methods that write tokens have in common.

A sequence is a row of segments, for instance ``prompt | step 1 | step 2 | <ans> | answer | <eos>``. :func:`join` puts ragged segments
together row by row and marks which tokens are learned. :func:`greedy_decode` continues from a state, one token a pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone import HybridForCausalLM, ModelState
from latentcot.reasoner import SPECIAL, PromptBatch, TaskBatch, TaskLimits

IGNORED = -100  # label that no loss counts


@dataclass(frozen=True)
class Segment:
    """``ids [B, n]`` with ``mask [B, n]`` (True = present); ``learn``: whether its tokens are targets."""

    ids: Tensor
    mask: Tensor
    learn: bool = False


@dataclass(frozen=True)
class Joined:
    """``ids``, ``mask``, ``labels``, each ``[B, S]``; padded with pad on the chosen side, labels -100 where nothing is learned.
    ``segment [B, S]``: which segment each token came from, -1 on padding."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    segment: Tensor


def constant(like: Tensor, *tokens: int, learn: bool = False) -> Segment:
    """The same tokens in every row; ``like`` gives batch size and device."""
    ids = torch.tensor(tokens, dtype=torch.int64, device=like.device).expand(like.shape[0], len(tokens))
    return Segment(ids, torch.ones_like(ids, dtype=torch.bool), learn)


def prompt(prompts: PromptBatch) -> Segment:
    return Segment(prompts.ids, prompts.mask)


def answer(batch: TaskBatch, learn: bool = True) -> Segment:
    return Segment(batch.answer_ids, batch.answer_mask, learn)


def steps_take_marker(limits: TaskLimits) -> bool:
    """Whether each written step begins with ``<step>``: only where steps have several tokens and would run together otherwise."""
    return limits.step_tokens > 1


def steps(batch: TaskBatch, first: int | Tensor = 0, learn: bool = True) -> Segment:
    """Gold steps from number ``first`` on (an int, or one a row ``[B]``), flattened; the others are left out."""
    ids, mask = batch.steps, batch.step_mask
    number = torch.arange(ids.shape[1], device=ids.device)
    kept = (number[None] >= first) if isinstance(first, int) else (number[None] >= first[:, None])
    mask = mask & kept[..., None]
    if steps_take_marker(batch.prompts.limits):
        marker = torch.full_like(ids[..., :1], SPECIAL.step)
        ids, mask = torch.cat([marker, ids], -1), torch.cat([mask.any(-1, keepdim=True), mask], -1)
    return Segment(ids.flatten(1), mask.flatten(1), learn)


def written_step_tokens(limits: TaskLimits) -> int:
    """Most tokens that written steps can take in this task."""
    return limits.steps * (limits.step_tokens + int(steps_take_marker(limits)))


def join(segments: Sequence[Segment], side: str = "right") -> Joined:
    """Concatenate segments row by row, absent tokens squeezed out.

    Args:
        side: where the padding goes, ``right`` (training) or ``left`` (all rows end together, for decoding).
    """
    if side not in ("left", "right"):
        raise ValueError(f"side: {side!r} given, expected 'left' or 'right'")
    ids = torch.cat([s.ids for s in segments], 1)
    mask = torch.cat([s.mask for s in segments], 1)
    learned = torch.cat([s.mask & s.learn for s in segments], 1)
    number = torch.cat([torch.full_like(s.ids, i) for i, s in enumerate(segments)], 1)
    order = torch.argsort((mask if side == "left" else ~mask).to(torch.uint8), dim=1, stable=True)
    width = int(mask.sum(1).max())
    order = order[:, -width:] if side == "left" else order[:, :width]
    ids, mask, learned, number = (t.gather(1, order) for t in (ids, mask, learned, number))
    ids = ids.masked_fill(~mask, SPECIAL.pad)
    return Joined(ids, mask, ids.masked_fill(~learned, IGNORED), number.masked_fill(~mask, -1))


def training_rows(batch: TaskBatch, thinking: Sequence[Segment] = (), learn_marker: bool = False) -> Joined:
    """``prompt | thinking | <ans> | answer | <eos>``, answer and ``<eos>`` learned; ``<ans>`` too where the model writes it itself."""
    marker = constant(batch.answer_ids, SPECIAL.ans, learn=learn_marker)
    end = constant(batch.answer_ids, SPECIAL.eos, learn=True)
    return join([prompt(batch.prompts), *thinking, marker, answer(batch), end])


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of label i + 1 given position i over labels that are not -100, in fp32 or better. Only scored
    positions meet the vocabulary-wide softmax."""
    targets = labels[:, 1:]
    scored = targets != IGNORED
    chosen = logits[:, :-1][scored]
    return F.cross_entropy(chosen.to(torch.promote_types(chosen.dtype, torch.float32)), targets[scored])


@dataclass(frozen=True)
class Decoded:
    """``ids [B, n]``: emitted tokens, pad behind a row's end; ``emitted [B]``: how many, the end token included; ``state``."""

    ids: Tensor
    emitted: Tensor
    state: ModelState


@torch.no_grad()
def greedy_decode(
    model: HybridForCausalLM,
    logits: Tensor,
    state: ModelState,
    max_tokens: int,
    stop: int = SPECIAL.eos,
    budget: Tensor | None = None,
) -> Decoded:
    """Emit the likeliest token until ``stop``, one pass a token.

    Args:
        logits: of the last position, ``[B, Vocab]``.
        state: after that position; finished rows no longer change it.
        max_tokens: most tokens a row may emit.
        stop: ends a row; it is emitted too.
        budget: own limit of each row ``[B]``, at most ``max_tokens``.
    """
    batch = logits.shape[0]
    out = torch.full((batch, max_tokens), SPECIAL.pad, dtype=torch.int64, device=logits.device)
    emitted = torch.zeros(batch, dtype=torch.int64, device=logits.device)
    limit = torch.full_like(emitted, max_tokens) if budget is None else budget
    active = limit > 0
    for position in range(max_tokens):
        token = logits.argmax(-1)
        out[:, position] = torch.where(active, token, SPECIAL.pad)
        emitted += active
        active = active & (token != stop) & (emitted < limit)
        if not bool(active.any()) or position + 1 == max_tokens:
            break
        output = model(
            input_ids=torch.where(active, token, SPECIAL.pad)[:, None], attention_mask=active[:, None], state=state
        )
        logits, state = output.logits[:, -1], output.state
    return Decoded(out, emitted, state)


def answer_after_marker(ids: Tensor, limits: TaskLimits, marker: int = SPECIAL.ans) -> Tensor:
    """Tokens behind the first ``marker`` up to ``<eos>``: ``[B, answer_tokens]``, pad where there are none."""
    found = ids == marker
    start = torch.where(found.any(1), found.to(torch.uint8).argmax(1) + 1, ids.shape[1])
    index = start[:, None] + torch.arange(limits.answer_tokens, device=ids.device)
    padded = F.pad(ids, (0, limits.answer_tokens + 1), value=SPECIAL.pad)
    return until_stop(padded.gather(1, index.clamp(max=padded.shape[1] - 1)))


def until_stop(ids: Tensor, stop: int = SPECIAL.eos) -> Tensor:
    """``ids`` with everything from the first ``stop`` on replaced by pad."""
    ended = (ids == stop).cumsum(1) > 0
    return ids.masked_fill(ended, SPECIAL.pad)
