r"""Self-speculative decoding: the loop drafts for itself with few recurrences and judges with many.

Some tokens are drafted with :math:`r_d < r` recurrences, then all of them are read once with r, and the longest prefix that agrees
is kept. No second model and no training (arXiv:2502.05171). A draft reads what the tokens before stored at its own depths, which
tokens of depth r all have, so that it needs no cache of its own; what it writes itself is thrown away.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentcot.backbone import ModelState
from latentcot.recurrent_depth.loop import DepthLoop
from latentcot.recurrent_depth.settings import check_count
from latentcot.recurrent_depth.step_cache import StepCache, depth_of, mark

LONGEST_BACKLOG = 32


@dataclass(frozen=True)
class SelfSpeculation:
    """
    Args:
        ids: new tokens, ``[1, n]``; the end token is the last one if it came.
        proposed, accepted: drafted tokens, and how many of them were kept.
        passes, draft_passes: passes at full and at draft depth behind the prompt.
        recurrences: of all these passes together; plain decoding takes r a token.
    """

    ids: Tensor
    proposed: int
    accepted: int
    passes: int
    draft_passes: int
    recurrences: int

    @property
    def acceptance_rate(self) -> float:
        """Share of drafted tokens that were kept; 0 when none was drafted."""
        return self.accepted / self.proposed if self.proposed else 0.0


@torch.no_grad()
def self_speculative_generate(
    loop: DepthLoop,
    input_ids: Tensor,
    max_new_tokens: int = 128,
    *,
    draft_recurrences: int,
    recurrences: int | None = None,
    drafted: int = 8,
    accept: float = 1.0,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> SelfSpeculation:
    r"""Greedy tokens of the loop at ``recurrences``.

    Args:
        input_ids: one prompt ``[1, S]``.
        draft_recurrences, recurrences: r_d and r (default: that of the settings), 1 ≤ r_d < r.
        drafted: tokens drafted for each pass at full depth; 8.
        accept: a draft is kept while :math:`p(draft) \ge accept \cdot \max p` under the full depth. At 1 only its own choice
            is, and the tokens are those of plain greedy decoding from the same initial states; below 1 more drafts pass.
        eos_token_id: ends the answer.
        generator: of the initial states, one for each position; the global generator by default.

    Raises:
        ValueError: several prompts or numbers out of range.
    """
    r = check_count("recurrences", loop.default_recurrences if recurrences is None else recurrences, 2)
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("drafted", drafted),
        ("draft_recurrences", draft_recurrences),
    ):
        check_count(name, value, 1)
    if draft_recurrences >= r:
        raise ValueError(f"draft_recurrences: {draft_recurrences} given, expected fewer than the {r} that judge")
    if not 0 < accept <= 1:
        raise ValueError(f"accept: {accept!r} given, expected a number above 0 and at most 1")
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise ValueError(f"input_ids: shape {list(input_ids.shape)} given, expected one prompt, [1, S]")
    run = _Run(loop, input_ids, max_new_tokens, r, draft_recurrences, generator)
    ids: list[int] = []
    proposed = accepted = 0
    while len(ids) < max_new_tokens and (not ids or ids[-1] != eos_token_id):
        count = min(drafted, max_new_tokens - len(ids) - 1)  # the pass itself gives one token more
        guesses = run.draft(count)
        logits, state = run.read([*run.backlog, *guesses], run.state, r)
        p = logits[len(run.backlog) - 1 :].softmax(-1)
        own = p.argmax(-1).tolist()
        kept = 0
        while kept < len(guesses) and (
            guesses[kept] == own[kept] or (accept < 1 and bool(p[kept, guesses[kept]] >= accept * p[kept].max()))
        ):
            kept += 1
        new = [*guesses[:kept], own[kept]]
        if eos_token_id in guesses[:kept]:
            new = guesses[: guesses.index(eos_token_id) + 1]
            kept = len(new)
        proposed, accepted, ids = proposed + len(guesses), accepted + kept, ids + new
        run.go_on(state, guesses, kept, new[-1])
    return SelfSpeculation(
        torch.tensor([ids], dtype=torch.long, device=input_ids.device),
        proposed,
        accepted,
        run.passes,
        run.draft_passes,
        run.passes * r + run.draft_passes * draft_recurrences,
    )


class _Run:
    """The loop, its state at full depth, and the tokens behind it that are still to be read: at least one, always."""

    def __init__(
        self,
        loop: DepthLoop,
        input_ids: Tensor,
        new_tokens: int,
        r: int,
        shallow: int,
        generator: torch.Generator | None,
    ):
        self.loop, self.r, self.shallow, self.device = loop, r, shallow, input_ids.device
        self.passes = self.draft_passes = 0
        self.crops = all(name == "attention" for name in loop.backbone.config.mixers)
        weight = loop.backbone.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        positions = input_ids.shape[1] + new_tokens
        self.noise = None
        if loop.initial.random:
            self.noise = loop.initial.draw(weight.new_empty(positions, weight.shape[1]), generator)
        self.state, self.backlog = loop.backbone.new_state(), input_ids[0, -1:].tolist()
        if input_ids.shape[1] > 1:
            _, self.state = self.read(input_ids[0, :-1].tolist(), self.state, r)
            self.passes = 0

    def read(self, tokens: list[int], state: ModelState, recurrences: int) -> tuple[Tensor, ModelState]:
        """Logits behind every token ``[n, Vocab]`` and the state behind the last; nothing is kept."""
        if recurrences == self.r:
            self.passes += 1
        else:
            self.draft_passes += 1
        past = state.get_seq_length()
        output = self.loop.recur(
            torch.tensor([tokens], device=self.device),
            recurrences,
            initial_state=None if self.noise is None else self.noise[past : past + len(tokens)][None],
            state=state,
            step_cache=StepCache(),
        )
        assert output.state is not None
        return output.logits[0], output.state

    def draft(self, count: int) -> list[int]:
        """``count`` tokens at draft depth."""
        guesses: list[int] = []
        state, waiting = self.state, self.backlog
        if not state.is_fresh:  # the rule in the state lets shallow tokens follow deep ones
            state = mark(state, StepCache(), depth_of(state, self.loop.core.start))
        for _ in range(count):
            logits, state = self.read(waiting, state, self.shallow)
            guesses.append(int(logits[-1].argmax()))
            waiting = guesses[-1:]
        return guesses

    def go_on(self, state: ModelState, guesses: list[int], kept: int, extra: int) -> None:
        """After a pass that read backlog and guesses: keep the state behind the kept ones. Keys and values are cut; the state
        of a linear mixer can not be, so the kept tokens wait to be read again from the one before."""
        if kept == len(guesses) or self.crops:
            self.state = cut_columns(state, len(guesses) - kept) if self.crops else state
            self.backlog = [extra]  # where the answer ended on a guess, nothing is read any more
            return
        self.backlog = [*self.backlog, *guesses[:kept], extra]
        if len(self.backlog) > LONGEST_BACKLOG:
            _, self.state = self.read(self.backlog[:-1], self.state, self.r)
            self.backlog = self.backlog[-1:]


def cut_columns(state: ModelState, columns: int) -> ModelState:
    """``state`` of attention alone without its last ``columns`` real tokens."""
    if not columns:
        return state
    assert state.lengths is not None
    assert state.valid is not None
    entries = {place: entry.map(lambda t: t[:, :, :-columns]) for place, entry in state.entries.items()}
    return replace(state, entries=entries, lengths=state.lengths - columns, valid=state.valid[:, :-columns])
