"""Generation through transformers' ``generate``, prefill in segments, and the choice of a token."""

# Tests read optional fields, and ``generate`` is typed by a protocol.
# pyright: reportOptionalMemberAccess=false, reportCallIssue=false, reportArgumentType=false

import pytest
import torch
from transformers import set_seed

from latentcot.backbone import MIXERS, HybridConfig, HybridForCausalLM
from latentcot.backbone.generation import Sampling, left_padded, prefill

STACKS = {
    **{name: {"mixer": name} for name in MIXERS},
    "hybrid": {"mixer": "gated_deltanet", "period": 2},
}


def make(stack: str = "hybrid", dtype: torch.dtype = torch.float64) -> HybridForCausalLM:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=29,
        hidden_size=32,
        num_hidden_layers=2,
        attention={"num_heads": 4},
        gla={"num_heads": 2},
        gated_deltanet={"num_heads": 2, "head_dim": 12},
        deltanet={"num_heads": 2},
        hgrn2={"num_heads": 2, "expand_ratio": None},
        retnet={"num_heads": 2},
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
        **STACKS[stack],
    )
    return HybridForCausalLM(config).to(dtype).eval()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 29, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_mask(lengths: list[int], width: int) -> torch.Tensor:
    return torch.stack([torch.arange(width) >= width - n for n in lengths]).long()


def relative_rms(actual, expected):
    return float((actual.detach().double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_token_by_token_equals_the_full_forward(stack, training):
    model, ids = make(stack, torch.float32).train(training), tokens(2, 70)
    exact = make(stack)(ids).logits.detach()
    for gradients in (False, True):  # without them one token takes the step kernels
        with torch.set_grad_enabled(gradients):
            assert relative_rms(model(ids).logits, exact) < 2e-4
            state, parts = model.new_state(), []
            for t in range(ids.shape[1]):
                output = model(ids[:, t : t + 1], state=state)
                state = output.state.detach()
                parts.append(output.logits)
            assert relative_rms(torch.cat(parts, 1), exact) < 2e-4


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("cuts", [(5, 4, 1, 1, 1), (1,) * 12, (2, 10)], ids=["uneven", "single", "two"])
@pytest.mark.parametrize("gradients", [False, True], ids=["no-grad", "grad"])
def test_tokens_onto_a_filled_state_go_on_from_it(stack, cuts, gradients):
    """Neither "prompt" nor "one token": several tokens at once behind others (reported fault S-1)."""
    model, ids = make(stack), tokens(2, 12)
    with torch.set_grad_enabled(gradients):
        whole, state, parts = model(ids).logits, model.new_state(), []
        for part in ids.split(cuts, 1):
            output = model(part, state=state)
            state = output.state
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_a_prompt_in_segments_equals_the_whole(stack, chunk):
    model, ids = make(stack), tokens(2, 130)
    mask = left_mask([130, 90], 130)
    whole = model(ids, attention_mask=mask, use_cache=True)
    logits, state = prefill(model, ids, mask, chunk=chunk)
    torch.testing.assert_close(logits, whole.logits[:, -1], rtol=0, atol=1e-9)
    assert state.lengths.tolist() == [130, 90]
    for place, entry in whole.state.entries.items():
        for name, tensor in entry.tensors.items():
            if name not in ("keys", "values"):  # what lies behind hidden columns is of no consequence
                torch.testing.assert_close(state.entries[place][name], tensor, rtol=0, atol=1e-9)
    new = tokens(2, 3, seed=5)
    torch.testing.assert_close(model(new, state=state).logits, model(new, state=whole.state).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("stack", STACKS)
def test_beams_with_a_state_equal_beams_by_full_forwards(stack):
    model, ids = make(stack), tokens(3, 9)
    mask = left_mask([9, 4, 1], 9)
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    beams = model.generate(ids * mask, **options)
    assert torch.equal(beams, model.generate(ids * mask, use_cache=False, **options))
    greedy = model.generate(ids * mask, **{**options, "num_beams": 1})
    assert beams.shape == greedy.shape
    assert not torch.equal(beams, greedy)  # else this would say nothing about reordering


@pytest.mark.parametrize("stack", STACKS)
def test_samples_with_a_state_equal_samples_by_full_forwards(stack):
    model, ids = make(stack), tokens(3, 6)
    drawn = []
    for use_cache in (True, False):
        set_seed(3)
        drawn.append(model.generate(ids, do_sample=True, top_k=10, max_new_tokens=8, use_cache=use_cache))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], model.generate(ids, do_sample=False, max_new_tokens=8))


@pytest.mark.parametrize("stack", STACKS)
def test_several_sequences_of_one_prompt_share_its_state(stack):
    model, ids = make(stack), tokens(2, 5)
    drawn = []
    for use_cache in (True, False):
        set_seed(4)
        drawn.append(model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=5, use_cache=use_cache))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("stack", ["gated_deltanet", "hybrid"])
def test_generate_from_embeddings_equals_generate_from_ids(stack):
    model, ids = make(stack), tokens(2, 7)
    mask = left_mask([7, 3], 7)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    by_ids = model.generate(ids * mask, **options)
    by_embeddings = model.generate(inputs_embeds=model.embed(ids * mask), **options)
    assert torch.equal(by_embeddings, by_ids[:, 7:])


def test_generate_while_training_equals_generate_afterwards():
    model, ids = make(), tokens(2, 6)
    expected = model.generate(ids, do_sample=False, max_new_tokens=6)
    assert torch.equal(model.train().generate(ids, do_sample=False, max_new_tokens=6), expected)


def test_assisted_decoding_is_refused_with_the_way_to_do_it():
    model, ids = make(), tokens(1, 6)
    for options in ({"assistant_model": make()}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="speculative_generate"):
            model.generate(ids, do_sample=False, max_new_tokens=6, **options)


# -- choosing a token -----------------------------------------------------------------------------------------------------


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    draws = Sampling(0.7).choose(logits.expand(40000, 4), torch.Generator().manual_seed(0))
    expected = (logits.double() / 0.7).softmax(-1)
    counts = torch.bincount(draws, minlength=4).double()
    chi_square = ((counts - 40000 * expected).square() / (40000 * expected)).sum()
    assert chi_square < 16.3  # 99.9 % of three degrees of freedom


def test_top_k_and_top_p_leave_the_likely_tokens():
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    assert Sampling(1.0, top_k=2).scores(logits).isfinite().tolist() == [[True, False, True, False]]
    assert Sampling(1.0, top_p=0.4).scores(logits).isfinite().tolist() == [[True, False, False, False]]
    assert Sampling(1.0, top_p=0.6).scores(logits).isfinite().tolist() == [[True, False, True, False]]
    assert Sampling(1.0, top_k=1, top_p=0.99).scores(logits).isfinite().sum() == 1
    assert Sampling().choose(logits).tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_impossible_choices_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"temperature": 1.0, **options})


def test_padding_moves_to_the_left_and_impossible_prompts_are_named():
    ids, mask = left_padded(torch.tensor([[1, 0, 2, 0], [3, 4, 5, 6]]), torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]]))
    assert ids[0, 2:].tolist() == [1, 2]
    assert mask.tolist() == [[False, False, True, True], [True] * 4]
    with pytest.raises(ValueError, match="no real token"):
        left_padded(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match="attention_mask"):
        left_padded(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4))
    with pytest.raises(ValueError, match="at least one token"):
        left_padded(torch.ones(2, 0, dtype=torch.long), None)
    with pytest.raises(ValueError, match="prefill_chunk"):
        prefill(make(), tokens(1, 3), chunk=0)
    with pytest.raises(ValueError, match="temperature"):
        Sampling().scores(torch.zeros(3))
