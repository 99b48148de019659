"""Continuous batching: every prompt gets what it would get alone, whatever runs beside it."""

# ``generate`` is typed by a protocol.
# pyright: reportCallIssue=false, reportArgumentType=false

import io

import pytest
import torch
from rich.console import Console

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.backbone.batching import ContinuousBatcher, generate_many
from latentcot.backbone.generation import Sampling

LENGTHS = [5, 1, 12, 3, 7, 2, 9]
MOST = [6, 9, 3, 1, 8, 12, 4]


def make(mixer: str = "gated_deltanet", period: int | None = 2) -> HybridForCausalLM:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=29,
        hidden_size=32,
        num_hidden_layers=2,
        mixer=mixer,
        period=period,
        attention={"num_heads": 4},
        gla={"num_heads": 2},
        gated_deltanet={"num_heads": 2, "head_dim": 12},
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return HybridForCausalLM(config).double().eval()


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 29, (n,), generator=generator) for n in LENGTHS]


def alone(model: HybridForCausalLM, prompt: torch.Tensor, most: int, end: int | None = None) -> list[int]:
    ids, found = prompt[None], []
    while len(found) < most and (not found or found[-1] != end):
        found.append(int(model(ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([found[-1:]])], 1)
    return found


@pytest.mark.parametrize(("mixer", "period"), [("gated_deltanet", 2), ("gla", None), ("attention", None)])
@pytest.mark.parametrize(("slots", "chunk"), [(1, 512), (2, 4), (3, 1), (7, 5), (20, 512)])
def test_answers_are_those_of_each_prompt_alone(mixer, period, slots, chunk):
    model = make(mixer, period)
    answers = generate_many(model, prompts(), slots, MOST, prefill_chunk=chunk)
    assert answers == [alone(model, prompt, most) for prompt, most in zip(prompts(), MOST, strict=True)]


def test_rows_end_at_the_end_token():
    model = make()
    free = [alone(model, prompt, 20) for prompt in prompts()]
    end = free[0][2]
    answers = generate_many(model, prompts(), 3, 20, eos_token_id=end)
    assert answers == [alone(model, prompt, 20, end) for prompt in prompts()]
    assert min(map(len, answers)) < 20


def test_a_free_slot_is_filled_while_the_others_go_on():
    batcher = ContinuousBatcher(make(), slots=2, max_length=64)
    for prompt, most in zip(prompts(), (30, 5, 5, 5, 5, 5, 4), strict=True):
        batcher.submit(prompt, most)
    ended = [ticket for ticket, _ in batcher.run()]
    assert ended[-1] == 0  # six short answers came and went beside the long one
    assert batcher.passes == 29  # as many as the long one needs behind its first token


def test_prompts_may_come_while_others_run():
    model, (first, second, *_) = make(), prompts()
    batcher = ContinuousBatcher(model, slots=2, max_length=40)
    assert batcher.submit(first, 10) == 0
    finished = batcher.advance() + batcher.advance()
    assert batcher.submit(second.tolist(), 4) == 1
    finished += list(batcher.run())
    assert batcher.idle
    assert dict(finished) == {0: alone(model, first, 10), 1: alone(model, second, 4)}
    assert [ticket for ticket, _ in finished] == [1, 0]


def test_samples_are_repeated_by_their_seed():
    drawn = [generate_many(make(), prompts(), 3, 8, sampling=Sampling(1.0), seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_a_bar_counts_finished_prompts():
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    generate_many(make(), prompts(), 3, 2, progress=True, console=console)
    assert "7/7" in written.getvalue()
    assert "14 tokens" in written.getvalue()
    silent = io.StringIO()
    generate_many(make(), prompts(), 3, 2, console=Console(file=silent))
    assert silent.getvalue() == ""


def test_bad_prompts_are_named_before_anything_runs():
    model = make()
    assert generate_many(model, []) == []
    for bad, message in (
        ([[1], []], "at least one token"),
        ([[1], [29]], "expected 0..28"),
        ([[1], [-1]], "expected 0..28"),
        ([torch.ones(2, 2, dtype=torch.long)], r"\[S\]"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_many(model, bad, max_new_tokens=2)
    with pytest.raises(TypeError, match="integer token ids"):
        generate_many(model, [[0.5]], max_new_tokens=2)
    with pytest.raises(ValueError, match="2 numbers given for 1 prompts"):
        generate_many(model, [[1]], max_new_tokens=[1, 2])
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate_many(model, [[1]], max_new_tokens=0)
    for sizes in ({"slots": 0}, {"slots": 1, "prefill_chunk": 0}):
        with pytest.raises(ValueError, match="positive integer"):
            generate_many(model, [[1]], max_new_tokens=1, **sizes)
    batcher = ContinuousBatcher(model, slots=1, max_length=8)
    with pytest.raises(ValueError, match="made for 8"):
        batcher.submit([1] * 6, 3)
    assert batcher.idle
