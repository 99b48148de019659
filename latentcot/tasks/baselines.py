"""What can be had without reasoning: chance, the most frequent answer, and each task's shortcuts."""

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentcot.reasoner import TaskBatch

if TYPE_CHECKING:
    from latentcot.tasks.base import Split, Task


class Baselines(dict[str, float]):
    """Accuracies by name: ``chance``, ``majority``, ``heuristic``, and every shortcut under its own name.

    ``heuristic`` is the best shortcut or majority on the measured examples themselves, so it errs upwards, and
    ``heuristic_name`` says which it is.
    """

    heuristic_name: str = ""

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}={value:.4f}" for name, value in self.items())
        return f"Baselines({figures}, heuristic_name={self.heuristic_name!r})"


def most_frequent_answer(seen: TaskBatch, batch: TaskBatch) -> Tensor:
    """The most frequent whole answer of ``seen``, once for every row of ``batch``: ``[B, A]``."""
    counts = Counter(tuple(answer) for answer in seen.answer_ids.tolist())
    best, _ = max(counts.items(), key=lambda item: (item[1], item[0]))
    return torch.tensor(best).expand(len(batch), -1)


def measure_baselines(task: "Task", split: "Split", n: int, difficulty: int | None) -> Baselines:
    """Baselines on ``n`` examples; majority is fitted on ``n`` training examples of the same series."""
    if n < 1:
        raise ValueError(f"n: expected at least 1 example, got {n}")

    def series(name: "Split") -> TaskBatch:
        return task.batch(name, range(n)) if difficulty is None else task.difficulty_batch(name, difficulty, range(n))

    batch, seen = series(split), series("train")
    result = Baselines(chance=task.chance(batch).double().mean().item())
    candidates = {"majority": task.majority(seen, batch), **task.guesses(batch)}
    accuracies = {name: task.score(batch, ids).double().mean().item() for name, ids in candidates.items()}
    result["majority"] = accuracies["majority"]
    result.heuristic_name = max(accuracies, key=lambda name: accuracies[name])
    result["heuristic"] = accuracies[result.heuristic_name]
    result.update(accuracies)
    return result
