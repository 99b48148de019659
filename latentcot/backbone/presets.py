"""The stacks of "A Systematic Analysis of Hybrid Linear Attention" (arXiv:2507.06457) by name, and what their states weigh.

A name is ``<mixer>-<size>-<ratio>``, such as ``gated_deltanet-340m-3-1``: six linear mixers, sizes ``340m`` and ``1.3b``, ratios
``24-1``, ``12-1``, ``6-1``, ``3-1`` and ``pure``; with ``transformer-<size>`` that is 31 stacks a size. All have 24 layers, a
vocabulary of 32,000, an untied head and rotary attention with heads of width 64.

==================== =========================== ==============================================================================
from                 fields                      where the values come from
==================== =========================== ==============================================================================
reports of releases  D, L, MLP width, vocabulary configurations of the released models as others describe them
published recipes    attention heads, DeltaNet   16 and 32 heads of width 64; heads of width 128
format's defaults    GLA, HGRN, HGRN2, RetNet    what a configuration of the format means where it is silent
study's models       Gated DeltaNet              heads of width 256, expand_v 1; confirmed by counting the parameters of a release
our choice           where full layers stand     the last of every period; a released model lists its own
==================== =========================== ==============================================================================

RetNet's MLP has hidden_ratio 2, because its mixer is twice as large; the others have 4.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch

from latentcot.backbone.config import HybridConfig
from latentcot.backbone.mixers import Mixer, find_mixer, make_options
from latentcot.backbone.mixers.attention import SoftmaxAttention
from latentcot.backbone.mixers.convolution import ShortConvolution

STUDY_MIXERS = ("hgrn", "retnet", "gla", "hgrn2", "deltanet", "gated_deltanet")
RATIOS: dict[str, int | None] = {"24-1": 24, "12-1": 12, "6-1": 6, "3-1": 3, "pure": None}
"""Name of a ratio and the period it means: one full layer in every so many."""
SIZES = {"340m": 1024, "1.3b": 2048}
"""Name of a size and its width D."""
PATTERN_KEYWORDS = ("period", "linear_per_full", "attention_layers", "mixers")


def preset_names() -> list[str]:
    """All names that :func:`preset` knows, size by size."""
    return [
        name
        for size in SIZES
        for name in (f"transformer-{size}", *(f"{mixer}-{size}-{ratio}" for mixer in STUDY_MIXERS for ratio in RATIOS))
    ]


def preset(name: str, **changes: Any) -> HybridConfig:
    """Configuration of a named stack.

    Args:
        name: one of :func:`preset_names`, in any case of letters.
        changes: keywords of :class:`HybridConfig` that replace the preset's. A mixer's options are replaced one by one, and any of
            ``period``, ``linear_per_full``, ``attention_layers`` and ``mixers`` replaces the preset's pattern.

    Raises:
        ValueError: unknown name; close ones are suggested.

    Example: ``preset("hgrn2-340m-6-1", num_hidden_layers=6, vocab_size=1000)``.
    """
    if name.lower() not in preset_names():
        close = get_close_matches(name.lower(), preset_names(), 3, 0.5)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"preset: unknown name {name!r}, expected <mixer>-<size>-<ratio> or transformer-<size> with mixer one of "
            f"{', '.join(STUDY_MIXERS)}, size one of {', '.join(SIZES)}, ratio one of {', '.join(RATIOS)}{hint}"
        )
    mixer, size, *ratio = name.lower().split("-", 2)
    width = SIZES[size]
    values: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": 24,
        "vocab_size": 32000,
        "mixer": "attention" if mixer == "transformer" else mixer,
        "period": RATIOS[ratio[0]] if ratio else None,
        "hidden_ratio": 2 if mixer == "retnet" else 4,
        "norm_eps": 1e-6,
        "attention": {"num_heads": width // 64},
        "retnet": {"num_heads": 8, "expand_k": 1, "expand_v": 2},
        "gla": {"num_heads": 4, "expand_k": 0.5, "expand_v": 1},
        "hgrn2": {"expand_ratio": 128},
        "deltanet": {"num_heads": width // 128},
        "gated_deltanet": {"num_heads": width // 256, "head_dim": 256, "expand_v": 1},
    }
    if any(keyword in changes for keyword in PATTERN_KEYWORDS):
        values["period"] = None
    for keyword, value in changes.items():
        both_options = isinstance(value, dict) and isinstance(values.get(keyword), dict)
        values[keyword] = values[keyword] | value if both_options else value
    return HybridConfig(**values)


# -- memory --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps for one sequence, in bytes.

    Args:
        mixer: name of its mixer.
        per_token: keys and values of one token; nothing for a linear mixer.
        recurrent: matrix or vector state, at least fp32 whatever the model's dtype; nothing for attention.
        convolution: the last W - 1 inputs of its short convolutions, at least fp32 too. (The study's own accounting keeps them in bf16,
            which is half: 18 KiB instead of 36 for a delta layer at D = 1024.)
    """

    mixer: str
    per_token: int = 0
    recurrent: int = 0
    convolution: int = 0

    def at(self, context_length: int) -> int:
        return self.per_token * context_length + self.recurrent + self.convolution


def layer_bytes(config: HybridConfig, dtype: torch.dtype = torch.bfloat16) -> list[LayerBytes]:
    """What each layer keeps, bottom to top. ``dtype``: of activations, thus of keys and values."""
    known = {name: _mixer_bytes(config, name, dtype.itemsize) for name in set(config.mixers)}
    return [known[name] for name in config.mixers]


def state_bytes(config: HybridConfig, context_length: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the state after ``context_length`` tokens: ``ModelState.nbytes``, without running or building the model.

    Keys and values grow by the token (a sliding window bounds what is seen, not what is kept); recurrent states and convolution
    inputs do not. An untouched model, ``context_length = 0``, holds nothing.
    """
    if context_length < 0 or batch < 1:
        raise ValueError(
            f"state_bytes: context_length = {context_length} and batch = {batch} given, expected at least 0 and 1"
        )
    return batch * sum(layer.at(context_length) for layer in layer_bytes(config, dtype)) if context_length else 0


def _mixer_bytes(config: HybridConfig, name: str, size: int) -> LayerBytes:
    kind = find_mixer(name)[0]
    with torch.device("meta"):  # sizes only
        mixer: Mixer = kind(config.hidden_size, make_options(name, getattr(config, name)), config.norm_eps)  # type: ignore[call-arg]
    if isinstance(mixer, SoftmaxAttention):
        return LayerBytes(name, per_token=2 * mixer.kv_heads * mixer.head_width * size)
    sizes = vars(mixer)
    if "width" in sizes:  # a number a channel
        numbers = sizes["width"]
    elif {"heads", "K", "V"} <= set(sizes):  # a matrix a head
        numbers = sizes.get("v_heads", sizes["heads"]) * sizes["K"] * sizes["V"]
    else:
        raise TypeError(
            f"{name}: its state is neither keys and values, a width, nor heads of K x V; its size is unknown"
        )
    windows = [convolution.weight.shape for convolution in _taps(mixer)]
    inputs = sum(width * (window - 1) for width, _, window in windows)
    return LayerBytes(name, recurrent=max(4, size) * numbers, convolution=max(4, size) * inputs)


def _taps(mixer: Mixer) -> list[ShortConvolution]:
    return [part for part in mixer.modules() if isinstance(part, ShortConvolution)]
