"""HRM and TRM as methods: layouts, the carry of training, answers and their price, saving."""

import math
from dataclasses import replace

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.compare import evaluate
from latentcot.compare.methods import find
from latentcot.compare.worker import TaskData
from latentcot.reasoner import SPECIAL, AnswerLimits, Phase, Reasoner, Sites, StepContext
from latentcot.recurrent_depth.recursive_solvers import IGNORED, SolverReasoner
from latentcot.tasks import make_task
from latentcot.training import TrainConfig, train

TASK = make_task("chain", modulus=5, max_difficulty=2, distractors=0, variables=4)
SUDOKU = make_task("sudoku", size=4, blanks=6)
SMALL = {"multiple_of": 16, "prefix": 1, "cycles": 2, "latent_updates": 1, "layers": 1}


def make(name: str = "trm", task=TASK, **settings) -> SolverReasoner:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=task.limits.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        mixer="attention",
        attention={"num_heads": 2},
        intermediate_size=32,
    )
    chosen = {"solver": SMALL, "supervision": {"segments": 3}, "length": 32, **settings}
    found = find(name)(HybridForCausalLM(config), chosen)
    assert isinstance(found, SolverReasoner)
    return found.eval()


def context(step: int = 0) -> StepContext:
    return StepContext(step, 10, Phase("train"), torch.Generator().manual_seed(step))


def test_answers_stand_in_slots_behind_prompts_of_any_length():
    reasoner, batch = make(), TASK.batch("train", range(6))
    grid, targets = reasoner.grid(batch.prompts), reasoner.targets(batch)
    width, slots = TASK.limits.prompt_tokens, TASK.limits.answer_tokens
    assert grid["grid"].shape == grid["mask"].shape == targets.shape == (6, width + slots)
    assert (grid["grid"][:, width:] == SPECIAL.mask).all()
    assert grid["mask"][:, width:].all()
    assert torch.equal(grid["mask"][:, :width].sum(1), batch.prompts.mask.sum(1))
    assert (targets[:, :width] == IGNORED).all()
    assert torch.equal(targets[:, width], batch.answer_ids[:, 0])


def test_equal_lengths_are_filled_in_place():
    reasoner, batch = make(task=SUDOKU, form="in_place"), SUDOKU.batch("train", range(4))
    grid = reasoner.grid(batch.prompts)["grid"]
    assert torch.equal(grid, batch.prompts.ids[:, 1:])
    assert torch.equal(reasoner.targets(batch), batch.answer_ids)
    with pytest.raises(ValueError, match="'in_place' needs answers as long as the prompt"):
        make(form="in_place").grid(TASK.batch("train", range(2)).prompts)


def test_short_answers_end_and_their_end_is_learned():
    task = make_task("sudoku", size=4, blanks=6, fewest_blanks=3, form="blanks")
    batch = task.batch("train", range(20))
    targets = make(task=task).targets(batch)[:, -task.limits.answer_tokens :]
    for row, n in zip(targets.tolist(), batch.answer_mask.sum(1).tolist(), strict=True):
        assert IGNORED not in row[:n]
        assert row[n : n + 1] in ([], [SPECIAL.eos])
        assert set(row[n + 1 :]) <= {IGNORED}


@pytest.mark.parametrize("name", ["trm", "hrm"])
def test_training_carries_rows_over_steps_and_learns(name):
    reasoner = make(name, supervision={"segments": 3, "explore": 0.0})
    batch = TASK.batch("train", range(8))
    first = reasoner.loss(batch, context(), reasoner.begin(batch, context()))
    assert first.carry is not None
    assert first.finished is not None
    assert not first.finished.any()  # the halt logit starts far below zero
    other = TASK.batch("train", range(8, 16))
    second = reasoner.loss(other, context(1), first.carry)
    third = reasoner.loss(other, context(2), second.carry)
    assert second.carry is not None
    assert torch.equal(second.carry.inputs["grid"], reasoner.grid(batch.prompts)["grid"])
    assert third.finished is not None
    assert third.finished.all()
    fourth = reasoner.loss(other, context(3), third.carry)
    assert fourth.carry is not None
    assert torch.equal(fourth.carry.inputs["grid"], reasoner.grid(other.prompts)["grid"])
    segments = 2 if name == "hrm" else 1  # the continue logit is compared with one more
    assert first.flops == 8 * segments * reasoner.solver.flops(TASK.limits.prompt_tokens + TASK.limits.answer_tokens)

    report = train(
        reasoner,
        TaskData(TASK, TASK.limits, 32),
        TrainConfig(steps=40, learning_rate=3e-3, log_every=1, warmup_steps=5),
    )
    losses = [row["answer"] for row in report.history]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert reasoner.phases()[0].ema == (0.999 if name == "trm" else None)


def test_answers_and_what_they_cost():
    reasoner, batch = make(), TASK.batch("test", range(5))
    output = reasoner.answer(batch.prompts)
    assert output.ids.shape == (5, TASK.limits.answer_tokens)
    assert (output.sequential_passes == 3 * 2 * 2).all()
    assert (output.info["segments"] == 3).all()
    once = reasoner.answer(batch.prompts, AnswerLimits(sequential_passes=7))
    assert (once.sequential_passes == 4).all()
    assert torch.equal(once.ids, reasoner.answer(batch.prompts, AnswerLimits(knobs={"segments": 1})).ids)
    assert output.flops.tolist() == pytest.approx([3 * f for f in once.flops.tolist()])
    alone = reasoner.answer(batch.prompts.rows(slice(2, 3)))
    assert torch.equal(alone.ids, output.ids[2:3])
    with torch.no_grad():
        reasoner.solver.halt_head.bias.fill_(5.0)
    halted = reasoner.answer(batch.prompts, AnswerLimits(knobs={"halt": True}))
    assert halted.info["halted"].all()
    assert (halted.info["segments"] == 1).all()
    scores = evaluate(reasoner, TASK, [1], 10, knobs={"segments": 2})
    assert 0 <= scores[0].accuracy <= 1
    assert scores[0].sequential_passes == 8


def test_traces_hold_both_states():
    reasoner, batch = make(), TASK.batch("test", range(3))
    trace = reasoner.trace(batch.prompts)
    positions = TASK.limits.prompt_tokens + TASK.limits.answer_tokens
    assert trace.hidden.shape == (3, 2, 3, positions, 32)
    assert trace.layers == ("y", "z")
    assert trace.valid.shape == (3, 3, positions)
    assert torch.equal(reasoner.trace(batch.prompts, Sites((1,), 2)).hidden[:, 0], trace.hidden[:2, 1])
    logits = reasoner.solver.head(trace.hidden[-1, 0])
    assert torch.equal(logits[:, -1].argmax(-1), reasoner.answer(batch.prompts).ids[:, -1])


def test_saving_keeps_the_solver_and_no_backbone(tmp_path):
    reasoner = make("hrm")
    assert not [name for name, _ in reasoner.named_parameters() if name.startswith("backbone")]
    reasoner.save_pretrained(tmp_path)
    loaded = Reasoner.from_pretrained(tmp_path)
    prompts = TASK.batch("test", range(4)).prompts
    assert torch.equal(loaded.eval().answer(prompts).ids, reasoner.answer(prompts).ids)
    assert loaded.settings == reasoner.settings


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"form: 'slot' given, .* did you mean 'slots'"):
        make(form="slot")
    with pytest.raises(ValueError, match="key: 'lenght' given"):
        make(lenght=3)
    with pytest.raises(ValueError, match="length: 5 given, but the task needs"):
        make(length=5).answer(TASK.batch("test", range(1)).prompts)
    with pytest.raises(ValueError, match="one segment takes 4, got 3"):
        make().answer(TASK.batch("test", range(1)).prompts, AnswerLimits(sequential_passes=3))
    with pytest.raises(ValueError, match="key: 'recurrences' given"):
        make().answer(TASK.batch("test", range(1)).prompts, AnswerLimits(knobs={"recurrences": 3}))
    with pytest.raises(ValueError, match="expected 0"):
        make().trace(TASK.batch("test", range(1)).prompts, Sites((2,)))
    assert math.isfinite(make().solver.flops(3))


def test_the_look_ahead_of_the_continue_logit_is_paid_for():
    batch = TASK.batch("train", range(4))
    cells = TASK.limits.prompt_tokens + TASK.limits.answer_tokens
    for name, passes in (("trm", 1), ("hrm", 2)):
        reasoner = make(name)
        calls: list[int] = []
        reasoner.solver.head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        out = reasoner.loss(batch, context())
        assert len(calls) == passes
        assert out.flops == passes * 4 * reasoner.solver.flops(cells)


def test_prompts_and_answers_beyond_the_limits_are_named_instead_of_cut():
    reasoner, batch = make(), TASK.batch("train", range(2))
    limits = TASK.limits
    short = replace(limits, prompt_tokens=int(batch.prompts.mask.sum(1).max()) - 1)
    with pytest.raises(ValueError, match=f"prompts: a prompt of .* but the task's limits allow {short.prompt_tokens}"):
        reasoner.grid(replace(batch.prompts, limits=short))
    wide = torch.cat([batch.answer_ids, batch.answer_ids], 1)
    with pytest.raises(ValueError, match=f"batch: an answer of .* but the task's limits allow {limits.answer_tokens}"):
        reasoner.targets(replace(batch, answer_ids=wide, answer_mask=torch.ones_like(wide, dtype=torch.bool)))


def test_a_sub_class_without_a_configuration_is_told_what_to_define():
    class Nothing(SolverReasoner):
        method = "nothing"

    config = make().backbone.config
    with pytest.raises(NotImplementedError, match="Nothing defines no _published; a sub-class returns"):
        Nothing(HybridForCausalLM(config))  # type: ignore[arg-type]
