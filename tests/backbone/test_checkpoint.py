"""Checkpoints of the study's format: there and back, older files, files of another kind, damaged files, and the hub without a network."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentcot.backbone import (
    CheckpointError,
    CheckpointMismatchError,
    HybridConfig,
    HybridForCausalLM,
    UnknownFamilyError,
    export_checkpoint,
    load_checkpoint,
)
from latentcot.backbone.presets import STUDY_MIXERS

D = 32
SMALL: dict[str, Any] = {
    "hidden_size": D,
    "num_hidden_layers": 3,
    "vocab_size": 23,
    "initializer_range": 0.2,  # so that every path matters to the logits
    "attention": {"num_heads": 4},
    "retnet": {"num_heads": 2},
    "gla": {"num_heads": 2},
    "hgrn2": {"expand_ratio": 8},
    "deltanet": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "head_dim": 12, "expand_v": 1.5},
}
STACKS: dict[str, dict[str, Any]] = {
    **{mixer: {"mixer": mixer} for mixer in ("attention", *STUDY_MIXERS)},
    **{f"{mixer}-hybrid": {"mixer": mixer, "attention_layers": [2, 0]} for mixer in STUDY_MIXERS},
    "retnet-ratio-2": {"mixer": "retnet", "hidden_ratio": 2},
    "hgrn2-heads": {"mixer": "hgrn2", "hgrn2": {"num_heads": 2, "expand_ratio": None}},
    "gla-convolution-ungated": {
        "mixer": "gla",
        "gla": {"num_heads": 2, "num_kv_heads": 1, "use_short_conv": True, "use_output_gate": False, "clamp_min": -0.1},
    },
    "deltanet-gate": {"mixer": "deltanet", "deltanet": {"num_heads": 4, "use_gate": True, "allow_neg_eigval": True}},
    "gated_deltanet-grouped": {
        "mixer": "gated_deltanet",
        "gated_deltanet": {"num_heads": 1, "num_v_heads": 2, "head_dim": 8, "use_gate": False, "conv_size": 3},
    },
    "transformer-shared-biased": {
        "mixer": "attention",
        "attention": {"num_heads": 4, "num_kv_heads": 2, "bias": "qkv", "rope_theta": 500.0, "window_size": 3},
    },
    "gla-hybrid-window-tied": {
        "mixer": "gla",
        "period": 3,
        "attention": {"num_heads": 2, "window_size": 2},
        "tie_word_embeddings": True,
    },
}


def make(stack: str = "gated_deltanet-hybrid", seed: int = 0, **changes: Any) -> HybridForCausalLM:
    torch.manual_seed(seed)
    model = HybridForCausalLM(HybridConfig(**{**SMALL, **STACKS[stack], **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "lower_bounds" in name:  # at their defaults a lost one would not be seen
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


IDS = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(1))


def rewrite(folder: Path, change) -> None:
    """Change the tensors of ``model.safetensors`` in place by ``change(tensors)``."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", STACKS)
def test_what_is_written_comes_back_with_the_same_logits(stack, tmp_path):
    model = make(stack)
    folder = export_checkpoint(model, tmp_path / "here")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    again, report = load_checkpoint(folder)
    assert not again.training
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert report.tensors == len(load_file(folder / "model.safetensors"))
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.renamed == report.split == report.dropped == report.unknown_fields == {}
    assert again.config.fingerprint == model.config.fingerprint or stack == "hgrn2-heads"
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
    into = make(stack, seed=5)
    assert not torch.equal(into(IDS).logits, model(IDS).logits)
    assert load_checkpoint(folder, model=into).model is into
    assert torch.equal(into(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("stack", ["hgrn-hybrid", "gated_deltanet-hybrid", "gla-hybrid-window-tied"])
def test_large_models_are_written_and_read_in_shards(stack, tmp_path):
    model = make(stack)
    folder = export_checkpoint(model, tmp_path / "here", max_shard_size=20_000)
    shards = sorted(p.name for p in folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert max(p.stat().st_size for p in folder.glob("*.safetensors")) < 25_000
    again, report = load_checkpoint(folder)
    assert report.files == shards
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_are_read_as_tensors_alone(sharded, tmp_path):
    model = make()
    folder = export_checkpoint(model, tmp_path / "here")
    tensors = load_file(folder / "model.safetensors")
    for i in range(3):  # split halves must own their memory: they are written again below
        tensors[f"model.layers.{i}.mlp.gate_proj.weight"] = torch.cat(
            [tensors[f"model.layers.{i}.mlp.gate_proj.weight"], tensors.pop(f"model.layers.{i}.mlp.up_proj.weight")]
        )
    (folder / "model.safetensors").unlink()
    if sharded:
        names = list(tensors)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, keys in parts.items():
            torch.save({k: tensors[k] for k in keys}, folder / file)
        index = {"metadata": {}, "weight_map": {k: file for file, keys in parts.items() for k in keys}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    again, report = load_checkpoint(folder)
    assert len(report.files) == 1 + sharded
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    export_checkpoint(again, tmp_path / "once more")
    assert torch.equal(load_checkpoint(tmp_path / "once more").model(IDS).logits, model(IDS).logits)


def test_code_in_a_pickle_does_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    folder = export_checkpoint(make(), tmp_path / "here")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged"):
        load_checkpoint(folder)
    assert not (tmp_path / "sprung").exists()


def test_our_own_folders_are_read_too(tmp_path):
    model = make("gated_deltanet", mixers="gated_deltanet,gla,attention")
    model.save_pretrained(tmp_path)
    again, report = load_checkpoint(tmp_path)
    assert report.family == "latentcot_hybrid"
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_transformers_reads_back_a_model_that_was_loaded(tmp_path):
    model = load_checkpoint(export_checkpoint(make("hgrn-hybrid"), tmp_path / "theirs"), dtype=torch.bfloat16).model
    model.save_pretrained(tmp_path / "ours")
    again = HybridForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    assert load_checkpoint(tmp_path / "ours").report.parameters == sum(p.numel() for p in model.parameters())


# -- dtypes and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stack", [f"{mixer}-hybrid" for mixer in STUDY_MIXERS])
def test_norms_and_decays_keep_their_precision_in_16_bits(stack, dtype, tmp_path):
    model = make(stack)
    folder = export_checkpoint(model, tmp_path / "here")
    low = load_checkpoint(folder, dtype=dtype).model
    precise = {name for name, p in low.named_parameters() if p.dtype == torch.float32}
    expected = {n for n, _ in model.named_parameters() if "norm" in n or n.endswith(("A_log", "dt_bias"))}
    assert precise == expected
    assert {p.dtype for name, p in low.named_parameters() if name not in precise} == {dtype}
    for name in precise:
        assert torch.equal(low.get_parameter(name), model.get_parameter(name))
    output = low(IDS, use_cache=True)
    assert output.logits.dtype == dtype
    scale = model(IDS).logits.std()
    assert (output.logits.float() - model(IDS).logits).square().mean().sqrt() < 0.05 * scale
    step = low(IDS[:, :1], state=output.state)
    assert torch.isfinite(step.logits).all()
    loss = low(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in low.parameters())


def test_the_dtype_is_the_stored_one_unless_another_is_asked_for(tmp_path):
    folder = export_checkpoint(make(), tmp_path / "here", dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.1.attn.A_log"].dtype == torch.float32
    again = load_checkpoint(folder).model
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: t.dtype for n, t in stored.items()}
    assert {p.dtype for p in load_checkpoint(folder, dtype=torch.float64).model.parameters()} == {torch.float64}


def test_the_new_model_is_built_without_memory_of_its_own(tmp_path, monkeypatch):
    """Every parameter is the tensor that was read: nothing was allocated first and copied over."""
    folder = export_checkpoint(make("hgrn-hybrid"), tmp_path / "here")
    built: list[torch.device] = []
    real = HybridForCausalLM.__init__

    def watched(self, config):
        real(self, config)
        built.extend(p.device for p in self.parameters())

    monkeypatch.setattr(HybridForCausalLM, "__init__", watched)
    model = load_checkpoint(folder).model
    assert {device.type for device in built} == {"meta"}
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())


@pytest.mark.parametrize("pickled", [False, True])
def test_training_a_loaded_model_leaves_its_file_alone(pickled, tmp_path):
    """Tensors may be mapped from the file: writing to them must not write to it."""
    folder = export_checkpoint(make(), tmp_path / "here")
    if pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model = load_checkpoint(folder).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not torch.equal(load_checkpoint(folder).model(IDS).logits, model(IDS).logits)


def test_a_tied_head_stays_tied(tmp_path):
    folder = export_checkpoint(make("gla-hybrid-window-tied"), tmp_path / "here")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_checkpoint(folder).model
    assert model.lm_head.weight is model.model.embeddings.weight
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embeddings.weight"].clone()}))
    again, report = load_checkpoint(folder)
    assert report.dropped == {"lm_head.weight": "tied to the embedding"}
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    rewrite(folder, lambda t: t.pop("model.embeddings.weight"))
    again, report = load_checkpoint(folder)
    assert report.renamed == {"lm_head.weight": "model.embeddings.weight"}
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    rewrite(folder, lambda t: t.update({"model.embeddings.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match="differ, though the configuration ties them"):
        load_checkpoint(folder)


# -- older files -------------------------------------------------------------------------------------------------------


def make_old(tensors: dict[str, torch.Tensor], mixers: list[str]) -> None:
    for i, name in enumerate(mixers):
        mlp = f"model.layers.{i}.mlp"
        tensors[f"{mlp}.gate_proj.weight"] = torch.cat(
            [tensors[f"{mlp}.gate_proj.weight"], tensors.pop(f"{mlp}.up_proj.weight")]
        )
        if name == "gated_deltanet":
            tensors[f"model.layers.{i}.attn.D"] = torch.zeros(2)
        if name in ("gla", "retnet"):
            tensors[f"model.layers.{i}.attn.g_norm.weight"] = tensors.pop(
                f"model.layers.{i}.attn.g_norm_swish_gate.weight"
            )


@pytest.mark.parametrize("stack", [f"{mixer}-hybrid" for mixer in STUDY_MIXERS])
def test_older_files_are_understood_and_the_report_says_what_was_done(stack, tmp_path):
    model = make(stack)
    folder = export_checkpoint(model, tmp_path / "here")
    rewrite(folder, lambda tensors: make_old(tensors, model.config.mixers))
    values = json.loads((folder / "config.json").read_text())
    values["rms_norm_eps"] = values.pop("norm_eps")
    values |= {"share_conv_kernel": False, "use_gk": True, "use_gv": False, "transformers_version": "4.48.0"}
    (folder / "config.json").write_text(json.dumps(values | {"attn_mode": "fused_chunk", "fuse_norm": True}))
    again, report = load_checkpoint(folder)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert len(report.split) == 3
    assert report.split["model.layers.1.mlp.gate_proj.weight"] == (
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    )
    old_name, new_name = (f"model.layers.1.attn.g_norm{ending}.weight" for ending in ("", "_swish_gate"))
    assert report.renamed == ({old_name: new_name} if stack.split("-")[0] in ("gla", "retnet") else {})
    assert list(report.dropped) == (["model.layers.1.attn.D"] if stack == "gated_deltanet-hybrid" else [])
    assert {"attn_mode", "use_gk", "share_conv_kernel", "fuse_norm"} <= set(report.ignored_fields)
    assert not report.unknown_fields
    for name in (*report.split, *report.renamed, *report.dropped):
        assert name in str(report)


def test_the_gate_half_comes_first(tmp_path):
    model = make("gla")
    folder = export_checkpoint(model, tmp_path / "here")
    rewrite(folder, lambda tensors: make_old(tensors, model.config.mixers))
    again = load_checkpoint(folder).model
    for ours, theirs in zip(again.model.layers, model.model.layers, strict=True):
        assert torch.equal(ours.mlp.gate_proj.weight, theirs.mlp.gate_proj.weight)  # type: ignore[union-attr]
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)  # type: ignore[union-attr]


# -- configurations ----------------------------------------------------------------------------------------------------


def test_an_unknown_field_is_told(tmp_path):
    folder = export_checkpoint(make(), tmp_path / "here")
    edit_config(folder, logit_scale=0.5)
    with pytest.warns(UserWarning, match=r"may matter: \{'logit_scale': 0\.5\}"):
        report = load_checkpoint(folder).report
    assert report.unknown_fields == {"logit_scale": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": "gla,retnet,attention"}, "one linear mixer a model, this one has gla, retnet"),
        ({"norm_placement": "post"}, "norm_placement = 'pre' alone, got 'post'"),
        ({"embedding_scale": 2.0}, "embedding_scale = 1.0 alone"),
        (
            {"gated_deltanet": {"combine": "gate", "num_heads": 2, "head_dim": 8}},
            r"no field for gated_deltanet\.combine",
        ),
        ({"attention": {"num_heads": 4, "rotary_layout": "interleaved"}, "period": 2}, r"attention\.rotary_layout"),
        ({"attention": {"num_heads": 4, "bias": "qk"}, "period": 2}, "bias = 'qk'"),
        ({"attention": {"num_heads": 4, "rope_theta": None}, "period": 2}, "rope_theta = None"),
        ({"mixer": "retnet", "retnet": {"num_heads": 2, "rope_theta": 500.0}}, r"retnet\.rope_theta"),
    ],
)
def test_what_the_format_can_not_say_is_not_written(changes, message, tmp_path):
    model = HybridForCausalLM(HybridConfig(**{**SMALL, **changes}))
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(model, tmp_path / "here")
    assert not list(tmp_path.iterdir())


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_does_not_fit_lists_every_difference_and_changes_nothing(tmp_path):
    folder = export_checkpoint(make(), tmp_path / "here")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
        del tensors["model.layers.1.attn.A_log"]
        tensors["model.layers.7.attn.q_proj.weight"] = torch.zeros(2, 2)
        tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(8, D)

    rewrite(folder, spoil)
    model = make(seed=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for into in (None, model):
        with pytest.raises(CheckpointMismatchError) as caught:
            load_checkpoint(folder, model=into)
        error = caught.value
        assert error.missing == ["model.layers.1.attn.A_log"]
        assert error.unexpected == ["model.layers.7.attn.q_proj.weight"]
        assert error.shapes == {
            "model.norm.weight": ([D - 1], [D]),
            "model.layers.0.mlp.gate_proj.weight": ([8, D], [96, D]),
        }
        for name in (*error.missing, *error.unexpected, *error.shapes):
            assert name in str(error)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"mixer": "gla"}, "mixers"),
        ({"attention_layers": [0, 1]}, "mixers"),
        ({"norm_eps": 1e-5}, "norm_eps"),
        ({"attention": {"num_heads": 8}}, "attention.num_heads attention.num_kv_heads"),  # equal tensors all the same
        ({"gated_deltanet": {**SMALL["gated_deltanet"], "allow_neg_eigval": True}}, "gated_deltanet.allow_neg_eigval"),
    ],
)
def test_a_model_that_would_compute_something_else_is_refused(changes, fields, tmp_path):
    folder = export_checkpoint(make(), tmp_path / "here")
    other = make(**changes)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match=fields.split()[0]) as caught:
        load_checkpoint(folder, model=other)
    assert list(caught.value.fields) == fields.split()
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_equal_layers_written_in_two_ways_fit(tmp_path):
    folder = export_checkpoint(make("hgrn2"), tmp_path / "here")
    for options in ({"num_heads": 4, "expand_ratio": 8}, {"num_heads": 4, "expand_ratio": None}):
        model = make("hgrn2", seed=1, hgrn2=options)
        load_checkpoint(folder, model=model)
        assert torch.equal(model(IDS).logits, make("hgrn2")(IDS).logits)


@pytest.mark.parametrize(
    ("model_type", "hint"), [("llama", ""), ("deltanet", "did you mean 'delta_net'"), ("hgrn3", "did you mean 'hgrn"), (None, "")]
)  # fmt: skip
def test_another_family_is_refused_by_name(model_type, hint, tmp_path):
    folder = export_checkpoint(make(), tmp_path / "here")
    edit_config(folder, model_type=model_type)
    with pytest.raises(UnknownFamilyError, match=f"{model_type!r} is of another family.*{hint}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dtype": torch.float32}, "leave them out"), ({"device": "cpu"}, "leave them out")],
)
def test_a_given_model_keeps_its_dtype_and_device(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path, model=make(), **arguments)
    with pytest.raises(ValueError, match=r"torch\.int8 given"):
        load_checkpoint(tmp_path, dtype=torch.int8)


# -- damaged folders ---------------------------------------------------------------------------------------------------


def test_damaged_and_incomplete_folders_are_refused_and_a_given_model_is_untouched(tmp_path):
    model = make(seed=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def refused(folder: Path, message: str) -> None:
        for into in (None, model):
            with pytest.raises(CheckpointError, match=message):
                load_checkpoint(folder, model=into)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    whole = export_checkpoint(make(), tmp_path / "whole")
    refused(whole / "config.json", "is a file, expected the folder")
    data = (whole / "model.safetensors").read_bytes()
    (whole / "model.safetensors").write_bytes(data[:-50])
    refused(whole, r"model\.safetensors is damaged")
    (whole / "model.safetensors").write_bytes(data)
    rewrite(whole, lambda t: t.update({"model.norm.weight": torch.zeros(D, dtype=torch.int32)}))
    refused(whole, r"model\.norm\.weight holds torch\.int32")
    (whole / "model.safetensors").unlink()
    refused(whole, "no weights in")
    for text in ('{"model_type": ', "[1]"):
        (whole / "config.json").write_text(text)
        refused(whole, r"config\.json is damaged")
    (whole / "config.json").unlink()
    refused(whole, r"no config\.json in")

    shards = export_checkpoint(make(), tmp_path / "shards", max_shard_size=20_000)
    index = shards / "model.safetensors.index.json"
    text = index.read_text()
    for wrong in ("../model-a.safetensors", "/etc/model.safetensors"):
        values = json.loads(text)
        values["weight_map"]["model.norm.weight"] = wrong
        index.write_text(json.dumps(values))
        refused(shards, "expected the name of a file in the same folder")
    values = json.loads(text)
    values["weight_map"]["ghost"] = values["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(values))
    refused(shards, r"do not hold: \['ghost'\]")
    index.write_text("{}")
    refused(shards, r"index\.json is damaged")
    index.write_text(text)
    next(shards.glob("model-*.safetensors")).unlink()
    refused(shards, "lists .*, which is not in")


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_kept_unless_it_is_a_checkpoint_to_be_replaced(tmp_path):
    first, second = make(seed=1), make(seed=2)
    folder = export_checkpoint(first, tmp_path / "deep" / "here", max_shard_size=20_000)
    with pytest.raises(CheckpointError, match="is not empty"):
        export_checkpoint(second, folder)
    assert torch.equal(load_checkpoint(folder).model(IDS).logits, first(IDS).logits)
    export_checkpoint(second, folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_checkpoint(folder).model(IDS).logits, second(IDS).logits)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"more than a checkpoint \(\['thesis\.tex'\]\)"):
        export_checkpoint(first, folder, overwrite=True)
    assert (folder / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    export_checkpoint(first, tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is a file"):
        export_checkpoint(first, folder / "config.json", overwrite=True)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name.startswith(".")) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_write_leaves_what_was_there(overwrite, tmp_path, monkeypatch):
    model, folder = make(), tmp_path / "here"
    if overwrite:
        export_checkpoint(model, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()} if overwrite else None

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("latentcot.backbone.checkpoint.write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        export_checkpoint(make(seed=2), folder, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == (["here"] if overwrite else [])
    if overwrite:
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


# -- the hub, without a network ------------------------------------------------------------------------------------------


class Hub:
    """Stands in for ``snapshot_download``: copies the files that match, and remembers what was asked."""

    def __init__(self, there: Path, cache: Path):
        self.there, self.cache, self.calls = there, cache, []

    def __call__(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append((name, revision, tuple(allow_patterns)))
        self.cache.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for path in self.there.glob(pattern):
                (self.cache / path.name).write_bytes(path.read_bytes())
        return str(self.cache)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    stand_in = Hub(tmp_path / "remote", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    monkeypatch.chdir(tmp_path)
    return stand_in


@pytest.mark.parametrize("size", ["5GB", 20_000])
def test_a_name_on_the_hub_brings_the_configuration_first_and_no_other_file(hub, size):
    model = make()
    export_checkpoint(model, hub.there, max_shard_size=size)
    (hub.there / "modeling.py").write_text("raise SystemExit")
    (hub.there / "optimizer.safetensors").write_bytes(b"large")
    again, report = load_checkpoint("someone/a-model.v1", revision="main")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert report.source == "someone/a-model.v1"
    assert [call[:2] for call in hub.calls] == [("someone/a-model.v1", "main")] * 2
    assert hub.calls[0][2] == ("config.json",)
    assert not {"modeling.py", "optimizer.safetensors"} & {p.name for p in hub.cache.iterdir()}


def test_pickles_are_fetched_only_where_there_is_nothing_else(hub):
    model = make()
    export_checkpoint(model, hub.there)
    torch.save(load_file(hub.there / "model.safetensors"), hub.there / "pytorch_model.bin")
    load_checkpoint("someone/model")
    assert not (hub.cache / "pytorch_model.bin").exists()
    (hub.there / "model.safetensors").unlink()
    (hub.cache / "model.safetensors").unlink()
    assert torch.equal(load_checkpoint("someone/model").model(IDS).logits, model(IDS).logits)


def test_weights_of_another_family_are_not_fetched(hub):
    export_checkpoint(make(), hub.there)
    edit_config(hub.there, model_type="llama")
    with pytest.raises(UnknownFamilyError, match="llama"):
        load_checkpoint("someone/llama")
    assert [p.name for p in hub.cache.iterdir()] == ["config.json"]


def test_what_the_hub_does_not_give_is_told_in_one_error(tmp_path, monkeypatch):
    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"no folder 'a/b', and the hub did not give it .*no route to host"):
        load_checkpoint("a/b")
    with pytest.raises(CheckpointError, match="a name on the hub is given as a string"):
        load_checkpoint(Path("a/b"))
    for name in ("nothing", "a/b/c", str(tmp_path / "missing")):
        with pytest.raises(CheckpointError, match="as a name on the hub it would be owner/name"):
            load_checkpoint(name)
