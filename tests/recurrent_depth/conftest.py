"""Small models and hand-made batches for the tests of recurrent depth."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.reasoner import Phase, PromptBatch, StepContext, TaskBatch, TaskLimits

VOCAB = 20
FIRST_SYMBOL = 11
MIXERS = ["gated_deltanet", "gated_deltanet", "attention", "gated_deltanet"]


def small_config(**changes: Any) -> HybridConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "mixers": MIXERS,
        "attention": {"num_heads": 4},
        "gated_deltanet": {"num_heads": 2, "head_dim": 16},
        # Wide enough that a token's embedding matters beside the random initial state of an untrained model.
        "initializer_range": 0.2,
    }
    return HybridConfig(**{**values, **changes})


def padded(rows: list[list[int]], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows)) if width is None else width
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return ids, mask


@pytest.fixture
def make_backbone() -> Callable[..., HybridForCausalLM]:
    def make(**changes: Any) -> HybridForCausalLM:
        torch.manual_seed(1)
        return HybridForCausalLM(small_config(**changes)).double()

    return make


@pytest.fixture
def make_batch() -> Callable[..., TaskBatch]:
    """Rows with prompts of 4, 6 and 3 tokens, 1, 2 and 5 one-token steps, and one- or two-token answers."""

    def make(answer_tokens: int = 1) -> TaskBatch:
        prompts = [[11, 12, 13, 14], [15, 11, 12, 16, 17, 13], [18, 19, 12]]
        prompt_ids, prompt_mask = padded(prompts)
        step_ids, step_mask = padded([[12], [13, 14], [15, 16, 17, 18, 19]])
        answers = [[14], [16], [11]] if answer_tokens == 1 else [[14, 12], [16], [11, 15]]
        answer_ids, answer_mask = padded(answers)
        limits = TaskLimits(VOCAB, prompt_tokens=7, steps=5, step_tokens=1, answer_tokens=answer_tokens)
        return TaskBatch(
            prompts=PromptBatch(prompt_ids, prompt_mask, limits),
            steps=step_ids[..., None],
            step_mask=step_mask[..., None],
            answer_ids=answer_ids,
            answer_mask=answer_mask,
            difficulty=torch.tensor([1, 2, 5]),
            index=torch.arange(3),
        )

    return make


@pytest.fixture
def make_step() -> Callable[..., StepContext]:
    def make(phase: Phase, step: int = 0) -> StepContext:
        return StepContext(step, 100, phase, torch.Generator().manual_seed(step))

    return make
