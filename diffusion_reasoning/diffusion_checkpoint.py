r"""Released masked-diffusion models: their configurations and weight names, both ways.

=========== ============================ ==================================================================
family      ``model_type``               what it is here
=========== ============================ ==================================================================
LLaDA       ``llada``                    attention, RMS norms in front, no biases, rotary base 5e5
Dream       ``dream``, ``Dream``         the same with biases on q, k, v and shared keys; ``shift``
MDLM        ``mdlm``                     layer norms, GELU MLP, modulation; sigma = 0 unless conditioned
BD3-LM      ``bd3lm``                    MDLM's network; ``block_length`` = its block size
=========== ============================ ==================================================================

LLaDA (9 tensors a block and 3 besides; ``ff_proj`` is the *gate*)::

    model.transformer.wte.weight                                backbone.model.embeddings.weight
    model.transformer.blocks.i.{attn_norm,ff_norm}.weight       ….layers.i.{attn_norm,mlp_norm}.weight
    model.transformer.blocks.i.{q,k,v}_proj, attn_out           ….layers.i.attn.{q,k,v,o}_proj
    model.transformer.blocks.i.{ff_proj,up_proj,ff_out}         ….layers.i.mlp.{gate,up,down}_proj
    model.transformer.ln_f.weight, ff_out.weight                backbone.model.norm.weight, lm_head.weight

Dream has the names of Qwen2 (12 tensors a block and 3 besides). MDLM and BD3-LM (names with or without ``backbone.`` in
front)::

    vocab_embed.embedding                                       backbone.model.embeddings.weight
    sigma_map.mlp.{0,2}                                         embed_time.mlp.{0,2}
    blocks.i.{norm1,norm2}.weight                               ….layers.i.{attn_norm,mlp_norm}.weight
    blocks.i.attn_qkv.weight [3d, d], attn_out.weight           ….layers.i.attn.{q,k,v}_proj, o_proj
    blocks.i.mlp.{0,2}, adaLN_modulation                        ….layers.i.mlp.{up,down}_proj, modulation
    output_layer.{norm_final,linear,adaLN_modulation}           model.norm, lm_head, model.norm_modulation

The rotary layout of MDLM (half-split, base 10000) is taken from its paper's code family and could not be checked against
released weights here.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from latentcot.backbone.checkpoint_config import CheckpointError
from latentcot.backbone.checkpoint_files import open_tensors
from latentcot.backbone.checkpoint_keys import CheckpointMismatchError, Piece
from latentcot.diffusion_reasoning.diffusion_lm import DiffusionConfig, DiffusionLM

LLADA_8B: dict[str, Any] = {
    "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
    "embedding_size": 126464, "vocab_size": 126464, "max_sequence_length": 4096, "rope_theta": 5e5, "rms_norm_eps": 1e-5,
    "layer_norm_type": "rms", "activation_type": "silu", "block_type": "llama", "weight_tying": False,
    "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081,
}  # fmt: skip
DREAM_7B: dict[str, Any] = {
    "model_type": "Dream", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "mask_token_id": 151666, "pad_token_id": 151643, "eos_token_id": 151643,
    "bos_token_id": 151643, "max_position_embeddings": 131072,
}  # fmt: skip
MDLM_SMALL: dict[str, Any] = {
    "model_type": "mdlm", "hidden_dim": 768, "cond_dim": 128, "n_blocks": 12, "n_heads": 12, "model_length": 1024,
    "vocab_size": 50258, "time_conditioning": False, "dropout": 0.1,
}  # fmt: skip
BD3LM_SMALL: dict[str, Any] = {**MDLM_SMALL, "model_type": "bd3lm", "block_size": 4, "cross_attn": True}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llada-8b": LLADA_8B,
    "dream-7b": DREAM_7B,
    "mdlm-small": MDLM_SMALL,
    "bd3lm-small": BD3LM_SMALL,
}
IGNORED_ENDINGS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "block_diff_mask")
"""Buffers that older files hold; they are computed here."""
_BACKBONE = "backbone.model"


@dataclass(frozen=True)
class Source:
    """One stored tensor and the tensors of the model that it holds, one behind the other along the first axis."""

    key: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """``config``: published fields to keywords of :class:`DiffusionConfig`; ``keys``: every tensor of such a model;
    ``needed``: fields without which the configuration means nothing; ``fixed``: fields that must have one value where
    they are given."""

    name: str
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    keys: Callable[[DiffusionConfig], list[Source]]
    needed: tuple[str, ...]
    fixed: Mapping[str, Any]


# -- configurations ------------------------------------------------------------------------------------------------------


def _llada_config(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": values.get("embedding_size") or values["vocab_size"],
        "hidden_size": values["d_model"],
        "num_hidden_layers": values["n_layers"],
        "intermediate_size": values["mlp_hidden_size"],
        "norm_eps": values["rms_norm_eps"],
        "attention": {
            "num_heads": values["n_heads"],
            "num_kv_heads": values.get("n_kv_heads") or values["n_heads"],
            "rope_theta": float(values["rope_theta"]),
        },
        "tie_word_embeddings": values.get("weight_tying", False),
        "max_position_embeddings": values.get("max_sequence_length"),
        "schedule_eps": 0.0,
    }


def _dream_config(values: Mapping[str, Any]) -> dict[str, Any]:
    heads = values["num_attention_heads"]
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_hidden_layers": values["num_hidden_layers"],
        "intermediate_size": values["intermediate_size"],
        "norm_eps": values["rms_norm_eps"],
        "attention": {
            "num_heads": heads,
            "num_kv_heads": values.get("num_key_value_heads") or heads,
            "rope_theta": float(values["rope_theta"]),
            "bias": "qkv",
        },
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "max_position_embeddings": values.get("max_position_embeddings"),
        "schedule_eps": 0.0,
        "shift": True,
    }


def _mdlm_config(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_dim"],
        "num_hidden_layers": values["n_blocks"],
        "intermediate_size": 4 * values["hidden_dim"],
        "norm": "layer",
        "norm_eps": 1e-5,
        "mlp": "gelu",
        "modulation": values["cond_dim"],
        "head_bias": values.get("head_bias", True),
        "attention": {"num_heads": values["n_heads"], "rope_theta": 10000.0},
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "max_position_embeddings": values.get("model_length"),
        "time_conditioning": bool(values.get("time_conditioning", False)),
        "block_length": values.get("block_size"),
        "mask_token_id": values.get("mask_token_id", values["vocab_size"] - 1),
    }


# -- names ---------------------------------------------------------------------------------------------------------------


def _llada_keys(config: DiffusionConfig) -> list[Source]:
    top = "model.transformer"
    parts = {
        "attn_norm": "attn_norm", "ff_norm": "mlp_norm", "q_proj": "attn.q_proj", "k_proj": "attn.k_proj",
        "v_proj": "attn.v_proj", "attn_out": "attn.o_proj", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj",
    }  # fmt: skip
    sources = [Source(f"{top}.wte.weight", (f"{_BACKBONE}.embeddings.weight",))]
    for i in range(config.num_hidden_layers):
        sources += [
            Source(f"{top}.blocks.{i}.{there}.weight", (f"{_BACKBONE}.layers.{i}.{here}.weight",))
            for there, here in parts.items()
        ]
    sources.append(Source(f"{top}.ln_f.weight", (f"{_BACKBONE}.norm.weight",)))
    if not config.tie_word_embeddings:
        sources.append(Source(f"{top}.ff_out.weight", ("backbone.lm_head.weight",)))
    return sources


def _dream_keys(config: DiffusionConfig) -> list[Source]:
    parts = {
        **{f"self_attn.{x}_proj.{kind}": f"attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")},
        "self_attn.o_proj.weight": "attn.o_proj.weight",
        **{f"mlp.{x}_proj.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "mlp_norm.weight",
    }
    sources = [Source("model.embed_tokens.weight", (f"{_BACKBONE}.embeddings.weight",))]
    for i in range(config.num_hidden_layers):
        sources += [
            Source(f"model.layers.{i}.{there}", (f"{_BACKBONE}.layers.{i}.{here}",)) for there, here in parts.items()
        ]
    sources.append(Source("model.norm.weight", (f"{_BACKBONE}.norm.weight",)))
    if not config.tie_word_embeddings:
        sources.append(Source("lm_head.weight", ("backbone.lm_head.weight",)))
    return sources


def _mdlm_keys(config: DiffusionConfig) -> list[Source]:
    kinds = ("weight", "bias")
    sources = [Source("vocab_embed.embedding", (f"{_BACKBONE}.embeddings.weight",))]
    sources += [Source(f"sigma_map.mlp.{n}.{kind}", (f"embed_time.mlp.{n}.{kind}",)) for n in (0, 2) for kind in kinds]
    for i in range(config.num_hidden_layers):
        there, here = f"blocks.{i}", f"{_BACKBONE}.layers.{i}"
        sources += [
            Source(f"{there}.norm1.weight", (f"{here}.attn_norm.weight",)),
            Source(f"{there}.attn_qkv.weight", tuple(f"{here}.attn.{x}_proj.weight" for x in "qkv")),
            Source(f"{there}.attn_out.weight", (f"{here}.attn.o_proj.weight",)),
            Source(f"{there}.norm2.weight", (f"{here}.mlp_norm.weight",)),
            *(Source(f"{there}.mlp.0.{kind}", (f"{here}.mlp.up_proj.{kind}",)) for kind in kinds),
            *(Source(f"{there}.mlp.2.{kind}", (f"{here}.mlp.down_proj.{kind}",)) for kind in kinds),
            *(Source(f"{there}.adaLN_modulation.{kind}", (f"{here}.modulation.{kind}",)) for kind in kinds),
        ]
    sources.append(Source("output_layer.norm_final.weight", (f"{_BACKBONE}.norm.weight",)))
    if not config.tie_word_embeddings:
        sources.append(Source("output_layer.linear.weight", ("backbone.lm_head.weight",)))
    if config.head_bias:
        sources.append(Source("output_layer.linear.bias", ("backbone.lm_head.bias",)))
    sources += [
        Source(f"output_layer.adaLN_modulation.{kind}", (f"{_BACKBONE}.norm_modulation.{kind}",)) for kind in kinds
    ]
    return sources


_MDLM = Family("MDLM", _mdlm_config, _mdlm_keys, ("hidden_dim", "cond_dim", "n_blocks", "n_heads", "vocab_size"), {})
FAMILIES: dict[str, Family] = {
    "llada": Family(
        "LLaDA",
        _llada_config,
        _llada_keys,
        ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "rope_theta", "rms_norm_eps", "mask_token_id"),
        {
            "layer_norm_type": "rms",
            "activation_type": "silu",
            "block_type": "llama",
            "rope": True,
            "alibi": False,
            "include_bias": False,
            "include_qkv_bias": False,
            "bias_for_layer_norm": False,
            "attention_layer_norm": False,
            "scale_logits": False,
            "input_emb_norm": False,
        },
    ),
    "dream": Family(
        "Dream",
        _dream_config,
        _dream_keys,
        (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
            "rope_theta",
            "rms_norm_eps",
            "mask_token_id",
        ),
        {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False},
    ),
    "mdlm": _MDLM,
    "bd3lm": Family("BD3-LM", _mdlm_config, _mdlm_keys, (*_MDLM.needed, "block_size"), {}),
}


def find_family(values: Mapping[str, Any]) -> Family:
    """By ``model_type``. ``CheckpointError`` names the known ones."""
    family = FAMILIES.get(str(values.get("model_type")).lower())
    if family is None:
        raise CheckpointError(
            f"config: model_type {values.get('model_type')!r} is no masked-diffusion model that is known here; valid: "
            f"{', '.join(FAMILIES)}"
        )
    return family


def read_published_config(values: Mapping[str, Any]) -> DiffusionConfig:
    """A published ``config.json`` as ours.

    Raises:
        CheckpointError: an unknown family, a field that is missing or has a value that this network does not have.
    """
    family = find_family(values)
    if missing := [name for name in family.needed if name not in values]:
        raise CheckpointError(f"config: fields {missing} are missing from a configuration of {family.name}")
    for name, value in family.fixed.items():
        if values.get(name, value) != value:
            raise CheckpointError(f"config: {name} = {values[name]!r} given, expected {value!r}")
    special: dict[str, Any] = {name: values.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    own: dict[str, Any] = {"mask_token_id": values.get("mask_token_id")} | family.config(values)
    try:
        return DiffusionConfig(mixer="attention", **own, **special)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config: {error}") from error


def empty_diffusion(values: Mapping[str, Any]) -> DiffusionLM:
    """The model of a published configuration on the meta device: names and shapes without memory."""
    config = read_published_config(values)
    with torch.device("meta"), no_init_weights():
        return DiffusionLM(config)


def published_shapes(model: DiffusionLM, family: Family) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a released checkpoint of these sizes."""
    here = model.state_dict()
    shapes = {}
    for source in family.keys(model.config):
        first = here[source.names[0]].shape
        rows = sum(here[name].shape[0] for name in source.names)
        shapes[source.key] = (rows, *first[1:])
    return shapes


def export_published(model: DiffusionLM, model_type: str) -> dict[str, Tensor]:
    """The model's tensors under released names (copies where several were joined)."""
    here = model.state_dict()
    sources = find_family({"model_type": model_type}).keys(model.config)
    covered = {name for source in sources for name in source.names}
    left = sorted(set(here) - covered - ({"backbone.lm_head.weight"} if model.config.tie_word_embeddings else set()))
    if left or covered - set(here):
        raise CheckpointError(
            f"export: no {model_type}: tensors {left[:4]} have no name there, {sorted(covered - set(here))[:4]} are missing"
        )
    return {
        source.key: here[source.names[0]]
        if len(source.names) == 1
        else torch.cat([here[name] for name in source.names])
        for source in sources
    }


def load_diffusion_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    values: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> DiffusionLM:
    """A released model, in evaluation mode.

    Args:
        source: folder with ``config.json`` and safetensors (whole or in shards), or a state dict.
        values: the published configuration; default: the folder's.
        dtype: cast on the way; ``None`` = as stored.

    Raises:
        CheckpointError: a file is missing or damaged, or the configuration is not understood.
        CheckpointMismatchError: tensors are missing, unknown or of other shapes; lists them all.
    """
    if isinstance(source, Mapping):
        if values is None:
            raise CheckpointError("values: a state dict has no configuration; give the published one")
        shapes = {key: tuple(tensor.shape) for key, tensor in source.items()}
        return _load(values, shapes, lambda key: source[key], dtype, torch.device(device))
    folder = Path(source)
    values = _read_values(folder) if values is None else values
    stored = open_tensors(folder, "model", ".safetensors")
    if stored is None:
        raise CheckpointError(f"checkpoint: no model.safetensors in {folder}, whole or with an index")
    with stored:
        return _load(values, stored.shapes, lambda key: stored.read(Piece(key)), dtype, torch.device(device))


def _load(
    values: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    dtype: torch.dtype | None,
    device: torch.device,
) -> DiffusionLM:
    family = find_family(values)
    prefix = _prefix(family, shapes)
    if family.config is _mdlm_config:
        values = {"head_bias": f"{prefix}output_layer.linear.bias" in shapes, **values}
    model = empty_diffusion(values)
    wanted = {prefix + key: shape for key, shape in published_shapes(model, family).items()}
    missing = [key for key in wanted if key not in shapes]
    unexpected = [key for key in shapes if key not in wanted and not key.endswith(IGNORED_ENDINGS)]
    differing = {
        key: (list(shapes[key]), list(shape)) for key, shape in wanted.items() if shapes.get(key, shape) != shape
    }
    if missing or unexpected or differing:
        raise CheckpointMismatchError(missing, unexpected, differing)
    here = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for source in family.keys(model.config):
        stored = read(prefix + source.key)
        pieces = stored.split([here[name].shape[0] for name in source.names])
        for name, piece in zip(source.names, pieces, strict=True):
            # a copy: pieces of one storage could not be saved apart, and the caller's tensors stay the caller's
            tensors[name] = piece.to(device, dtype or piece.dtype, copy=True)
    model.load_state_dict(tensors, strict=False, assign=True)  # a tied head is absent; all others were compared
    model.backbone.tie_weights()
    model.config.dtype = tensors[f"{_BACKBONE}.embeddings.weight"].dtype
    return model.eval()


def _prefix(family: Family, keys: Iterable[str]) -> str:
    """MDLM's names come with and without ``backbone.``."""
    return "backbone." if family.config is _mdlm_config and "backbone.vocab_embed.embedding" in set(keys) else ""


def _read_values(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"folder: no config.json in {folder}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {path} is damaged ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"checkpoint: {path} is damaged: an object is needed, got {type(values).__name__}")
    return values
