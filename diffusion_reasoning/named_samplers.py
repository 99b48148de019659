"""Published samplers by name: each is one :class:`DiffusionGenerationConfig`.

================== ============================================ =============================================
name               constructor                                  source
================== ============================================ =============================================
ancestral          :func:`ancestral`                            MDLM (arXiv:2406.07524)
remdm              :func:`ancestral` with ``remask``            ReMDM (arXiv:2503.00307), five schedules
first_hitting      :func:`first_hitting`                        arXiv:2409.02908
low_confidence     :func:`low_confidence`                       LLaDA (arXiv:2502.09992), semi-autoregressive
threshold, factor  :func:`low_confidence` with either           Fast-dLLM (arXiv:2505.22618)
dream              :func:`dream`                                Dream (arXiv:2508.15487), four orders
easy_first         :func:`easy_first`                           MGDM (arXiv:2410.14157)
================== ============================================ =============================================
"""

from collections.abc import Callable
from typing import Any

from latentcot.diffusion_reasoning.confidence import Confidence
from latentcot.diffusion_reasoning.generation_config import DiffusionGenerationConfig
from latentcot.diffusion_reasoning.quota import Bernoulli, Dream, EasyFirst
from latentcot.diffusion_reasoning.remasking import Remasking
from latentcot.diffusion_reasoning.schedule import NoiseSchedule


def low_confidence(
    max_new_tokens: int = 0,
    steps: int | None = None,
    block_length: int | None = None,
    *,
    order: str | Confidence = "prob",
    temperature: float = 0.0,
    threshold: float | None = None,
    factor: float | None = None,
    **other: Any,
) -> DiffusionGenerationConfig:
    """LLaDA's semi-autoregressive sampler (arXiv:2502.09992): in every pass the most confident tokens of the current
    block stay.

    Blocks go from left to right; positions right of the current block stay visible as masks. ``threshold`` or
    ``factor`` reveals by confidence instead of by count (arXiv:2505.22618) and takes no steps.
    """
    if threshold is not None and factor is not None:
        raise ValueError(f"threshold, factor: give one of them, got {threshold} and {factor}")
    if threshold is not None:
        other |= {"quota": "threshold", "threshold": threshold}
    if factor is not None:
        other |= {"quota": "factor", "factor": factor}
    return DiffusionGenerationConfig(max_new_tokens, steps, block_length, order=order, temperature=temperature, **other)


def ancestral(
    steps: int,
    max_new_tokens: int = 0,
    *,
    temperature: float = 1.0,
    schedule: NoiseSchedule | None = None,
    remask: str | Remasking = None,
    **other: Any,
) -> DiffusionGenerationConfig:
    """MDLM's reverse process on ``steps`` equal times (arXiv:2406.07524), with ReMDM's re-masking when ``remask`` is
    given: a :class:`~latentcot.diffusion_reasoning.remasking.ReMDM` or the name of its variant.

    A step that reveals nothing costs no pass: the last output is used again. What is masked after the last step is
    filled by argmax.
    """
    return DiffusionGenerationConfig(
        max_new_tokens,
        steps,
        quota="bernoulli",
        order="random",
        temperature=temperature,
        schedule=NoiseSchedule() if schedule is None else schedule,
        remask=remask,
        **other,
    )


def first_hitting(max_new_tokens: int = 0, *, temperature: float = 1.0, **other: Any) -> DiffusionGenerationConfig:
    """One uniformly random position a pass: what the ancestral sampler tends to with ever more steps, exactly, in as
    many passes as there are tokens (arXiv:2409.02908)."""
    return DiffusionGenerationConfig(
        max_new_tokens, quota="first_hitting", order="random", temperature=temperature, **other
    )


DREAM_ORDERS = {"maskgit_plus": "prob_tempered", "topk_margin": "margin", "entropy": "neg_entropy"}


def dream(
    max_new_tokens: int = 0,
    steps: int = 512,
    *,
    alg: str = "origin",
    alg_temp: float | None = None,
    eps: float = 1e-3,
    temperature: float = 0.0,
    **other: Any,
) -> DiffusionGenerationConfig:
    """Dream's samplers under its own argument names (arXiv:2508.15487).

    ``alg``: ``origin`` = ancestral on times 1 ... eps, the last step reveals all; ``maskgit_plus``, ``topk_margin``,
    ``entropy`` = confidence with the ``dream`` quota. ``alg_temp`` above 0 draws the positions instead of taking the
    best. Dream's network shifts its logits by one: see ``DiffusionConfig.shift``.

    Raises:
        ValueError: unknown ``alg``, and what the configuration refuses.
    """
    if alg == "origin":
        quota = Bernoulli(NoiseSchedule("loglinear", eps=0.0), t_end=eps, last="reveal")
        return DiffusionGenerationConfig(
            max_new_tokens, steps, quota=quota, order="random", temperature=temperature, **other
        )
    if alg not in DREAM_ORDERS:
        raise ValueError(f"alg: unknown algorithm {alg!r}; valid: origin, {', '.join(DREAM_ORDERS)}")
    return DiffusionGenerationConfig(
        max_new_tokens,
        steps,
        quota=Dream(eps),
        order=DREAM_ORDERS[alg],
        order_temperature=alg_temp or 0.0,
        temperature=temperature,
        **other,
    )


def easy_first(
    max_new_tokens: int = 0, steps: int = 20, *, noise: float = 0.5, **other: Any
) -> DiffusionGenerationConfig:
    """MGDM's decoding (arXiv:2410.14157): every pass predicts the whole canvas greedily and sends the least certain
    share back to the mask, revealed tokens included."""
    return DiffusionGenerationConfig(max_new_tokens, steps, quota=EasyFirst(noise), **other)


NAMED_SAMPLERS: dict[str, Callable[..., DiffusionGenerationConfig]] = {
    "ancestral": ancestral,
    "first_hitting": first_hitting,
    "low_confidence": low_confidence,
    "dream": dream,
    "easy_first": easy_first,
}


def named_sampler(name: str, **arguments: Any) -> DiffusionGenerationConfig:
    """A sampler by name; ``remdm`` with ``variant`` and ``eta``, ``threshold`` and ``factor`` with their value.

    >>> named_sampler("threshold", max_new_tokens=8, threshold=0.9).quota
    'threshold'
    """
    if name == "remdm":
        variant = arguments.pop("variant", "cap")
        return ancestral(remask=variant, **arguments)
    if name in ("threshold", "factor"):
        arguments.setdefault(name, {"threshold": 0.9, "factor": 1.0}[name])
        return low_confidence(**arguments)
    if name not in NAMED_SAMPLERS:
        valid = sorted([*NAMED_SAMPLERS, "remdm", "threshold", "factor"])
        raise ValueError(f"name: unknown sampler {name!r}; valid: {', '.join(valid)}")
    return NAMED_SAMPLERS[name](**arguments)
