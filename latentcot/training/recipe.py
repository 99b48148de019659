r"""The training recipe of the hybrid study (arXiv:2507.06457) as a value, and how to scale it down.

The paper states data, tokens, batch, optimiser and the cosine; on learning rate, warm-up, weight decay and clipping it is silent.
Those are the defaults of the training framework it names, and the betas are a public report: each field says which below.

=================== ============= ============= ==========================================
field               340M          1.3B          from
=================== ============= ============= ==========================================
tokens              20e9          100e9         paper
tokens a batch      50,000        1,000,000     paper (rounded here to whole sequences)
context             4096          4096          paper v2; v1 says 2048
optimiser, schedule AdamW, cosine the same      paper
learning rate       3e-4          3e-4          framework default
warm-up steps       1024          1024          framework default
final rate          0.1           0.1           framework default
weight decay, eps   0.1, 1e-15    the same      framework default
gradient clip       1.0           1.0           framework default
non-finite gradient step skipped  the same      framework default
betas               (0.9, 0.95)   the same      public report
=================== ============= ============= ==========================================

A recipe is run by ``train(model, data, recipe.train, folder, skip_nonfinite=recipe.skip_nonfinite)``.
"""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from latentcot.training.loop import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """
    Args:
        tokens: tokens seen in all.
        batch_tokens: about so many a step; whole sequences are taken.
        length: tokens a sequence.
        train: the loop's values; ``steps`` follows from the rest.
        skip_nonfinite: see :func:`~latentcot.training.train`.
    """

    tokens: int
    batch_tokens: int
    length: int
    train: TrainConfig
    skip_nonfinite: bool = True

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.batch_tokens < self.length:
            raise ValueError(f"batch_tokens: {self.batch_tokens} hold no sequence of length {self.length}")

    @property
    def batch_size(self) -> int:
        """Sequences a step, over all processes."""
        return round(self.batch_tokens / self.length)


def _make(tokens: int, batch_tokens: int, length: int, mixed_precision: str = "bf16", **train: Any) -> Recipe:
    values = {
        "learning_rate": 3e-4,
        "final_rate": 0.1,
        "warmup_steps": 1024,
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "eps": 1e-15,
        "grad_clip": 1.0,
        "seed": 42,
        "checkpoint_every": 2000,
        **train,
    }
    steps = max(1, round(tokens / (round(batch_tokens / length) * length))) if batch_tokens >= length else 1
    return Recipe(tokens, batch_tokens, length, TrainConfig(steps=steps, mixed_precision=mixed_precision, **values))


RECIPES = {
    "340M": _make(20_000_000_000, 50_000, 4096),
    "1.3B": _make(100_000_000_000, 1_000_000, 4096),
}
"""The published recipes by model size."""


def recipe(
    name: str = "340M",
    *,
    tokens: int | None = None,
    batch_tokens: int | None = None,
    length: int | None = None,
    warmup_steps: int | None = None,
    skip_nonfinite: bool = True,
    **train: Any,
) -> Recipe:
    """A published recipe, or a scaled variant: what is given replaces what the paper has.

    Args:
        name: ``340M`` or ``1.3B``.
        tokens, batch_tokens, length: sizes; steps follow.
        warmup_steps: default 1024, or a tenth of the steps where that is less.
        skip_nonfinite: pass over steps whose gradients are not finite.
        train: other fields of :class:`TrainConfig` (``learning_rate``, ``seed``, ``mixed_precision``, ...).

    Raises:
        ValueError: an unknown name or a value out of range.
    """
    if name not in RECIPES:
        close = get_close_matches(name, RECIPES, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name: unknown recipe {name!r}, expected one of {', '.join(RECIPES)}{hint}")
    if "steps" in train:
        raise ValueError("steps: they follow from tokens, batch_tokens and length; give tokens instead")
    published = RECIPES[name]
    scaled = _make(
        published.tokens if tokens is None else tokens,
        published.batch_tokens if batch_tokens is None else batch_tokens,
        published.length if length is None else length,
        **train,
    )
    default = min(1024, scaled.train.steps // 10)
    warmup = default if warmup_steps is None else warmup_steps
    return replace(scaled, train=replace(scaled.train, warmup_steps=warmup), skip_nonfinite=skip_nonfinite)
