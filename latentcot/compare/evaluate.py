"""Accuracy by difficulty, and what each answer cost."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from latentcot.reasoner import SPECIAL, AnswerLimits, Reasoner
from latentcot.tasks.base import Split, Task


@dataclass(frozen=True)
class DifficultyScore:
    """Of ``items`` test items at one difficulty, ``distinct`` different prompts among them (a small level holds few): how many were
    right, and the mean cost of an answer."""

    difficulty: int
    items: int
    distinct: int
    correct: int
    tokens_emitted: float
    sequential_passes: float
    flops: float
    seconds: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.items

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "accuracy": self.accuracy}


def evaluate(
    reasoner: Reasoner,
    task: Task,
    difficulties: Sequence[int],
    items: int,
    *,
    split: Split = "test",
    batch_size: int = 256,
    knobs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> list[DifficultyScore]:
    """Answer ``items`` prompts at each difficulty; exact match. Methods get prompts alone (a ``PromptBatch``)."""
    if items < 1:
        raise ValueError(f"items: at least one a difficulty is needed, got {items}")
    limits = AnswerLimits(knobs=dict(knobs or {}))
    scores = []
    reasoner.eval()
    device = next(reasoner.parameters()).device
    for difficulty in difficulties:
        correct, tokens, passes, flops, seconds = 0, 0.0, 0.0, 0.0, 0.0
        prompts: set[tuple[int, ...]] = set()
        for start in range(0, items, batch_size):
            batch = task.difficulty_batch(split, difficulty, range(start, min(items, start + batch_size))).to(device)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + difficulty * 10_007 + start)
            began = time.perf_counter()
            with torch.no_grad():
                output = reasoner.answer(batch.prompts, limits, generator)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds += time.perf_counter() - began
            prompts.update(tuple(t for t in row if t != SPECIAL.pad) for row in batch.prompts.ids.tolist())
            correct += int(task.score(batch, output.ids).sum())
            tokens += float(output.tokens_emitted.double().sum())
            passes += float(output.sequential_passes.double().sum())
            flops += float(output.flops.double().sum())
        scores.append(
            DifficultyScore(
                difficulty, items, len(prompts), correct, tokens / items, passes / items, flops / items, seconds
            )
        )
    return scores
