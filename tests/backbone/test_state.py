"""ModelState as a value: select, detach, fork, save, load."""

import pytest
import torch
from safetensors.torch import save_file

from latentcot.backbone import HybridConfig, HybridForCausalLM, ModelState


def model_and_ids():
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=19,
        hidden_size=32,
        num_hidden_layers=2,
        period=2,
        attention={"num_heads": 4},
        gated_deltanet={"num_heads": 2, "head_dim": 8},
        initializer_range=0.2,
    )
    ids = torch.randint(0, 19, (3, 7), generator=torch.Generator().manual_seed(2))
    return HybridForCausalLM(config).double().eval(), ids


def test_select_gives_each_row_its_own_past():
    model, ids = model_and_ids()
    state = model(ids[:, :5], use_cache=True).state
    whole = model(ids).logits[:, 5:]
    rows = [2, 0, 0]
    torch.testing.assert_close(model(ids[rows, 5:], state=state.select(rows)).logits, whole[rows], rtol=0, atol=1e-12)
    twice = model(ids[:, 5:].repeat_interleave(2, 0), state=state.expand(2)).logits
    torch.testing.assert_close(twice, whole.repeat_interleave(2, 0), rtol=0, atol=1e-12)


def test_using_a_state_leaves_it_as_it_was():
    model, ids = model_and_ids()
    state = model(ids[:, :5], use_cache=True).state
    kept = {place: {k: v.clone() for k, v in entry.tensors.items()} for place, entry in state.entries.items()}
    model(ids[:, 5:], state=state)
    for place, entry in state.entries.items():
        for name, tensor in entry.tensors.items():
            assert torch.equal(tensor, kept[place][name])
    assert state.get_seq_length() == 5


def test_fork_is_independent_and_detach_has_no_history():
    model, ids = model_and_ids()
    state = model(ids, use_cache=True).state
    fork = state.fork()
    with torch.no_grad():
        fork.entries[0, 0]["matrix"].zero_()
    assert state.entries[0, 0]["matrix"].abs().max() > 0
    assert state.entries[0, 0]["matrix"].requires_grad
    assert not any(t.requires_grad for entry in state.detach().entries.values() for t in entry.tensors.values())


def test_a_saved_state_goes_on_where_it_was(tmp_path):
    model, ids = model_and_ids()
    state = model(ids[:, :5], use_cache=True).state
    state.save(tmp_path / "state.safetensors")
    loaded = ModelState.load(tmp_path / "state.safetensors", model.config.fingerprint)
    assert torch.equal(model(ids[:, 5:], state=loaded).logits, model(ids[:, 5:], state=state).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.safetensors"]


def test_files_that_are_no_states_are_refused(tmp_path):
    model, ids = model_and_ids()
    path = tmp_path / "state.safetensors"
    with pytest.raises(ValueError, match="no state file"):
        ModelState.load(path)
    model(ids, use_cache=True).state.save(path)
    with pytest.raises(ValueError, match="another model"):
        ModelState.load(path, "0123456789abcdef")
    save_file({"x": torch.zeros(1)}, path, {"latentcot_state": "{}"})
    with pytest.raises(ValueError, match="not a readable model state"):
        ModelState.load(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="not a readable model state"):
        ModelState.load(path)


def test_states_are_fp32_whatever_the_model_computes_in():
    model, ids = model_and_ids()
    state = model.to(torch.bfloat16)(ids, use_cache=True).state
    assert state.entries[0, 0]["matrix"].dtype == torch.float32
    assert state.entries[1, 0]["keys"].dtype == torch.bfloat16


def test_memory_of_a_linear_layer_does_not_grow():
    model, ids = model_and_ids()
    short, long = (model(x, use_cache=True).state.entries[0, 0].nbytes for x in (ids, ids.repeat(1, 3)))
    assert short == long


def test_reading_an_entry_that_was_never_written_raises():
    model, ids = model_and_ids()
    state = model(ids, use_cache=True).state
    with pytest.raises(ValueError, match="nothing is stored"):
        state.read((0, 1))
    with pytest.raises(ValueError, match="holds 3 rows"):
        state.select([3])
