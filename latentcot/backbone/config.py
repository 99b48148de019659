"""Configuration of the hybrid backbone."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedConfig

from latentcot.backbone.block import NORM_PLACEMENTS
from latentcot.backbone.mixers import MIXERS, make_options
from latentcot.backbone.mixers.base import is_count, is_positive
from latentcot.backbone.patterns import expand_pattern


class HybridConfig(PreTrainedConfig):
    """A stack of blocks, each with one mixer; ``mixers`` lists them in order.

    The pattern comes from at most one of (:mod:`~latentcot.backbone.patterns` has them side by side)

    * ``period = r``: the study's reading of a ratio "r:1" (arXiv:2507.06457): layer i (from 0) is full attention if and only if
      (i + 1) mod r = 0, the others are ``mixer``;
    * ``linear_per_full = r``: the literal reading: r linear layers, then a full one;
    * ``attention_layers``: an explicit list of full-attention layers, in any order;
    * ``mixers``: a pattern repeated to the number of layers, ``"gated_deltanet*3,attention"``, or every layer by name;
    * none of them: all layers are ``mixer`` (``mixer="attention"`` is the plain transformer).

    Whichever was given, ``config.mixers`` is the list of names, one a layer.

    Args:
        vocab_size, hidden_size, num_hidden_layers: sizes.
        mixer: name of the linear mixer (or ``attention``): a key of :data:`~latentcot.backbone.mixers.MIXERS`.
        hidden_ratio, intermediate_size: MLP width; ``None`` = smallest multiple of 256 (of 32 below width 256) that is at least
            2 · ratio · D / 3.
        norm_placement, norm_eps, norm_affine: see :class:`~latentcot.backbone.block.Block`.
        norm: ``rms`` or ``layer`` (with a weight and no bias; of blocks and the final one, not of mixers).
        mlp: ``swiglu``, or ``gelu`` (two matrices with biases, tanh form; its width is hidden_ratio · D unless given).
        modulation: width of a conditioning that shifts, scales and gates every block and the final norm (MDLM); ``None`` = none.
        head_bias: the head has a bias.
        embedding_scale: factor on token embeddings (Huginn: sqrt(D)).
        attention, hgrn, retnet, gla, hgrn2, deltanet, gated_deltanet: options of each mixer as a dict (see ``AttentionOptions`` and
            its like); options that are left out get their defaults. A mixer that was added to ``MIXERS`` takes its options under its
            own name in the same way.
        initializer_range: standard deviation of linear, embedding and head weights.
        convolution_init: taps of short convolutions: ``normal``, of the same deviation (what the study's format does today), or
            ``uniform`` within W^(-1/2) either way (what torch gives a depthwise convolution). At a deviation of 0.02 a narrow model's
            values shrink below the epsilon of the norms behind them and it starts slowly; the CPU studies draw uniformly.
        tie_word_embeddings: head shares the embedding matrix.
        recompute_mlp: training keeps nothing of an MLP but its input and computes it again in backward: about half the activations of a
            block for its share of one more forward pass. Results are the same.
        loss_chunk: in training with labels, positions whose logits exist at a time (see ``loss.py``); ``None`` = all.

    Raises:
        ValueError: on two patterns at once, an unknown mixer or option (close names are suggested), a pattern without the full layer
            it asks for, or options that do not fit together.
        TypeError: on a keyword that looks like a misspelt one of these, or options that are no dict.
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
        attention_layers: Sequence[int] | None = None,
        mixers: str | Sequence[str] | None = None,
        hidden_ratio: float = 4.0,
        intermediate_size: int | None = None,
        norm_placement: str = "pre",
        norm_eps: float = 1e-6,
        norm_affine: bool = True,
        norm: str = "rms",
        mlp: str = "swiglu",
        modulation: int | None = None,
        head_bias: bool = False,
        embedding_scale: float = 1.0,
        attention: dict[str, Any] | None = None,
        hgrn: dict[str, Any] | None = None,
        retnet: dict[str, Any] | None = None,
        gla: dict[str, Any] | None = None,
        hgrn2: dict[str, Any] | None = None,
        deltanet: dict[str, Any] | None = None,
        gated_deltanet: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        convolution_init: str = "normal",
        tie_word_embeddings: bool = False,
        recompute_mlp: bool = False,
        loss_chunk: int | None = None,
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
            ("intermediate_size", 1 if intermediate_size is None else intermediate_size),
            ("modulation", 1 if modulation is None else modulation),
        ):
            if not is_count(value):
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        for name, value in (("hidden_ratio", hidden_ratio), ("norm_eps", norm_eps)):
            if not is_positive(value):
                raise ValueError(f"{name}: expected a number above zero, got {value!r}")
        if norm_placement not in NORM_PLACEMENTS:
            raise ValueError(f"norm_placement: {norm_placement!r} given, expected one of {', '.join(NORM_PLACEMENTS)}")
        for name, value, choices in (("norm", norm, ("rms", "layer")), ("mlp", mlp, ("swiglu", "gelu"))):
            if value not in choices:
                raise ValueError(f"{name}: {value!r} given, expected one of {', '.join(map(repr, choices))}")
        if modulation is not None and norm_placement != "pre":
            raise ValueError(f"modulation: it belongs to norm_placement 'pre', got {norm_placement!r}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.mixer = mixer
        self.period = period
        self.linear_per_full = linear_per_full
        self.mixers = expand_pattern(num_hidden_layers, mixer, period, linear_per_full, attention_layers, mixers)
        self.attention_layers = None if attention_layers is None else list(attention_layers)
        self.hidden_ratio = hidden_ratio
        default_width = mlp_width(hidden_size, hidden_ratio) if mlp == "swiglu" else int(hidden_ratio * hidden_size)
        self.intermediate_size = intermediate_size or default_width
        self.norm_placement = norm_placement
        self.norm_eps = norm_eps
        self.norm_affine = norm_affine
        self.norm, self.mlp, self.modulation, self.head_bias = norm, mlp, modulation, head_bias
        self.embedding_scale = embedding_scale
        given = {
            "attention": attention,
            "hgrn": hgrn,
            "retnet": retnet,
            "gla": gla,
            "hgrn2": hgrn2,
            "deltanet": deltanet,
            "gated_deltanet": gated_deltanet,
        }
        given |= {name: kwargs.pop(name) for name in MIXERS if name in kwargs}
        for name in MIXERS | {name: None for name, options in given.items() if options is not None}:
            setattr(self, name, _complete(name, given.get(name)))
        refuse_misspelt(kwargs, [*given, *self.__dict__])
        self.initializer_range = initializer_range
        if convolution_init not in ("normal", "uniform"):
            raise ValueError(f"convolution_init: {convolution_init!r} given, expected 'normal' or 'uniform'")
        self.convolution_init = convolution_init
        self.recompute_mlp = recompute_mlp
        if loss_chunk is not None and (not isinstance(loss_chunk, int) or loss_chunk < 1):
            raise ValueError(f"loss_chunk: {loss_chunk!r} given, expected a positive number of positions or None")
        self.loss_chunk = loss_chunk
        self.use_cache = use_cache
        super().__init__(**kwargs)
        # Behind the base class, which has fields of these names with defaults of its own.
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        self.tie_word_embeddings = tie_word_embeddings

    @property
    def fingerprint(self) -> str:
        """Short name of everything that shapes a state: a state made by another architecture is refused."""
        own = vars(
            self
        )  # every read of an attribute goes through the base class, and this is asked for with every run of blocks
        shape = {"D": own["hidden_size"], "mixers": own["mixers"]} | {name: own[name] for name in set(own["mixers"])}
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


def _complete(name: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """All options of a mixer, defaults filled in."""
    if options is not None and not isinstance(options, dict):
        raise TypeError(f"{name}: the mixer's options are a dict, got {options!r}")
    return asdict(make_options(name, dict(options or {})))


def refuse_misspelt(unknown: dict[str, Any], known: list[str]) -> None:
    """The base class keeps any keyword as an attribute, so that a misspelt one would be lost without a word."""
    inherited = {*dir(PreTrainedConfig), *PreTrainedConfig().to_dict()} if unknown else set()
    for name in unknown:
        if name not in inherited and (close := get_close_matches(name, known, 1, 0.8)):
            raise TypeError(f"{name}: unknown keyword; did you mean {close[0]!r}?")


def mlp_width(hidden_size: int, ratio: float) -> int:
    """:func:`published_mlp_width`, with multiples of 32 for models narrower than 256."""
    return published_mlp_width(hidden_size, ratio, 256 if hidden_size >= 256 else 32)


def published_mlp_width(hidden_size: int, ratio: float, multiple: int = 256) -> int:
    """Smallest multiple of 256 that is at least floor(2 · ratio · D / 3)."""
    return -(-int(2 * ratio * hidden_size / 3) // multiple) * multiple
