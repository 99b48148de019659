"""The language model as a whole: pieces, states, padding, packing, saving, generation."""

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM, ModelState, SequenceContext
from latentcot.kernels import Bidirectional, BlockCausal

STACKS = {
    "gla": {"mixer": "gla"},
    "gated_deltanet": {"mixer": "gated_deltanet"},
    "gated_deltanet-neg-grouped": {
        "mixer": "gated_deltanet",
        "gated_deltanet": {"num_heads": 1, "num_v_heads": 2, "head_dim": 12, "expand_v": 1.5, "allow_neg_eigval": True},
    },
    "attention": {"mixer": "attention"},
    "hybrid": {"mixer": "gated_deltanet", "period": 2},
    "hybrid-gla-sandwich": {"mixer": "gla", "period": 2, "norm_placement": "sandwich_post_residual"},
    "hybrid-gqa-interleaved": {
        "mixer": "gla",
        "period": 2,
        "norm_placement": "sandwich_pre_residual",
        "attention": {"num_heads": 4, "num_kv_heads": 2, "rotary_layout": "interleaved", "bias": "qk"},
    },
    "post-norm": {"mixer": "gated_deltanet", "period": 2, "norm_placement": "post"},
}


def make(stack: str = "hybrid", dtype: torch.dtype = torch.float64, layers: int = 2, **changes) -> HybridForCausalLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 23,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "attention": {"num_heads": 4},
        "gla": {"num_heads": 2},
        "gated_deltanet": {"num_heads": 2, "head_dim": 12},
        "initializer_range": 0.2,  # so that every path matters to the logits
    }
    return HybridForCausalLM(HybridConfig(**{**values, **STACKS[stack], **changes})).to(dtype).eval()


def tokens(batch: int = 3, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 23, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], width: int) -> torch.Tensor:
    return torch.stack([torch.arange(width) >= width - n for n in lengths]).long()


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padded_rows_equal_the_rows_alone(stack, side):
    model, ids = make(stack), tokens(3, 11)
    lengths = [11, 6, 1]
    if side == "left":
        mask = left_padded(lengths, 11)
    elif side == "right":
        mask = left_padded(lengths, 11).flip(1)
    else:
        mask = torch.stack([torch.randperm(11, generator=torch.Generator().manual_seed(n)) < n for n in lengths]).long()
    together = model(ids, attention_mask=mask).logits
    for row, kept in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, kept]).logits[0]
        torch.testing.assert_close(together[row, kept], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("visibility", [Bidirectional()], ids=["bidirectional"])
def test_padded_rows_equal_the_rows_alone_when_every_token_sees_every_other(stack, visibility):
    model, ids = make(stack), tokens(2, 9)
    for mask in (left_padded([9, 4], 9), left_padded([9, 4], 9).flip(1)):
        together = model(ids, attention_mask=mask, visibility=visibility).logits
        for row, kept in enumerate(mask.bool()):
            alone = model(ids[row : row + 1, kept], visibility=visibility).logits[0]
            torch.testing.assert_close(together[row, kept], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("stack", ["gla", "gated_deltanet", "hybrid"])
def test_bidirectional_outputs_depend_on_later_tokens_and_causal_ones_do_not(stack):
    model, ids = make(stack), tokens(1, 8)
    changed = ids.clone()
    changed[0, -1] = 3 if ids[0, -1] != 3 else 4
    assert torch.equal(model(ids).logits[:, :-1], model(changed).logits[:, :-1])
    before, after = (model(x, visibility=Bidirectional()).logits[:, 0] for x in (ids, changed))
    assert (before - after).abs().max() > 1e-6


@pytest.mark.parametrize("stack", STACKS)
def test_padded_chunks_with_a_state_equal_the_whole_row(stack):
    """Rows of different lengths go on from their own states, padding in every chunk."""
    model, ids = make(stack), tokens(2, 10)
    rows = [ids[0, :9], ids[1, :5]]
    first = torch.stack([torch.cat([ids[0, :4]]), torch.cat([torch.zeros(3, dtype=torch.long), ids[1, :1]])])
    second = torch.stack([ids[0, 4:9], torch.cat([ids[1, 1:5], torch.zeros(1, dtype=torch.long)])])
    output = model(first, attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]]), use_cache=True)
    output = model(second, attention_mask=torch.tensor([[1] * 5, [1, 1, 1, 1, 0]]), state=output.state)
    whole = [model(row[None]).logits[0] for row in rows]
    torch.testing.assert_close(output.logits[0], whole[0][4:], rtol=0, atol=1e-10)
    torch.testing.assert_close(output.logits[1, :4], whole[1][1:], rtol=0, atol=1e-10)
    assert output.state.lengths.tolist() == [9, 5]


@pytest.mark.parametrize("stack", ["gla", "gated_deltanet", "hybrid"])
def test_gradients_cross_a_segment_border_and_stop_at_detach(stack):
    model, ids = make(stack), tokens(1, 6)
    embedded = model.embed(ids).detach().requires_grad_()
    whole = torch.autograd.grad(model(inputs_embeds=embedded).logits[:, 4:].square().sum(), embedded)[0]
    first = model(inputs_embeds=embedded[:, :4], use_cache=True)
    cut = torch.autograd.grad(model(inputs_embeds=embedded[:, 4:], state=first.state).logits.square().sum(), embedded)[
        0
    ]
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-10)
    first = model(inputs_embeds=embedded[:, :4], use_cache=True)
    short = torch.autograd.grad(
        model(inputs_embeds=embedded[:, 4:], state=first.state.detach()).logits.square().sum(), embedded
    )[0]
    assert short[:, :4].abs().max() == 0
    assert short[:, 4:].abs().max() > 0


def test_run_in_slices_equals_forward():
    model, ids = make(layers=4), tokens()
    context = SequenceContext.build(ids.shape[0], ids.shape[1])
    hidden = model.embed(ids)
    for blocks in (slice(0, 1), slice(1, 3), slice(3, None)):
        hidden, state = model.run(hidden, context, blocks)
        assert state is None
    assert torch.equal(model.head(hidden), model(ids).logits)


def test_save_and_load_pretrained_give_the_same_model(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    model, ids = make(dtype=torch.float32, gated_deltanet={"num_heads": 2, "head_dim": 12, "combine": "gate"}), tokens()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).mixers == ["gated_deltanet", "attention"]
    for kind in (HybridForCausalLM, AutoModelForCausalLM):
        loaded = kind.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_tied_embeddings_survive_saving(tmp_path):
    model, ids = make(dtype=torch.float32, tie_word_embeddings=True), tokens()
    assert model.lm_head.weight is model.model.embeddings.weight
    model.save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.model.embeddings.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# -- generate -----------------------------------------------------------------------------------------------------------


def by_hand(model: HybridForCausalLM, ids: torch.Tensor, count: int) -> list[int]:
    row = ids[None]
    for _ in range(count):
        row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
    return row[0, len(ids) :].tolist()


@pytest.mark.parametrize("stack", ["gla", "gated_deltanet", "attention", "hybrid"])
def test_generate_on_a_left_padded_batch_equals_each_row_by_full_forwards(stack):
    model, ids = make(stack, eos_token_id=None, pad_token_id=0), tokens(3, 9)
    lengths = [9, 4, 1]
    mask = left_padded(lengths, 9)
    out = model.generate(ids * mask, attention_mask=mask, max_new_tokens=5, do_sample=False)
    for row, n in enumerate(lengths):
        assert out[row, 9:].tolist() == by_hand(model, ids[row, 9 - n :], 5)


def test_generate_goes_on_from_a_state():
    model, ids = make(eos_token_id=None, pad_token_id=0), tokens(2, 8)
    whole = model.generate(ids, max_new_tokens=4, do_sample=False)
    state = model(ids[:, :6], use_cache=True).state
    resumed = model.generate(ids, state=state, max_new_tokens=4, do_sample=False)
    assert torch.equal(resumed, whole)


def test_generate_by_beams_without_cache_and_with_a_chunked_prefill_agree():
    model, ids = make(eos_token_id=None, pad_token_id=0), tokens(2, 8)
    beams = model.generate(ids, num_beams=3, max_new_tokens=4, do_sample=False)
    assert torch.equal(beams, model.generate(ids, num_beams=3, max_new_tokens=4, do_sample=False, use_cache=False))
    greedy = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(greedy, model.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=3))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "gated_delta"}, "did you mean 'gated_deltanet'"),
        ({"period": 5}, "makes no layer"),
        ({"period": 2, "linear_per_full": 1}, "give one of"),
        ({"attention_layers": [7]}, "outside"),
        ({"mixers": ["gla"]}, "1 names given"),
        ({"attention": {"num_heads": 5}, "period": 2}, "must divide"),
        ({"gated_deltanet": {"heads": 2}}, "unknown option"),
        ({"norm_placement": "middle"}, "norm_placement"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"convolution_init": "he"}, "convolution_init"),
        ({"vocab_size": True}, "vocab_size"),
        ({"intermediate_size": -3}, "intermediate_size"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"hidden_ratio": 0}, "hidden_ratio"),
        ({"norm_eps": -1.0}, "norm_eps"),
        ({"mixer": None}, "unknown name None"),
        ({"mixer": ["gla"]}, "unknown name"),
    ],
)
def test_impossible_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make("gated_deltanet", **changes)


def test_patterns_by_period_and_by_linear_layers_per_full_one():
    assert [i for i, m in enumerate(HybridConfig(period=6).mixers) if m == "attention"] == [5, 11, 17, 23]
    assert [
        i for i, m in enumerate(HybridConfig(linear_per_full=3, num_hidden_layers=8).mixers) if m == "attention"
    ] == [3, 7]
    assert HybridConfig(attention_layers=[1, 0], num_hidden_layers=3).mixers == [
        "attention",
        "attention",
        "gated_deltanet",
    ]
    assert set(HybridConfig(mixer="gla").mixers) == {"gla"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([[1, 99]])}, "expected 0..22"),
        ({"input_ids": torch.tensor([1, 2])}, r"\[B, S\]"),
        ({"input_ids": tokens(), "attention_mask": torch.ones(3, 5)}, "attention_mask"),
        ({"input_ids": tokens(), "attention_mask": torch.full((3, 12), -1e9)}, "other than 0 and 1"),
        ({"input_ids": tokens(), "cu_seqlens": torch.tensor([0, 12])}, "batch size 1"),
        ({"input_ids": tokens(1), "cu_seqlens": torch.tensor([0, 5, 3, 12])}, "offsets must rise"),
        ({"input_ids": tokens(1), "cu_seqlens": torch.tensor([0, 11])}, "offsets must rise"),
        ({"input_ids": tokens(1), "cu_seqlens": torch.tensor([0, 3, 3, 12])}, "offsets must rise"),
        ({"input_ids": tokens(), "visibility": BlockCausal(4)}, "BlockCausal"),
        ({"input_ids": tokens(), "labels": torch.full((3, 12), -100)}, "no position is left"),
        ({"input_ids": tokens(), "labels": torch.ones(3, 11, dtype=torch.long)}, "labels"),
        ({"input_ids": tokens(), "logits_to_keep": -1}, "logits_to_keep"),
        ({}, "exactly one"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "-".join(v) or "nothing",
)
def test_bad_calls_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make()(**arguments)


def test_a_state_of_another_model_batch_or_direction_is_refused():
    model, ids = make(), tokens()
    state = model(ids, use_cache=True).state
    with pytest.raises(ValueError, match="another model"):
        make("gla")(ids, state=ModelState("other"))
    with pytest.raises(ValueError, match="holds 3 rows"):
        model(ids[:2], state=state)
    with pytest.raises(ValueError, match="causal direction"):
        model(ids, state=state, visibility=Bidirectional())
    with pytest.raises(TypeError, match="unknown argument"):
        model(ids, tokens=3)


def test_parameters_are_counted_as_the_study_does():
    """One layer of the published 340M sizes, by arithmetic: projections, gates, convolution, norms, MLP."""
    config = HybridConfig(num_hidden_layers=1, gated_deltanet={"num_heads": 4, "head_dim": 256})
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    d, layer = 1024, sum(p.numel() for p in model.model.layers[0].parameters())
    mixer = 5 * d * d + 2 * d * 4 + 3 * d * 4 + 4 + 4 + 256
    assert layer == mixer + 3 * d * 2816 + 2 * d
    assert 24 * layer + 2 * 32000 * d + d == 399_531_200
