"""Configurations of the hybrid study's checkpoint format (arXiv:2507.06457), here and back.

``model_type`` names the linear mixer, the mixer's options stand beside the sizes under the names that they have here, and ``attn`` (a
dict, or a list of dicts) names the layers that are full attention, in any order. Older files differ:

================================= ===================================================================================
in the file                       means
================================= ===================================================================================
``rms_norm_eps``                  ``norm_eps``
``intermediate_size: null``       smallest multiple of 256 that is at least 2 · hidden_ratio · D / 3
an option that is not there       the format's default (:data:`FAMILIES`), which need not be ours
``attn_mode``, ``fuse_*``, ...    hints how to run; ignored
================================= ===================================================================================
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedConfig

from latentcot.backbone.config import HybridConfig, published_mlp_width
from latentcot.backbone.mixers import find_mixer
from latentcot.backbone.mixers.deltanet import HEAD_WIDTH

REQUIRED = object()
"""Default of a field that the configuration must have."""


class CheckpointError(ValueError):
    """A checkpoint that can not be read, written, or understood."""


class UnknownFamilyError(CheckpointError):
    """A checkpoint of a model family that this backbone does not have."""


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of the format.

    Args:
        mixer: our name of its linear mixer.
        architecture: class name in ``architectures``.
        fields: the mixer's options and what a configuration without the field means; option and field have the same name.
        hidden_ratio: what a configuration without it means.
    """

    mixer: str
    architecture: str
    fields: Mapping[str, Any]
    hidden_ratio: float = 4


FAMILIES = {
    "hgrn": Family(
        "hgrn",
        "HGRNForCausalLM",
        {
            "expand_ratio": 1,
            "use_short_conv": False,
            "conv_size": 4,
            "use_lower_bound": True,
            "elementwise_affine": True,
        },
    ),
    "retnet": Family(
        "retnet",
        "RetNetForCausalLM",
        {
            "num_heads": 8,
            "num_kv_heads": None,
            "expand_k": 1,
            "expand_v": 2,
            "feature_map": None,
            "use_output_gate": True,
        },
        hidden_ratio=2,
    ),
    "gla": Family(
        "gla",
        "GLAForCausalLM",
        {
            "num_heads": 4,
            "num_kv_heads": None,
            "expand_k": 0.5,
            "expand_v": 1,
            "clamp_min": None,
            "feature_map": None,
            "use_output_gate": True,
            "use_short_conv": False,
            "conv_size": 4,
        },
    ),
    "hgrn2": Family(
        "hgrn2",
        "HGRN2ForCausalLM",
        {"num_heads": None, "expand_ratio": 128, "use_short_conv": False, "conv_size": 4, "use_lower_bound": True},
    ),
    "delta_net": Family(
        "deltanet",
        "DeltaNetForCausalLM",
        {
            "num_heads": REQUIRED,
            "expand_k": 1,
            "expand_v": 1,
            "use_beta": True,
            "use_gate": False,
            "use_output_norm": True,
            "qk_activation": "silu",
            "qk_norm": "l2",
            "use_short_conv": True,
            "conv_size": 4,
            "allow_neg_eigval": False,
        },
    ),
    "gated_deltanet": Family(
        "gated_deltanet",
        "GatedDeltaNetForCausalLM",
        {
            "num_heads": 6,
            "head_dim": 256,
            "expand_v": 2,
            "num_v_heads": None,
            "use_short_conv": True,
            "conv_size": 4,
            "use_gate": True,
            "allow_neg_eigval": False,
        },
    ),
    "transformer": Family("attention", "TransformerForCausalLM", {}),
}
"""By ``model_type``."""

ATTENTION_FIELDS: dict[str, Any] = {
    "num_heads": REQUIRED,
    "num_kv_heads": None,
    "qkv_bias": False,
    "window_size": None,
    "rope_theta": 10000.0,
}
"""Fields of ``attn``, and of a transformer itself."""

MUST_BE: dict[str, tuple[Any, ...]] = {
    "elementwise_affine": (True, None),
    "hidden_act": ("swish", "silu", None),
}
"""Fields with which another model would be meant, where a family does not list them, and the values that are ours."""

HINTS = {
    *("attn_mode", "share_conv_kernel", "use_gk", "use_gv", "max_position_embeddings", "use_cache", "auto_map"),
    *(
        "fuse_norm",
        "fuse_swiglu",
        "fuse_cross_entropy",
        "fuse_linear_cross_entropy",
        "use_l2warp",
        "torch_dtype",
        "qk_norm",
    ),
}
"""Fields that say how to run, or say nothing any more."""

HINTS_OF_A_FAMILY = {"retnet": {"use_short_conv", "conv_size"}}
"""Fields that the published models of a family never used, whatever they say."""

SHARED = (
    *("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "hidden_ratio", "intermediate_size", "norm_eps"),
    *(
        "rms_norm_eps",
        "tie_word_embeddings",
        "initializer_range",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "attn",
    ),
)


def find_family(model_type: Any) -> Family:
    """Raises ``UnknownFamilyError`` with what there is, and the closest."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    close = get_close_matches(str(model_type), FAMILIES, 1)
    raise UnknownFamilyError(
        f"checkpoint: model_type {model_type!r} is of another family, expected one of {', '.join(FAMILIES)}"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def config_from_published(values: Mapping[str, Any]) -> tuple[HybridConfig, dict[str, Any], dict[str, Any]]:
    """Read a ``config.json`` of the format.

    Returns:
        our configuration; the fields that were ignored as hints; the fields that mean nothing to us (one of them could change what
        the model computes: look at them).

    Raises:
        UnknownFamilyError: another ``model_type``.
        CheckpointError: a field is missing, contradicts another, or asks for what this backbone does not do.
    """
    model_type = values.get("model_type")
    family = find_family(model_type)
    fields = ATTENTION_FIELDS if family.mixer == "attention" else family.fields
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if not isinstance(values.get(name), int):
            raise CheckpointError(f"config.json: {name} is needed and must be an integer, got {values.get(name)!r}")
    for name, allowed in MUST_BE.items():
        if name not in fields and values.get(name) not in allowed:
            raise CheckpointError(f"config.json: {name} = {values[name]!r} is not supported, expected {allowed[0]!r}")
    width = values["hidden_size"]
    ratio = _filled(values, "hidden_ratio", family.hidden_ratio)
    options: dict[str, Any] = {}
    attention: dict[str, Any] = {}
    full = None
    if family.mixer == "attention":
        if values.get("qk_norm"):
            raise CheckpointError(f"config.json: qk_norm = {values['qk_norm']!r} is not supported, expected false")
        attention = _attention_options(values, "config.json")
    else:
        options = {name: _filled(values, name, default) for name, default in fields.items()}
        if family.mixer == "hgrn2" and options["num_heads"] is not None and values.get("expand_ratio", 0) is None:
            options["expand_ratio"] = None  # then the number of heads decides
        if values.get("attn"):
            attention, full = _read_attention(values["attn"])
    mixers: dict[str, Any] = {
        name: given for name, given in ((family.mixer, options), ("attention", attention)) if given
    }
    try:
        config = HybridConfig(
            vocab_size=values["vocab_size"],
            hidden_size=width,
            num_hidden_layers=values["num_hidden_layers"],
            mixer=family.mixer,
            attention_layers=full,
            hidden_ratio=ratio,
            intermediate_size=values.get("intermediate_size") or published_mlp_width(width, ratio),
            norm_eps=_filled(values, "norm_eps", _filled(values, "rms_norm_eps", 1e-6)),
            initializer_range=_filled(values, "initializer_range", 0.02),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            pad_token_id=values.get("pad_token_id"),
            bos_token_id=values.get("bos_token_id", 1),
            eos_token_id=values.get("eos_token_id", 2),
            **mixers,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {error}") from error
    hints = HINTS | HINTS_OF_A_FAMILY.get(str(model_type), set())
    inherited = set(PreTrainedConfig().to_dict())
    rest = {k: v for k, v in values.items() if k not in {*fields, *SHARED, *MUST_BE}}
    ignored = {k: v for k, v in rest.items() if k in hints}
    unknown = {k: v for k, v in rest.items() if k not in hints | inherited}
    for group in _attention_groups(values.get("attn") if family.mixer != "attention" else None):
        unknown |= {f"attn.{k}": v for k, v in group.items() if k not in {"layers", "qk_norm", *ATTENTION_FIELDS}}
    return config, ignored, unknown


def config_to_published(config: HybridConfig) -> dict[str, Any]:
    """The ``config.json`` of the format that means ``config``.

    Raises:
        CheckpointError: the format can not say it (several linear mixers, another norm placement, options of our own).
    """
    linear = sorted(set(config.mixers) - {"attention"})
    if len(linear) > 1:
        raise CheckpointError(
            f"export: the format has one linear mixer a model, this one has {', '.join(linear)}; use save_pretrained"
        )
    mixer = linear[0] if linear else "attention"
    known = {family.mixer: model_type for model_type, family in FAMILIES.items()}
    if mixer not in known:
        raise CheckpointError(
            f"export: the format has no mixer {mixer!r}, only {', '.join(known)}; use save_pretrained"
        )
    family = FAMILIES[known[mixer]]
    for name, only in (
        ("norm_placement", "pre"),
        ("norm_affine", True),
        ("embedding_scale", 1.0),
        ("norm", "rms"),
        ("mlp", "swiglu"),
        ("modulation", None),
        ("head_bias", False),
    ):
        if getattr(config, name) != only:
            raise CheckpointError(
                f"export: the format knows {name} = {only!r} alone, got {getattr(config, name)!r}; use save_pretrained"
            )
    full = [i for i, name in enumerate(config.mixers) if name == "attention"]
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": known[mixer],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_ratio": config.hidden_ratio,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "swish",
        "norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    attention = _published_attention(config) if full else {}
    if mixer == "attention":
        return values | attention
    options = dict(getattr(config, mixer))
    if mixer == "deltanet":  # its field has no null
        options["num_heads"] = resolved_options(config, mixer)["num_heads"]
    _refuse_other_options(mixer, options, family.fields)
    values |= {name: options[name] for name in family.fields}
    return values | {"attn": {"layers": full} | attention if full else None}


def resolved_options(config: HybridConfig, mixer: str) -> dict[str, Any]:
    """Options of a mixer with the numbers of heads that ``None`` stands for, so that equal layers have equal options."""
    options, width = dict(getattr(config, mixer)), config.hidden_size
    if mixer == "deltanet" and options["num_heads"] is None:
        options["num_heads"] = width // HEAD_WIDTH
    if mixer == "hgrn2":
        options["num_heads"] = options["num_heads"] or width // options["expand_ratio"]
        options["expand_ratio"] = options["expand_ratio"] or width // options["num_heads"]
    for name in ("num_kv_heads", "num_v_heads"):
        if name in options:
            options[name] = options[name] or options["num_heads"]
    return options


def _filled(values: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field, or what its absence (or null) means."""
    value = values.get(name)
    if value is None and default is REQUIRED:
        raise CheckpointError(f"config.json: {name} is needed, its value differs between published models; got {value}")
    return default if value is None else value


def _attention_options(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        options = {name: _filled(values, name, default) for name, default in ATTENTION_FIELDS.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {str(error).removeprefix('config.json: ')}") from None
    options["bias"] = "qkv" if options.pop("qkv_bias") else "none"
    return options


def _attention_groups(attn: Any) -> list[Any]:
    return attn if isinstance(attn, list) else [attn] if attn else []


def _read_attention(attn: Any) -> tuple[dict[str, Any], list[int]]:
    """``attn``, a dict or a list of dicts, as attention options and full layers."""
    groups = _attention_groups(attn)
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("layers"), list):
            raise CheckpointError(f"config.json: attn needs a list of layers, got {group!r}")
        if group.get("qk_norm"):
            raise CheckpointError("config.json: attn.qk_norm = true is not supported, expected false")
    options = [_attention_options(group, "config.json: attn") for group in groups]
    if any(each != options[0] for each in options):
        raise CheckpointError(
            f"config.json: attn lists groups of layers with different options ({options}); one set of options serves "
            f"all attention layers here"
        )
    return options[0], [layer for group in groups for layer in group["layers"]]


def _published_attention(config: HybridConfig) -> dict[str, Any]:
    options = dict(config.attention)
    if options["bias"] not in ("none", "qkv") or options["rope_theta"] is None:
        raise CheckpointError(
            f"export: the format's attention has rotary positions, and biases on all of q, k, v or none; got "
            f"bias = {options['bias']!r}, rope_theta = {options['rope_theta']!r}; use save_pretrained"
        )
    options["qkv_bias"] = options.pop("bias") == "qkv"
    _refuse_other_options("attention", options, ATTENTION_FIELDS)
    return {name: options[name] for name in ATTENTION_FIELDS}


def _refuse_other_options(mixer: str, options: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Options that the format has no field for must be at their defaults."""
    ours = find_mixer(mixer)[1].__dataclass_fields__
    for name, value in options.items():
        if name not in fields and value != ours[name].default:
            raise CheckpointError(
                f"export: the format has no field for {mixer}.{name}, expected its default {ours[name].default!r}, got "
                f"{value!r}; use save_pretrained"
            )
