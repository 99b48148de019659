"""Sequences and the two baselines: layout, labels, decoding, and that nothing gold is used at evaluation."""

from dataclasses import replace

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.baselines import ChainOfThought, Direct
from latentcot.reasoner import SPECIAL, AnswerLimits, Reasoner, StepContext
from latentcot.sequences import IGNORED, answer, answer_after_marker, constant, greedy_decode, join, prompt, steps
from latentcot.tasks import make_task

TASK = make_task("group", group="S3", min_difficulty=2, max_difficulty=5)
MULTI = make_task("chain", min_difficulty=2, max_difficulty=4)


def backbone(task=TASK) -> HybridForCausalLM:
    torch.manual_seed(0)
    return HybridForCausalLM(
        HybridConfig(
            vocab_size=task.limits.vocab_size,
            hidden_size=16,
            num_hidden_layers=2,
            period=2,
            attention={"num_heads": 2},
            gated_deltanet={"num_heads": 1, "head_dim": 8},
            initializer_range=0.3,
        )
    ).eval()


def context(reasoner: Reasoner) -> StepContext:
    return StepContext(0, 10, reasoner.phases()[0], torch.Generator().manual_seed(0))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("task", [TASK, MULTI], ids=["one token a step", "several"])
def test_joined_rows_are_the_rows_written_by_hand(side, task):
    batch = task.batch("train", range(12))
    rows = join([prompt(batch.prompts), steps(batch), constant(batch.answer_ids, SPECIAL.ans), answer(batch)], side)
    for i in range(12):
        example = task.example("train", i)
        marker = [SPECIAL.step] if task.limits.step_tokens > 1 else []
        thinking = [t for step in example.steps for t in [*marker, *step]]
        expected = [*example.prompt_ids, *thinking, SPECIAL.ans, *example.answer_ids]
        assert rows.ids[i][rows.mask[i]].tolist() == expected
        learned = rows.labels[i][rows.mask[i]] != IGNORED
        assert learned.tolist() == [False] * len(example.prompt_ids) + [True] * len(thinking) + [False] + [True] * len(
            example.answer_ids
        )
    assert (rows.mask[:, -1] if side == "left" else rows.mask[:, 0]).all()


def test_steps_can_begin_later_row_by_row():
    batch = TASK.batch("train", range(6))
    some = steps(batch, torch.arange(6) % 3)
    for i in range(6):
        assert some.ids[i][some.mask[i]].tolist() == [t for s in TASK.example("train", i).steps[i % 3 :] for t in s]


def test_the_answer_is_what_follows_the_first_marker():
    a, e, p = SPECIAL.ans, SPECIAL.eos, SPECIAL.pad
    limits = replace(TASK.limits, answer_tokens=2)
    ids = torch.tensor([[5 + 8, a, 12, e, 13], [a, 12, 13, e, p], [12, 13, 14, 15, 16], [12, 13, 14, 15, a]])
    assert answer_after_marker(ids, limits).tolist() == [[12, p], [12, 13], [p, p], [p, p]]


@pytest.mark.parametrize("kind", [Direct, ChainOfThought])
def test_answers_of_a_batch_are_the_answers_of_its_rows(kind):
    reasoner = kind(backbone()).double().eval()
    batch = TASK.batch("test", range(9))
    together = reasoner.answer(batch.prompts)
    for i in range(9):
        alone = reasoner.answer(batch.prompts.rows(slice(i, i + 1)))
        assert torch.equal(alone.ids[0], together.ids[i])
        assert alone.tokens_emitted[0] == together.tokens_emitted[i]
        assert alone.flops[0] == pytest.approx(float(together.flops[i]))


def test_greedy_decoding_equals_generate():
    model = backbone()
    ids = TASK.batch("test", range(4)).prompts.ids[:, :3]
    output = model(ids, use_cache=True)
    ours = greedy_decode(model, output.logits[:, -1], output.state, 6)
    theirs = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=SPECIAL.eos, pad_token_id=SPECIAL.pad)[
        :, 3:
    ]
    width = theirs.shape[1]
    assert torch.equal(ours.ids[:, :width], theirs)
    assert (ours.ids[:, width:] == SPECIAL.pad).all()


def test_limits_bound_what_is_written():
    output = ChainOfThought(backbone()).answer(TASK.batch("test", range(5)).prompts, AnswerLimits(new_tokens=2))
    assert output.tokens_emitted.max() <= 2
    for value in (0, -1, True):
        with pytest.raises(ValueError, match="new_tokens"):
            AnswerLimits(new_tokens=value)
        with pytest.raises(ValueError, match="sequential_passes"):
            AnswerLimits(sequential_passes=value)


@pytest.mark.parametrize("kind", [Direct, ChainOfThought])
def test_a_memorising_model_is_scored_as_right(kind):
    """A few examples learned by heart come back as answers: layout of training and of answering fit together."""
    from latentcot.training import TrainConfig, train

    reasoner = kind(backbone())
    batch = TASK.batch("train", range(6))

    class Same:
        def stream(self, start, rank=0, world_size=1):
            while True:
                yield batch

        def describe(self):
            return {}

    train(reasoner, Same(), TrainConfig(steps=120, learning_rate=1e-2, warmup_steps=5))
    output = reasoner.answer(batch.prompts)
    assert TASK.score(batch, output.ids).all()
    if kind is ChainOfThought:
        # steps, <ans>, answer and <eos>; the longest chain the task allows leaves no room for the last
        assert output.tokens_emitted.tolist() == (batch.n_steps + 3).clamp(max=TASK.limits.steps + 2).tolist()


@pytest.mark.parametrize("kind", [Direct, ChainOfThought])
def test_a_saved_reasoner_answers_the_same(kind, tmp_path):
    reasoner = kind(backbone())
    reasoner.save_pretrained(tmp_path)
    loaded = Reasoner.from_pretrained(tmp_path)
    batch = TASK.batch("test", range(5))
    assert type(loaded) is kind
    assert torch.equal(loaded.eval().answer(batch.prompts).ids, reasoner.answer(batch.prompts).ids)
    other = ChainOfThought if kind is Direct else Direct
    with pytest.raises(ValueError, match=reasoner.method):
        other.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="can not be read"):
        Reasoner.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no reasoner"):
        Reasoner.from_pretrained(tmp_path / "nothing")


def test_a_trace_has_one_layer_a_block_and_marks_padding():
    reasoner = Direct(backbone())
    batch = TASK.batch("test", range(5))
    trace = reasoner.trace(batch.prompts)
    assert trace.hidden.shape[:3] == (1, 2, 5)
    assert trace.valid.shape == trace.hidden.shape[:1] + trace.hidden.shape[2:4]
    assert trace.valid[0].sum(1).tolist() == (batch.prompts.mask.sum(1) + 1).tolist()
