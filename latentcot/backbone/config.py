"""Configuration of the hybrid backbone."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedConfig

from latentcot.backbone.block import NORM_PLACEMENTS
from latentcot.backbone.mixers import find_mixer, make_options


class HybridConfig(PreTrainedConfig):
    """A stack of blocks, each with one mixer; ``mixers`` lists them in order.

    The pattern comes from exactly one of

    * ``period = r``: the study's reading of a ratio "r:1" (arXiv:2507.06457): layer i (from 0) is full attention if and only if
      (i + 1) mod r = 0, the others are ``mixer``;
    * ``linear_per_full = r``: the literal reading: r linear layers, then a full one;
    * ``attention_layers``: an explicit list of full-attention layers, in any order;
    * ``mixers``: every layer by name;
    * none of them: all layers are ``mixer`` (``mixer="attention"`` is the plain transformer).

    Args:
        vocab_size, hidden_size, num_hidden_layers: sizes.
        mixer: name of the linear mixer: ``gla``, ``gated_deltanet`` (or ``attention``).
        hidden_ratio, intermediate_size: MLP width; ``None`` = smallest multiple of 256 (of 32 below width 256) that is at least
            2 · ratio · D / 3.
        norm_placement, norm_eps, norm_affine: see :class:`~latentcot.backbone.block.Block`.
        embedding_scale: factor on token embeddings (Huginn: sqrt(D)).
        attention, gla, gated_deltanet: options of each mixer as a dict (see ``AttentionOptions`` and its like).
        initializer_range: standard deviation of linear, embedding and head weights.
        tie_word_embeddings: head shares the embedding matrix.

    Raises:
        ValueError: on two patterns at once, an unknown mixer (close names are suggested), a pattern without the full layer it asks
            for, or options that do not fit the width.
    """

    model_type = "latentcot_hybrid"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        mixer: str = "gated_deltanet",
        period: int | None = None,
        linear_per_full: int | None = None,
        attention_layers: list[int] | None = None,
        mixers: list[str] | None = None,
        hidden_ratio: float = 4.0,
        intermediate_size: int | None = None,
        norm_placement: str = "pre",
        norm_eps: float = 1e-6,
        norm_affine: bool = True,
        embedding_scale: float = 1.0,
        attention: dict[str, Any] | None = None,
        gla: dict[str, Any] | None = None,
        gated_deltanet: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        for name, value in (
            ("vocab_size", vocab_size),
            ("hidden_size", hidden_size),
            ("num_hidden_layers", num_hidden_layers),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if norm_placement not in NORM_PLACEMENTS:
            raise ValueError(f"norm_placement: {norm_placement!r} given, expected one of {', '.join(NORM_PLACEMENTS)}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.mixer = mixer
        self.period = period
        self.linear_per_full = linear_per_full
        self.attention_layers = attention_layers
        self.mixers = expand_pattern(num_hidden_layers, mixer, period, linear_per_full, attention_layers, mixers)
        self.hidden_ratio = hidden_ratio
        self.intermediate_size = intermediate_size or mlp_width(hidden_size, hidden_ratio)
        self.norm_placement = norm_placement
        self.norm_eps = norm_eps
        self.norm_affine = norm_affine
        self.embedding_scale = embedding_scale
        self.attention = asdict(make_options("attention", dict(attention or {})))
        self.gla = asdict(make_options("gla", dict(gla or {})))
        self.gated_deltanet = asdict(make_options("gated_deltanet", dict(gated_deltanet or {})))
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(**kwargs)
        # Behind the base class, which has fields of these names with defaults of its own.
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        self.tie_word_embeddings = tie_word_embeddings

    @property
    def fingerprint(self) -> str:
        """Short name of everything that shapes a state: a state made by another architecture is refused."""
        shape = {"D": self.hidden_size, "mixers": self.mixers} | {
            name: getattr(self, name) for name in sorted(set(self.mixers))
        }
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


def mlp_width(hidden_size: int, ratio: float) -> int:
    """Smallest multiple of 256 that is at least floor(2 · ratio · D / 3); of 32 for models narrower than 256."""
    multiple = 256 if hidden_size >= 256 else 32
    return -(-int(2 * ratio * hidden_size / 3) // multiple) * multiple


def expand_pattern(
    layers: int,
    mixer: str,
    period: int | None,
    linear_per_full: int | None,
    attention_layers: list[int] | None,
    mixers: list[str] | None,
) -> list[str]:
    """Mixer name of every layer; see :class:`HybridConfig`."""
    find_mixer(mixer)
    if mixers is not None and period is None and linear_per_full is None and attention_layers is None:
        for name in mixers:
            find_mixer(name)
        if len(mixers) != layers:
            raise ValueError(f"mixers: {len(mixers)} names given for num_hidden_layers = {layers}")
        return list(mixers)
    given = {
        name: value
        for name, value in (
            ("period", period),
            ("linear_per_full", linear_per_full),
            ("attention_layers", attention_layers),
        )
        if value is not None
    }
    if len(given) > 1:
        raise ValueError(f"layer pattern: give one of period, linear_per_full, attention_layers; got {given}")
    every = period if period is not None else (linear_per_full + 1 if linear_per_full is not None else None)
    if every is not None:
        if not 1 <= every <= layers:
            raise ValueError(
                f"layer pattern: {given} makes no layer of {layers} full attention; the period must be within 1..{layers}"
            )
        full = {i for i in range(layers) if (i + 1) % every == 0}
    else:
        full = set(attention_layers or [])
        if outside := sorted(i for i in full if not 0 <= i < layers):
            raise ValueError(f"attention_layers: {outside} lie outside 0..{layers - 1}")
    expanded = ["attention" if i in full else mixer for i in range(layers)]
    if mixers is not None and list(mixers) != expanded:
        raise ValueError(f"mixers: {mixers} contradicts the pattern {given}, which means {expanded}")
    return expanded
