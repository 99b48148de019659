"""Switches of the mixers: parameter names and sizes as published, and what a bad option is told."""

# pyright: reportArgumentType=false

import pytest
import torch

from latentcot.backbone.mixers import MIXERS, Mixer, find_mixer, make_options


def build(mixer: str, size: int = 1024, **values) -> Mixer:
    with torch.device("meta"):
        return find_mixer(mixer)[0](size, make_options(mixer, values))  # type: ignore[call-arg]


D = 1024
CONVOLUTIONS = {f"{x}_conv1d.weight": (D, 1, 4) for x in "qkv"}
SQUARE = {f"{x}_proj.weight": (D, D) for x in "qkvo"}
PUBLISHED = {
    "attention": SQUARE,
    "hgrn": {**{f"{x}_proj.weight": (D, D) for x in "ifgo"}, "g_norm.weight": (D,)},
    "retnet": {
        **{f"{x}_proj.weight": (D, D) for x in "qk"},
        **{f"{x}_proj.weight": (2 * D, D) for x in "vg"},
        "o_proj.weight": (D, 2 * D),
        "g_norm_swish_gate.weight": (256,),
    },
    "gla": {
        **{f"{x}_proj.weight": (D // 2, D) for x in "qk"},
        **{f"{x}_proj.weight": (D, D) for x in "vgo"},
        "gk_proj.0.weight": (16, D),
        "gk_proj.1.weight": (D // 2, 16),
        "gk_proj.1.bias": (D // 2,),
        "g_norm_swish_gate.weight": (256,),
    },
    "hgrn2": {**{f"{x}_proj.weight": (D, D) for x in "qfio"}, "g_norm.weight": (D,)},
    "deltanet": {**SQUARE, **CONVOLUTIONS, "b_proj.weight": (8, D), "o_norm.weight": (128,)},
    "gated_deltanet": {
        **SQUARE,
        **CONVOLUTIONS,
        "g_proj.weight": (D, D),
        "a_proj.weight": (4, D),
        "b_proj.weight": (4, D),
        "A_log": (4,),
        "dt_bias": (4,),
        "o_norm.weight": (256,),
    },
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_defaults_have_the_published_names_and_shapes_at_340m(mixer):
    assert {name: tuple(x.shape) for name, x in build(mixer).state_dict().items()} == PUBLISHED[mixer]


STUDY = {  # a whole model of 24 pure layers, vocabulary 32000, by MLP width
    "attention": (373_867_520, 1_364_297_728, 2816),
    "hgrn": (373_916_672, 1_364_396_032, 2816),
    "retnet": (380_165_120, 1_351_727_104, 1536),
    "gla": (374_475_776, 1_365_514_240, 2816),
    "hgrn2": (373_916_672, 1_364_396_032, 2816),
    "deltanet": (374_362_112, 1_365_677_056, 2816),
    "gated_deltanet": (399_531_200, 1_466_343_808, 2816),
}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("size", [1024, 2048])
def test_a_layer_has_its_share_of_the_published_parameters(mixer, size):
    values = {"num_heads": size // 256} if mixer == "gated_deltanet" else {}
    layer = build(mixer, size, **values)
    counted = sum(p.numel() for p in layer.parameters()) + layer.bound_width  # one row of the model's matrix
    mlp = STUDY[mixer][2] * (size // 1024) if mixer != "retnet" or size == 1024 else 2816
    whole = 24 * (counted + 3 * size * mlp + 2 * size) + size + 2 * 32000 * size
    assert whole == STUDY[mixer][size == 2048]


def names(mixer: str, **values) -> set[str]:
    return set(build(mixer, 24, **values).state_dict())


def test_switches_add_and_remove_parameters():
    two = {"num_heads": 2}
    assert names("deltanet", **two) - names("deltanet", **two, use_beta=False) == {"b_proj.weight"}
    assert names("deltanet", **two, use_gate=True) - names("deltanet", **two) == {"g_proj.weight"}
    assert names("deltanet", **two) - names("deltanet", **two, use_output_norm=False) == {"o_norm.weight"}
    for mixer, letters in (("deltanet", "qkv"), ("gla", "qkv"), ("hgrn2", "qfi")):
        plain = names(mixer, **two, use_short_conv=False)
        assert names(mixer, **two, use_short_conv=True) - plain == {f"{x}_conv1d.weight" for x in letters}
    assert names("hgrn", use_short_conv=True) - names("hgrn") == {"i_conv1d.weight", "f_conv1d.weight"}
    assert names("hgrn") - names("hgrn", elementwise_affine=False) == {"g_norm.weight"}
    for mixer in ("gla", "retnet"):
        with_gate, without = names(mixer, **two), names(mixer, **two, use_output_gate=False)
        assert with_gate - without == {"g_proj.weight", "g_norm_swish_gate.weight"}
        assert without - with_gate == {"g_norm.weight"}
    gated = {"num_heads": 2, "head_dim": 12}
    assert {n for n in names("gated_deltanet", **gated) if "conv" in n}
    assert not {n for n in names("gated_deltanet", **gated, use_short_conv=False) if "conv" in n}
    assert names("gated_deltanet", **gated) - names("gated_deltanet", **gated, use_gate=False) == {"g_proj.weight"}


@pytest.mark.parametrize(
    ("mixer", "values", "message"),
    [
        ("attention", {"num_heads": 5}, "num_heads = 5 must divide 24"),
        ("attention", {"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads = 3 must divide 4"),
        ("attention", {"num_heads": 4, "num_kv_heads": 0}, "num_kv_heads = 0 must divide 4"),
        ("attention", {"num_heads": 8}, "even head width, got 3"),
        ("attention", {"num_heads": 4, "window_size": 0}, "window_size = 0"),
        ("attention", {"bias": "all"}, "bias = 'all'"),
        ("attention", {"rotary_layout": "thirds"}, "rotary_layout = 'thirds'"),
        ("hgrn", {"expand_ratio": 0}, "expand_ratio = 0"),
        ("hgrn", {"expand_ratio": 0.3}, "whole number"),
        ("hgrn", {"conv_size": 0}, "conv_size = 0"),
        ("hgrn", {"use_lower_bounds": True}, "did you mean 'use_lower_bound'"),
        ("retnet", {"num_heads": 8}, "even head width, got 3"),
        ("retnet", {"num_heads": 5}, "num_heads = 5 must divide 24"),
        ("retnet", {"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads = 3 must divide 4"),
        ("retnet", {"num_heads": 2, "expand_v": 0.3}, "expand_v = 0.3 makes 7.2 channels of 24"),
        ("retnet", {"feature_map": "tanh"}, "feature_map = 'tanh'"),
        ("gla", {"num_heads": 5}, "num_heads = 5 must divide 12"),
        ("gla", {"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads = 3 must divide 4"),
        ("gla", {"clamp_min": 0.5}, "clamp_min"),
        ("gla", {"feature_map": "tanh"}, "feature_map = 'tanh'"),
        ("gla", {"gate_low_rank_dim": 16}, "unknown option"),
        ("hgrn2", {}, "expand_ratio = 128 must divide 24"),
        ("hgrn2", {"num_heads": 7}, "num_heads = 7 must divide 24"),
        ("hgrn2", {"expand_ratio": None}, "both None"),
        ("deltanet", {}, "must divide 24"),
        ("deltanet", {"num_heads": 5}, "num_heads = 5 must divide 24"),
        ("deltanet", {"num_heads": 2, "qk_norm": "l1"}, "qk_norm = 'l1'"),
        ("deltanet", {"num_heads": 2, "qk_norm": "sum"}, "pass through zero"),
        ("deltanet", {"num_heads": 2, "qk_activation": "gelu"}, "qk_activation = 'gelu'"),
        ("deltanet", {"num_heads": 2, "combine": "sum"}, "combine = 'sum'"),
        ("gated_deltanet", {"num_heads": 2, "num_v_heads": 3}, "must divide 3"),
        ("gated_deltanet", {"num_heads": 2, "head_dim": 0}, "head_dim = 0"),
        ("gated_deltanet", {"num_heads": 2, "head_dim": 5, "expand_v": 0.5}, "whole number"),
        ("gated_deltanet", {"combine": "sum"}, "combine = 'sum'"),
        ("gated_deltanet", {"conv_size": 0}, "conv_size = 0"),
        ("gla", {"num_heads": None}, "num_kv_heads = None must divide None"),
        ("gla", {"num_heads": "2"}, "num_heads = '2' given, expected an integer"),
        ("gla", {"num_heads": 2.0}, r"num_heads = 2\.0 given, expected an integer"),
        ("gla", {"expand_k": None}, "expand_k = None makes 0 channels"),
        ("attention", {"num_heads": True}, "num_heads = True given"),
        ("attention", {"num_heads": 4, "rope_theta": "1e4"}, "rope_theta = '1e4'"),
        ("hgrn2", {"num_heads": 2, "expand_ratio": 5.0}, r"expand_ratio = 5\.0 given, expected an integer"),
        ("deltanet", {"num_heads": 2, "conv_size": 2.5}, r"conv_size = 2\.5 given, expected an integer"),
        ("gated_deltanet", {"num_heads": 2.0}, r"num_heads = 2\.0 must divide 2\.0"),
        ("gated_delta", {}, "did you mean 'gated_deltanet'"),
    ],
)
def test_bad_options_are_named(mixer, values, message):
    with pytest.raises(ValueError, match=message):
        build(mixer, 24, **values)
