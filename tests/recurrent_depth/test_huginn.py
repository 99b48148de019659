"""Huginn: exact sizes, released names, and logits equal to a reference written from the equations alone."""

import math
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from latentcot.backbone.checkpoint_config import CheckpointError
from latentcot.backbone.checkpoint_keys import CheckpointMismatchError
from latentcot.recurrent_depth import (
    HUGINN_TOKENS,
    DepthRecurrence,
    GradientWindow,
    HuginnShape,
    StepCache,
    build_huginn,
    export_huginn,
    huginn_chat,
    load_huginn,
)
from latentcot.recurrent_depth.huginn_checkpoint import huginn_keys

V, D, H, M = 24, 32, 4, 48
TINY = HuginnShape(1, 2, 1, V, D, H, M, mean_recurrences=4)


@pytest.fixture
def stored() -> dict[str, torch.Tensor]:
    """A random state dict with the published names and shapes, written out by hand."""
    torch.manual_seed(0)
    shapes = {
        "freqs_cis": (1, 64, 1, D // H // 2, 2),
        "transformer.wte.weight": (V, D),
        "transformer.adapter.weight": (D, 2 * D),
        "transformer.ln_f.weight": (D,),
    }
    for block in ("prelude.0", "core_block.0", "core_block.1", "coda.0"):
        shapes |= {
            f"transformer.{block}.attn.Wqkv.weight": (3 * D, D),
            f"transformer.{block}.attn.qk_bias": (2, 1, H, D // H),
            f"transformer.{block}.attn.proj.weight": (D, D),
            f"transformer.{block}.mlp.fc.weight": (2 * M, D),
            f"transformer.{block}.mlp.proj.weight": (D, M),
        }
        shapes |= {f"transformer.{block}.norm_{i}.weight": (D,) for i in (1, 2, 3, 4)}
    tensors = {key: 0.3 * torch.randn(shape) + (1.0 if len(shape) == 1 else 0.0) for key, shape in shapes.items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    return tensors


# -- the reference, from the released tensors alone --------------------------------------------------------------------


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def block(w, name, x):
    t = {key.removeprefix(f"transformer.{name}."): value for key, value in w.items() if f".{name}." in key}
    S, d = len(x), D // H
    q, k, v = (norm(x, t["norm_1.weight"]) @ t["attn.Wqkv.weight"].T).view(S, 3, H, d).unbind(1)
    q, k = q + t["attn.qk_bias"][0], k + t["attn.qk_bias"][1]

    def rotate(y):
        out = torch.empty_like(y)
        for j in range(d // 2):
            angle = torch.arange(S, dtype=y.dtype)[:, None] * 50_000.0 ** (-2 * j / d)
            a, b = y[..., 2 * j], y[..., 2 * j + 1]
            out[..., 2 * j] = a * angle.cos() - b * angle.sin()
            out[..., 2 * j + 1] = a * angle.sin() + b * angle.cos()
        return out

    scores = torch.einsum("shd,thd->hst", rotate(q), rotate(k)) / math.sqrt(d)
    scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), -math.inf)
    mixed = torch.einsum("hst,thd->shd", scores.softmax(-1), v).flatten(1)
    u = norm(x + mixed @ t["attn.proj.weight"].T, t["norm_2.weight"])
    gate, up = (norm(u, t["norm_3.weight"]) @ t["mlp.fc.weight"].T).chunk(2, -1)
    return norm(u + (gate * gate.sigmoid() * up) @ t["mlp.proj.weight"].T, t["norm_4.weight"])


def reference(w, ids, start, r):
    w = {key: value.double() for key, value in w.items()}
    e = block(w, "prelude.0", math.sqrt(D) * w["transformer.wte.weight"][ids])
    s = start.double()
    for _ in range(r):
        s = torch.cat([s, e], -1) @ w["transformer.adapter.weight"].T
        s = block(w, "core_block.1", block(w, "core_block.0", s))
    out = block(w, "coda.0", norm(s, w["transformer.ln_f.weight"]))
    return norm(out, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_released_names_give_the_reference_logits(stored, dtype, atol):
    # of ordinary size: wide weights make a loop amplify rounding, on some processors above the bound
    stored = {name: 0.3 * t if name.endswith("weight") and t.dim() > 1 else t for name, t in stored.items()}
    model = load_huginn(stored, dtype=dtype)
    assert isinstance(model, DepthRecurrence)
    ids, start = torch.randint(0, V, (10,)), 0.6 * torch.randn(10, D)
    expected = reference(stored, ids, start, 3)
    logits = model.recur(ids[None], 3, initial_state=start[None].to(dtype)).logits[0]
    assert logits.dtype == dtype
    scale = float(expected.abs().max())  # the tolerance is that of logits of order one
    torch.testing.assert_close(logits.double() / scale, expected / scale, atol=atol, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "policy",
    [StepCache(), StepCache("latest"), StepCache("skip"), StepCache("compress_s", 8), StepCache("anchor", 6)],
    ids=lambda p: p.kind,
)
def test_cached_decoding_is_the_whole_pass_and_more_recurrences_stay_finite(stored, policy):
    model = load_huginn(stored)
    for parameter in model.parameters():
        parameter *= 0.3 if parameter.dim() > 1 else 1.0  # of ordinary size: wide weights make a loop amplify rounding
    ids, start = torch.randint(0, V, (2, 10)), 0.6 * torch.randn(2, 10, D)
    assert policy.exact(4, 2)
    whole = model.recur(ids, 4, initial_state=start).logits
    state, logits = None, []
    for t in range(10):
        piece = slice(t, t + 1)
        out = model.recur(
            ids[:, piece], 4, initial_state=start[:, piece], state=state, use_cache=True, step_cache=policy
        )
        state = out.state
        logits.append(out.logits)
    scale = float(whole.abs().max())
    torch.testing.assert_close(torch.cat(logits, 1) / scale, whole / scale, atol=1e-5, rtol=0)
    assert model.recur(ids, 200, initial_state=start).logits.isfinite().all()


def test_the_prelude_learns_through_the_window_alone(stored):
    model = load_huginn(stored)
    ids = torch.randint(0, V, (2, 6))
    for last in (0, 1):
        model.zero_grad()
        model.recur(ids, 3, window=GradientWindow(last)).logits.square().mean().backward()
        first: Any = model.backbone.model.layers[0]
        grads = [p.grad for p in first.parameters() if p.grad is not None]
        assert sum(float(g.abs().sum()) for g in grads) > 0 if last else not grads


def test_export_gives_back_what_was_loaded(stored):
    exported = export_huginn(load_huginn(stored))
    assert exported.keys() == stored.keys() - {"freqs_cis"}
    for key, tensor in exported.items():
        assert torch.equal(tensor, stored[key]), key


def test_folder_and_state_dict_load_alike(stored, tmp_path):
    save_file(stored, tmp_path / "model.safetensors")
    a, b = load_huginn(tmp_path), load_huginn(stored)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert a.backbone.lm_head.weight is a.backbone.model.embeddings.weight
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_huginn(tmp_path / "nothing")


def test_loading_is_strict(stored):
    broken = {key: value for key, value in stored.items() if key != "transformer.coda.0.norm_4.weight"}
    broken["transformer.coda.0.norm_5.weight"] = torch.ones(D)
    broken["transformer.prelude.0.mlp.fc.weight"] = torch.ones(M, D)
    with pytest.raises(CheckpointMismatchError) as caught:
        load_huginn(broken)
    assert caught.value.missing == ["transformer.coda.0.norm_4.weight"]
    assert caught.value.unexpected == ["transformer.coda.0.norm_5.weight"]
    assert caught.value.shapes == {"transformer.prelude.0.mlp.fc.weight": ([M, D], [2 * M, D])}
    stored["lm_head.weight"][0, 0] += 1
    with pytest.raises(CheckpointError, match="differ"):
        load_huginn(stored)
    with pytest.raises(CheckpointMismatchError, match="qk_bias"):
        load_huginn({"transformer.wte.weight": torch.ones(V, D)})


def test_full_size_has_the_published_parameters():
    model = build_huginn(device="meta")
    assert sum(p.numel() for p in model.parameters()) == 3_564_976_800
    assert sum(p.numel() for p in model.backbone.model.layers[3].parameters()) == 395_398_080
    keys = huginn_keys(HuginnShape())
    assert len(keys) == 3 + 9 * 8
    stored = sum(math.prod(source.shape) for source in keys)
    assert 4 * (stored + 65536 * 5280 + 4096 * 48 * 2) == 15_645_600_384  # the shard index: head and buffer besides
    assert HuginnShape().effective_depth == 132
    assert model.backbone.config.embedding_scale == pytest.approx(72.6636, abs=1e-4)
    assert model.backbone.config.initializer_range == pytest.approx(0.008703882797784892)
    assert (model.default_recurrences, model.window.last) == (32, 8)


def test_starting_weights_have_the_published_deviations():
    shape = HuginnShape(1, 2, 1, 512, 128, 4, 384, mean_recurrences=32)
    model = build_huginn(shape, generator=torch.Generator().manual_seed(0))
    plain, small = math.sqrt(2 / (5 * 128)), math.sqrt(1 / (5 * 128 * shape.effective_depth))
    left = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))  # of the cut
    layer: Any = model.backbone.model.layers[1]
    head: Any = model.backbone.lm_head
    for weight in (model.adapter.weight, layer.mlp.up_proj.weight, layer.attn.q_proj.weight, head.weight):
        assert isinstance(weight, torch.Tensor)
        assert weight.std().item() == pytest.approx(plain * left, rel=0.02)
    for weight in (layer.attn.o_proj.weight, layer.mlp.down_proj.weight):
        assert weight.std().item() == pytest.approx(small * left, rel=0.02)
    assert layer.attn.q_proj.bias.count_nonzero() == 0
    assert torch.equal(layer.attn_norm_2.weight, torch.ones(128))
    full = math.sqrt(1 / (5 * 5280 * 132))
    assert full == pytest.approx(0.0005356869554443541)


def test_export_names_what_makes_a_model_no_huginn(make_backbone):
    model = DepthRecurrence(make_backbone(), {"readout": "none"})
    with pytest.raises(ValueError, match=r"norm_placement.*readout"):
        export_huginn(model)


def test_chat_layout():
    t = HUGINN_TOKENS

    def encode(text: str) -> list[int]:
        return [ord(c) for c in text]

    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    user = [t["begin_header"], *encode("user"), t["end_header"], *encode("\n\na"), t["end_turn"]]
    huginn = [t["begin_header"], *encode("Huginn"), t["end_header"], *encode("\n\nb"), t["end_turn"]]
    assert huginn_chat(said, encode, generation_prompt=False) == [65504, *user, *huginn, 65505]
    assert huginn_chat(said[:1], encode) == [
        65504,
        *user,
        t["begin_header"],
        *encode("Huginn"),
        t["end_header"],
        10,
        10,
    ]
    with pytest.raises(ValueError, match="role"):
        huginn_chat([{"rule": "user", "content": "a"}], encode)
