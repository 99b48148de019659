"""Token mixers by name. A mixer is ``forward(hidden [B, S, D], context, state) -> (hidden, state)``."""

from difflib import get_close_matches
from typing import Any

from latentcot.backbone.mixers.attention import AttentionOptions, SoftmaxAttention
from latentcot.backbone.mixers.base import Mixer
from latentcot.backbone.mixers.deltanet import DeltaNet, DeltaNetOptions
from latentcot.backbone.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetOptions
from latentcot.backbone.mixers.gla import GatedLinearAttention, GLAOptions
from latentcot.backbone.mixers.hgrn import HGRN, HGRNOptions
from latentcot.backbone.mixers.hgrn2 import HGRN2, HGRN2Options
from latentcot.backbone.mixers.retnet import RetNet, RetNetOptions

MIXERS: dict[str, tuple[type[Mixer], type]] = {
    "attention": (SoftmaxAttention, AttentionOptions),
    "hgrn": (HGRN, HGRNOptions),
    "retnet": (RetNet, RetNetOptions),
    "gla": (GatedLinearAttention, GLAOptions),
    "hgrn2": (HGRN2, HGRN2Options),
    "deltanet": (DeltaNet, DeltaNetOptions),
    "gated_deltanet": (GatedDeltaNet, GatedDeltaNetOptions),
}


def find_mixer(name: str) -> tuple[type[Mixer], type]:
    """Class and options class of a mixer; ``ValueError`` with close names when there is none."""
    if not isinstance(name, str) or name not in MIXERS:
        close = get_close_matches(str(name), MIXERS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"mixer: unknown name {name!r}, expected one of {', '.join(MIXERS)}{hint}")
    return MIXERS[name]


def make_options(name: str, values: dict[str, Any]) -> Any:
    """Options of mixer ``name`` from a dict; unknown keys raise ``ValueError``."""
    kind = find_mixer(name)[1]
    known = kind.__dataclass_fields__
    if unknown := sorted(set(values) - set(known)):
        close = get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}: unknown option(s) {unknown}, expected some of {sorted(known)}{hint}")
    return kind(**values)


__all__ = [
    "HGRN",
    "HGRN2",
    "MIXERS",
    "AttentionOptions",
    "DeltaNet",
    "DeltaNetOptions",
    "GLAOptions",
    "GatedDeltaNet",
    "GatedDeltaNetOptions",
    "GatedLinearAttention",
    "HGRN2Options",
    "HGRNOptions",
    "Mixer",
    "RetNet",
    "RetNetOptions",
    "SoftmaxAttention",
    "find_mixer",
    "make_options",
]
