"""ModelState as a value: select, detach, fork, save, load."""

# Tests read attributes of mixers and of optional states, which a type checker cannot know.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false, reportIndexIssue=false

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from latentcot.backbone import MIXERS, HybridConfig, HybridForCausalLM, ModelState
from latentcot.backbone.state import ADDITIVE, ForeignStateError


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
    whole = model(ids, use_cache=True).state
    places = {"fingerprint": whole.fingerprint, "mixers": {"first": "gla"}}
    save_file({"entry.first.matrix": torch.zeros(1)}, path, {"latentcot_state": json.dumps(places)})
    with pytest.raises(ValueError, match="not a readable model state"):
        ModelState.load(path)
    replace(whole, valid=None).save(path)  # it would go on from position 3 and see no past
    with pytest.raises(ValueError, match="parts are missing"):
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


# -- merging, resetting, foreign states -----------------------------------------------------------------------------------


def of_mixers(*mixers: str, **changes):
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=19,
        hidden_size=32,
        mixers=list(mixers),
        num_hidden_layers=len(mixers),
        attention={"num_heads": 4},
        gla={"num_heads": 2},
        gated_deltanet={"num_heads": 2, "head_dim": 8},
        deltanet={"num_heads": 2},
        hgrn2={"num_heads": 2, "expand_ratio": None},
        retnet={"num_heads": 2},
        initializer_range=0.2,
        **changes,
    )
    return HybridForCausalLM(config).double().eval()


def test_rows_of_merged_states_of_unequal_lengths_go_on_as_they_would_alone():
    model, ids = model_and_ids()
    parts = [model(ids[:1, :5], use_cache=True).state, model(ids[1:, :2], use_cache=True).state]
    merged = ModelState.merge([model.new_state(), *parts])
    assert merged.lengths.tolist() == [5, 2, 2]
    new = ids[:, 5:]
    together = model(new, state=merged).logits
    alone = torch.cat([model(new[:1], state=parts[0]).logits, model(new[1:], state=parts[1]).logits])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_a_merged_state_can_be_taken_apart_again():
    model, ids = model_and_ids()
    parts = [model(ids[row : row + 1, : 3 + row], use_cache=True).state for row in range(3)]
    merged = ModelState.merge(parts)
    for row, part in enumerate(parts):
        expected = model(ids[row : row + 1, 6:], state=part).logits
        torch.testing.assert_close(
            model(ids[row : row + 1, 6:], state=merged.select([row])).logits, expected, rtol=0, atol=1e-12
        )


def test_the_sum_of_two_states_holds_what_each_document_wrote():
    """One GLA layer by its definition: what two documents wrote, decayed within each alone, read by one query."""
    model, ids = of_mixers("gla"), model_and_ids()[1]
    documents = [ids[:1, :4], ids[1:2, :6]]
    states = [model(document, use_cache=True).state for document in documents]
    merged = ModelState.merge(states, how="sum")
    assert merged.lengths.tolist() == [6]
    assert merged.get_seq_length() == 6
    mixer, expected = model.model.layers[0].attn, 0.0
    for document in documents:
        x = model.model.layers[0].attn_norm(model.embed(document))
        k = mixer.k_proj(x).view(-1, mixer.heads, mixer.K)
        v = mixer.v_proj(x).view(-1, mixer.heads, mixer.V)
        alpha = torch.nn.functional.logsigmoid(mixer.gk_proj(x)).div(16).exp().view(-1, mixer.heads, mixer.K)
        state = torch.zeros(mixer.heads, mixer.K, mixer.V, dtype=torch.float64)
        for t in range(document.shape[1]):
            state = alpha[t, :, :, None] * state + k[t, :, :, None] * v[t, :, None, :]
        expected = expected + state
    torch.testing.assert_close(merged.entries[0, 0]["matrix"][0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_adds_up_or_is_refused(mixer):
    model, ids = of_mixers(mixer), model_and_ids()[1]
    states = [model(ids[:, :4], use_cache=True).state, model(ids[:, 3:], use_cache=True).state]
    if mixer in ADDITIVE:
        merged = ModelState.merge(states, how="sum")
        for name, tensor in merged.entries[0, 0].tensors.items():
            torch.testing.assert_close(tensor, states[0].entries[0, 0][name] + states[1].entries[0, 0][name])
        assert model(ids, state=merged).logits.isfinite().all()
    else:
        with pytest.raises(ValueError, match="do not add up"):
            ModelState.merge(states, how="sum")


def test_rotated_keys_of_unequal_documents_are_refused():
    model, ids = of_mixers("retnet"), model_and_ids()[1]
    states = [model(ids[:, :4], use_cache=True).state, model(ids[:, :3], use_cache=True).state]
    with pytest.raises(ValueError, match="equally long"):
        ModelState.merge(states, how="sum")


def test_states_that_do_not_add_up_are_refused():
    ids = model_and_ids()[1]
    for mixers in (("gated_deltanet",), ("gla", "attention")):
        model = of_mixers(*mixers)
        state = model(ids, use_cache=True).state
        with pytest.raises(ValueError, match="do not add up"):
            ModelState.merge([state, state], how="sum")
    model = of_mixers("gla")
    state = model(ids, use_cache=True).state
    with pytest.raises(ValueError, match="equal batches"):
        ModelState.merge([state, state.select([0])], how="sum")


def test_what_can_not_be_merged_is_named():
    model, ids = model_and_ids()
    state = model(ids, use_cache=True).state
    with pytest.raises(ValueError, match="at least one"):
        ModelState.merge([])
    with pytest.raises(ValueError, match="'rows' or 'sum'"):
        ModelState.merge([state], how="mean")  # type: ignore[arg-type]
    with pytest.raises(ForeignStateError, match="different models"):
        ModelState.merge([state, of_mixers("gla")(ids, use_cache=True).state])
    with pytest.raises(ValueError, match="places differ"):
        ModelState.merge(
            [state, ModelState(state.fingerprint, {(0, 0): state.entries[0, 0]}, state.lengths, state.valid)]
        )


@pytest.mark.parametrize("rows", [[1], torch.tensor([False, True, False])], ids=["index", "mask"])
def test_a_reset_row_starts_anew_and_the_others_go_on(rows):
    model, ids = model_and_ids()
    state = model(ids[:, :5], use_cache=True).state
    assert state.reset(rows).lengths.tolist() == [5, 0, 5]  # rotary angles are relative: logits would not tell
    after = model(ids[:, 5:], state=state.reset(rows)).logits
    torch.testing.assert_close(after[[0, 2]], model(ids).logits[[0, 2], 5:], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1], model(ids[1:2, 5:]).logits[0], rtol=0, atol=1e-12)
    assert state.lengths.tolist() == [5, 5, 5]
    assert state.reset().is_fresh


def test_rows_outside_the_state_are_refused_and_negative_ones_count_from_the_end():
    model, ids = model_and_ids()
    state = model(ids, use_cache=True).state
    assert torch.equal(state.select([-1]).entries[0, 0]["matrix"], state.entries[0, 0]["matrix"][2:])
    assert state.select([]).batch_size == 0
    for rows in ([-4], [3], torch.tensor([True, False]), torch.tensor([[0]]), torch.tensor([0.5])):
        with pytest.raises(ValueError, match="rows:"):
            state.select(rows)
    with pytest.raises(ValueError, match="rows:"):
        state.reset([3])
    with pytest.raises(ValueError, match="copies"):
        state.expand(0)


def test_a_state_of_another_model_is_refused_by_name_and_nothing_changes(tmp_path):
    model, ids = model_and_ids()
    other = of_mixers("gla", "attention")
    path = tmp_path / "state.safetensors"
    other(ids, use_cache=True).state.save(path)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ForeignStateError, match="another model"):
        model.load_state(path)
    with pytest.raises(ForeignStateError, match="another model"):
        model(ids, state=ModelState.load(path))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model(ids, use_cache=True).state.get_seq_length() == 7
    assert other.load_state(path).lengths.tolist() == [7, 7, 7]


def test_a_state_that_can_not_be_written_leaves_the_old_file(tmp_path):
    model, ids = model_and_ids()
    state = model(ids, use_cache=True).state
    with pytest.raises(ValueError, match="no folder"):
        state.save(tmp_path / "missing" / "state.safetensors")
    state.save(tmp_path / "state.safetensors")
    short = model(ids[:, :2], use_cache=True).state
    short.save(tmp_path / "state.safetensors")
    assert ModelState.load(tmp_path / "state.safetensors").get_seq_length() == 2
    assert len(list(tmp_path.iterdir())) == 1
