"""The method on the real hybrid backbone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentcot import diffusion_reasoning
from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.diffusion_reasoning import BackboneDenoiser, MaskedDiffusion, diffusion_generate, low_confidence
from latentcot.reasoner import (
    SPECIAL,
    AnswerLimits,
    PromptBatch,
    Reasoner,
    Sites,
    StepContext,
    TaskBatch,
    TaskLimits,
    find_method,
)
from latentcot.training.budget import FlopCounter

LIMITS = TaskLimits(vocab_size=19, prompt_tokens=7, steps=4, step_tokens=1, answer_tokens=2)
CANVAS = 4 + 1 + 2 + 1


def backbone(
    seed: int = 0, rope: bool = True, mixers: tuple[str, ...] = ("gated_deltanet", "gla", "attention")
) -> HybridForCausalLM:
    torch.manual_seed(seed)
    config = HybridConfig(
        vocab_size=LIMITS.vocab_size,
        hidden_size=32,
        num_hidden_layers=len(mixers),
        mixers=list(mixers),
        attention={"num_heads": 4, "rope_theta": 10_000.0 if rope else None},
        gla={"num_heads": 2},
        gated_deltanet={"num_heads": 2, "head_dim": 16},
        initializer_range=0.2,  # far from uniform, so that a leak would show
    )
    return HybridForCausalLM(config).double().eval()


def batch(rows: int = 6, seed: int = 0) -> TaskBatch:
    """Rows with prompts of 3 to 7 tokens, 1 to 4 steps and answers of 1 or 2 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ragged(width: int, least: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(SPECIAL.count, LIMITS.vocab_size, (rows, width), generator=generator)
        mask = torch.arange(width) < torch.randint(least, width + 1, (rows, 1), generator=generator)
        return ids.masked_fill(~mask, SPECIAL.pad), mask

    prompts = PromptBatch(*ragged(7, 3), LIMITS)
    steps, step_mask = ragged(4, 1)
    answers, answer_mask = ragged(2, 1)
    number = torch.arange(rows)
    return TaskBatch(prompts, steps[..., None], step_mask[..., None], answers, answer_mask, number, number)


def context(reasoner: Reasoner, seed: int = 0, **position: int) -> StepContext:
    return StepContext(0, 10, reasoner.phases()[0], torch.Generator().manual_seed(seed), **position)


def test_the_canvas_reads_steps_marker_answer_and_ends():
    data = batch()
    reasoner = MaskedDiffusion(backbone())
    text = reasoner._text(data)
    assert text.ids.shape == (6, CANVAS) == (6, reasoner.canvas_tokens(LIMITS))
    for row in range(6):
        expected = [*data.steps[row][data.step_mask[row]].tolist(), SPECIAL.ans]
        expected += data.answer_ids[row][data.answer_mask[row]].tolist()
        expected += [SPECIAL.eos] * (CANVAS - len(expected))
        assert text.ids[row].tolist() == expected
    assert text.mask.all()  # every <eos> is masked and learned like any other token
    row, maskable = reasoner._rows(data.prompts, text)
    assert (maskable.sum(1) == CANVAS).all()
    assert (row.ids[~maskable & row.mask] != SPECIAL.eos).all()


def test_one_phase_and_registration():
    assert [p.form for p in MaskedDiffusion(backbone()).phases()] == ["denoise"]
    assert find_method("masked_diffusion") is MaskedDiffusion


@pytest.mark.parametrize("settings", [{}, {"canvas": "answer"}, {"normalise": "tokens", "schedule": "cosine"}], ids=str)
def test_loss_reaches_the_parameters(settings: dict):
    reasoner = MaskedDiffusion(backbone(), settings)
    out = reasoner.loss(batch(), context(reasoner))
    out.loss.backward()
    assert out.loss.isfinite()
    assert out.flops > 0
    for name, parameter in reasoner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_padded_columns_do_not_change_the_loss():
    """Columns of padding behind the prompts are squeezed out before anything is drawn."""
    data = batch(8)
    reasoner = MaskedDiffusion(backbone())
    wide = PromptBatch(
        torch.nn.functional.pad(data.prompts.ids, (0, 5)), torch.nn.functional.pad(data.prompts.mask, (0, 5)), LIMITS
    )
    first, second = (reasoner.loss(replace(data, prompts=p), context(reasoner)).loss for p in (data.prompts, wide))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_does_not_reach_real_tokens_of_the_bidirectional_backbone(side: str):
    torch.manual_seed(0)
    denoise = BackboneDenoiser(backbone())
    lengths = [4, 9, 6]
    rows = [torch.randint(0, LIMITS.vocab_size, (n,)) for n in lengths]
    ids, mask = torch.full((3, 11), 13), torch.zeros(3, 11, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = len(row)
        columns = {"left": range(11 - n, 11), "right": range(n), "middle": [*range(2), *range(11 - n + 2, 11)]}[side]
        ids[i, columns], mask[i, columns] = row, True
    together = denoise(ids, mask)
    for i, row in enumerate(rows):
        alone = denoise(row[None], torch.ones(1, len(row), dtype=torch.bool))[0]
        torch.testing.assert_close(together[i][mask[i]], alone, rtol=1e-10, atol=1e-10)


def test_sampling_left_padded_equals_sampling_right_padded_and_alone():
    torch.manual_seed(0)
    model = backbone()
    prompts = batch(3).prompts
    width = prompts.ids.shape[1]
    left = torch.stack([row.roll(width - int(m.sum())) for row, m in zip(prompts.ids, prompts.mask, strict=True)])
    left_mask = torch.stack([m.roll(width - int(m.sum())) for m in prompts.mask])
    for config in (low_confidence(8, steps=4), low_confidence(8, temperature=1.0, block_length=4)):
        seeds = torch.arange(3) + 100
        one = diffusion_generate(model, prompts.ids, config, prompts.mask, row_seeds=seeds).sequences[:, -8:]
        other = diffusion_generate(model, left, config, left_mask, row_seeds=seeds).sequences[:, -8:]
        assert torch.equal(one, other)
        for i in range(3):
            row = prompts.ids[i : i + 1, prompts.mask[i]]
            alone = diffusion_generate(model, row, config, row_seeds=seeds[i : i + 1]).sequences[:, -8:]
            assert torch.equal(alone[0], one[i])


@pytest.mark.parametrize(
    "mixers", [("gated_deltanet",), ("gla",), ("gated_deltanet", "gla", "attention")], ids="-".join
)
def test_reversing_the_input_reverses_the_output(mixers: tuple[str, ...]):
    """Both directions share their weights and the convolution is centred. Rotary positions are left out: they tell left
    from right."""
    torch.manual_seed(0)
    denoise = BackboneDenoiser(backbone(rope=False, mixers=mixers))
    z, mask = torch.randint(0, LIMITS.vocab_size, (2, 13)), torch.ones(2, 13, dtype=torch.bool)
    torch.testing.assert_close(denoise(z.flip(1), mask).flip(1), denoise(z, mask), rtol=1e-10, atol=1e-10)


SAMPLERS = [
    {},
    {"tokens_per_step": 3},
    {"block_length": 3, "order": "margin"},
    {"threshold": 0.5},
    {"temperature": 1.0, "order": "random"},
    {"sampler": "ancestral"},
    {"canvas": "answer"},
]


@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
def test_answers_are_those_of_each_row_alone(settings: dict):
    reasoner = MaskedDiffusion(backbone(), settings)
    prompts = batch(3).prompts
    together = reasoner.answer(prompts, generator=torch.Generator().manual_seed(1))
    size = reasoner.canvas_tokens(LIMITS)
    assert together.ids.shape == (3, LIMITS.answer_tokens)
    assert together.info["text"].shape == (3, size)
    for i in range(3):
        alone = reasoner.answer(prompts.rows(slice(i, i + 1)), generator=torch.Generator().manual_seed(1))
        assert torch.equal(alone.info["text"][0], together.info["text"][i])
        for name in ("ids", "tokens_emitted", "sequential_passes", "flops"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), name


def test_the_price_is_counted():
    reasoner = MaskedDiffusion(backbone())
    prompts = batch(5).prompts
    for steps in (1, 3, CANVAS, 50):
        out = reasoner.answer(prompts, AnswerLimits(knobs={"steps": steps}))
        assert out.sequential_passes.tolist() == [min(steps, CANVAS)] * 5
        length = prompts.mask.sum(1).double() + 1 + CANVAS
        one_pass = FlopCounter(reasoner.backbone, directions=2)(length, head=length)
        torch.testing.assert_close(out.flops, one_pass * min(steps, CANVAS), rtol=0, atol=0)
        for text, emitted in zip(out.info["text"].tolist(), out.tokens_emitted.tolist(), strict=True):
            assert emitted == (text.index(SPECIAL.eos) + 1 if SPECIAL.eos in text else CANVAS)
    assert int(reasoner.answer(prompts, AnswerLimits(sequential_passes=2)).sequential_passes.max()) == 2
    blocks = MaskedDiffusion(backbone(), {"block_length": 2})
    assert blocks.answer(prompts, AnswerLimits(sequential_passes=2)).sequential_passes.tolist() == [2] * 5
    ancestral = MaskedDiffusion(backbone(), {"sampler": "ancestral"})
    assert int(ancestral.answer(prompts, AnswerLimits(sequential_passes=2)).sequential_passes.max()) == 2
    assert reasoner.answer(prompts, AnswerLimits(new_tokens=3)).info["text"].shape == (5, 3)


@pytest.mark.parametrize(
    ("canvas", "answer"),
    [
        ([12, 13, 5, 14, 2, 2, 2, 2], [14, 0]),
        ([5, 14, 15, 2, 2, 2, 2, 2], [14, 15]),
        ([12, 13, 14, 2, 5, 16, 2, 2], [0, 0]),  # text behind <eos> does not count
        ([12, 13, 14, 15, 16, 17, 11, 12], [0, 0]),
    ],
)
def test_the_answer_is_read_off_behind_its_marker(
    canvas: list[int], answer: list[int], monkeypatch: pytest.MonkeyPatch
):
    reasoner = MaskedDiffusion(backbone())
    prompts = batch(1).prompts
    fill = reasoner._fill

    def replaced(*arguments, **named):
        row, text, out = fill(*arguments, **named)
        return row, torch.tensor([canvas]).expand_as(text), out

    monkeypatch.setattr(reasoner, "_fill", replaced)
    assert reasoner.answer(prompts).ids[0].tolist() == answer


@pytest.mark.parametrize("settings", [{}, {"sampler": "ancestral"}, {"threshold": 0.3}], ids=str)
def test_trace_has_every_denoising_step(settings: dict):
    reasoner = MaskedDiffusion(backbone(), settings)
    prompts = batch(4).prompts
    trace = reasoner.trace(prompts)
    passes = reasoner.answer(prompts).sequential_passes
    assert trace.hidden.shape == (trace.valid.shape[0], 3, 4, trace.valid.shape[2], 32)
    assert torch.equal(trace.valid.any(-1).sum(0), passes)
    assert trace.layers == ("block 0", "block 1", "block 2")
    some = reasoner.trace(prompts, Sites(blocks=(2,), steps=2))
    assert torch.equal(some.hidden, trace.hidden[:2, 2:])
    assert (trace.hidden[~trace.valid[:, None].expand(-1, 3, -1, -1)] == 0).all()


def test_save_and_load_is_exact(tmp_path):
    reasoner = MaskedDiffusion(backbone(), {"tokens_per_step": 2, "canvas": "answer"})
    reasoner.save_pretrained(tmp_path)
    other = Reasoner.from_pretrained(tmp_path).double()
    assert isinstance(other, MaskedDiffusion)
    assert other.settings == reasoner.settings
    for (name, one), two in zip(reasoner.state_dict().items(), other.state_dict().values(), strict=True):
        # from_pretrained builds an fp32 model
        assert torch.equal(one.float(), two.float()), name
    prompts = batch(3).prompts
    single = MaskedDiffusion(backbone().float(), reasoner.settings)
    single.save_pretrained(tmp_path)
    assert torch.equal(
        single.answer(prompts).info["text"], Reasoner.from_pretrained(tmp_path).answer(prompts).info["text"]
    )


def test_times_are_stratified_over_ranks():
    """Each rank passes its place on: two ranks of 6 rows, with one generator state, score different times."""
    reasoner = MaskedDiffusion(backbone())
    losses = [float(reasoner.loss(batch(), context(reasoner, rank=r, world_size=2)).loss.detach()) for r in (0, 1)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"canvs": "answer"}, "canvs"),
        ({"canvas": "all"}, "steps_and_answer"),
        ({"sampler": "dream"}, "low_confidence"),
        ({"tokens_per_step": 0}, "tokens_per_step"),
        ({"canvas_tokens": 0}, "canvas_tokens"),
        ({"schedule": "linear"}, "schedule"),
        ({"order": "best"}, "order"),
        ({"threshold": 2.0}, "threshold"),
        ({"sampler": "ancestral", "block_length": 2}, "block_length"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, says: str):
    with pytest.raises(ValueError, match=says):
        MaskedDiffusion(backbone(), settings)


def test_wrong_calls_are_refused():
    data = batch()
    reasoner = MaskedDiffusion(backbone(), {"canvas_tokens": 4})
    with pytest.raises(ValueError, match="do not fit into a canvas of 4"):
        reasoner.loss(data, context(reasoner))
    for knobs, says in (({"recurrences": 2}, "recurrences"), ({"steps": 0}, "steps")):
        with pytest.raises(ValueError, match=says):
            reasoner.answer(data.prompts, AnswerLimits(knobs=knobs))
    with pytest.raises(ValueError, match="at least one"):
        reasoner.answer(data.prompts, AnswerLimits(new_tokens=0))
    small = HybridForCausalLM(HybridConfig(vocab_size=5, hidden_size=32, num_hidden_layers=1, mixer="gla"))
    with pytest.raises(ValueError, match="mask_id"):
        MaskedDiffusion(small)


def test_the_example_of_the_readme_works_as_written(capsys: pytest.CaptureFixture):
    readme = Path(diffusion_reasoning.__file__).parent / "README.md"
    code = readme.read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, str(readme), "exec"), {})
    assert "torch.Size([8, 12])" in capsys.readouterr().out
