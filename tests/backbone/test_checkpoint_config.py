"""Configurations of the study's checkpoint format: the published form, its defaults, and what is refused."""

import json
from typing import Any

import pytest
import torch
from transformers.initialization import no_init_weights

from latentcot.backbone import CheckpointError, HybridForCausalLM
from latentcot.backbone.checkpoint_config import FAMILIES, config_from_published, config_to_published
from latentcot.backbone.checkpoint_keys import plan_keys
from latentcot.backbone.presets import preset, preset_names

PUBLISHED: dict[str, Any] = {
    "architectures": ["GatedDeltaNetForCausalLM"],
    "attn": {"layers": [20, 2, 5, 8, 11, 14, 17, 23], "num_heads": 16, "num_kv_heads": None, "qkv_bias": False,
             "rope_theta": 10000.0, "window_size": None},
    "attn_mode": "chunk", "bos_token_id": 1, "conv_size": 4, "eos_token_id": 2, "expand_v": 1,
    "fuse_cross_entropy": True, "fuse_norm": True, "fuse_swiglu": True, "head_dim": 256, "hidden_act": "swish",
    "hidden_ratio": 4, "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": None,
    "max_position_embeddings": 2048, "model_type": "gated_deltanet", "norm_eps": 1e-06, "num_heads": 4,
    "num_hidden_layers": 24, "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.50.0",
    "use_cache": True, "use_gate": True, "use_short_conv": True, "vocab_size": 32000,
}  # fmt: skip


def test_a_published_configuration_is_the_preset():
    config, ignored, unknown = config_from_published(PUBLISHED)
    assert unknown == {}
    assert "attn_mode" in ignored
    ours = preset("gated_deltanet-340m-3-1")
    assert config.fingerprint == ours.fingerprint
    assert config.intermediate_size == ours.intermediate_size == 2816
    assert (
        config_from_published({**PUBLISHED, "attn": None})[0].fingerprint
        == preset("gated_deltanet-340m-pure").fingerprint
    )


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_can_be_said_in_the_format(name):
    config = preset(name)
    values = json.loads(json.dumps(config_to_published(config)))
    again, ignored, unknown = config_from_published(values)
    assert again.fingerprint == config.fingerprint
    for field in ("mixers", "intermediate_size", "vocab_size", "norm_eps", "tie_word_embeddings", "hidden_ratio"):
        assert getattr(again, field) == getattr(config, field)
    assert ignored == unknown == {}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_short_configuration_means_the_formats_defaults(model_type):
    values = {"model_type": model_type, "hidden_size": 1024, "num_hidden_layers": 2, "vocab_size": 99}
    needed = {"num_heads": 8} if model_type in ("delta_net", "transformer") else {}
    config = config_from_published(values | needed)[0]
    assert config.intermediate_size == (1536 if model_type == "retnet" else 2816)
    if model_type == "gated_deltanet":
        assert (config.gated_deltanet["num_heads"], config.gated_deltanet["expand_v"]) == (6, 2)
    if needed:
        with pytest.raises(CheckpointError, match="num_heads is needed"):
            config_from_published(values)
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        with pytest.raises(CheckpointError, match=f"{name} is needed"):
            config_from_published({k: v for k, v in (values | needed).items() if k != name})


def test_attention_layers_may_come_in_groups_and_in_any_order():
    first, second = ({**PUBLISHED["attn"], "layers": layers} for layers in ([9, 3], [6]))
    config = config_from_published({**PUBLISHED, "attn": [first, second]})[0]
    assert [i for i, name in enumerate(config.mixers) if name == "attention"] == [3, 6, 9]
    with pytest.raises(CheckpointError, match="groups of layers with different options"):
        config_from_published({**PUBLISHED, "attn": [first, {**second, "window_size": 8}]})
    assert config_from_published({**PUBLISHED, "attn": [{**first, "sink": 4}]})[2] == {"attn.sink": 4}
    with pytest.raises(CheckpointError, match="listed more than once"):
        config_from_published({**PUBLISHED, "attn": [first, first]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn": {"num_heads": 16}}, "attn needs a list of layers"),
        ({"attn": {"layers": [1]}}, "attn: num_heads is needed"),
        ({"attn": {"layers": [24], "num_heads": 16}}, r"\[24\] lie outside"),
        ({"attn": [4]}, "attn needs a list of layers, got 4"),
        ({"attn": {"layers": [1], "num_heads": 16, "qk_norm": True}}, "qk_norm = true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"elementwise_affine": False}, "elementwise_affine = False is not supported"),
        ({"num_v_heads": 3}, "num_heads = 4 must divide 3"),
        ({"conv_size": 0}, "conv_size"),
    ],
)
def test_configurations_that_ask_for_something_else_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_published({**PUBLISHED, **changes})


@pytest.mark.parametrize("fused", [False, True])
def test_the_published_file_of_1_3b_fits_its_preset_tensor_by_tensor(fused):
    """459 tensors with 1,466,344,000 numbers, as its index says; shapes alone, no memory."""
    with torch.device("meta"), no_init_weights():
        model = HybridForCausalLM(preset("gated_deltanet-1.3b-pure"))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = wanted | {f"model.layers.{i}.attn.D": (8,) for i in range(24)}
    assert len(stored) == 459
    assert sum(torch.Size(shape).numel() for shape in stored.values()) == 1_466_344_000
    if fused:
        for i in range(24):
            del stored[f"model.layers.{i}.mlp.up_proj.weight"]
            stored[f"model.layers.{i}.mlp.gate_proj.weight"] = (2 * 5632, 2048)
    plan = plan_keys(stored, wanted)
    assert set(plan.pieces) == set(wanted)
    assert list(plan.dropped) == [f"model.layers.{i}.attn.D" for i in range(24)]
    assert len(plan.split) == (24 if fused else 0)
