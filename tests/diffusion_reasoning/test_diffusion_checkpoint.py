"""Released masked-diffusion models: names, sizes, strict loading, and what the loaded network computes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from latentcot.backbone.checkpoint_config import CheckpointError
from latentcot.backbone.checkpoint_keys import CheckpointMismatchError
from latentcot.diffusion_reasoning import (
    diffusion_generate,
    export_published,
    load_diffusion_checkpoint,
    low_confidence,
    read_published_config,
)
from latentcot.diffusion_reasoning.diffusion_checkpoint import (
    BD3LM_SMALL,
    DREAM_7B,
    LLADA_8B,
    MDLM_SMALL,
    PUBLISHED,
    empty_diffusion,
    find_family,
    published_shapes,
)

TINY: dict[str, dict[str, Any]] = {
    "llada": {
        **LLADA_8B, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 48,
        "embedding_size": 40, "vocab_size": 40, "mask_token_id": 36, "eos_token_id": 35, "pad_token_id": 35,
    },
    "dream": {
        **DREAM_7B, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": 40, "mask_token_id": 36, "eos_token_id": 35, "pad_token_id": 35,
        "bos_token_id": 34,
    },
    "mdlm": {**MDLM_SMALL, "hidden_dim": 32, "cond_dim": 8, "n_blocks": 2, "n_heads": 4, "vocab_size": 40},
    "bd3lm": {**BD3LM_SMALL, "hidden_dim": 32, "cond_dim": 8, "n_blocks": 2, "n_heads": 4, "vocab_size": 40},
}  # fmt: skip


def weights(family: str) -> dict[str, Tensor]:
    """Random tensors under released names."""
    torch.manual_seed(0)
    model = empty_diffusion(TINY[family])
    shapes = published_shapes(model, find_family(TINY[family]))
    return {key: torch.randn(shape, dtype=torch.float64) * 0.2 for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("llada-8b", 291, 8.016e9), ("dream-7b", 339, 7.616e9), ("mdlm-small", 130, None), ("bd3lm-small", 130, None)],
)
def test_released_sizes(name: str, tensors: int, parameters: float | None):
    values = PUBLISHED[name]
    model = empty_diffusion(values)
    shapes = published_shapes(model, find_family(values))
    assert len(shapes) == tensors
    count = sum(math.prod(shape) for shape in shapes.values())
    assert count == sum(p.numel() for p in model.parameters())
    if parameters is not None:
        assert abs(count - parameters) < 0.0005e9
    assert model.config.shift == (name == "dream-7b")


def test_names_are_the_released_ones():
    assert {
        "model.transformer.wte.weight", "model.transformer.blocks.1.ff_proj.weight", "model.transformer.ln_f.weight",
        "model.transformer.blocks.0.attn_out.weight", "model.transformer.ff_out.weight",
    } <= set(weights("llada"))  # fmt: skip
    assert {
        "model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.bias", "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.post_attention_layernorm.weight", "model.norm.weight", "lm_head.weight",
    } <= set(weights("dream"))  # fmt: skip
    mdlm = weights("mdlm")
    assert mdlm["blocks.0.attn_qkv.weight"].shape == (96, 32)
    assert mdlm["blocks.1.adaLN_modulation.weight"].shape == (192, 8)
    assert mdlm["output_layer.adaLN_modulation.bias"].shape == (64,)
    assert mdlm["vocab_embed.embedding"].shape == (40, 32)


@pytest.mark.parametrize("family", TINY)
def test_loaded_strictly_and_written_back_bit_for_bit(family: str, tmp_path: Path):
    tensors = weights(family)
    model = load_diffusion_checkpoint(tensors, TINY[family])
    back = export_published(model, family)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    save_file({key: t.clone() for key, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY[family]))
    again = load_diffusion_checkpoint(tmp_path, dtype=torch.float32)
    assert again.dtype == torch.float32
    prompt = torch.randint(0, 30, (2, 4))
    out = again.diffusion_generate(prompt, max_new_tokens=4)
    assert out.nfe.tolist() == [4, 4]
    own = tmp_path / "own"
    again.save_pretrained(own)
    same = type(again).from_pretrained(own)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), same.state_dict().values(), strict=True))


def everything_seen(z: Tensor) -> Tensor:
    return torch.zeros(z.shape[0], 1, z.shape[1], z.shape[1], dtype=torch.float64)


def positions(base: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}, "attn_implementation": "eager"}


def test_llada_computes_what_a_llama_without_a_causal_mask_does():
    tensors = weights("llada")
    model = load_diffusion_checkpoint(tensors, TINY["llada"])
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            rms_norm_eps=1e-5, tie_word_embeddings=False, **positions(5e5),
        )
    ).double()  # fmt: skip
    names = {
        "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
        "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
    }  # fmt: skip
    state = {
        "model.embed_tokens.weight": tensors["model.transformer.wte.weight"],
        "model.norm.weight": tensors["model.transformer.ln_f.weight"],
        "lm_head.weight": tensors["model.transformer.ff_out.weight"],
    }
    for i in range(2):
        for there, here in names.items():
            state[f"model.layers.{i}.{here}.weight"] = tensors[f"model.transformer.blocks.{i}.{there}.weight"]
    peer.load_state_dict(state)
    z = torch.randint(0, 40, (3, 9))
    expected = peer(z, attention_mask=everything_seen(z)).logits
    torch.testing.assert_close(model(z).logits, expected, rtol=1e-6, atol=1e-6)


def test_dream_computes_what_a_qwen2_without_a_causal_mask_does_one_place_to_the_right():
    tensors = weights("dream")
    model = load_diffusion_checkpoint(tensors, TINY["dream"])
    peer = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, rms_norm_eps=1e-6, tie_word_embeddings=False, **positions(1e6),
        )
    ).double()  # fmt: skip
    peer.load_state_dict(tensors)
    z = torch.randint(0, 40, (3, 9))
    expected = peer(z, attention_mask=everything_seen(z)).logits
    logits = model(z).logits
    torch.testing.assert_close(logits[:, 1:], expected[:, :-1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits[:, 0], expected[:, 0], rtol=1e-6, atol=1e-6)
    # with padding in front, the previous real token
    padded, mask = F.pad(z, (2, 0)), F.pad(torch.ones_like(z), (2, 0))
    torch.testing.assert_close(model(padded, mask).logits[:, 2:], logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("conditioned", [False, True])
def test_mdlm_computes_its_equations(conditioned: bool):
    w = weights("mdlm")
    model = load_diffusion_checkpoint(w, {**TINY["mdlm"], "time_conditioning": conditioned})
    z, sigma = torch.randint(0, 40, (2, 7)), torch.tensor([0.3, 2.0], dtype=torch.float64)
    frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    angle = (sigma if conditioned else torch.zeros(2, dtype=torch.float64))[:, None] * frequency
    c = torch.cat([angle.cos(), angle.sin()], -1) @ w["sigma_map.mlp.0.weight"].T + w["sigma_map.mlp.0.bias"]
    c = F.silu(F.silu(c) @ w["sigma_map.mlp.2.weight"].T + w["sigma_map.mlp.2.bias"])

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(x, (32,), weight, None, 1e-5)

    def rotate(x: Tensor) -> Tensor:
        angle = torch.arange(7).double()[:, None] * 10000.0 ** -(torch.arange(4).double() / 4)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([x[..., :4] * cos - x[..., 4:] * sin, x[..., 4:] * cos + x[..., :4] * sin], -1)

    x = w["vocab_embed.embedding"][z]
    for i in range(2):
        b = f"blocks.{i}."
        m = (c @ w[b + "adaLN_modulation.weight"].T + w[b + "adaLN_modulation.bias"])[:, None].chunk(6, -1)
        h = norm(x, w[b + "norm1.weight"]) * (1 + m[1]) + m[0]
        q, k, v = ((h @ part.T).view(2, 7, 4, 8) for part in w[b + "attn_qkv.weight"].chunk(3))
        weight = (torch.einsum("bihd,bjhd->bhij", rotate(q), rotate(k)) / 8**0.5).softmax(-1)
        x = x + m[2] * (torch.einsum("bhij,bjhd->bihd", weight, v).flatten(2) @ w[b + "attn_out.weight"].T)
        h = norm(x, w[b + "norm2.weight"]) * (1 + m[4]) + m[3]
        inner = F.gelu(h @ w[b + "mlp.0.weight"].T + w[b + "mlp.0.bias"], approximate="tanh")
        x = x + m[5] * (inner @ w[b + "mlp.2.weight"].T + w[b + "mlp.2.bias"])
    shift, scale = (c @ w["output_layer.adaLN_modulation.weight"].T + w["output_layer.adaLN_modulation.bias"])[
        :, None
    ].chunk(2, -1)
    x = norm(x, w["output_layer.norm_final.weight"]) * (1 + scale) + shift
    expected = x @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]
    torch.testing.assert_close(model(z, sigma=sigma).logits, expected, rtol=1e-9, atol=1e-9)
    assert diffusion_generate(model, z, low_confidence(3, mask_id=39)).nfe.tolist() == [3, 3]


def test_mdlm_names_may_stand_behind_a_prefix_and_buffers_are_ignored():
    tensors = weights("mdlm")
    stored = {f"backbone.{key}": tensor for key, tensor in tensors.items()}
    stored["backbone.rotary_emb.inv_freq"] = torch.zeros(4)
    model = load_diffusion_checkpoint(stored, TINY["mdlm"])
    plain = load_diffusion_checkpoint(tensors, TINY["mdlm"])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    del tensors["output_layer.linear.bias"]
    assert not load_diffusion_checkpoint(tensors, TINY["mdlm"]).config.head_bias


def test_configurations_say_what_the_release_is():
    llada, dream, bd3lm = (read_published_config(PUBLISHED[name]) for name in ("llada-8b", "dream-7b", "bd3lm-small"))
    assert (llada.mask_token_id, llada.eos_token_id, llada.max_position_embeddings) == (126336, 126081, 4096)
    assert (dream.mask_token_id, dream.attention["bias"], dream.attention["num_kv_heads"]) == (151666, "qkv", 4)
    assert (bd3lm.mask_token_id, bd3lm.block_length, bd3lm.mlp, bd3lm.norm) == (50257, 4, "gelu", "layer")


def renamed(family: str) -> dict[str, Tensor]:
    tensors = weights(family)
    key = next(k for k in tensors if "blocks.1" in k or "layers.1" in k)
    return {(k + "_x" if k == key else k): t for k, t in tensors.items()}


@pytest.mark.parametrize("family", TINY)
def test_a_renamed_tensor_is_named_twice(family: str):
    with pytest.raises(CheckpointMismatchError) as caught:
        load_diffusion_checkpoint(renamed(family), TINY[family])
    assert len(caught.value.missing) == 1
    assert caught.value.unexpected == [caught.value.missing[0] + "_x"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: read_published_config({"model_type": "gpt2"}), "valid: llada, dream"),
        (lambda: read_published_config({"model_type": "llada"}), "'d_model'"),
        (lambda: read_published_config({**TINY["llada"], "layer_norm_type": "default"}), "layer_norm_type"),
        (lambda: read_published_config({**TINY["dream"], "rope_scaling": {"factor": 2}}), "rope_scaling"),
        (lambda: read_published_config({**TINY["dream"], "mask_token_id": 35}), "also pad_token_id"),
        (lambda: load_diffusion_checkpoint(weights("llada")), "values"),
        (lambda: load_diffusion_checkpoint("no/such/folder"), r"no config.json"),
        (
            lambda: export_published(load_diffusion_checkpoint(weights("mdlm"), TINY["mdlm"]), "llada"),
            "export: no llada",
        ),
    ],
)
def test_bad_input_says_what_was_expected(call, says: str):
    with pytest.raises(CheckpointError, match=says):
        call()


def test_damaged_configurations(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_diffusion_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="an object is needed"):
        load_diffusion_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY["llada"]))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_diffusion_checkpoint(tmp_path)
