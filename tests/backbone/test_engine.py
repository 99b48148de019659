"""The decode engine on a CPU: the same numbers as the model's own forward, in place and at fixed addresses."""

# Tests read optional fields, and ``generate`` is typed by a protocol.
# pyright: reportOptionalMemberAccess=false, reportCallIssue=false, reportArgumentType=false, reportOptionalSubscript=false

import pytest
import torch

from latentcot.backbone import MIXERS, HybridConfig, HybridForCausalLM, ModelState
from latentcot.backbone.engine import FIRST_WINDOW, DecodeEngine
from latentcot.backbone.generation import Sampling
from latentcot.backbone.state import ForeignStateError

SMALL = {
    "attention": {"num_heads": 4},
    "gla": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "head_dim": 12},
    "deltanet": {"num_heads": 2},
    "hgrn2": {"num_heads": 2, "expand_ratio": None},
    "retnet": {"num_heads": 2},
}
STACKS = {
    **{name: {"mixer": name} for name in MIXERS},
    "hybrid": {"mixer": "gated_deltanet", "period": 2},
    "grouped-negative": {
        "mixer": "gated_deltanet",
        "gated_deltanet": {"num_heads": 1, "num_v_heads": 2, "head_dim": 12, "expand_v": 1.5, "allow_neg_eigval": True},
    },
    "no-gate-post": {
        "mixer": "gated_deltanet",
        "period": 2,
        "norm_placement": "post",
        "gated_deltanet": {"num_heads": 3, "head_dim": 8, "use_gate": False, "conv_size": 3},
    },
    "no-convolution": {
        "mixer": "gated_deltanet",
        "gated_deltanet": {"num_heads": 2, "head_dim": 8, "use_short_conv": False},
    },
    "gqa-interleaved-sandwich": {
        "mixer": "gla",
        "period": 2,
        "norm_placement": "sandwich_pre_residual",
        "attention": {"num_heads": 4, "num_kv_heads": 2, "rotary_layout": "interleaved", "bias": "qk"},
        "embedding_scale": 3.0,
    },
    "window-biased": {
        "mixer": "attention",
        "norm_placement": "sandwich_post_residual",
        "attention": {"num_heads": 2, "num_kv_heads": 1, "bias": "qkv", "window_size": 4},
    },
    "no-positions": {"mixer": "attention", "attention": {"num_heads": 2, "rope_theta": None}},
}


def make(stack: str = "hybrid", dtype: torch.dtype = torch.float64, **changes) -> HybridForCausalLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 29,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "initializer_range": 0.2,
        "convolution_init": "uniform",
        "eos_token_id": None,
        "pad_token_id": 0,
        **{name: options for name, options in SMALL.items() if name in MIXERS},
    }
    model = HybridForCausalLM(HybridConfig(**{**values, **STACKS[stack], **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "lower_bounds" in name:  # zeros would hide a term that is left out
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 29, (batch, length), generator=torch.Generator().manual_seed(seed))


LENGTHS = [9, 4, 1]
MASKS = {
    "left": torch.stack([torch.arange(9) >= 9 - n for n in LENGTHS]).long(),
    "right": torch.stack([torch.arange(9) < n for n in LENGTHS]).long(),
}


def alone(model: HybridForCausalLM, ids: torch.Tensor, mask: torch.Tensor, count: int) -> list[list[int]]:
    """Greedy tokens of every row by full forwards, each row by itself."""
    found = []
    for row in range(len(ids)):
        line = ids[row : row + 1, mask[row].bool()]
        start = line.shape[1]
        for _ in range(count):
            line = torch.cat([line, model(line).logits[:, -1:].argmax(-1)], 1)
        found.append(line[0, start:].tolist())
    return found


@pytest.mark.parametrize("stack", STACKS)
def test_greedy_tokens_are_those_of_full_forwards(stack):
    model, ids = make(stack), tokens(3, 9)
    engine = DecodeEngine(model, batch=3, max_length=24)
    for side, mask in MASKS.items():
        engine.prefill(ids, mask)
        assert engine.generate(12).tolist() == alone(model, ids, mask, 12), side


@pytest.mark.parametrize("stack", STACKS)
def test_logits_and_states_are_those_of_the_model(stack):
    model, ids, mask = make(stack), tokens(3, 9), MASKS["left"]
    engine = DecodeEngine(model, batch=3, max_length=24)
    token = engine.prefill(ids, mask, chunk=4).clone()
    state = model(ids, attention_mask=mask, use_cache=True).state
    for _ in range(7):
        output = model(token[:, None], state=state)
        state, token = output.state, engine.step().clone()
        torch.testing.assert_close(engine.logits, output.logits[:, -1], rtol=0, atol=1e-9)
    held = engine.state()
    assert torch.equal(held.lengths, state.lengths)
    new = tokens(3, 3, seed=5)
    torch.testing.assert_close(model(new, state=held).logits, model(new, state=state).logits, rtol=0, atol=1e-9)
    for place, entry in state.entries.items():
        for name, tensor in entry.tensors.items():
            if name not in ("keys", "values"):
                torch.testing.assert_close(held.entries[place][name], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize("stack", ["gated_deltanet", "attention", "hybrid", "gla"])
def test_generate_of_transformers_gives_the_same_tokens(stack):
    model, ids = make(stack), tokens(3, 9)
    engine = DecodeEngine(model, batch=3, max_length=40)
    engine.prefill(ids * MASKS["left"], MASKS["left"])
    expected = model.generate(ids * MASKS["left"], attention_mask=MASKS["left"], max_new_tokens=20, do_sample=False)
    assert torch.equal(torch.cat([engine.generate(5), engine.generate(15)], 1), expected[:, 9:])
    engine.prefill(ids * MASKS["left"], MASKS["left"])
    assert torch.equal(torch.cat([engine.generate(n) for n in (1, 0, 1, 3)], 1), expected[:, 9:14])


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_stay_close_to_the_full_forward(stack, dtype):
    model, exact, ids = make(stack, dtype), make(stack), tokens(2, 9)
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    engine = DecodeEngine(model, batch=2, max_length=24)
    tolerance = 2e-4 if dtype == torch.float32 else 5e-2
    line = torch.cat([ids, engine.prefill(ids)[:, None]], 1)
    for _ in range(6):
        line = torch.cat([line, engine.step()[:, None]], 1)
        expected = exact(line[:, :-1]).logits[:, -1].detach()
        assert float((engine.logits.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("stack", STACKS)
def test_states_stay_at_their_addresses(stack):
    model = make(stack)
    engine = DecodeEngine(model, batch=2, max_length=24)
    where = [buffer.data_ptr() for block in engine.blocks for buffer in block.mixer.buffers.values()]
    engine.prefill(tokens(2, 5))
    engine.generate(6)
    engine.reset()
    assert [buffer.data_ptr() for block in engine.blocks for buffer in block.mixer.buffers.values()] == where


@pytest.mark.parametrize("stack", ["hybrid", "attention"])
def test_windows_of_attention_widen_with_the_context(stack):
    model, length = make(stack), FIRST_WINDOW - 4
    ids = tokens(1, length)
    engine = DecodeEngine(model, batch=1, max_length=FIRST_WINDOW + 50)
    assert engine.windows == [FIRST_WINDOW, FIRST_WINDOW + 64]
    engine.prefill(ids)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(engine.generate(20), expected[:, length:])
    assert engine.clock.window == FIRST_WINDOW + 64


def test_a_row_can_be_replaced_while_the_others_go_on():
    model, ids = make(), tokens(3, 9)
    full = torch.ones_like(ids)
    engine = DecodeEngine(model, batch=2, max_length=40)
    first = engine.prefill(ids[:2])
    rows = [[int(t)] for t in first]
    for _ in range(4):
        for row, token in zip(rows, engine.step().tolist(), strict=True):
            row.append(token)
    engine.stop([1])
    held = engine.state()
    assert held.lengths.tolist() == [13, 0]
    assert all(not tensor[1].any() for entry in held.entries.values() for tensor in entry.tensors.values())
    output = model(ids[2:], use_cache=True)
    rows[1] = engine.load(output.state, output.logits[:, -1], rows=[1]).tolist()
    for _ in range(5):
        for row, token in zip(rows, engine.step().tolist(), strict=True):
            row.append(token)
    assert rows[0] == alone(model, ids[:1], full, 10)[0]
    assert rows[1] == alone(model, ids[2:], full, 6)[0]


def test_a_state_decodes_on_from_a_file(tmp_path):
    model, ids = make(), tokens(2, 6)
    engine = DecodeEngine(model, batch=2, max_length=40)
    engine.prefill(ids)
    engine.generate(4)
    last = engine.token.clone()
    engine.state().save(tmp_path / "state.safetensors")
    expected = engine.generate(5)
    output = model(last[:, None], state=model.load_state(tmp_path / "state.safetensors"))
    other = DecodeEngine(model, batch=2, max_length=40)
    other.load(output.state, output.logits[:, -1])
    assert torch.equal(other.generate(5), expected)


def test_rows_end_at_the_end_token():
    model, ids = make(), tokens(3, 9)
    engine = DecodeEngine(model, batch=3, max_length=80)
    engine.prefill(ids)
    free = engine.generate(60)
    end = int(free[0, 3])
    engine.prefill(ids)
    ended = engine.generate(60, eos_token_id=end, pad_token_id=1)
    expected = model.generate(ids, max_new_tokens=60, do_sample=False, eos_token_id=end, pad_token_id=1)[:, 9:]
    assert torch.equal(ended, expected)


def test_samples_are_repeated_by_their_seed_and_differ_from_greedy():
    model, ids = make(), tokens(2, 6)
    drawn = []
    for seed in (1, 1, 2):
        engine = DecodeEngine(model, batch=2, max_length=40, sampling=Sampling(1.0), seed=seed)
        engine.prefill(ids)
        drawn.append(engine.generate(20))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_explain_names_the_path_of_every_layer():
    lines = DecodeEngine(make("gqa-interleaved-sandwich"), batch=1, max_length=8).explain()
    assert lines == ["0: gla: the mixer's forward", "1: attention: static keys and values"]
    assert "in place" in DecodeEngine(make(), batch=1, max_length=8).explain()[0]


def test_bad_calls_are_named_and_change_nothing():
    model, ids = make(), tokens(2, 6)
    with pytest.raises(TypeError, match="HybridForCausalLM"):
        DecodeEngine(model.model, batch=1, max_length=8)
    for sizes in ({"batch": 0, "max_length": 8}, {"batch": 1, "max_length": 0}):
        with pytest.raises(ValueError, match="positive integer"):
            DecodeEngine(model, **sizes)
    engine = DecodeEngine(model, batch=2, max_length=8)
    with pytest.raises(ValueError, match="prefill or load first"):
        engine.step()
    with pytest.raises(ValueError, match="the engine's batch"):
        engine.prefill(ids[:1])
    with pytest.raises(ValueError, match="made for 8"):
        engine.prefill(tokens(2, 9))
    engine.prefill(ids)
    before = engine.state()
    with pytest.raises(ValueError, match="made for 8"):
        engine.generate(4)
    with pytest.raises(ForeignStateError, match="another model"):
        engine.load(ModelState("other"), torch.zeros(2, 29))
    with pytest.raises(ValueError, match="fresh"):
        engine.load(model.new_state(), torch.zeros(2, 29))
    output = model(ids, use_cache=True)
    for rows, logits in (([0], output.logits[:, -1]), ([0, 2], output.logits[:, -1]), ([0, 1], output.logits[:1, -1])):
        with pytest.raises(ValueError, match="rows"):
            engine.load(output.state, logits, rows=rows)
    partial = ModelState(
        output.state.fingerprint, {(0, 0): output.state.entries[0, 0]}, output.state.lengths, output.state.valid
    )
    with pytest.raises(ValueError, match=r"nothing is stored for .* \(1, 0\)"):
        engine.load(partial.map(lambda tensor: tensor * 0), output.logits[:, -1])
    with pytest.raises(ValueError, match=r"\[2\] given"):
        engine.stop([0, 2])
    with pytest.raises(ValueError, match="count"):
        engine.generate(1.5)
    after = engine.state()
    for place, entry in before.entries.items():
        assert all(torch.equal(tensor, after.entries[place][name]) for name, tensor in entry.tensors.items())
    assert engine.generate(3).shape == (2, 3)
    with pytest.raises(ValueError, match="made for 8"):
        engine.step()
