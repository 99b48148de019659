"""Ouro's published configuration and weight names (arXiv:2510.25741), both ways.

========================================================== ======================================
published                                                  here
========================================================== ======================================
``model.embed_tokens.weight``                              ``backbone.model.embeddings.weight``
``model.layers.i.self_attn.{q,k,v,o}_proj.weight``         ``backbone.model.layers.i.attn.…``
``model.layers.i.mlp.{gate,up,down}_proj.weight``          the same behind ``backbone.``
``model.layers.i.input_layernorm.weight``                  ``….attn_norm.weight`` (before attention)
``model.layers.i.input_layernorm_2.weight``                ``….attn_norm_2.weight`` (on its output)
``model.layers.i.post_attention_layernorm.weight``         ``….mlp_norm.weight``
``model.layers.i.post_attention_layernorm_2.weight``       ``….mlp_norm_2.weight``
``model.norm.weight``, ``lm_head.weight``                  the same behind ``backbone.``
``model.early_exit_gate.{weight,bias}``                    ``gate.{weight,bias}``
========================================================== ======================================

11 tensors a layer and 5 besides.
"""

import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.backbone.checkpoint_config import CheckpointError
from latentcot.backbone.checkpoint_files import open_tensors
from latentcot.backbone.checkpoint_keys import CheckpointMismatchError, Piece
from latentcot.recurrent_depth.ouro import Ouro

OURO_1_4B: dict[str, Any] = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "vocab_size": 49152,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
}
OURO_2_6B: dict[str, Any] = {**OURO_1_4B, "num_hidden_layers": 48}
PUBLISHED: dict[str, dict[str, Any]] = {"ouro-1.4b": OURO_1_4B, "ouro-2.6b": OURO_2_6B}

RENAMED = {
    "embed_tokens": "embeddings",
    "self_attn": "attn",
    "input_layernorm": "attn_norm",
    "input_layernorm_2": "attn_norm_2",
    "post_attention_layernorm": "mlp_norm",
    "post_attention_layernorm_2": "mlp_norm_2",
}
_BACK = {ours: theirs for theirs, ours in RENAMED.items()}
_HINTS = (
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "model_type", "pad_token_id", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
"""Fields that say how to run or train, not what is computed."""


def our_name(published: str) -> str:
    """A published tensor name as :class:`~latentcot.recurrent_depth.ouro.Ouro` has it (whether or not there is such a tensor)."""
    if published.startswith("model.early_exit_gate."):
        return published.removeprefix("model.early_exit_")
    return "backbone." + ".".join(RENAMED.get(part, part) for part in published.split("."))


def published_name(ours: str) -> str:
    """The inverse of :func:`our_name`."""
    if ours.startswith("gate."):
        return "model.early_exit_" + ours
    return ".".join(_BACK.get(part, part) for part in ours.removeprefix("backbone.").split("."))


def read_config(values: Mapping[str, Any]) -> tuple[HybridConfig, dict[str, Any]]:
    """A published ``config.json`` as backbone configuration and settings of the method.

    Raises:
        CheckpointError: a field is missing, unknown, or has a value that this backbone does not have.
    """
    known = (
        *OURO_1_4B,
        *_HINTS,
        "attention_bias",
        "hidden_act",
        "rope_scaling",
        "sliding_window",
        "use_sliding_window",
    )
    for name in values:
        # What the table of layers and the like say is checked by the weights' names; a field of an unknown effect is refused.
        if name not in (*known, "layer_types", "max_window_layers"):
            close = get_close_matches(name, known, 1, 0.8)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise CheckpointError(f"config: field {name!r} means nothing here and may matter{hint}")
    optional = ("head_dim", "num_key_value_heads", "max_position_embeddings", "early_exit_threshold")
    if missing := sorted(set(OURO_1_4B) - set(values) - set(optional)):
        raise CheckpointError(f"config: fields {missing} are missing")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    expected = {
        "head_dim": width // heads,
        "attention_bias": False,
        "hidden_act": "silu",
        "rope_scaling": None,
        "use_sliding_window": False,
    }
    for name, value in expected.items():
        if values.get(name, value) not in (value, None):
            raise CheckpointError(f"config: {name} = {values[name]!r} given, expected {value!r}")
    if set(values.get("layer_types") or ()) - {"full_attention"}:
        raise CheckpointError(
            f"config: layer_types {sorted(set(values['layer_types']))} given, expected full attention alone"
        )
    config = HybridConfig(
        vocab_size=values["vocab_size"],
        hidden_size=width,
        num_hidden_layers=values["num_hidden_layers"],
        mixer="attention",
        intermediate_size=values["intermediate_size"],
        norm_placement="sandwich_pre_residual",
        norm_eps=values["rms_norm_eps"],
        attention={
            "num_heads": heads,
            "num_kv_heads": values.get("num_key_value_heads") or heads,
            "rope_theta": float(values["rope_theta"]),
        },
        initializer_range=values.get("initializer_range", 0.02),
        tie_word_embeddings=values["tie_word_embeddings"],
    )
    return config, {"steps": values["total_ut_steps"], "q": float(values.get("early_exit_threshold", 1.0))}


def empty_ouro(values: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Ouro:
    """The model of a published configuration on the meta device: names and shapes without memory."""
    config, own = read_config(values)
    with torch.device("meta"), no_init_weights():
        return Ouro(HybridForCausalLM(config), {**own, **(settings or {})})


def published_tensors(model: Ouro) -> dict[str, Tensor]:
    """State of ``model`` under published names; a tied head is left out."""
    tensors = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    if model.backbone.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    return tensors


def load_published(model: Ouro, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors of published names into ``model``, strictly.

    Raises:
        CheckpointMismatchError: names or shapes differ; lists them all, and the model is as it was.
    """
    _compare({name: tuple(t.shape) for name, t in tensors.items()}, model)
    wanted = published_tensors(model)
    with torch.no_grad():
        for name, target in wanted.items():
            target.copy_(tensors[name])


def load_ouro(
    folder: str | os.PathLike[str], settings: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
) -> Ouro:
    """Read a folder with ``config.json`` and safetensors, whole or in shards.

    Args:
        settings: override those of the configuration.
        dtype: cast to it; ``None`` = as stored.

    Raises:
        CheckpointError: a file is missing or damaged, or the configuration is not understood.
        CheckpointMismatchError: names or shapes differ.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"folder: no config.json in {folder}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {path} is damaged ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"checkpoint: {path} is damaged: an object is needed, got {type(values).__name__}")
    model = empty_ouro(values, settings)
    stored = open_tensors(folder, "model", ".safetensors")
    if stored is None:
        raise CheckpointError(f"checkpoint: no model.safetensors in {folder}, whole or with an index")
    with stored:
        _compare(stored.shapes, model)
        read = {our_name(name): stored.read(Piece(name)) for name in published_tensors(model)}
    read = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in read.items()}
    model.load_state_dict(read, strict=False, assign=True)  # a tied head is absent; all others were compared
    model.backbone.tie_weights()
    return model.eval()


def _compare(stored: Mapping[str, tuple[int, ...]], model: Ouro) -> None:
    wanted = {name: tuple(t.shape) for name, t in published_tensors(model).items()}
    missing = [name for name in wanted if name not in stored]
    unexpected = [name for name in stored if name not in wanted]
    shapes = {
        name: (list(stored[name]), list(shape))
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    }
    if missing or unexpected or shapes:
        raise CheckpointMismatchError(missing, unexpected, shapes)
