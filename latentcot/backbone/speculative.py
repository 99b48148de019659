r"""Speculative decoding on forks of a state: a small model drafts, the large one judges several tokens in one pass.

The rule of arXiv:2211.17192 and arXiv:2302.01318. The draft proposes :math:`x_1 \dots x_n` with distributions :math:`q_i`; the target
reads them in one pass and has :math:`p_i`. Token i is kept with probability :math:`\min(1, p_i(x_i) / q_i(x_i))`; the first one that
is not is replaced by a draw from :math:`\max(0, p_i - q_i)`, normalised; if all are kept, one more is drawn from :math:`p_{n+1}`. What
comes out has the distribution of the target alone, whatever the draft is. Greedily a token is kept if it is the target's own choice.

A recurrent state can not be cropped, as keys and values can. States are values here, so the one before the pass is still there: after
a rejection the kept tokens are read once more from it, in the pass that judges the next guesses. A round is one pass of the target;
only when more than :data:`LONGEST_BACKLOG` tokens wait to be read again do they get a pass of their own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentcot.backbone.generation import GREEDY, Sampling, prefill
from latentcot.backbone.model import HybridForCausalLM
from latentcot.backbone.state import ModelState

LONGEST_BACKLOG = 32


@dataclass(frozen=True)
class SpeculativeOutput:
    """
    Args:
        ids: new tokens, ``[1, n]``; the end token is the last one if it came.
        proposed: tokens that the draft proposed.
        accepted: how many of them were kept.
        target_passes, draft_passes: passes of each model behind the prompt.
    """

    ids: Tensor
    proposed: int
    accepted: int
    target_passes: int
    draft_passes: int

    @property
    def acceptance_rate(self) -> float:
        """Share of proposed tokens that were kept; 0 when none was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0


class _Reader:
    """A model, a state, and the tokens behind it that are still to be read: at least one, always."""

    def __init__(self, model: HybridForCausalLM, input_ids: Tensor, chunk: int | None):
        self.model, self.passes, self.device = model, 0, input_ids.device
        self.state, self.backlog = model.new_state(), input_ids[0, -1:].tolist()
        if input_ids.shape[1] > 1:
            _, self.state = prefill(model, input_ids[:, :-1], chunk=chunk)

    def read(self, tokens: list[int], state: ModelState) -> tuple[Tensor, ModelState]:
        """Logits behind every token, ``[n, Vocab]``, and the state behind the last; nothing is kept."""
        self.passes += 1
        output = self.model(torch.tensor([tokens], device=self.device), state=state)
        assert output.state is not None
        assert output.logits is not None
        return output.logits[0], output.state

    def go_on(self, state: ModelState, backlog: list[int]) -> None:
        self.state, self.backlog = state, backlog
        if len(backlog) > LONGEST_BACKLOG:
            _, self.state = self.read(backlog[:-1], state)
            self.backlog = backlog[-1:]


@torch.no_grad()
def speculative_generate(
    target: HybridForCausalLM,
    draft: HybridForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int = 128,
    *,
    drafted: int = 4,
    sampling: Sampling = GREEDY,
    eos_token_id: int | None = None,
    prefill_chunk: int | None = None,
    generator: torch.Generator | None = None,
) -> SpeculativeOutput:
    """Tokens of the target model, drafted by another; see the top of this module.

    Args:
        target, draft: models over one vocabulary, on one device.
        input_ids: one prompt ``[1, S]``.
        max_new_tokens: the most new tokens.
        drafted: tokens that the draft proposes for each pass of the target.
        sampling: greedy unless given; both models draw by it.
        eos_token_id: ends the answer.
        prefill_chunk: tokens of the prompt read at a time; ``None`` = all.
        generator: of the draws, on the models' device.

    Raises:
        ValueError: different vocabularies or devices, several prompts, numbers below 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("drafted", drafted)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if target.config.vocab_size != draft.config.vocab_size:
        raise ValueError(
            f"draft: its vocabulary has {draft.config.vocab_size} tokens, the target's {target.config.vocab_size}; they must be one"
        )
    if target.device != draft.device:
        raise ValueError(f"draft: it is on {draft.device}, the target on {target.device}")
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise ValueError(
            f"input_ids: shape {list(input_ids.shape)} given, expected one prompt of at least one token, [1, S]"
        )
    judge, scribe = (_Reader(model, input_ids, prefill_chunk) for model in (target, draft))
    ids: list[int] = []
    proposed = accepted = 0
    while len(ids) < max_new_tokens and (not ids or ids[-1] != eos_token_id):
        count = min(drafted, max_new_tokens - len(ids) - 1)  # the pass itself gives one token more
        guesses, beliefs, drafts = _propose(scribe, count, sampling, generator)
        logits, read_on = judge.read([*judge.backlog, *guesses], judge.state)
        kept, extra = _judge(logits[len(judge.backlog) - 1 :], guesses, beliefs, sampling, generator)
        new = [*guesses[:kept], extra]
        if eos_token_id in guesses[:kept]:
            kept = guesses.index(eos_token_id) + 1
            new = guesses[:kept]
        proposed, accepted, ids = proposed + len(guesses), accepted + kept, ids + new
        if kept == len(guesses):
            judge.go_on(read_on, new[-1:])
        else:
            judge.go_on(judge.state, [*judge.backlog, *new])
        if drafts:  # the draft's state behind as many kept guesses as it has read
            held = min(kept, len(drafts) - 1)
            scribe.go_on(drafts[held], new[held:])
    return SpeculativeOutput(
        torch.tensor([ids], dtype=torch.long, device=input_ids.device), proposed, accepted, judge.passes, scribe.passes
    )


def _propose(
    scribe: _Reader, count: int, sampling: Sampling, generator: torch.Generator | None
) -> tuple[list[int], list[Tensor], list[ModelState]]:
    """``count`` tokens, the distribution each was drawn from, and the states behind none to all but the last of them."""
    guesses: list[int] = []
    beliefs: list[Tensor] = []
    states: list[ModelState] = []
    for _ in range(count):
        behind, state = scribe.read(guesses[-1:], states[-1]) if guesses else scribe.read(scribe.backlog, scribe.state)
        states.append(state)
        if sampling.greedy:
            guesses.append(int(behind[-1].argmax()))
        else:
            beliefs.append(sampling.scores(behind[-1]).softmax(-1))
            guesses.append(int(torch.multinomial(beliefs[-1], 1, generator=generator)))
    return guesses, beliefs, states


def _judge(
    logits: Tensor, guesses: list[int], beliefs: list[Tensor], sampling: Sampling, generator: torch.Generator | None
) -> tuple[int, int]:
    """How many guesses are kept, and the token that follows them; ``logits [n + 1, Vocab]`` are the target's."""
    if sampling.greedy:
        own = logits.argmax(-1).tolist()
        kept = next((i for i, guess in enumerate(guesses) if own[i] != guess), len(guesses))
        return kept, own[kept]
    chances = sampling.scores(logits).softmax(-1)
    for i, (guess, belief) in enumerate(zip(guesses, beliefs, strict=True)):
        draw = torch.rand((), generator=generator, device=logits.device, dtype=chances.dtype)
        if draw * belief[guess] >= chances[i, guess]:
            missed = (chances[i] - belief).clamp(min=0)
            if not bool(missed.any()):  # distributions that differ by rounding alone
                missed = chances[i]
            return i, int(torch.multinomial(missed, 1, generator=generator))
    return len(guesses), int(torch.multinomial(chances[-1], 1, generator=generator))
