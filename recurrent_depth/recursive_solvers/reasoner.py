"""``trm`` and ``hrm`` as methods: prompt and answer as one grid, filled in segment by segment (arXiv:2510.04871, arXiv:2506.21734).

Two layouts (``form``)::

    slots      prompt <mask> ... <mask>     as many masks as answers may be long; the answer is read there
    in_place   prompt without <bos>         answer and prompt are equally long (Sudoku with ``form="grid"``)

Every position sees every other, so answers come out at once and not token by token. The backbone lends its sizes and nothing else: its
blocks are causal and its weights are not used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latentcot.backbone import HybridForCausalLM
from latentcot.reasoner import (
    SPECIAL,
    AnswerLimits,
    AnswerOutput,
    LossOutput,
    Phase,
    PromptBatch,
    Reasoner,
    Sites,
    StepContext,
    TaskBatch,
    TaskLimits,
    Trace,
    register_method,
)
from latentcot.recurrent_depth.recursive_solvers.config import SolverConfig, hrm, trm
from latentcot.recurrent_depth.recursive_solvers.solver import RecursiveSolver
from latentcot.recurrent_depth.recursive_solvers.supervision import (
    IGNORED,
    DeepSupervision,
    SupervisionCarry,
    SupervisionConfig,
)
from latentcot.recurrent_depth.settings import check_choice, check_count, check_keys, merge
from latentcot.sequences import until_stop

DEFAULTS: dict[str, Any] = {
    "form": "slots",
    "length": 128,
    "solver": {},
    "supervision": {},
    "average": 0.999,
    "halt": False,
}
_NO_LIMITS, _EVERYWHERE = AnswerLimits(), Sites()


class _Sizes(nn.Module):
    """A backbone's configuration without its weights."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config


class SolverReasoner(Reasoner):
    """Base of ``trm`` and ``hrm``.

    Args:
        backbone: its vocabulary, width and heads (of attention) are the solver's; its weights are dropped.
        settings: left-out keys take the values of ``DEFAULTS``.

            * ``form``: see the module.
            * ``length``: the most positions of a grid.
            * ``solver``: changes of the published :class:`SolverConfig` (``layers``, ``cycles``, ``latent_updates``, ``mixing``, ...).
            * ``supervision``: fields of :class:`SupervisionConfig`.
            * ``average``: decay of the weights' average that answers, or ``None``; TRM's value by default. HRM answers with the last
              weights.
            * ``halt``: when answering, rows that call themselves done stop.

    Training carries rows over optimiser steps, so ``train`` takes no folder for it. ``answer`` takes ``segments`` and ``halt`` from
    ``limits.knobs``.

    Raises:
        ValueError: unknown keys, values out of range, and later prompts and answers that do not fit ``form`` or ``length``.
    """

    def __init__(self, backbone: HybridForCausalLM, settings: Mapping[str, Any] | None = None):
        merged = merge(type(self).__name__, {**DEFAULTS, **self._defaults()}, settings)
        check_choice("form", merged["form"], ("slots", "in_place"))
        length = check_count("length", merged["length"], 1)
        super().__init__(backbone, merged)
        config = backbone.config
        self.backbone = _Sizes(config)  # type: ignore[assignment]
        sizes = {"hidden_size": config.hidden_size, "num_heads": config.attention["num_heads"], **merged["solver"]}
        self.model = DeepSupervision(
            RecursiveSolver(self._published(config.vocab_size, length, sizes)),
            SupervisionConfig(**merged["supervision"]),
        )

    @staticmethod
    def _defaults() -> dict[str, Any]:
        return {}

    @classmethod
    def _published(cls, vocab_size: int, length: int, changes: Mapping[str, Any]) -> SolverConfig:
        """The published configuration for these sizes, with ``changes``."""
        raise NotImplementedError(
            f"{cls.__name__} defines no _published; a sub-class returns the SolverConfig of its method from it, as TRMReasoner does"
        )

    @property
    def solver(self) -> RecursiveSolver:
        module = self.model.module
        assert isinstance(module, RecursiveSolver)
        return module

    def phases(self) -> Sequence[Phase]:
        return (Phase("train", ema=self.settings["average"]),)

    # -- layout --------------------------------------------------------------------------------------------------------

    def grid(self, prompts: PromptBatch) -> dict[str, Tensor]:
        """Inputs of the solver: ``grid [B, S]`` and ``mask [B, S]``; S follows from the task's limits alone."""
        limits = prompts.limits
        if bool(prompts.mask[:, limits.prompt_tokens :].any()):
            raise ValueError(
                f"prompts: a prompt of {prompts.mask.shape[1]} tokens given, but the task's limits allow {limits.prompt_tokens}"
            )
        if self.settings["form"] == "in_place":
            self._check_in_place(limits)
            ids, mask = _widened(prompts.ids, limits.prompt_tokens), _widened(prompts.mask, limits.prompt_tokens)
            ids, mask = ids[:, 1:], mask[:, 1:]
        else:
            ids, mask = _widened(prompts.ids, limits.prompt_tokens), _widened(prompts.mask, limits.prompt_tokens)
            slots = ids.new_full((len(ids), limits.answer_tokens), SPECIAL.mask)
            ids, mask = torch.cat([ids, slots], 1), torch.cat([mask, torch.ones_like(slots, dtype=torch.bool)], 1)
        if ids.shape[1] > self.solver.config.length:
            raise ValueError(f"length: {self.solver.config.length} given, but the task needs {ids.shape[1]} positions")
        return {"grid": ids, "mask": mask}

    def targets(self, batch: TaskBatch) -> Tensor:
        """``[B, S]``: answers where they are read, ``<eos>`` behind a short one, ``IGNORED`` elsewhere."""
        limits = batch.prompts.limits
        width = limits.answer_tokens
        if bool(batch.answer_mask[:, width:].any()):
            raise ValueError(
                f"batch: an answer of {batch.answer_mask.shape[1]} tokens given, but the task's limits allow {width}"
            )
        answer, there = _widened(batch.answer_ids, width), _widened(batch.answer_mask, width)
        ends = torch.arange(width, device=answer.device) == batch.answer_mask.sum(1)[:, None]
        answer = answer.masked_fill(~there, IGNORED).masked_fill(ends, SPECIAL.eos)
        if self.settings["form"] == "in_place":
            return answer
        front = answer.new_full((len(answer), limits.prompt_tokens), IGNORED)
        return torch.cat([front, answer], 1)

    def _check_in_place(self, limits: TaskLimits) -> None:
        if limits.answer_tokens != limits.prompt_tokens - 1:
            raise ValueError(
                f"form: 'in_place' needs answers as long as the prompt without <bos>, but the task has {limits.prompt_tokens} prompt "
                f"and {limits.answer_tokens} answer tokens; take 'slots'"
            )

    # -- training and answering ------------------------------------------------------------------------------------------

    def begin(self, batch: TaskBatch, ctx: StepContext) -> SupervisionCarry:
        """A carry whose rows all wait to be replaced."""
        return self.model.begin(self.grid(batch.prompts), self.targets(batch))

    def loss(self, batch: TaskBatch, ctx: StepContext, carry: SupervisionCarry | None = None) -> LossOutput:
        """One segment of every row; rows that are done start on the row of ``batch`` at their place. ``finished`` says which.

        FLOPs hold the pass after the segment that HRM's continue logit is compared with.
        """
        inputs, targets = self.grid(batch.prompts), self.targets(batch)
        carry = self.model.begin(inputs, targets) if carry is None else carry
        result, after = self.model(carry, inputs, targets, ctx.generator)
        looks_ahead = self.solver.config.halting == "q_learning"
        flops = self.solver.flops(targets.shape[1]) * len(targets) * (2 if looks_ahead else 1)
        return LossOutput(result.loss, result.parts, flops, after, result.finished)

    @torch.no_grad()
    def answer(
        self, prompts: PromptBatch, limits: AnswerLimits = _NO_LIMITS, generator: torch.Generator | None = None
    ) -> AnswerOutput:
        """All answer tokens at once after ``segments`` segments (default: those of training).

        ``sequential_passes``: applications of the network that wait for one another, cycles · (updates + 1) a segment.
        ``info["segments"] [B]``: segments taken; ``info["halted"] [B]``.
        """
        check_keys("limits.knobs", limits.knobs, ("segments", "halt"))
        segments = check_count("limits.knobs: segments", limits.knobs.get("segments", self.model.config.segments), 1)
        c, inputs = self.solver.config, self.grid(prompts)
        passes = c.cycles * (c.latent_updates + 1)
        if limits.sequential_passes is not None:
            segments = min(segments, limits.sequential_passes // passes)
            if not segments:
                raise ValueError(
                    f"limits.sequential_passes: one segment takes {passes}, got {limits.sequential_passes}"
                )
        halt = bool(limits.knobs.get("halt", self.settings["halt"]))
        solution = self.model.solve(inputs, segments, halt=halt)
        width = prompts.limits.answer_tokens
        most = width if limits.new_tokens is None else min(width, limits.new_tokens)
        ids = until_stop(solution.answers[:, -width:][:, :most])
        price = self.solver.flops(inputs["grid"].shape[1])
        return AnswerOutput(
            ids,
            (ids != SPECIAL.pad).sum(1),
            solution.segments * passes,
            solution.segments.double() * price,
            {"segments": solution.segments, "halted": solution.halted},
        )

    @torch.no_grad()
    def trace(self, prompts: PromptBatch, sites: Sites = _EVERYWHERE) -> Trace:
        """Both states after each segment, prefix left out: ``hidden [segments, 2, B, S, D]``, layers ``y`` and ``z``."""
        if sites.blocks is not None and any(b not in (0, 1) for b in sites.blocks):
            raise ValueError(f"sites.blocks: {sites.blocks} given, expected 0 (y) and 1 (z)")
        wanted = (0, 1) if sites.blocks is None else tuple(sites.blocks)
        inputs = self.grid(prompts)
        state, recorded = self.solver.start(inputs), []
        for _ in range(self.model.config.segments if sites.steps is None else sites.steps):
            state, _ = self.solver(state, inputs)
            recorded.append(torch.stack([state[b][:, self.solver.config.prefix :] for b in wanted]))
        valid = inputs["mask"].expand(len(recorded), *inputs["mask"].shape)
        return Trace(torch.stack(recorded), valid, tuple("yz"[b] for b in wanted))


def _widened(rows: Tensor, width: int) -> Tensor:
    """Right-padded with 0 (the id of pad, or False) to ``width``."""
    return nn.functional.pad(rows, (0, width - rows.shape[1]))


@register_method("trm")
class TRMReasoner(SolverReasoner):
    """TRM as a method; see :class:`SolverReasoner`."""

    @classmethod
    def _published(cls, vocab_size: int, length: int, changes: Mapping[str, Any]) -> SolverConfig:
        return trm(vocab_size, length, **changes)


@register_method("hrm")
class HRMReasoner(SolverReasoner):
    """HRM as a method; see :class:`SolverReasoner`."""

    @staticmethod
    def _defaults() -> dict[str, Any]:
        return {"average": None}

    @classmethod
    def _published(cls, vocab_size: int, length: int, changes: Mapping[str, Any]) -> SolverConfig:
        return hrm(vocab_size, length, **changes)
