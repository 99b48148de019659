"""Faults of recurrent-depth and latent-thought code reported elsewhere, as tests (see the case ids in the names)."""

from dataclasses import replace

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.reasoner import AnswerLimits, PromptBatch, StepContext, TaskBatch, TaskLimits
from latentcot.recurrent_depth import DepthRecurrence, ExitRule
from latentcot.recurrent_depth.latent_thoughts import Coconut, CoconutPause

METHODS = {
    "depth_recurrence": (DepthRecurrence, {"sampler": {"mean": 3}}),
    "coconut": (Coconut, {"latents_per_step": 2, "max_stage": 3}),
    "coconut_pause": (CoconutPause, {"latents_per_step": 2, "max_stage": 3}),
}


def make(name: str):
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=4,
        period=4,
        attention={"num_heads": 4},
        gated_deltanet={"num_heads": 2, "head_dim": 16},
        initializer_range=0.2,
    )
    kind, settings = METHODS[name]
    return kind(HybridForCausalLM(config), settings).double()


@pytest.fixture
def batch() -> TaskBatch:
    """Three examples whose chains have 1, 2 and 5 steps."""
    ids = torch.tensor([[11, 12, 13], [14, 15, 16], [17, 18, 19]])
    counts = torch.tensor([1, 2, 5])
    return TaskBatch(
        prompts=PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), TaskLimits(20, 3, 5, 1, 1)),
        steps=torch.randint(11, 20, (3, 5, 1), generator=torch.Generator().manual_seed(0)),
        step_mask=(torch.arange(5) < counts[:, None])[..., None],
        answer_ids=torch.tensor([[11], [12], [13]]),
        answer_mask=torch.ones(3, 1, dtype=torch.bool),
        difficulty=counts,
        index=torch.arange(3),
    )


@pytest.mark.parametrize("stage", [3, 4])
@pytest.mark.parametrize("name", ["coconut", "coconut_pause"])
def test_R_2_latents_are_six_for_every_chain_in_training_and_answering(name, batch, stage, monkeypatch):
    model = make(name)
    fed: list[int] = []
    think, opening = model.think, model._opening
    monkeypatch.setattr(model, "think", lambda prompts, n: (fed.extend([n] * len(prompts)), think(prompts, n))[1])

    def counted(prompts, n):
        segments = opening(prompts, n)
        fed.extend([] if segments is None else (segments[-1].ids == 10).sum(1).tolist())
        return segments

    monkeypatch.setattr(model, "_opening", counted)
    phase = model.phases()[stage]
    model.loss(batch, StepContext(0, 1, phase, torch.Generator().manual_seed(0)))
    assert fed == [6, 6, 6]
    fed.clear()
    passes = [model.answer(batch.prompts.rows(torch.tensor([row]))).sequential_passes for row in range(3)]
    assert fed == [6, 6, 6]
    assert len({int(p) for p in passes}) == 1


@pytest.mark.parametrize("name", METHODS)
def test_R_2_answers_do_not_depend_on_gold_steps(name, batch):
    model = make(name)
    empty = replace(batch, steps=batch.steps[:, :0], step_mask=batch.step_mask[:, :0])
    nonsense = replace(batch, steps=torch.full_like(batch.steps, 19), step_mask=torch.ones_like(batch.step_mask))
    whole = model.answer(batch.prompts)
    for changed in (empty, nonsense):
        output = model.answer(changed.prompts)
        assert torch.equal(output.ids, whole.ids)
        assert torch.equal(output.sequential_passes, whole.sequential_passes)
        assert torch.equal(output.flops, whole.flops)


def test_R_3_rows_that_stop_at_different_depths_equal_the_rows_alone():
    model = make("depth_recurrence")
    with torch.no_grad():
        model.adapter.weight[:, :32] *= 0.02  # forget the state fast, so that rows settle
    ids = torch.tensor([[11, 12, 13, 14], [14, 15, 16, 19]])
    start = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start *= torch.tensor([100.0, 1e-4])[:, None, None]  # one row has far to go
    rule = ExitRule("latent_difference", 0.1)
    together = model.recur(ids, 20, initial_state=start, exit_rule=rule)
    assert together.recurrences.unique().numel() == 2
    for row in range(2):
        alone = model.recur(ids[row : row + 1], 20, initial_state=start[row : row + 1], exit_rule=rule)
        assert alone.recurrences[0] == together.recurrences[row]
        torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-10, rtol=0)


def test_R_3_a_depth_that_was_never_stored_raises():
    model = make("depth_recurrence")
    ids = torch.tensor([[11, 12, 13]])
    state = model.recur(ids, 2, use_cache=True).state
    with pytest.raises(ValueError, match="2 recurrences"):
        model.recur(ids, 4, state=state)
    with pytest.raises(ValueError, match="gaps"):
        model.recur(ids, 4, exit_rule=ExitRule("kl"), use_cache=True)


@pytest.mark.parametrize("cuts", [(5, 4, 1, 1, 1), (1,) * 12, (2, 10)], ids=str)
def test_S_1_recurrent_depth_state_continues_with_any_number_of_tokens(cuts):
    model = make("depth_recurrence")
    ids = torch.randint(11, 20, (2, 12), generator=torch.Generator().manual_seed(0))
    start = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = model.recur(ids, 2, initial_state=start).logits
    state, parts, at = None, [], 0
    for n in cuts:
        output = model.recur(ids[:, at : at + n], 2, initial_state=start[:, at : at + n], state=state, use_cache=True)
        state, at = output.state, at + n
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)


def test_R_2_an_explicit_number_of_latents_is_the_same_for_every_row(batch):
    model = make("coconut")
    output = model.answer(batch.prompts, AnswerLimits(knobs={"latents": 3}))
    assert output.sequential_passes.tolist() == [4, 4, 4]
