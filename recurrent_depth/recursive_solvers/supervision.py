r"""Deep supervision with carry: a loss and an optimiser step after every segment (arXiv:2506.21734, arXiv:2510.04871).

An example stays in the batch for up to ``segments`` optimiser steps. The state at a segment's end, without its gradient, is the start
of the next; an example that halts is replaced by a fresh one with a fresh state.

Loss of a segment: cross entropy, averaged over the cells of a row and over rows, plus ``halt_weight`` times

.. math:: \mathrm{BCE}(q_{halt},\ \text{whole answer right}) \;[+\; \mathrm{BCE}(q_{continue}, \sigma(\max(q'_{halt}, q'_{continue})))]

q' are the logits one segment later (after the last segment :math:`\sigma(q'_{halt})`); the second term exists where the module has a
continue logit. Stablemax (:func:`stablemax_cross_entropy`) replaces the softmax by default.

Any module will do that has

* ``start(inputs) -> state``: fresh state, a tensor or a tuple, list or dict of tensors, rows first;
* ``forward(state, inputs) -> (state, output)``: one segment, ``output.logits [B, S, V]``, ``output.halt [B]`` and ``output.proceed
  [B]`` or ``None``;
* optionally ``halts(output) -> bool [B]``; default: ``output.halt > 0``.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from latentcot.recurrent_depth.settings import check_choice, check_count

IGNORED = -100
"""Target of a cell that does not count."""


def stablemax_log_probs(logits: Tensor) -> Tensor:
    r""":math:`\log(s(a) / \sum s)` with :math:`s(a) = a + 1` for :math:`a \ge 0` and :math:`1 / (1 - a)` below, over the last axis, in
    fp64."""
    a = logits.double()
    # both branches stay positive where they are not taken, so that no gradient is NaN
    s = torch.where(a >= 0, a.clamp(min=0) + 1, 1 / (1 - a.clamp(max=0)))
    return s.log() - s.sum(-1, keepdim=True).log()


def stablemax_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``[B, S, V]``, ``[B, S]`` -> loss of each cell ``[B, S]`` in fp64, 0 where the target is ``IGNORED``."""
    kept = targets != IGNORED
    found = stablemax_log_probs(logits).gather(-1, targets.masked_fill(~kept, 0)[..., None])[..., 0]
    return -found * kept


def softmax_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """As :func:`stablemax_cross_entropy` with the ordinary softmax, in the dtype of ``logits``."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)


_LOSSES = {"stablemax": stablemax_cross_entropy, "softmax": softmax_cross_entropy}


@dataclass(frozen=True)
class SupervisionConfig:
    """
    Args:
        segments: the most segments of an example, N_sup.
        explore: probability of a minimum number of segments, drawn from {2 ... segments}, that a row may not halt before.
        minimum: is that number drawn once an ``example`` or anew at every ``segment``?
        loss: ``stablemax`` or ``softmax``.
        halt_weight: of the halt terms; 1/2 in HRM.
    """

    segments: int = 16
    explore: float = 0.1
    minimum: Literal["example", "segment"] = "example"
    loss: Literal["stablemax", "softmax"] = "stablemax"
    halt_weight: float = 0.5

    def __post_init__(self) -> None:
        check_count("segments", self.segments, 1)
        if not 0 <= self.explore <= 1:
            raise ValueError(f"explore: {self.explore!r} given, expected a probability")
        if self.halt_weight < 0:
            raise ValueError(f"halt_weight: {self.halt_weight!r} given, expected a number of at least 0")
        check_choice("minimum", self.minimum, ("example", "segment"))
        check_choice("loss", self.loss, _LOSSES)


@dataclass
class SupervisionCarry:
    """What rows take from one optimiser step to the next: ``state`` (without gradient), ``inputs`` and ``targets`` of their
    examples, ``segments [B]`` done, ``halted [B]`` (to be replaced), ``least [B]``: segments before they may halt."""

    state: Any
    inputs: dict[str, Tensor]
    targets: Tensor
    segments: Tensor
    halted: Tensor
    least: Tensor

    def __len__(self) -> int:
        return len(self.targets)


@dataclass
class SegmentLoss:
    """``loss``: to differentiate; ``parts``: numbers for the log, accuracies over the rows that halted in this segment (NaN when none
    did); ``logits [B, S, V]``; ``finished [B]``: rows that the next step replaces."""

    loss: Tensor
    parts: dict[str, float]
    logits: Tensor
    finished: Tensor


@dataclass
class Solution:
    """``answers [B, S]``; ``segments [B]`` taken; ``halted [B]``: did the row stop by itself; ``history``: answers after each segment
    (a row that has stopped keeps its last), when recorded."""

    answers: Tensor
    segments: Tensor
    halted: Tensor
    history: list[Tensor] = field(default_factory=list)


class DeepSupervision(nn.Module):
    """Trains and runs a module segment by segment; see this file's beginning for what the module must offer.

    Args:
        module: the network of one segment.
        config: :class:`SupervisionConfig`.
    """

    def __init__(self, module: nn.Module, config: SupervisionConfig | None = None):
        super().__init__()
        for name in ("start", "forward"):
            if not callable(getattr(module, name, None)):
                raise TypeError(f"module: {type(module).__name__} has no method {name!r}")
        self.module = module
        self.config = SupervisionConfig() if config is None else config

    def _halts(self, output: Any) -> Tensor:
        rule = getattr(self.module, "halts", None)
        return output.halt > 0 if rule is None else rule(output)

    # -- training ------------------------------------------------------------------------------------------------------

    def begin(self, inputs: dict[str, Tensor], targets: Tensor) -> SupervisionCarry:
        """A carry whose rows all wait to be replaced; the given rows set shapes and device only."""
        rows = len(targets)
        zeros = torch.zeros(rows, dtype=torch.long, device=targets.device)
        state = self.module.start(inputs)  # type: ignore[operator]
        return SupervisionCarry(state, inputs, targets, zeros, torch.ones_like(zeros, dtype=torch.bool), zeros)

    def forward(
        self,
        carry: SupervisionCarry,
        inputs: dict[str, Tensor],
        targets: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[SegmentLoss, SupervisionCarry]:
        """One segment of every row: those that have halted start on the row of ``inputs`` and ``targets`` at their place.

        Args:
            carry: from :meth:`begin` or from the last call.
            inputs, targets: fresh examples, as many and as wide as the carry's; ``targets [B, S]`` with ``IGNORED`` where a cell does
                not count.
            generator: of the minimum numbers of segments (on the CPU).

        Raises:
            ValueError: a carry of another batch size, width or set of inputs.
        """
        self._check(carry, inputs, targets)
        new = carry.halted
        inputs = {name: _pick(new, inputs[name], carry.inputs[name]) for name in inputs}
        targets = _pick(new, targets, carry.targets)
        fresh = self.module.start(inputs)  # type: ignore[operator]
        state = tree_map(lambda a, b: _pick(new, a, b), fresh, carry.state)
        segments = carry.segments.masked_fill(new, 0) + 1
        drawn = self._draw_least(len(targets), generator).to(segments.device)
        least = drawn if self.config.minimum == "segment" else _pick(new, drawn, carry.least)
        state, output = self.module(state, inputs)
        state = tree_map(torch.Tensor.detach, state)
        last = segments >= self.config.segments
        halted = (last | self._halts(output).detach()) & (last | (segments >= least))
        result = self._loss(state, inputs, targets, output, last, halted)
        return result, SupervisionCarry(state, inputs, targets, segments, halted, least)

    def _check(self, carry: SupervisionCarry, inputs: dict[str, Tensor], targets: Tensor) -> None:
        if carry.targets.shape != targets.shape:
            raise ValueError(
                f"carry: it holds targets of shape {list(carry.targets.shape)}, the new ones have {list(targets.shape)}; rows of "
                "other batches can not be continued"
            )
        if differing := sorted(set(carry.inputs) ^ set(inputs)):
            raise ValueError(f"inputs: the carry's and the new ones differ in {', '.join(differing)}")
        for name, value in inputs.items():
            if carry.inputs[name].shape != value.shape:
                raise ValueError(
                    f"inputs: {name!r} has shape {list(value.shape)}, the carry's {list(carry.inputs[name].shape)}"
                )

    def _draw_least(self, rows: int, generator: torch.Generator | None) -> Tensor:
        explored = torch.rand(rows, generator=generator) < self.config.explore
        most = self.config.segments
        least = torch.randint(min(2, most), most + 1, (rows,), generator=generator)
        return torch.where(explored, least, torch.ones_like(least))

    def _loss(
        self, state: Any, inputs: dict[str, Tensor], targets: Tensor, output: Any, last: Tensor, halted: Tensor
    ) -> SegmentLoss:
        kept = targets != IGNORED
        cells = kept.sum(1)
        per_cell = _LOSSES[self.config.loss](output.logits, targets)
        answer_loss = (per_cell.sum(1) / cells.clamp(min=1)).mean()
        with torch.no_grad():
            hit = (output.logits.argmax(-1) == targets) & kept
            right = (hit.sum(1) == cells) & (cells > 0)
        halt_loss = F.binary_cross_entropy_with_logits(output.halt, right.to(output.halt))
        parts = {"answer": float(answer_loss.detach()), "halt": float(halt_loss.detach())}
        halting = halt_loss
        if output.proceed is not None:
            with torch.no_grad():
                _, later = self.module(state, inputs)
                best = torch.where(last, later.halt, torch.maximum(later.halt, later.proceed)).sigmoid()
            continue_loss = F.binary_cross_entropy_with_logits(output.proceed, best)
            parts["continue"] = float(continue_loss.detach())
            halting = halt_loss + continue_loss
        loss = answer_loss + self.config.halt_weight * halting
        done = max(1, int(halted.sum()))
        none = float("nan") if not bool(halted.any()) else 0.0
        parts["finished"] = float(halted.sum())
        parts["exact"] = none + float((right & halted).sum()) / done
        parts["cells"] = none + float((hit.sum(1) / cells.clamp(min=1))[halted].sum()) / done
        return SegmentLoss(loss, parts, output.logits.detach(), halted)

    # -- answering -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def solve(
        self, inputs: dict[str, Tensor], segments: int | None = None, *, halt: bool = True, record: bool = False
    ) -> Solution:
        """Answers after at most ``segments`` segments (default: the training's; more are allowed).

        Args:
            halt: a row that calls itself done stops and leaves the computation, and its answer is that of the row alone. ``False`` runs
                every segment, as the published evaluations do.
            record: keep the answers after every segment.
        """
        most = self.config.segments if segments is None else check_count("segments", segments, 1)
        state = self.module.start(inputs)  # type: ignore[operator]
        first = tree_leaves(state)[0]
        rows = torch.arange(len(first), device=first.device)
        taken, stopped = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
        answers = torch.empty(0)
        history: list[Tensor] = []
        for _ in range(most):
            state, output = self.module(state, inputs)
            found = output.logits.argmax(-1)
            # all rows take part in the first segment; a copy, because the history keeps the one before
            answers = found.clone() if len(rows) == len(taken) else answers.clone()
            answers[rows] = found
            taken[rows] += 1
            if record:
                history.append(answers)
            if halt:
                done = self._halts(output)
                stopped[rows[done]] = True
                if bool(done.any()):
                    stay = ~done
                    rows, state = rows[stay], tree_map(lambda t, stay=stay: t[stay], state)
                    inputs = {name: value[stay] for name, value in inputs.items()}
                if not len(rows):
                    break
        return Solution(answers, taken, stopped, history)


def _pick(choose: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Rows of ``yes`` where ``choose [B]``, of ``no`` elsewhere."""
    return torch.where(choose.view(-1, *[1] * (yes.ndim - 1)), yes, no)
