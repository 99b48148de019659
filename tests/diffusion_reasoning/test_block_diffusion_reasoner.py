"""The method ``block_diffusion`` on the hybrid backbone."""

# Options go through dictionaries of mixed types, and weights of modules are tensors: a type checker can not know either.
# pyright: reportAttributeAccessIssue=false

import pytest
import torch
from torch import Tensor

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.diffusion_reasoning.block_diffusion.reasoner import BlockDiffusion
from latentcot.reasoner import (
    SPECIAL,
    AnswerLimits,
    PromptBatch,
    Reasoner,
    Sites,
    StepContext,
    TaskBatch,
    TaskLimits,
    find_method,
)

LIMITS = TaskLimits(vocab_size=19, prompt_tokens=7, steps=4, step_tokens=1, answer_tokens=2)
CANVAS = 4 + 1 + 2 + 1


def backbone(mixers: tuple[str, ...] = ("gated_deltanet", "attention")) -> HybridForCausalLM:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=19,
        hidden_size=32,
        num_hidden_layers=len(mixers),
        mixers=list(mixers),
        attention={"num_heads": 4},
        gated_deltanet={"num_heads": 2, "head_dim": 16},
        initializer_range=0.2,
    )
    return HybridForCausalLM(config).double().eval()


def batch(rows: int = 4) -> TaskBatch:
    generator = torch.Generator().manual_seed(0)

    def ragged(width: int, least: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(SPECIAL.count, 19, (rows, width), generator=generator)
        mask = torch.arange(width) < torch.randint(least, width + 1, (rows, 1), generator=generator)
        return ids.masked_fill(~mask, SPECIAL.pad), mask

    prompts = PromptBatch(*ragged(7, 3), LIMITS)
    steps, step_mask = ragged(4, 1)
    answers, answer_mask = ragged(2, 1)
    number = torch.arange(rows)
    return TaskBatch(prompts, steps[..., None], step_mask[..., None], answers, answer_mask, number, number)


def alone(prompts: PromptBatch, row: int) -> PromptBatch:
    return PromptBatch(prompts.ids[row : row + 1], prompts.mask[row : row + 1], LIMITS)


def context(reasoner: Reasoner, seed: int = 0) -> StepContext:
    return StepContext(0, 10, reasoner.phases()[0], torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "settings", [{}, {"canvas": "answer", "interval": [0.3, 0.9], "inside": "bilinear"}], ids=["plain", "clipped"]
)
def test_a_few_steps_lower_the_loss(settings):
    reasoner, data = BlockDiffusion(backbone(), settings), batch()
    optimiser, losses = torch.optim.AdamW(reasoner.parameters(), 3e-3), []
    for step in range(25):
        out = reasoner.loss(data, context(reasoner, step))
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
        losses.append(out.parts["loss"])
        assert ("nats_per_token" in out.parts) == ("interval" not in settings)
        assert out.flops > 0
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(p.grad is not None for p in reasoner.backbone.parameters())


@pytest.mark.parametrize("settings", [{}, {"tokens_per_step": 3, "temperature": 0.7}, {"threshold": 0.2}], ids=str)
def test_a_row_is_answered_alone_as_in_a_batch(settings):
    reasoner, data = BlockDiffusion(backbone(), settings), batch()
    out = reasoner.answer(data.prompts, generator=torch.Generator().manual_seed(5))
    assert out.ids.shape == (4, 2)
    text = out.info["text"]
    assert text.shape == (4, CANVAS)
    assert not (text == SPECIAL.mask).any()
    for row in range(4):
        one = reasoner.answer(alone(data.prompts, row), generator=torch.Generator().manual_seed(5))
        assert torch.equal(one.info["text"][0], text[row])
        assert int(one.sequential_passes[0]) == int(out.sequential_passes[row])
        assert float(one.flops[0]) == pytest.approx(float(out.flops[row]))


def test_passes_are_those_of_blocks():
    """Prompt and <bot> of n tokens: what is read, a pass for every canvas token, and commits between blocks of 4."""
    reasoner, data = BlockDiffusion(backbone()), batch()
    out = reasoner.answer(data.prompts)
    for row in range(4):
        n = int(data.prompts.mask[row].sum()) + 1
        blocks = -(-(n + CANVAS) // 4) - n // 4
        assert int(out.sequential_passes[row]) == (n >= 4) + CANVAS + blocks - 1
    few = reasoner.answer(data.prompts, AnswerLimits(knobs={"steps": 1}))
    assert (few.sequential_passes <= 1 + 3 + 2).all()
    bounded = reasoner.answer(data.prompts, AnswerLimits(sequential_passes=7))
    assert (bounded.sequential_passes <= 7).all()
    with pytest.raises(ValueError, match="unknown to block_diffusion"):
        reasoner.answer(data.prompts, AnswerLimits(knobs={"depth": 1}))
    with pytest.raises(ValueError, match="expected a positive integer"):
        reasoner.answer(data.prompts, AnswerLimits(knobs={"steps": 0}))


def test_the_trace_holds_what_the_denoising_passes_computed():
    """Last hidden states through norm and head are the logits of the passes, in order."""
    reasoner, data = BlockDiffusion(backbone()), batch()
    logits, model = [], reasoner.model()
    peek = type(model).peek

    def remember(self, z, state, mask=None, keep=False):
        found = peek(self, z, state, mask, keep)
        logits.append((found[0], mask))
        return found

    type(model).peek = remember
    try:
        reasoner.answer(data.prompts)
        passes = list(logits)
    finally:
        type(model).peek = peek
    trace = reasoner.trace(data.prompts)
    assert trace.hidden.shape[:3] == (len(passes), 2, 4)
    for step, (found, mask) in enumerate(passes):
        recorded = reasoner.backbone.head(trace.hidden[step, -1])[trace.valid[step]]
        expected = found.flatten(0, 1) if mask is None else found[mask]
        torch.testing.assert_close(recorded, expected, rtol=0, atol=1e-10)
    short = reasoner.trace(data.prompts, Sites((1,), 3))
    assert torch.equal(short.hidden, trace.hidden[:3, 1:])


def test_saved_and_loaded_it_answers_the_same(tmp_path):
    reasoner, data = BlockDiffusion(backbone(), {"block_length": 3, "inside": "decayed"}), batch()
    reasoner.save_pretrained(tmp_path)
    again = Reasoner.from_pretrained(tmp_path)
    assert isinstance(again, BlockDiffusion)
    again = again.double()
    assert torch.equal(again.answer(data.prompts).info["text"], reasoner.answer(data.prompts).info["text"])
    assert find_method("block_diffusion") is BlockDiffusion


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 3}, "unknown to block_diffusion"),
        ({"canvas": "wide"}, "canvas = 'wide'"),
        ({"block_length": 0}, "block_length = 0"),
        ({"inside": "dense"}, "inside is 'dense'"),
        ({"interval": [0.9, 0.1]}, "0 < lo < hi <= 1"),
        ({"normalise": "mean"}, "normalise = 'mean'"),
        ({"order": "luck"}, "luck"),
        ({"threshold": 2.0}, "threshold"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        BlockDiffusion(backbone(), settings)
