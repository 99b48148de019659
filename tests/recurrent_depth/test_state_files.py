"""States made of several in one file: what was read back continues as what was saved, and foreign or damaged files are refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from latentcot.backbone import ForeignStateError, ModelState
from latentcot.recurrent_depth import CoTFormer, DepthRecurrence, MixtureOfRecursions, Ouro, StepCache
from latentcot.recurrent_depth.cotformer import CoTState
from latentcot.recurrent_depth.mixture_of_recursions import RoutedState
from latentcot.recurrent_depth.ragged_state import LoopStates

CASES: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "loop": (Ouro, LoopStates, {"steps": 3, "q": 0.6, "gaps": "hold"}, {}),
    "loop, shared": (Ouro, LoopStates, {"steps": 3, "sharing": "last"}, {"mixers": ["attention"] * 4}),
    "routed": (MixtureOfRecursions, RoutedState, {}, {}),
    "routed, shared": (MixtureOfRecursions, RoutedState, {"cache": "shared"}, {"mixers": ["attention"] * 4}),
    "cotformer": (CoTFormer, CoTState, {"adaptive": True, "threshold": 0.45}, {"mixers": ["attention"] * 4}),
}


@pytest.fixture(params=CASES)
def case(request, make_backbone):
    kind, states, settings, mixers = CASES[request.param]
    model = kind(make_backbone(**mixers), settings).double()
    return model, states


def prompt() -> torch.Tensor:
    return torch.randint(11, 20, (3, 6), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_what_was_read_back_goes_on_like_what_was_saved(case, tmp_path):
    model, kind = case
    ids, options = prompt(), model.options({})
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :2] = False
    state = model.read(ids, mask, None, options).state
    assert isinstance(state, kind)
    state.save(tmp_path / "state.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    loaded = kind.load(tmp_path / "state.safetensors", model.backbone.config.fingerprint)
    assert loaded.nbytes == state.nbytes
    if isinstance(state, LoopStates):  # the rules are part of the file
        assert (loaded.gaps, loaded.sharing) == (state.gaps, state.sharing)
    a, b = state, loaded
    for token in (11, 14, 17):
        step = torch.full((3, 1), token)
        one, two = model.read(step, None, a, options), model.read(step, None, b, options)
        assert torch.equal(one.logits, two.logits)
        assert torch.equal(one.depth, two.depth)
        a, b = one.state, two.state
    kept = kind.load(tmp_path / "state.safetensors").select(
        torch.tensor([2])
    )  # a row of a file goes on as the row alone
    alone = model.read(torch.full((1, 1), 11), None, kept, options)
    torch.testing.assert_close(alone.logits[0], model.read(torch.full((3, 1), 11), None, loaded, options).logits[2])


@torch.no_grad()
def test_foreign_and_damaged_files_are_refused(case, tmp_path):
    model, kind = case
    path = tmp_path / "state.safetensors"
    model.read(prompt(), None, None, model.options({})).state.save(path)
    with pytest.raises(ForeignStateError, match="saved by another model"):
        kind.load(path, "0123456789abcdef")
    for other in {LoopStates, RoutedState, CoTState} - {kind}:
        with pytest.raises(ValueError, match=r"holds .* expected"):
            other.load(path)
    with pytest.raises(ValueError, match="not a readable model state"):
        ModelState.load(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="not a readable file of states"):
        kind.load(path)
    with pytest.raises(ValueError, match="no state file"):
        kind.load(tmp_path / "none")
    with pytest.raises(ValueError, match="no folder"):
        model.read(prompt(), None, None, model.options({})).state.save(tmp_path / "no" / "state.safetensors")


@torch.no_grad()
def test_parts_of_several_models_or_batches_are_refused(make_backbone, tmp_path):
    model = Ouro(make_backbone(), {"steps": 2}).double()
    states = model.unroll(prompt(), use_cache=True).states
    assert states is not None
    other = model.backbone.new_state()
    other.fingerprint = "other"
    with pytest.raises(ForeignStateError, match="different models"):
        replace(states, steps=(states.steps[0], other)).save(tmp_path / "a")
    replace(states, lengths=states.lengths[:2]).save(tmp_path / "b")
    with pytest.raises(ValueError, match="disagree about the batch"):
        LoopStates.load(tmp_path / "b")


@torch.no_grad()
def test_a_state_of_another_number_of_recursions_is_refused(make_backbone):
    model = MixtureOfRecursions(make_backbone(), {"recursions": 2}).double()
    state = model.route(prompt(), use_cache=True).state
    other = MixtureOfRecursions(make_backbone(), {"recursions": 3}).double()
    with pytest.raises(ValueError, match="holds 2 recursions, expected 3"):
        other.route(prompt()[:, :1], state=state)


@torch.no_grad()
def test_columns_that_grew_in_place_are_saved_as_they_are_seen(make_backbone, tmp_path):
    model = DepthRecurrence(make_backbone(mixers=["attention"] * 4)).double()
    policy, start = StepCache("latest"), torch.zeros(3, 9, 32, dtype=torch.float64)
    state = model.recur(prompt(), 3, initial_state=start[:, :6], use_cache=True, step_cache=policy).state
    for token in (11, 12):
        step = torch.full((3, 1), token)
        state = model.recur(step, 3, initial_state=start[:, :1], state=state, step_cache=policy).state
    assert state is not None
    state.save(tmp_path / "state")
    loaded = ModelState.load(tmp_path / "state", state.fingerprint)
    assert loaded.nbytes == state.nbytes
    step = torch.full((3, 1), 13)
    a, b = (model.recur(step, 3, initial_state=start[:, :1], state=s, step_cache=policy) for s in (loaded, state))
    assert torch.equal(a.logits, b.logits)
