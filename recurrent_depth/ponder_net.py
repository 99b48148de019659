r"""``ponder_net``: a looped stack whose gate is held near a geometric law (arXiv:2107.05407).

.. math:: L = \sum_t p(t)\, CE^{(t)} + \beta\, KL(p \,\Vert\, \mathrm{Geometric}(\lambda_p))

p is the law of :mod:`~latentcot.recurrent_depth.exit_law`; Ouro's first stage is this with a uniform prior. The defaults
:math:`\lambda_p = 0.4` and :math:`\beta = 0.2` are those of the baseline in CoTFormer's released code (arXiv:2310.10845).
"""

from collections.abc import Mapping
from typing import Any

import torch

from latentcot.backbone import HybridForCausalLM
from latentcot.reasoner import LossOutput, StepContext, TaskBatch, register_method
from latentcot.recurrent_depth.exit_law import exit_law, expected_steps, geometric_law, ponder_loss
from latentcot.recurrent_depth.reading import scored
from latentcot.recurrent_depth.settings import merge
from latentcot.recurrent_depth.stack_loop import StackLoop
from latentcot.sequences import training_rows

DEFAULTS: dict[str, Any] = {
    "steps": 4,
    "q": 1.0,
    "readout": "step",
    "sharing": "own",
    "gaps": None,
    "gradient_checkpointing": False,
    "beta": 0.2,
    "rate": 0.4,
    "tail": "last",
}


@register_method("ponder_net")
class PonderNet(StackLoop):
    """PonderNet over the whole stack.

    Leaving is by quantile of the law (``q``), so that an answer is no draw; the paper draws from it.

    Args:
        backbone: all of it is looped.
        settings: those of :class:`~latentcot.recurrent_depth.stack_loop.StackLoop`, and ``beta``, ``rate`` (:math:`\\lambda_p`) and
            ``tail`` (what becomes of the prior's mass behind step T): see
            :func:`~latentcot.recurrent_depth.exit_law.geometric_law`.

    Raises:
        ValueError: unknown keys, values out of range.
    """

    def __init__(self, backbone: HybridForCausalLM, settings: Mapping[str, Any] | None = None):
        merged = merge("PonderNet", DEFAULTS, settings)
        beta = merged["beta"]
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta < float("inf"):
            raise ValueError(f"beta: {beta!r} given, expected a number of at least 0")
        geometric_law(1, merged["rate"], merged["tail"])
        super().__init__(backbone, merged)

    def loss(self, batch: TaskBatch, ctx: StepContext, carry: object = None) -> LossOutput:
        """The loss above on answer and ``<eos>``. ``parts``: cross-entropy of the first and last step, mean steps under p."""
        row = training_rows(batch)
        chosen, targets = scored(row.labels)
        unrolled = self.unroll(row.ids, attention_mask=row.mask)
        losses = self.step_losses(unrolled, chosen, targets)
        log_p = exit_law(unrolled.gate[:, :, :-1][:, chosen])
        s = self.settings
        loss = ponder_loss(losses, log_p, s["beta"], s["rate"], s["tail"])
        with torch.no_grad():
            parts = {
                "loss": float(loss),
                "first_step": float(losses[0].mean()),
                "last_step": float(losses[-1].mean()),
                "mean_steps": float(expected_steps(log_p).mean()),
            }
        return LossOutput(loss, parts, self.training_flops(row.mask, chosen))
