r"""Training recipes by name: which schedule, times, weight and normalisation belong together.

================== =========== ============ ======== =========== ==================================================
name               eps, times  weight       divides  T           source
================== =========== ============ ======== =========== ==================================================
mdlm               1e-3, anti. elbo         elbo     –           arXiv:2406.07524
llada_pretraining  iid         elbo         elbo     –           arXiv:2502.09992; 1 % of batches cut, `random_length`
llada_sft          iid         elbo         answer   –           arXiv:2502.09992; prompt given, `answer_rows`
d1_sft             iid         elbo         tokens   –           arXiv:2504.12216
diffullama         iid         elbo         masked   –           arXiv:2410.17891; not an ELBO
mgdm               discrete    mgdm         masked   20          arXiv:2410.14157; focal (0.25, 1)
dream              iid         cart         masked   –           arXiv:2508.15487; context-adaptive weights
================== =========== ============ ======== =========== ==================================================

LLaDA masks with probability :math:`p = (1-\epsilon)u + \epsilon` and weighs by 1/p; that is a log-linear schedule
without a floor at times :math:`t = p`, which is how it is written here. What a source leaves open (Dream's normaliser)
is our choice.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentcot.diffusion_reasoning.schedule import NoiseSchedule


@dataclass(frozen=True)
class Recipe:
    """Arguments of :func:`~latentcot.diffusion_reasoning.objective.diffusion_loss` that belong together:
    ``diffusion_loss(model, x0, mask_id=..., **recipe.arguments)``."""

    name: str
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        return {"schedule": self.schedule, **dict(self.options)}


_NO_FLOOR = NoiseSchedule("loglinear", eps=0.0)


def _recipe(name: str, schedule: NoiseSchedule, **options: Any) -> Recipe:
    return Recipe(name, schedule, tuple(options.items()))


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _recipe("mdlm", NoiseSchedule(), time="antithetic", weight="elbo", normalise="elbo"),
        _recipe("llada_pretraining", _NO_FLOOR, time="iid", weight="elbo", normalise="elbo"),
        _recipe("llada_sft", _NO_FLOOR, time="iid", weight="elbo", normalise="answer"),
        _recipe("d1_sft", _NO_FLOOR, time="iid", weight="elbo", normalise="tokens"),
        _recipe("diffullama", _NO_FLOOR, time="iid", weight="elbo", normalise="masked"),
        _recipe(
            "mgdm",
            _NO_FLOOR,
            time="discrete",
            discrete_steps=20,
            weight="mgdm",
            focal=(0.25, 1.0),
            normalise="masked",
        ),
        _recipe("dream", _NO_FLOOR, time="iid", weight="cart", cart_p=0.3, normalise="masked"),
    )
}


def find_recipe(name: str) -> Recipe:
    """By name. ``ValueError`` names the valid ones."""
    if name not in RECIPES:
        raise ValueError(f"name: unknown recipe {name!r}; valid: {', '.join(RECIPES)}")
    return RECIPES[name]


def random_length(
    x0: Tensor, generator: torch.Generator | None = None, probability: float = 0.01, longest: int = 4096
) -> Tensor:
    """LLaDA's pre-training: with ``probability`` the whole batch ``[B, L]`` is cut to a random length, uniform in 1 ...
    ``longest`` (at most L), so that short texts are seen too. A view of the first columns, or ``x0`` itself."""
    if not 0.0 <= probability <= 1.0 or longest < 1:
        raise ValueError(f"probability, longest: expected 0..1 and at least 1, got {probability} and {longest}")
    device = "cpu" if generator is None else generator.device
    cut = bool(torch.rand((), generator=generator, device=device) < probability)
    length = int(torch.randint(1, longest + 1, (), generator=generator, device=device))
    return x0[:, :length] if cut else x0


def answer_rows(prompts: list[Tensor], answers: list[Tensor], eos_id: int) -> tuple[Tensor, Tensor]:
    """Rows for fine-tuning on prompt and answer: ``(x0, maskable)``, each ``[B, L]``.

    Answers are filled up with ``eos_id`` to the end of the longest row, and those tokens are masked and learned like any
    other: that is how a canvas of fixed length learns to end early. The prompt is given. No attention mask belongs to
    it: every position is real.

    Raises:
        ValueError: lists of different lengths, or an empty answer.
    """
    if len(prompts) != len(answers) or not prompts:
        raise ValueError(
            f"prompts, answers: {len(prompts)} and {len(answers)} given, expected as many of both, at least 1"
        )
    if empty := [row for row, answer in enumerate(answers) if not answer.numel()]:
        raise ValueError(f"answers: rows {empty[:8]} are empty, so there is nothing to learn")
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    x0 = torch.full((len(prompts), length), eos_id, dtype=torch.int64)
    maskable = torch.ones_like(x0, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        x0[row, : len(prompt)] = prompt
        x0[row, len(prompt) : len(prompt) + len(answer)] = answer
        maskable[row, : len(prompt)] = False
    return x0, maskable
