"""Latent thoughts: passes with state = passes without, schedule, loss mask, controls, ablations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from latentcot.reasoner import SPECIAL, AnswerLimits, Phase, PromptBatch, Reasoner, Sites, TaskBatch
from latentcot.recurrent_depth.latent_thoughts import (
    Coconut,
    CoconutNoLatents,
    CoconutPause,
    Curriculum,
    LatentReasoner,
    SlotAblation,
    SlotWriter,
)
from latentcot.training.budget import FlopCounter

TOLERANCE: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10}
SETTINGS = {"latents_per_step": 2, "max_stage": 3}
KINDS = [Coconut, CoconutPause, CoconutNoLatents]


@pytest.fixture
def coconut(make_backbone) -> Coconut:
    return Coconut(make_backbone(), SETTINGS).double()


def row_prompt(batch: TaskBatch, row: int) -> list[int]:
    return batch.prompts.ids[row, batch.prompts.mask[row]].tolist()


def written(batch: TaskBatch, row: int, removed: int | None) -> list[int]:
    kept = [] if removed is None else batch.steps[row, batch.step_mask[row, :, 0], 0].tolist()[removed:]
    return [*kept, SPECIAL.ans, *batch.answer_ids[row, batch.answer_mask[row]].tolist(), SPECIAL.eos]


def passes_without_state(model: LatentReasoner, opening: list[int], latents: int, behind: list[int]) -> torch.Tensor:
    """Logits of the last of n + 1 full passes over one row: after each, its last hidden state fills the next slot."""
    body = model.backbone.model
    embeds = body.embed(torch.tensor([opening]))
    for _ in range(latents):
        hidden, _ = body(inputs_embeds=embeds)
        embeds = torch.cat([embeds, hidden[:, -1:]], 1)
    embeds = torch.cat([embeds, body.embed(torch.tensor([behind]))], 1)
    return model.backbone(inputs_embeds=embeds).logits[0]


def reference_loss(model: LatentReasoner, batch: TaskBatch, stage: int) -> torch.Tensor:
    """Loss of the sequential method, row by row and without any state."""
    losses = []
    for row in range(len(batch)):
        n = model.curriculum.latents(stage)
        text = written(batch, row, model.curriculum.steps_removed(stage))
        if n == 0:
            opening, behind = row_prompt(batch, row), text
        else:
            opening, behind = [*row_prompt(batch, row), SPECIAL.bot], [SPECIAL.eot, *text]
        logits = passes_without_state(model, opening, n, behind)
        before = logits[-len(text) - 1 : -1]  # the position before each learned token
        losses.append(F.cross_entropy(before, torch.tensor(text), reduction="none"))
    return torch.cat(losses).mean()


# -- forward and gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 3, 4])
def test_loss_and_gradient_equal_passes_without_state(make_backbone, make_batch, make_step, stage):
    # Moderate weights: seven chained passes of a model with large ones amplify rounding beyond the bar.
    coconut = Coconut(make_backbone(initializer_range=0.1), SETTINGS).double()
    batch = make_batch(2)
    output = coconut.loss(batch, make_step(coconut.phases()[stage]))
    output.loss.backward()
    ours = {name: p.grad.clone() for name, p in coconut.named_parameters() if p.grad is not None}
    coconut.zero_grad()
    expected = reference_loss(coconut, batch, stage)
    torch.testing.assert_close(output.loss, expected, **TOLERANCE)
    expected.backward()
    for name, p in coconut.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(ours[name], p.grad, **TOLERANCE)


def test_gradient_flows_through_every_pass(coconut, make_batch):
    """The last latent depends on the prompt's embedding through all n passes."""
    thoughts = coconut.think(make_batch().prompts, 4)
    coconut.zero_grad()
    thoughts.latents[:, -1].square().sum().backward()
    gradient = coconut.backbone.model.embeddings.weight.grad
    assert gradient[SPECIAL.bot].abs().sum() > 0
    assert gradient[11].abs().sum() > 0


def test_latents_fed_by_hand_equal_the_modules(coconut, make_batch):
    batch = make_batch()
    thoughts = coconut.think(batch.prompts, 5)
    behind = torch.tensor([[SPECIAL.eot, SPECIAL.ans]]).expand(3, 2)
    hidden, _ = coconut.read_on(thoughts, behind, torch.ones_like(behind, dtype=torch.bool))
    for row in range(3):
        opening = torch.tensor([[*row_prompt(batch, row), SPECIAL.bot]])
        embed = coconut.backbone.embed
        embeds = torch.cat([embed(opening), thoughts.latents[row : row + 1], embed(behind[:1])], 1)
        by_hand, _ = coconut.backbone.model(inputs_embeds=embeds)
        torch.testing.assert_close(hidden[row], by_hand[0, -3:], **TOLERANCE)
        torch.testing.assert_close(thoughts.latents[row], by_hand[0, -8:-3], **TOLERANCE)


def test_no_latents_is_the_plain_model(coconut, make_batch, make_step):
    """Stage 0 is chain of thought: prompt, steps, <ans>, answer, <eos>, no markers."""
    batch = make_batch()
    loss = coconut.loss(batch, make_step(coconut.phases()[0])).loss
    summed, count = torch.zeros(()).double(), 0
    for row in range(3):
        text = written(batch, row, 0)
        ids = torch.tensor([row_prompt(batch, row) + text])
        labels = torch.full_like(ids, -100)
        labels[0, -len(text) :] = ids[0, -len(text) :]
        summed, count = summed + coconut.backbone(input_ids=ids, labels=labels).loss * len(text), count + len(text)
    torch.testing.assert_close(loss, summed / count, **TOLERANCE)


def test_only_text_behind_the_slots_is_learned(coconut, make_batch, make_step):
    """Stage 2 of the row with five steps scores steps 3 to 5, <ans>, the answer and <eos>."""
    batch = make_batch().rows(torch.tensor([2]))
    logits_seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        output.retain_grad()
        logits_seen.append(output)

    handle = coconut.backbone.lm_head.register_forward_hook(keep)
    coconut.loss(batch, make_step(coconut.phases()[2])).loss.backward()
    handle.remove()
    (logits,) = logits_seen
    assert logits.grad is not None
    # behind latent 4 stand <eot>, steps 3 to 5, <ans>, answer, <eos>: all but the last predict a learned token
    assert (logits.grad[0].abs().sum(-1) > 0).tolist() == [True] * 6 + [False]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.method)
def test_rows_of_a_batch_do_not_touch_each_other(kind, make_backbone, make_batch):
    model = kind(make_backbone(), SETTINGS).double()
    prompts = make_batch(2).prompts
    together = model.answer(prompts)
    for row in range(3):
        alone = model.answer(prompts.rows(torch.tensor([row])))
        assert torch.equal(alone.info["text"][0], together.info["text"][row])
        assert float(alone.flops[0]) == float(together.flops[row])


# -- curriculum -----------------------------------------------------------------------------------------------------


def test_stage_schedule_of_the_paper():
    gsm8k = Curriculum.gsm8k()
    assert [gsm8k.latents(k) for k in range(5)] == [0, 2, 4, 6, 6]
    assert [gsm8k.steps_removed(k) for k in range(5)] == [0, 1, 2, 3, None]
    assert gsm8k.epochs() == (3, 3, 3, 3, 13)
    prosqa = Curriculum.prosqa()
    assert [prosqa.latents(k) for k in range(8)] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert prosqa.epochs() == (5,) * 7 + (15,)
    for plan in (gsm8k, prosqa):
        phases = plan.phases()
        assert sum(p.share for p in phases) == pytest.approx(1)
        assert [p.knobs["stage"] for p in phases] == list(range(plan.last_stage + 1))
        assert all(p.reset_optimizer for p in phases)
        assert [p.form for p in phases] == ["cot"] + ["latent"] * plan.last_stage


def test_other_schedules():
    plan = Curriculum(latents_per_step=3, steps_per_stage=2, max_stage=2, pad_to_max=True, final_stage=False)
    assert plan.last_stage == 2
    assert [plan.latents(k) for k in range(3)] == [0, 6, 6]
    assert [plan.steps_removed(k) for k in range(3)] == [0, 2, 4]
    with pytest.raises(ValueError, match="stage: 3"):
        plan.latents(3)


def test_mixed_stages_average_over_tokens(coconut, make_batch, make_step):
    batch = make_batch()
    mixed = Coconut(coconut.backbone, SETTINGS | {"mix_probability": 1.0}).double()
    phase = mixed.phases()[4]
    groups = mixed._by_stage(batch, 4, make_step(phase, step=3))
    assert len(groups) > 1
    assert sorted(i for _, rows in groups for i in rows.index.tolist()) == [0, 1, 2]
    summed, count = torch.zeros(()).double(), 0
    for stage, rows in groups:
        n = sum(len(written(rows, row, mixed.curriculum.steps_removed(stage))) for row in range(len(rows)))
        summed, count = summed + n * reference_loss(mixed, rows, stage), count + n
    loss = mixed.loss(batch, make_step(phase, step=3)).loss
    torch.testing.assert_close(loss, summed / count, **TOLERANCE)


# -- controls -------------------------------------------------------------------------------------------------------


def test_pause_control_reads_the_pause_token_in_every_slot(make_backbone, make_batch, make_step):
    model = CoconutPause(make_backbone(), SETTINGS).double()
    batch = make_batch()
    phase = model.phases()[4]
    losses = []
    for row in range(3):
        opening = [*row_prompt(batch, row), SPECIAL.bot, *[SPECIAL.pause] * 6, SPECIAL.eot]
        text = written(batch, row, None)
        logits = model.backbone(input_ids=torch.tensor([opening + text])).logits[0]
        losses.append(F.cross_entropy(logits[-len(text) - 1 : -1], torch.tensor(text)))
    torch.testing.assert_close(model.loss(batch, make_step(phase)).loss, torch.stack(losses).mean(), **TOLERANCE)
    assert model.answer(batch.prompts).sequential_passes.tolist() == [1, 1, 1]


def test_curriculum_alone_ends_as_direct(make_backbone, make_batch, make_step):
    model = CoconutNoLatents(make_backbone(), SETTINGS).double()
    batch = make_batch()
    output = model.loss(batch, make_step(model.phases()[4]))
    assert output.parts["latents"] == 0
    losses = []
    for row in range(3):
        text = written(batch, row, None)
        logits = model.backbone(input_ids=torch.tensor([row_prompt(batch, row) + text])).logits[0]
        losses.append(F.cross_entropy(logits[-len(text) - 1 : -1], torch.tensor(text)))
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), **TOLERANCE)


# -- answers --------------------------------------------------------------------------------------------------------


def test_price_of_an_answer(coconut, make_batch):
    prompts = make_batch().prompts
    output = coconut.answer(prompts)
    assert output.tokens_emitted.tolist() == [1, 1, 1]
    assert output.sequential_passes.tolist() == [7, 7, 7]  # six latents and the pass that answers
    expected = FlopCounter(coconut.backbone)(prompts.mask.sum(1).double() + 1 + 6 + 2, head=1)
    torch.testing.assert_close(output.flops, expected)
    two = coconut.answer(prompts, AnswerLimits(knobs={"latents": 2}))
    assert two.sequential_passes.tolist() == [3, 3, 3]
    assert (two.flops < output.flops).all()


def test_greedy_answer_equals_passes_without_state(coconut, make_batch):
    batch = make_batch(2)
    output = coconut.answer(batch.prompts)
    for row, emitted in enumerate(output.tokens_emitted.tolist()):
        opening, behind = [*row_prompt(batch, row), SPECIAL.bot], [SPECIAL.eot, SPECIAL.ans]
        for token in output.info["text"][row, :emitted].tolist():
            assert token == int(passes_without_state(coconut, opening, 6, behind)[-1].argmax())
            behind.append(token)


def test_earlier_stage_writes_its_remaining_steps(coconut, make_batch):
    output = coconut.answer(make_batch().prompts, AnswerLimits(knobs={"stage": 1}))
    assert output.info["latents"] == 2
    assert output.info["text"].shape[1] == 5 + 1 + 1  # as much as the task's limits allow: steps, <ans>, answer
    assert (output.sequential_passes - output.tokens_emitted).tolist() == [2, 2, 2]


def test_limits_bound_tokens_and_passes(coconut, make_batch):
    prompts = make_batch(2).prompts
    assert coconut.answer(prompts, AnswerLimits(new_tokens=1)).tokens_emitted.max() == 1
    assert coconut.answer(prompts, AnswerLimits(sequential_passes=7)).sequential_passes.max() == 7
    with pytest.raises(ValueError, match="sequential_passes"):
        coconut.answer(prompts, AnswerLimits(sequential_passes=6))


def test_trace_equals_the_passes(coconut, make_batch):
    prompts = make_batch().prompts
    trace = coconut.trace(prompts)
    assert trace.hidden.shape == (6, 4, 3, 1, 32)
    assert trace.valid.all()
    latents = coconut.think(prompts, 6).latents
    # after the final norm, the hidden state at slot j is the input of slot j + 1
    after = coconut.backbone.model.norm(trace.hidden[:5, 3, :, 0])
    torch.testing.assert_close(after, latents[:, 1:].transpose(0, 1), **TOLERANCE)
    short = coconut.trace(prompts, Sites(blocks=(1,), steps=2))
    torch.testing.assert_close(short.hidden[:, 0], trace.hidden[:2, 1], **TOLERANCE)


# -- ablations ------------------------------------------------------------------------------------------------------


def test_replacements():
    torch.manual_seed(0)
    latents, pause = torch.randn(3, 2, 4).double(), torch.arange(4.0)
    apply = lambda kind: SlotAblation(kind).apply(latents, pause, torch.Generator().manual_seed(0))  # noqa: E731
    assert apply("zeros").count_nonzero() == 0
    assert torch.equal(apply("pause")[2, 1], pause.double())
    torch.testing.assert_close(apply("mean")[0], latents.mean(0))
    assert torch.equal(apply("shuffle"), latents[[1, 2, 0]])
    many = latents.expand(3, 2, 4).repeat(1, 1, 500)
    noise = SlotAblation("noise").apply(many, pause, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noise.square().mean(-1).sqrt(), many.square().mean(-1).sqrt(), rtol=0.1, atol=0)
    with pytest.raises(ValueError, match="two rows"):
        SlotAblation("shuffle").apply(latents[:1], pause)


@pytest.mark.parametrize("kind", ["zeros", "pause", "mean", "shuffle", "noise"])
def test_ablated_answer_reads_the_replaced_latents(coconut, make_batch, kind):
    batch = make_batch()
    output = coconut.answer(batch.prompts, AnswerLimits(knobs={"ablation": kind}))
    assert output.sequential_passes.tolist() == [8, 8, 8]
    latents = coconut.think(batch.prompts, 6).latents
    pause = coconut.backbone.model.embeddings.weight[SPECIAL.pause]
    replaced = SlotAblation(kind).apply(latents, pause, torch.Generator().manual_seed(0))
    embed = coconut.backbone.embed
    for row in range(3):
        opening, behind = (
            torch.tensor([[*row_prompt(batch, row), SPECIAL.bot]]),
            torch.tensor([[SPECIAL.eot, SPECIAL.ans]]),
        )
        embeds = torch.cat([embed(opening), replaced[row : row + 1], embed(behind)], 1)
        assert int(output.info["text"][row, 0]) == int(coconut.backbone(inputs_embeds=embeds).logits[0, -1].argmax())


# -- saving, refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.method)
def test_save_and_load_give_the_same_answers(kind, make_backbone, make_batch, tmp_path):
    model = kind(make_backbone(), SETTINGS).double()
    model.save_pretrained(tmp_path)
    loaded = Reasoner.from_pretrained(tmp_path).double()
    assert type(loaded) is kind
    assert loaded.settings == model.settings
    assert torch.equal(
        model.answer(make_batch(2).prompts).info["text"], loaded.answer(make_batch(2).prompts).info["text"]
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"latent_per_step": 2}, "latents_per_step"),
        ({"latents_per_step": 0}, "latents_per_step"),
        ({"max_stage": 2.5}, "max_stage"),
        ({"mix_probability": 1.5}, "mix_probability"),
        ({"epochs_per_stage": 5, "max_stage": 3, "total_epochs": 20}, "total_epochs"),
        ({"final_stage": "yes"}, "final_stage"),
    ],
)
def test_bad_settings_are_refused_by_name(make_backbone, settings, words):
    with pytest.raises(ValueError, match=words):
        Coconut(make_backbone(), settings)


def test_bad_calls_are_refused_by_name(coconut, make_backbone, make_batch, make_step):
    batch = make_batch()
    with pytest.raises(ValueError, match="stage"):
        coconut.loss(batch, make_step(Phase("train")))
    for knobs, words in (
        ({"latent": 3}, "latents"),
        ({"stage": 5}, "stage: 5"),
        ({"ablation": "zero"}, "zeros"),
        ({"latents": 0, "ablation": "zeros"}, "computes no latents"),
    ):
        with pytest.raises(ValueError, match=words):
            coconut.answer(batch.prompts, AnswerLimits(knobs=knobs))
    with pytest.raises(ValueError, match="no latent slots"):
        CoconutNoLatents(make_backbone()).trace(batch.prompts)
    with pytest.raises(ValueError, match="special tokens"):
        Coconut(make_backbone(vocab_size=8))
    with pytest.raises(ValueError, match="last_hidden"):
        SlotWriter("hidden")


def test_answers_read_prompts_alone(coconut, make_batch):
    batch = make_batch()
    other = replace(batch, steps=torch.full_like(batch.steps, 19), step_mask=torch.zeros_like(batch.step_mask))
    assert isinstance(other.prompts, PromptBatch)
    assert torch.equal(coconut.answer(batch.prompts).ids, coconut.answer(other.prompts).ids)
