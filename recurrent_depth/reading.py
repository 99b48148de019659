"""Answering for methods that read tokens and say what comes next: :class:`ReadingReasoner`.

Layout, learned tokens in capitals, as for ``direct``::

    prompt <ans> ANSWER <EOS>
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.reasoner import SPECIAL, AnswerLimits, AnswerOutput, PromptBatch, Reasoner
from latentcot.sequences import IGNORED, constant, join, prompt, until_stop

_NO_LIMITS = AnswerLimits()


class RowState(Protocol):
    """A state whose rows can be chosen."""

    def select(self, rows: Tensor) -> Self: ...


@dataclass
class Reading:
    """What a pass over new tokens gave: ``logits [B, Vocab]`` after the last one, ``state`` to go on from, and its price row by row:
    ``passes [B]`` that waited for one another, ``flops [B]``. ``depth [B]``: steps of the last token."""

    logits: Tensor
    state: RowState
    passes: Tensor
    flops: Tensor
    depth: Tensor


class ReadingReasoner(Reasoner):
    """Base of methods that define :meth:`read`; greedy answers and their price follow from it."""

    def options(self, knobs: Mapping[str, Any]) -> Any:
        """``limits.knobs`` checked, as :meth:`read` wants them."""
        raise NotImplementedError(f"{type(self).__name__} defines no options")

    def most_passes(self, options: Any) -> int:
        """Most sequential passes that reading one token, or the prompt at once, can take."""
        raise NotImplementedError(f"{type(self).__name__} defines no most_passes")

    def read(self, ids: Tensor, mask: Tensor | None, state: Any, options: Any) -> Reading:
        """Read ``ids [B, S]`` after ``state`` (``None``: from nothing); the last column is real in every row."""
        raise NotImplementedError(f"{type(self).__name__} defines no read")

    @torch.no_grad()
    def answer(
        self, prompts: PromptBatch, limits: AnswerLimits = _NO_LIMITS, generator: torch.Generator | None = None
    ) -> AnswerOutput:
        """Greedy answers; rows that have ended leave the computation.

        ``info``: ``text`` (with ``<eos>``) and ``depth [B]``, mean steps of the tokens that each row read after its prompt's
        (``<ans>`` included).
        """
        options = self.options(limits.knobs)
        most = prompts.limits.answer_tokens
        if limits.new_tokens is not None:
            most = min(most, limits.new_tokens)
        if limits.sequential_passes is not None:
            fit = limits.sequential_passes // self.most_passes(options)
            if fit < 1:
                raise ValueError(
                    f"limits.sequential_passes: {limits.sequential_passes} given, but one token takes up to {self.most_passes(options)}"
                )
            most = min(most, fit)
        start = join([prompt(prompts), constant(prompts.ids, SPECIAL.ans)], side="left")
        batch, device = len(prompts), start.ids.device
        out = torch.full((batch, most), SPECIAL.pad, dtype=torch.int64, device=device)
        emitted, passes, depth = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(3))
        flops = torch.zeros(batch, dtype=torch.float64, device=device)
        rows = torch.arange(batch, device=device)
        found = self.read(start.ids, start.mask, None, options)
        for position in range(most):
            passes[rows] += found.passes
            flops[rows] += found.flops
            depth[rows] += found.depth
            token = found.logits.argmax(-1)
            out[rows, position] = token
            emitted[rows] += 1
            going = token != SPECIAL.eos
            if position + 1 == most or not bool(going.any()):
                break
            state = found.state if bool(going.all()) else found.state.select(going)
            rows = rows[going]
            found = self.read(token[going][:, None], None, state, options)
        info = {"text": out, "depth": depth.double() / emitted.clamp(min=1)}
        return AnswerOutput(until_stop(out), emitted, passes, flops, info)


def scored(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions whose next label counts, bool ``[B, S - 1]``, and those labels ``[P]``.

    Raises:
        ValueError: none is left.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    if not bool(chosen.any()):
        raise ValueError("labels: no position is left to score")
    return chosen, targets[chosen]


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each position in nats, fp32 or better: ``[P, Vocab]``, ``[P]`` to ``[P]``."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
