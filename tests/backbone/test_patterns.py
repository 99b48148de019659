"""Which layer gets which mixer: both readings of a ratio, lists, mixtures, and what is refused; and the configuration around it."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentcot.backbone import MIXERS, HybridConfig
from latentcot.backbone.patterns import PatternError, describe_pattern, expand_pattern, parse_pattern

SMALL: dict[str, Any] = {"vocab_size": 11, "hidden_size": 32}


def full(mixers: list[str]) -> list[int]:
    return [i for i, name in enumerate(mixers) if name == "attention"]


@pytest.mark.parametrize(
    ("period", "expected"),
    [(24, [23]), (12, [11, 23]), (6, [5, 11, 17, 23]), (3, [2, 5, 8, 11, 14, 17, 20, 23]), (1, list(range(24)))],
)
def test_the_study_reads_r_to_1_as_one_full_layer_in_every_r(period, expected):
    assert full(expand_pattern(24, "gla", period=period)) == expected


@pytest.mark.parametrize(("ratio", "expected"), [(3, [3, 7, 11, 15, 19, 23]), (23, [23]), (0, list(range(24)))])
def test_the_literal_reading_counts_linear_layers_before_each_full_one(ratio, expected):
    assert full(expand_pattern(24, "gla", linear_per_full=ratio)) == expected


def test_the_two_readings_differ_by_one():
    for ratio in range(1, 8):
        assert expand_pattern(24, "gla", linear_per_full=ratio) == expand_pattern(24, "gla", period=ratio + 1)


def test_full_layers_are_listed_in_any_order():
    assert full(expand_pattern(9, "gla", attention_layers=[7, 0, 3])) == [0, 3, 7]
    assert full(expand_pattern(9, "gla", attention_layers=[])) == full(expand_pattern(9, "gla")) == []
    assert full(expand_pattern(2, "attention")) == [0, 1]


@pytest.mark.parametrize(
    ("pattern", "layers", "expected"),
    [
        ("gla", 3, ["gla"] * 3),
        ("gated_deltanet*3,attention", 8, (["gated_deltanet"] * 3 + ["attention"]) * 2),
        ("gated_deltanet*3,attention", 6, ["gated_deltanet"] * 3 + ["attention"] + ["gated_deltanet"] * 2),
        (" gla , gated_deltanet * 2 ,attention", 4, ["gla", "gated_deltanet", "gated_deltanet", "attention"]),
    ],
)
def test_a_written_pattern_is_repeated_over_the_depth(pattern, layers, expected):
    assert parse_pattern(pattern, layers) == expected
    assert HybridConfig(**SMALL, num_hidden_layers=layers, mixers=pattern).mixers == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["gla", "gated_deltanet", "attention"]), min_size=1, max_size=9), st.integers(1, 3))
def test_describing_a_pattern_and_reading_it_again_changes_nothing(unit, times):
    mixers = unit * times
    assert parse_pattern(describe_pattern(mixers), len(mixers)) == mixers
    counts = [int(part.partition("*")[2] or 1) for part in describe_pattern(mixers).split(",")]
    assert sum(counts) <= len(unit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period": 5}, r"period = 5 .* no layer of 4 .* within 1\.\.4"),
        ({"period": 0}, r"period = 0 .* within 1\.\.4"),
        ({"period": 2.0}, r"period = 2\.0 .* expected an integer"),
        ({"period": True}, "period = True"),
        ({"linear_per_full": 4}, r"linear_per_full = 4 .* within 0\.\.3"),
        ({"linear_per_full": -1}, "linear_per_full = -1"),
        ({"period": 2, "linear_per_full": 1}, "give one of"),
        ({"period": 2, "attention_layers": [1]}, "give one of"),
        ({"attention_layers": [1, 4, -1]}, r"\[-1, 4\] lie outside 0\.\.3"),
        ({"attention_layers": [1, 1]}, r"\[1\] are listed more than once"),
        ({"attention_layers": ["1"]}, "integers are needed"),
        ({"attention_layers": 1}, "a list of integers is needed, got 1"),
        ({"attention_layers": 0}, "a list of integers is needed, got 0"),
        ({"mixers": 3}, "a list of names is needed, got 3"),
        ({"mixers": "gla*4,attention"}, "longer than the 4 layers"),
        ({"mixers": "gla*0"}, r"can not read 'gla\*0'"),
        ({"mixers": "gla,,gla"}, "can not read ''"),
        ({"mixers": "3*gla"}, r"can not read '3\*gla'"),
        ({"mixers": ""}, "can not read ''"),
        ({"mixers": ["gla", "attention"]}, r"2 names given .* one string, 'gla,attention'"),
        ({"mixers": "gla*4", "period": 2}, r"'gla' contradicts .*'period': 2.* means 'gla,attention'"),
    ],
)
def test_an_impossible_pattern_is_refused(arguments, message):
    with pytest.raises(PatternError, match=message):
        HybridConfig(**SMALL, num_hidden_layers=4, **{"mixer": "gla", **arguments})


@pytest.mark.parametrize("arguments", [{"mixer": "glaa"}, {"mixers": "glaa*2,attention"}, {"mixers": ["glaa"] * 4}])
def test_an_unknown_mixer_gets_a_close_name(arguments):
    with pytest.raises(ValueError, match=r"'glaa'.*did you mean 'gla'"):
        HybridConfig(**SMALL, num_hidden_layers=4, **arguments)


# -- the configuration -------------------------------------------------------------------------------------------------


def test_a_configuration_comes_back_from_its_file(tmp_path):
    patterns: list[dict[str, Any]] = [
        {"period": 2},
        {"attention_layers": (3, 1)},
        {"mixers": "gla,attention"},
        {"linear_per_full": 3},
    ]
    for pattern in patterns:
        config = HybridConfig(**SMALL, num_hidden_layers=4, gla={"num_heads": 2}, **pattern)
        config.save_pretrained(tmp_path)
        again = HybridConfig.from_pretrained(tmp_path)
        assert again.mixers == config.mixers
        assert again.fingerprint == config.fingerprint
        assert {name: getattr(again, name) for name in MIXERS} == {name: getattr(config, name) for name in MIXERS}


def test_a_configuration_saved_when_there_were_three_mixers_still_loads(tmp_path):
    saved: dict[str, Any] = {
        "model_type": "latentcot_hybrid", "architectures": ["HybridForCausalLM"], "transformers_version": "5.24.0",
        "vocab_size": 32000, "hidden_size": 32, "num_hidden_layers": 2, "mixer": "gated_deltanet", "period": 2,
        "linear_per_full": None, "attention_layers": None, "mixers": ["gated_deltanet", "attention"],
        "hidden_ratio": 4.0, "intermediate_size": 96, "norm_placement": "pre", "norm_eps": 1e-6, "norm_affine": True,
        "embedding_scale": 1.0, "initializer_range": 0.02, "use_cache": True, "dtype": "float32",
        "attention": {"num_heads": 4, "num_kv_heads": None, "rope_theta": 10000.0, "rotary_layout": "half", "bias": "none"},
        "gla": {"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "clamp_min": None},
        "gated_deltanet": {"num_heads": 2, "head_dim": 12, "expand_v": 1.0, "num_v_heads": None, "conv_size": 4,
                           "use_gate": True, "allow_neg_eigval": False, "combine": "average"},
        "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = HybridConfig.from_pretrained(tmp_path)
    assert config.mixers == ["gated_deltanet", "attention"]
    for name in ("attention", "gla", "gated_deltanet"):
        assert saved[name].items() <= getattr(config, name).items()
    for name in MIXERS:
        assert getattr(config, name)


def test_every_mixer_has_its_options_in_the_configuration(monkeypatch):
    config = HybridConfig(**SMALL)
    for name, (_, kind) in MIXERS.items():
        assert set(getattr(config, name)) == set(kind.__dataclass_fields__)
    monkeypatch.setitem(MIXERS, "house_made", MIXERS["gla"])
    config = HybridConfig(**SMALL, mixers="house_made,gla", house_made={"num_heads": 8})
    assert config.house_made["num_heads"] == 8
    assert config.gla["num_heads"] == 4


def test_a_state_of_other_options_is_another_state_and_unused_options_do_not_matter():
    config = HybridConfig(**SMALL, mixer="gla")
    assert HybridConfig(**SMALL, mixer="gla", gated_deltanet={"head_dim": 8}).fingerprint == config.fingerprint
    assert HybridConfig(**SMALL, mixers="gla").fingerprint == config.fingerprint
    for change in ({"gla": {"num_heads": 2}}, {"period": 3}, {"hidden_size": 64}, {"num_hidden_layers": 3}):
        assert HybridConfig(**{**SMALL, "mixer": "gla", **change}).fingerprint != config.fingerprint


def test_misspelt_keywords_and_options_are_refused():
    with pytest.raises(TypeError, match="gated_deltanets: unknown keyword; did you mean 'gated_deltanet'"):
        HybridConfig(**SMALL, gated_deltanets={})
    with pytest.raises(TypeError, match="hiden_size: unknown keyword; did you mean 'hidden_size'"):
        HybridConfig(hiden_size=64)
    with pytest.raises(ValueError, match=r"gla: unknown option\(s\) \['head'\]"):
        HybridConfig(**SMALL, gla={"head": 2})
    with pytest.raises(TypeError, match="gla: the mixer's options are a dict, got 2"):
        HybridConfig(**SMALL, gla=2)  # type: ignore[arg-type]
