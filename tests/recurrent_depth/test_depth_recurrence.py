"""Depth recurrence as a method: loss, answers, their price, trace, saving."""

import pytest
import torch

from latentcot.reasoner import SPECIAL, AnswerLimits, Phase, Reasoner, Sites
from latentcot.recurrent_depth import DepthRecurrence, diagnose, token_correlation
from latentcot.sequences import constant, join, prompt
from latentcot.training.budget import FlopCounter, count_parameters


@pytest.fixture
def method(make_backbone) -> DepthRecurrence:
    return DepthRecurrence(make_backbone(), {"sampler": {"mean": 4}, "gradient_window": 2}).double()


def test_loss_is_that_of_answer_and_end_at_the_drawn_depth(method, make_batch, make_step):
    batch, ctx = make_batch(), make_step(Phase("train"), step=5)
    output = method.loss(batch, ctx)
    r = method.sampler.at_step(5)
    assert output.parts["recurrences"] == r
    row = join([prompt(batch.prompts), constant(batch.answer_ids, SPECIAL.ans)])
    ids = torch.zeros(3, row.ids.shape[1] + 2, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for b, n in enumerate(row.mask.sum(1).tolist()):
        ids[b, : n + 2] = torch.tensor([*row.ids[b, :n].tolist(), int(batch.answer_ids[b, 0]), SPECIAL.eos])
        mask[b, : n + 2] = True
    generator = make_step(Phase("train"), step=5).generator
    log_p = method.recur(ids, r, attention_mask=mask, generator=generator).logits.log_softmax(-1)
    scored = [log_p[b, n - 1 + i, ids[b, n + i]] for b, n in enumerate(row.mask.sum(1).tolist()) for i in (0, 1)]
    torch.testing.assert_close(output.loss, -torch.stack(scored).mean(), atol=1e-10, rtol=0)
    output.loss.backward()
    assert method.adapter.weight.grad is not None


def test_monitors_are_logged_and_warn_of_the_two_failures(make_backbone, make_batch, make_step):
    method = DepthRecurrence(make_backbone(), {"sampler": {"kind": "fixed", "mean": 4}, "monitor_every": 5}).double()
    quiet = DepthRecurrence(method.backbone, {"sampler": {"kind": "fixed", "mean": 4}}).double()
    quiet.adapter = method.adapter
    names = {"token_correlation", "relative_residual", "state_rms", "loss_at_one"}
    batch = make_batch()
    for step, logged in ((5, False), (4, True)):
        output, plain = (m.loss(batch, make_step(Phase("train"), step=step)) for m in (method, quiet))
        assert (output.parts.keys() >= names) == logged
        assert torch.equal(output.loss, plain.loss)
        assert (output.flops > plain.flops) == logged
    assert output.parts["relative_residual"] > 0
    with torch.no_grad():
        method.adapter.weight[:, :32] = 0  # a loop that does not see its state
    with pytest.warns(UserWarning, match="more recurrences do not help") as caught:
        parts = method.loss(batch, make_step(Phase("train"), step=49)).parts
    assert parts["relative_residual"] < 1e-10
    assert len(caught) == 1
    collapsed = torch.ones(1, 4, 8)
    assert "nearly the same state" in diagnose(float(token_correlation(collapsed).mean()))[0]
    assert diagnose(0.5, 2.0, 1.0) == []


def test_answers_do_not_depend_on_the_batch_and_repeat(method, make_batch):
    prompts = make_batch(2).prompts
    whole = method.answer(prompts)
    assert torch.equal(method.answer(prompts).ids, whole.ids)
    for row in range(3):
        alone = method.answer(prompts.rows(torch.tensor([row])))
        assert torch.equal(alone.info["text"][0], whole.info["text"][row])
        assert float(alone.flops[0]) == float(whole.flops[row])


@pytest.mark.parametrize("rule", ["none", {"kind": "latent_difference", "threshold": 0.0}], ids=["state", "exit"])
def test_price_of_a_fixed_depth(method, make_batch, rule):
    prompts = make_batch(2).prompts
    output = method.answer(prompts, AnswerLimits(knobs={"recurrences": 3, "exit_rule": rule}))
    assert output.sequential_passes.tolist() == (output.tokens_emitted * 4).tolist()
    assert output.info["recurrences"].tolist() == [3, 3, 3]
    whole, core = FlopCounter(method.backbone), FlopCounter(method.backbone, method.core)
    given = prompts.mask.sum(1).double() + 1
    adapter = 2 * 32 * 64

    def price(new, past, head):
        return whole(new, past, head) + 2 * core(new, past) + 3 * adapter * new

    expected = price(given, 0, 1)
    for extra in range(1, 2):
        more = (output.tokens_emitted > extra).double()
        expected += price(1, given, 1) * more if rule == "none" else price(given + 1, 0, 1) * more
    torch.testing.assert_close(output.flops, expected)


def test_exits_that_never_fire_answer_like_the_state(method, make_batch):
    prompts = make_batch(2).prompts
    fixed = method.answer(prompts, AnswerLimits(knobs={"recurrences": 3}))
    never = {"kind": "kl", "threshold": 0.0}
    exits = method.answer(prompts, AnswerLimits(knobs={"recurrences": 3, "exit_rule": never}))
    assert torch.equal(fixed.info["text"], exits.info["text"])
    assert torch.equal(fixed.tokens_emitted, exits.tokens_emitted)
    assert (exits.flops > fixed.flops).all()  # checks run coda and head


@pytest.mark.parametrize("positions", ["last", "mean", "max"])
def test_checks_cost_as_many_heads_as_positions_are_looked_at(method, make_batch, positions):
    prompts = make_batch().prompts
    never = {"kind": "kl", "threshold": 0.0, "positions": positions}
    output = method.answer(prompts, AnswerLimits(knobs={"recurrences": 3, "exit_rule": never}))
    given = prompts.mask.sum(1).double() + 1
    looked_at = torch.ones_like(given) if positions == "last" else given
    coda = FlopCounter(method.backbone, method.coda)
    expected = method.flops(given, recurrences=3, head=1) + 2 * coda(given, 0, looked_at)
    torch.testing.assert_close(output.flops, expected)


def test_a_check_that_ends_a_row_costs_a_head_and_no_second_coda(method, make_batch):
    prompts = make_batch().prompts
    at_once = {"kind": "kl", "threshold": float("inf"), "min_steps": 2}
    output = method.answer(prompts, AnswerLimits(knobs={"recurrences": 9, "exit_rule": at_once}))
    assert output.info["recurrences"].tolist() == [2, 2, 2]
    given = prompts.mask.sum(1).double() + 1
    coda = FlopCounter(method.backbone, method.coda)
    # two checks of one position each, and the head of the answer
    expected = method.flops(given, recurrences=2, head=1) + coda(given, 0) + 2 * coda.head
    torch.testing.assert_close(output.flops, expected)


def test_early_exit_costs_less(method, make_batch):
    prompts = make_batch().prompts
    at_once = {"kind": "latent_difference", "threshold": float("inf"), "min_steps": 2}
    output = method.answer(prompts, AnswerLimits(knobs={"recurrences": 9, "exit_rule": at_once}))
    assert output.info["recurrences"].tolist() == [2, 2, 2]
    assert output.sequential_passes.tolist() == [3, 3, 3]
    two = method.answer(prompts, AnswerLimits(knobs={"recurrences": 2}))
    assert torch.equal(output.ids, two.ids)
    torch.testing.assert_close(output.flops, two.flops)


def test_limits_bound_passes_and_tokens(method, make_batch):
    prompts = make_batch(2).prompts
    assert method.answer(prompts, AnswerLimits(new_tokens=1)).tokens_emitted.tolist() == [1, 1, 1]
    output = method.answer(prompts, AnswerLimits(sequential_passes=7, knobs={"recurrences": 4}))
    assert output.sequential_passes.max() <= 7
    with pytest.raises(ValueError, match="sequential_passes"):
        method.answer(prompts, AnswerLimits(sequential_passes=1))


def test_unknown_knobs_are_refused_by_name(method, make_batch):
    with pytest.raises(ValueError, match="recurrences"):
        method.answer(make_batch().prompts, AnswerLimits(knobs={"recurrence": 3}))
    with pytest.raises(ValueError, match="recurrences"):
        method.answer(make_batch().prompts, AnswerLimits(knobs={"recurrences": 0}))


def test_trace_has_one_step_a_recurrence(method, make_batch):
    prompts = make_batch().prompts
    trace = method.trace(prompts)
    assert trace.hidden.shape == (4, 2, 3, 7, 32)
    assert trace.valid.shape == (4, 3, 7)
    assert trace.valid[2].sum(1).tolist() == [5, 7, 4]
    assert trace.layers == ("block 1", "block 2")
    short = method.trace(prompts, Sites(blocks=(2,), steps=2))
    torch.testing.assert_close(short.hidden[:, 0], trace.hidden[:2, 1], atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="core"):
        method.trace(prompts, Sites(blocks=(0,)))


def test_parameters_do_not_grow_with_depth(method):
    assert count_parameters(method) - count_parameters(method.backbone) == 2 * 32 * 32


def test_save_and_load_give_the_same_answers(method, make_batch, tmp_path):
    method.save_pretrained(tmp_path)
    loaded = Reasoner.from_pretrained(tmp_path).double()
    assert isinstance(loaded, DepthRecurrence)
    assert loaded.settings == method.settings
    assert (loaded.window, loaded.sampler) == (method.window, method.sampler)
    a, b = (model.trace(make_batch().prompts).hidden for model in (method, loaded))
    assert torch.equal(a, b)
