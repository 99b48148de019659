"""Comparisons by name. A preset is a function that returns the whole configuration as one frozen value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from latentcot.training import TrainConfig

Role = Literal["floor", "ceiling", "latent", "control"]


@dataclass(frozen=True)
class MethodSpec:
    """One method of a comparison.

    Args:
        name: registered name of the method.
        role: ``floor`` (answers at once), ``ceiling`` (writes its steps out), ``latent``, or ``control`` of a latent method.
        settings: of the method.
        knobs: passed at answering (:class:`~latentcot.reasoner.AnswerLimits`).
        controls: names of the methods that this one has to beat before a claim is made for it.
    """

    name: str
    role: Role
    settings: Mapping[str, Any] = field(default_factory=dict)
    knobs: Mapping[str, Any] = field(default_factory=dict)
    controls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Same backbone, same task, same examples for every method.

    Args:
        task: name, with ``task_config`` for training; evaluation uses the same with difficulties up to ``evaluate_to``.
        backbone: :class:`~latentcot.backbone.HybridConfig` arguments (the vocabulary size comes from the task).
        batch_size: examples a training step.
        items: evaluation items in all, spread evenly over difficulties.
    """

    name: str
    title: str
    task: str
    task_config: Mapping[str, Any]
    evaluate_to: int
    backbone: Mapping[str, Any]
    methods: tuple[MethodSpec, ...]
    train: TrainConfig
    batch_size: int = 64
    items: int = 1500


def quickstart() -> Comparison:
    """Minutes on two CPU cores: products in the group S3, final product asked, trained on 2 to 9 elements, evaluated to 16.

    Prompts are filled to nine places (``width``), so that element i and running product i stand equally far apart whatever the
    length: without that, a model of this size does not learn the written-out products in the time, and the comparison would be about
    finding the place and not about thinking.
    """
    curriculum = {"steps_per_stage": 1, "latents_per_step": 1, "max_stage": 8, "final_stage": False}
    return Comparison(
        name="quickstart",
        title="Products in S3: thinking out loud, in hidden states, or not at all",
        task="group",
        task_config={"group": "S3", "min_difficulty": 2, "max_difficulty": 9, "width": 9},
        evaluate_to=16,
        backbone={
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "mixer": "gated_deltanet",
            "attention_layers": [1],
            "attention": {"num_heads": 4},
            "gated_deltanet": {"num_heads": 2, "head_dim": 32, "combine": "gate"},
            "intermediate_size": 128,
            "initializer_range": 0.1,
            "convolution_init": "uniform",
        },
        methods=(
            MethodSpec("direct", "floor"),
            MethodSpec("cot", "ceiling"),
            MethodSpec(
                "depth_recurrence",
                "latent",
                {
                    "prelude": 1,
                    "core": 2,
                    "coda": 0,
                    "injection": "add",
                    "embedding_scale": "sqrt_width",
                    "sampler": {"kind": "fixed", "mean": 4},
                    "recurrences": 4,
                },
                controls=("direct",),
            ),
            MethodSpec("coconut", "latent", curriculum, controls=("coconut_no_latents", "coconut_pause")),
            MethodSpec("coconut_no_latents", "control", curriculum),
            MethodSpec("coconut_pause", "control", curriculum),
            MethodSpec("masked_diffusion", "latent", controls=("direct",)),
        ),
        train=TrainConfig(steps=1200, learning_rate=3e-3, warmup_steps=50),
        batch_size=64,
        items=1500,
    )


PRESETS: dict[str, Callable[[], Comparison]] = {"quickstart": quickstart}
