"""The study's stacks: exact sizes counted without memory, full layers, state memory against the table and against real states."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers.initialization import no_init_weights

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.backbone.presets import (
    RATIOS,
    SIZES,
    STUDY_MIXERS,
    layer_bytes,
    preset,
    preset_names,
    state_bytes,
)

LAYERS, VOCABULARY = 24, 32000
FULL_LAYERS = {"24-1": 1, "12-1": 2, "6-1": 4, "3-1": 8, "pure": 0}
MIB = 2**20

# exact numbers of parameters, embeddings and untied head included
COUNTS = {
    ("hgrn", "340m"): 373_916_672,
    ("retnet", "340m"): 380_165_120,
    ("gla", "340m"): 374_475_776,
    ("hgrn2", "340m"): 373_916_672,
    ("deltanet", "340m"): 374_362_112,
    ("gated_deltanet", "340m"): 399_531_200,
    ("transformer", "340m"): 373_867_520,
    ("hgrn", "1.3b"): 1_364_396_032,
    ("retnet", "1.3b"): 1_351_727_104,
    ("gla", "1.3b"): 1_365_514_240,
    ("hgrn2", "1.3b"): 1_364_396_032,
    ("deltanet", "1.3b"): 1_365_677_056,
    ("gated_deltanet", "1.3b"): 1_466_343_808,
    ("transformer", "1.3b"): 1_364_297_728,
}


def without_memory(config: HybridConfig) -> HybridForCausalLM:
    with torch.device("meta"), no_init_weights():
        return HybridForCausalLM(config)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@cache
def counted(name: str) -> int:
    return count(without_memory(preset(name)))


def test_there_are_31_stacks_a_size_and_no_name_twice():
    names = preset_names()
    assert len(names) == len(set(names)) == 62
    for size in SIZES:
        assert sum(f"-{size}" in name for name in names) == 31


@pytest.mark.parametrize(("mixer", "size"), COUNTS)
def test_the_number_of_parameters_is_exact(mixer, size):
    name = f"transformer-{size}" if mixer == "transformer" else f"{mixer}-{size}-pure"
    assert counted(name) == COUNTS[mixer, size]


def test_retnet_of_four_heads_has_wider_norms():
    config = preset("retnet-340m-pure", retnet={"num_heads": 4})
    assert config.retnet["expand_v"] == 2
    assert count(without_memory(config)) == 380_171_264


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mixer", STUDY_MIXERS)
def test_a_hybrid_trades_mixers_for_attention_and_changes_nothing_else(mixer, size, ratio):
    D, config = SIZES[size], preset(f"{mixer}-{size}-{ratio}")
    full = config.mixers.count("attention")
    assert full == FULL_LAYERS[ratio]
    assert set(config.mixers) <= {mixer, "attention"}
    I = config.intermediate_size
    shared = 2 * VOCABULARY * D + D + LAYERS * (2 * D + 3 * D * I)
    bounds = LAYERS * D if mixer in ("hgrn", "hgrn2") else 0  # replaced layers keep their row
    a_mixer = (COUNTS[mixer, size] - shared - bounds) // LAYERS
    assert counted(f"{mixer}-{size}-{ratio}") == shared + bounds + (LAYERS - full) * a_mixer + full * 4 * D * D


def test_the_published_gated_deltanet_holds_459_tensors():
    """Its file has 459, of which 24 are ``attn.D``, a parameter without effect that is no longer there."""
    assert len(without_memory(preset("gated_deltanet-1.3b-pure")).state_dict()) == 459 - 24
    assert COUNTS["gated_deltanet", "1.3b"] + 24 * 8 == 1_466_344_000


@pytest.mark.parametrize(
    ("size", "mixer", "width"), [("340m", "gla", 2816), ("1.3b", "gla", 5632), ("340m", "retnet", 1536), ("1.3b", "retnet", 2816)]
)  # fmt: skip
def test_mlp_widths(size, mixer, width):
    assert preset(f"{mixer}-{size}-3-1").intermediate_size == width


def test_presets_can_be_changed_without_losing_the_rest():
    small = preset(
        "Gated_DeltaNet-340M-3-1", hidden_size=64, num_hidden_layers=4, mixers="gated_deltanet*3,attention", vocab_size=50,
        gated_deltanet={"head_dim": 32, "num_heads": 2}, attention={"num_heads": 4},
    )  # fmt: skip
    assert small.mixers == ["gated_deltanet"] * 3 + ["attention"]
    assert small.gated_deltanet["expand_v"] == 1
    assert preset("gla-340m-3-1", period=12).mixers.count("attention") == 2
    assert preset("gla-340m-3-1", attention_layers=[0]).mixers[:2] == ["attention", "gla"]


def test_an_unknown_name_gets_close_ones():
    with pytest.raises(ValueError, match=r"'gated_deltnet-340m-3-1'.*did you mean 'gated_deltanet-340m-3-1'"):
        preset("gated_deltnet-340m-3-1")
    with pytest.raises(ValueError, match=r"expected <mixer>-<size>-<ratio>"):
        preset("llama")


# -- memory ------------------------------------------------------------------------------------------------------------

# bf16 keys and values of one sequence: bytes a token, MiB at 4096 and 32768 tokens
KEYS_AND_VALUES = {
    ("transformer", "340m"): (98_304, 384, 3072),
    ("3-1", "340m"): (32_768, 128, 1024),
    ("6-1", "340m"): (16_384, 64, 512),
    ("12-1", "340m"): (8_192, 32, 256),
    ("24-1", "340m"): (4_096, 16, 128),
    ("pure", "340m"): (0, 0, 0),
    ("transformer", "1.3b"): (196_608, 768, 6144),
    ("3-1", "1.3b"): (65_536, 256, 2048),
    ("6-1", "1.3b"): (32_768, 128, 1024),
    ("12-1", "1.3b"): (16_384, 64, 512),
    ("24-1", "1.3b"): (8_192, 32, 256),
    ("pure", "1.3b"): (0, 0, 0),
}

# fp32 state of one linear layer in MiB, and the context at which one layer's keys and values weigh as much; 340M and 1.3B
RECURRENT = {
    "hgrn": (1024 * 4 / MIB, 2048 * 4 / MIB, 1, 1),
    "gla": (0.5, 2, 128, 256),
    "hgrn2": (0.5, 1, 128, 128),
    "deltanet": (0.5, 1, 128, 128),
    "gated_deltanet": (1, 2, 256, 256),
    "retnet": (1, 4, 256, 512),
}


@pytest.mark.parametrize(("stack", "size"), KEYS_AND_VALUES)
@pytest.mark.parametrize("mixer", STUDY_MIXERS)
def test_keys_and_values_weigh_what_the_table_says(stack, size, mixer):
    config = preset(f"transformer-{size}" if stack == "transformer" else f"{mixer}-{size}-{stack}")
    per_token, at_4k, at_32k = KEYS_AND_VALUES[stack, size]
    fixed = sum(layer.recurrent + layer.convolution for layer in layer_bytes(config))
    assert sum(layer.per_token for layer in layer_bytes(config)) == per_token
    assert state_bytes(config, 4096) - fixed == at_4k * MIB
    assert state_bytes(config, 32768) - fixed == at_32k * MIB
    assert state_bytes(config, 4096, batch=3) == 3 * state_bytes(config, 4096)
    assert state_bytes(config, 0) == 0


@pytest.mark.parametrize("mixer", STUDY_MIXERS)
@pytest.mark.parametrize("size", SIZES)
def test_fixed_states_weigh_what_the_table_says(mixer, size):
    mib, break_even = (RECURRENT[mixer][i + list(SIZES).index(size)] for i in (0, 2))
    linear, full = layer_bytes(preset(f"{mixer}-{size}-24-1"))[-2:]
    assert linear.recurrent == mib * MIB
    assert linear.recurrent / full.per_token == break_even
    numbers = 3 * SIZES[size] * 3 if mixer in ("deltanet", "gated_deltanet") else 0
    assert linear.convolution == 4 * numbers  # fp32 here, where the table has bf16


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 23,
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "hgrn": {},
    "retnet": {"num_heads": 2},
    "gla": {"num_heads": 2},
    "hgrn2": {"expand_ratio": 8},
    "deltanet": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5, "conv_size": 3},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", ["attention", *STUDY_MIXERS])
def test_the_formula_weighs_a_real_state(mixer, dtype):
    config = HybridConfig(**SMALL, mixers=f"{mixer},attention")
    model = HybridForCausalLM(config).to(dtype)
    for length in (1, 7):
        state = model(torch.zeros(3, length, dtype=torch.long), use_cache=True).state
        assert state_bytes(config, length, batch=3, dtype=dtype) == state.nbytes


def test_sizes_that_make_no_sense_are_refused():
    for length, batch in ((-1, 1), (4, 0)):
        with pytest.raises(ValueError, match=f"context_length = {length} and batch = {batch}"):
            state_bytes(HybridConfig(**SMALL), length, batch)
