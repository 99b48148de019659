r"""``ouro``: a looped language model that learns when it has thought enough (arXiv:2510.25741).

The whole stack is a step (:mod:`~latentcot.recurrent_depth.stack_loop`). Two stages of training:

* *stage one*, everything learns: :math:`\sum_t p(t)\, CE^{(t)} - \beta H(p)`;
* *stage two*, the gate alone learns to go on while a further step still lowers the loss.

Both are in :mod:`~latentcot.recurrent_depth.exit_law`. Layout of the sequences: as for ``direct``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from latentcot.backbone import HybridForCausalLM
from latentcot.reasoner import LossOutput, Phase, StepContext, TaskBatch, register_method
from latentcot.recurrent_depth.exit_law import (
    MARGIN,
    PAIRINGS,
    SHARPNESS,
    entropy,
    entropy_loss,
    exit_law,
    expected_steps,
    gate_loss,
)
from latentcot.recurrent_depth.reading import scored
from latentcot.recurrent_depth.settings import check_choice, merge
from latentcot.recurrent_depth.stack_loop import StackLoop
from latentcot.sequences import training_rows

DEFAULTS: dict[str, Any] = {
    "steps": 4,
    "q": 1.0,
    "readout": "step",
    "sharing": "own",
    "gaps": None,
    "gradient_checkpointing": False,
    "betas": (0.1, 0.05),
    "gate_share": 0.1,
    "sharpness": SHARPNESS,
    "margin": MARGIN,
    "pairing": "after",
}


@register_method("ouro")
class Ouro(StackLoop):
    """Ouro as a method.

    Args:
        backbone: ``norm_placement="sandwich_pre_residual"`` is published; any works.
        settings: those of :class:`~latentcot.recurrent_depth.stack_loop.StackLoop`, and

            * ``betas``: weight of the entropy, one phase of stage one each, in equal shares: 0.1, later 0.05 (published values;
              when the change comes is not).
            * ``gate_share``: part of training that is stage two; 0.1 (not published). 0 leaves it out.
            * ``sharpness``, ``margin``: k = 50 and γ = 0.005 nats of stage two.
            * ``pairing``: which gate a gain teaches, ``after`` (published) or ``before``:
              :func:`~latentcot.recurrent_depth.exit_law.gate_loss`.

    Raises:
        ValueError: unknown keys, values out of range, and a stage two with a single step.
    """

    def __init__(self, backbone: HybridForCausalLM, settings: Mapping[str, Any] | None = None):
        merged = merge("Ouro", DEFAULTS, settings)
        betas = merged["betas"]
        if isinstance(betas, str) or not isinstance(betas, Sequence) or not betas:
            raise ValueError(f"betas: {betas!r} given, expected a list of at least one number")
        for name, values, least in (
            ("betas", betas, 0),
            ("sharpness", [merged["sharpness"]], 0),
            ("margin", [merged["margin"]], 0),
            ("gate_share", [merged["gate_share"]], 0),
        ):
            for value in values:
                if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
                    raise ValueError(f"{name}: {value!r} given, expected a number of at least {least}")
        if merged["gate_share"] > 1:
            raise ValueError(f"gate_share: {merged['gate_share']!r} given, expected a number within [0, 1]")
        check_choice("pairing", merged["pairing"], PAIRINGS)
        merged["betas"] = list(betas)
        super().__init__(backbone, merged)
        if merged["gate_share"] and merged["steps"] < 2:
            raise ValueError("gate_share: stage two needs at least two steps; give gate_share = 0 for a single one")

    def phases(self) -> tuple[Phase, ...]:
        """One phase of stage one for each of ``betas``, then ``gate`` with everything but the gate frozen."""
        share, betas = self.settings["gate_share"], self.settings["betas"]
        language = [
            Phase(f"language {i + 1}", (1 - share) / len(betas), knobs={"stage": 1, "beta": beta})
            for i, beta in enumerate(betas)
        ]
        if share == 1:
            language = []
        gate = [Phase("gate", share, trainable=("gate.",), reset_optimizer=True, knobs={"stage": 2})] if share else []
        return (*language, *gate)

    def loss(self, batch: TaskBatch, ctx: StepContext, carry: object = None) -> LossOutput:
        """Loss of the phase on answer and ``<eos>``. ``parts``: cross-entropy of the first and the last step, entropy of p and mean
        steps under it."""
        row = training_rows(batch)
        chosen, targets = scored(row.labels)
        stage = ctx.phase.knobs.get("stage", 1)
        if stage == 2:
            with torch.no_grad():
                unrolled = self.unroll(row.ids, attention_mask=row.mask)
                losses = self.step_losses(unrolled, chosen, targets)
            gate = torch.stack([self.gate(h[:, :-1][chosen])[:, 0] for h in unrolled.hidden])
            s = self.settings
            loss = gate_loss(losses, gate, s["sharpness"], s["margin"], s["pairing"])
        else:
            unrolled = self.unroll(row.ids, attention_mask=row.mask)
            losses = self.step_losses(unrolled, chosen, targets)
            gate = unrolled.gate[:, :, :-1][:, chosen]
            loss = entropy_loss(losses, exit_law(gate), ctx.phase.knobs.get("beta", self.settings["betas"][0]))
        with torch.no_grad():
            log_p = exit_law(gate)
            parts = {
                "loss": float(loss),
                "first_step": float(losses[0].mean()),
                "last_step": float(losses[-1].mean()),
                "entropy": float(entropy(log_p).mean()),
                "mean_steps": float(expected_steps(log_p).mean()),
            }
        return LossOutput(loss, parts, self.training_flops(row.mask, chosen))
