"""The two ends of every comparison: answer at once (``direct``), or write the steps out (``cot``).

Layout, learned tokens in capitals::

    direct   prompt <ans> ANSWER <EOS>
    cot      prompt STEPS <ANS> ANSWER <EOS>
"""

import torch

from latentcot.backbone import SequenceContext
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
    Trace,
    register_method,
)
from latentcot.sequences import (
    Segment,
    answer_after_marker,
    constant,
    greedy_decode,
    join,
    label_loss,
    prompt,
    steps,
    training_rows,
    until_stop,
    written_step_tokens,
)
from latentcot.training.budget import FlopCounter


class TokenReasoner(Reasoner):
    """A method that is one causal pass over tokens in training and greedy decoding in answering. Sub-classes say which segments
    stand before the answer in training (:meth:`thinking`) and whether the model writes ``<ans>`` itself."""

    writes_thinking = False

    def thinking(self, batch: TaskBatch, phase: Phase) -> list[Segment]:
        """Segments between prompt and ``<ans>`` in training."""
        return []

    def given(self, prompts: PromptBatch) -> list[Segment]:
        """Segments behind the prompt that an answer starts from."""
        return [] if self.writes_thinking else [constant(prompts.ids, SPECIAL.ans)]

    def loss(self, batch: TaskBatch, ctx: StepContext, carry: object = None) -> LossOutput:
        row = training_rows(batch, self.thinking(batch, ctx.phase), learn_marker=self.writes_thinking)
        loss = label_loss(self.backbone(input_ids=row.ids, attention_mask=row.mask).logits, row.labels)
        lengths = row.mask.sum(1).double()
        flops = FlopCounter(self.backbone)(lengths, head=lengths)
        return LossOutput(loss, {"loss": float(loss.detach())}, float(flops.sum()))  # type: ignore[union-attr]

    @torch.no_grad()
    def answer(
        self, prompts: PromptBatch, limits: AnswerLimits = AnswerLimits(), generator: torch.Generator | None = None
    ) -> AnswerOutput:
        start = join([prompt(prompts), *self.given(prompts)], side="left")
        output = self.backbone(input_ids=start.ids, attention_mask=start.mask, use_cache=True, logits_to_keep=1)
        size = prompts.limits
        most = (written_step_tokens(size) + 1 if self.writes_thinking else 0) + size.answer_tokens
        # An answer as long as the task allows needs no <eos>; text behind it could not count.
        most = min(m for m in (most, limits.new_tokens, limits.sequential_passes) if m is not None)
        decoded = greedy_decode(self.backbone, output.logits[:, -1], output.state, most)
        ids = answer_after_marker(decoded.ids, size) if self.writes_thinking else until_stop(decoded.ids)
        count = FlopCounter(self.backbone)
        given = start.mask.sum(1).double()
        flops = count(given, head=1) + count(
            decoded.emitted.double() - 1, past=given, head=decoded.emitted.double() - 1
        )
        return AnswerOutput(ids, decoded.emitted, decoded.emitted.clone(), flops, {"text": decoded.ids})  # type: ignore[arg-type]

    @torch.no_grad()
    def trace(self, prompts: PromptBatch, sites: Sites = Sites()) -> Trace:
        """Hidden states after each chosen block, one step: the prompt (and what an answer starts from) read once."""
        start = join([prompt(prompts), *self.given(prompts)])
        batch, length = start.ids.shape
        context = SequenceContext.build(batch, length, start.ids.device, attention_mask=start.mask)
        wanted = range(len(self.backbone.model.layers)) if sites.blocks is None else sites.blocks
        hidden, recorded = self.backbone.embed(start.ids), []
        for block in range(len(self.backbone.model.layers)):
            hidden, _ = self.backbone.run(hidden, context, slice(block, block + 1))
            if block in wanted:
                recorded.append(hidden)
        return Trace(torch.stack(recorded)[None], start.mask[None], tuple(f"block {b}" for b in wanted))


@register_method("direct")
class Direct(TokenReasoner):
    """Answer right behind the prompt: the floor of every comparison."""


@register_method("cot")
class ChainOfThought(TokenReasoner):
    """Write every gold step as tokens, then the answer (explicit chain of thought): the usual ceiling."""

    writes_thinking = True

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("train", form="cot"),)

    def thinking(self, batch: TaskBatch, phase: Phase) -> list[Segment]:
        return [steps(batch)]
