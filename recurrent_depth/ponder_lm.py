r"""``ponder_lm``: ponder in embedding space, every position at once (arXiv:2505.20674).

.. math::
    P_0 = \mathrm{LM}(E_0), \qquad T_i = P_{i-1} E, \qquad E_i = E_0 + \sum_{j \le i} T_j, \qquad P_i = \mathrm{LM}(E_i)

:math:`T_i` is the embedding of the next token, weighted by what the model thinks of it. The loss is plain cross-entropy on
:math:`P_s` alone; no parameter is added. Pass i of block b keeps its token state at place ``(b, i)``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentcot.backbone import HybridForCausalLM, ModelState, SequenceContext
from latentcot.reasoner import LossOutput, StepContext, TaskBatch, register_method
from latentcot.recurrent_depth.reading import Reading, ReadingReasoner
from latentcot.recurrent_depth.settings import check_count, check_keys, merge
from latentcot.sequences import label_loss, training_rows
from latentcot.training.budget import FlopCounter

DEFAULTS: dict[str, Any] = {"ponder": 3, "top": 100, "renormalise": False}


@dataclass
class Pondered:
    """``hidden [B, S, D]``: of the last pass, before the final norm; ``inputs``: :math:`E_0 \\dots E_s`; ``state`` when kept."""

    hidden: Tensor
    inputs: list[Tensor]
    state: ModelState | None = None


@register_method("ponder_lm")
class PonderLM(ReadingReasoner):
    """PonderLM.

    Args:
        backbone: any.
        settings:

            * ``ponder``: s, 3; 0 is the plain model.
            * ``top``: likeliest tokens that are mixed, 100 (as many as there are at most); ``None`` = all.
            * ``renormalise``: whether their probabilities are made to sum to 1; ``False`` (not settled by the paper's text).

    Raises:
        ValueError: unknown keys, values out of range.
    """

    def __init__(self, backbone: HybridForCausalLM, settings: Mapping[str, Any] | None = None):
        merged = merge("PonderLM", DEFAULTS, settings)
        check_count("ponder", merged["ponder"], 0)
        if merged["top"] is not None:
            check_count("top", merged["top"], 1)
        if not isinstance(merged["renormalise"], bool):
            raise ValueError(f"renormalise: {merged['renormalise']!r} given, expected True or False")
        super().__init__(backbone, merged)

    def thought(self, logits: Tensor) -> Tensor:
        """T: the embedding weighted by probability, ``[..., Vocab]`` to ``[..., D]``."""
        table = self.backbone.get_input_embeddings().weight
        assert isinstance(table, Tensor)
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        top = self.settings["top"]
        if top is None or top >= p.shape[-1]:
            mixed = p.to(table.dtype) @ table
        else:
            p, chosen = p.topk(top, -1)
            if self.settings["renormalise"]:
                p = p / p.sum(-1, keepdim=True)
            mixed = (p.to(table.dtype)[..., None, :] @ table[chosen])[..., 0, :]
        return mixed * self.backbone.config.embedding_scale

    def ponder(
        self,
        input_ids: Tensor,
        ponder: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        state: ModelState | None = None,
        use_cache: bool = False,
    ) -> Pondered:
        """s + 1 passes over ``input_ids [B, S]``.

        Raises:
            ValueError: a state made with another s.
        """
        count = check_count("ponder", self.settings["ponder"] if ponder is None else ponder, 0)
        if state is not None and not state.is_fresh:
            stored = max((i for _, i in state.entries), default=-1)
            if stored != count:
                raise ValueError(f"state: made with ponder = {stored}, so it can not be continued with {count}")
        context = SequenceContext.build(
            len(input_ids),
            input_ids.shape[1],
            input_ids.device,
            attention_mask=attention_mask,
            state=state,
            keep_state=use_cache or state is not None,
        )
        inputs = [self.backbone.embed(input_ids)]
        for i in range(count + 1):
            hidden, state = self.backbone.run(inputs[-1], context, slice(None), state, i)
            if i == count:
                break
            inputs.append(inputs[-1] + self.thought(self.backbone.head(hidden)))
        return Pondered(hidden, inputs, None if state is None else state.advance(context))

    def loss(self, batch: TaskBatch, ctx: StepContext, carry: object = None) -> LossOutput:
        """Next-token loss of the last pass on answer and ``<eos>``; gradient flows through every pass."""
        row = training_rows(batch)
        found = self.ponder(row.ids, attention_mask=row.mask)
        loss = label_loss(self.backbone.head(found.hidden), row.labels)
        tokens = row.mask.sum(1).double()
        flops = self.flops(tokens, 0, self.settings["ponder"], tokens)
        return LossOutput(loss, {"loss": float(loss.detach())}, float(flops.sum()))

    def flops(self, tokens: Tensor, past: Tensor | int, ponder: int, head: Tensor | int) -> Tensor:
        """Forward FLOPs row by row: every pass but the last decodes and mixes at every position, the last at ``head``."""
        count = FlopCounter(self.backbone)
        config = self.backbone.config
        mixed = config.vocab_size if self.settings["top"] is None else min(self.settings["top"], config.vocab_size)
        thought = count(tokens, past, tokens) + 2.0 * mixed * config.hidden_size * tokens
        found = ponder * thought + count(tokens, past, head)
        assert isinstance(found, Tensor)
        return found

    # -- answers -----------------------------------------------------------------------------------------------------

    def options(self, knobs: Mapping[str, Any]) -> int:
        check_keys("limits.knobs", knobs, ("ponder",))
        return check_count("limits.knobs: ponder", knobs.get("ponder", self.settings["ponder"]), 0)

    def most_passes(self, options: int) -> int:
        return options + 1

    def read(self, ids: Tensor, mask: Tensor | None, state: ModelState | None, options: int) -> Reading:
        past = 0 if state is None or state.lengths is None else state.lengths.double()
        found = self.ponder(ids, options, attention_mask=mask, state=state, use_cache=True)
        tokens = torch.ones_like(ids).sum(1).double() if mask is None else mask.sum(1).double()
        assert found.state is not None
        passes = torch.full_like(ids[:, 0], options + 1)
        logits = self.backbone.head(found.hidden[:, -1:])[:, 0]
        return Reading(logits, found.state, passes, self.flops(tokens, past, options, 1), passes)
