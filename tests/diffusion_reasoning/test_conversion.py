"""Autoregressive models as diffusion models: the model as it was, the open mask, alignment, the mask token, growing blocks."""

# Options go through dictionaries of mixed types, and weights of modules are tensors: a type checker can not know either.
# pyright: reportCallIssue=false

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.diffusion_reasoning import DiffusionGenerationConfig, diffusion_generate
from latentcot.diffusion_reasoning.block_diffusion import block_diffusion_loss, block_generate
from latentcot.diffusion_reasoning.convert import (
    ConvertedModel,
    MaskAnnealing,
    ar_to_diffusion,
    causal_loss,
    conversion_loss,
)
from latentcot.diffusion_reasoning.convert_blocks import BlockGrowth, ar_to_block_diffusion
from latentcot.kernels import Bidirectional

VOCAB = 21
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HYBRIDS = {
    "gla-attention": ["gla", "attention"],
    "gated_deltanet": ["gated_deltanet", "gated_deltanet"],
    "deltanet-gate": ["deltanet", "attention"],
    "retnet-hgrn2": ["retnet", "hgrn2"],
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    if name in HYBRIDS:
        config = HybridConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            mixers=HYBRIDS[name],
            initializer_range=0.3,
            attention={"num_heads": 2},
            gla={"num_heads": 2, "use_short_conv": True},
            retnet={"num_heads": 2},
            hgrn2={"num_heads": 2, "expand_ratio": 6},
            deltanet={"num_heads": 2, "combine": "gate"},
            gated_deltanet={"num_heads": 2, "head_dim": 8},
        )
        return HybridForCausalLM(config).double().eval()
    if name == "llama-tied-eager":
        config = LlamaConfig(**SIZES, tie_word_embeddings=True, attn_implementation="eager")
        return LlamaForCausalLM(config).double().eval()
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES)).double().eval()
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).double().eval()


MODELS = ["llama-tied-eager", "qwen2", "gpt2", *HYBRIDS]


def text(rows=2, length=9, seed=0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_before_the_first_step_it_is_the_model_as_it_was(name):
    """rho = 0: the logits of token i are those of the autoregressive model at i - 1."""
    model, x = make(name), text()
    expected = model(x).logits
    converted = ar_to_diffusion(model)
    assert converted.rho == 0
    found = converted(x)
    torch.testing.assert_close(found[:, 1:, :VOCAB], expected[:, :-1], rtol=0, atol=1e-10)
    torch.testing.assert_close(found[:, 0, :VOCAB], expected[:, 0], rtol=0, atol=1e-10)
    assert (found[..., converted.mask_id] == -torch.inf).all()
    unmoved = ar_to_diffusion(make(name), shift=False)(x)
    torch.testing.assert_close(unmoved[..., :VOCAB], expected, rtol=0, atol=1e-10)
    chosen = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    torch.testing.assert_close(converted.at(x, None, chosen), found[chosen], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", HYBRIDS)
def test_with_rho_1_a_hybrid_is_its_bidirectional_form(name):
    model, x = make(name), text()
    expected = model(x, visibility=Bidirectional()).logits
    converted = ar_to_diffusion(model, anneal=10)
    converted.set_step(9)
    assert converted.rho == 1
    torch.testing.assert_close(converted(x)[:, 1:, :VOCAB], expected[:, :-1], rtol=0, atol=1e-11)
    torch.testing.assert_close(ar_to_diffusion(make(name), anneal=None)(x), converted(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["qwen2", "llama-tied-eager", "gpt2", "gla-attention"])
def test_attention_opens_the_pairs_that_were_drawn(name):
    """In the first layer of one that attends, position i changes with token j exactly where j <= i or (i, j) was drawn."""
    model = make(name)
    if name == "gla-attention":
        model.model.layers = model.model.layers[1:]
    elif name == "gpt2":
        model.transformer.h = model.transformer.h[:1]
    else:
        model.model.layers = model.model.layers[:1]
    converted = ar_to_diffusion(model, shift=False, anneal=MaskAnnealing(4, seed=3))
    converted.set_step(1)
    assert converted.rho == 0.5
    x = text(1, 7)
    before = converted(x)[0, :, :VOCAB]
    seen = torch.zeros(7, 7, dtype=torch.bool)
    for j in range(7):
        moved = x.clone()
        moved[0, j] = 3 if int(x[0, j]) != 3 else 4
        seen[:, j] = (converted(moved)[0, :, :VOCAB] - before).abs().amax(-1) > 1e-12
    drawn = MaskAnnealing(4, seed=3).ahead(1, 7)
    assert torch.equal(seen, drawn | torch.ones(7, 7).tril().bool())
    assert drawn.triu(1).any()


def test_a_step_has_one_draw_whatever_ran_before():
    annealing = MaskAnnealing(10, seed=1)
    assert [annealing.rho(s) for s in (-1, 0, 4, 9, 50)] == [0.0, 0.1, 0.5, 1.0, 1.0]
    share = torch.stack([annealing.ahead(s, 60).double().mean() for s in range(9)])
    torch.testing.assert_close(share, torch.arange(1, 10).double() / 10, rtol=0, atol=0.03)
    assert not torch.equal(annealing.ahead(4, 8), annealing.ahead(5, 8))
    converted, x = ar_to_diffusion(make("gla-attention"), anneal=annealing), text()
    converted.set_step(4)
    first = converted(x)
    assert torch.equal(first, converted(x))
    converted.set_step(6)
    converted.set_step(4)
    assert torch.equal(first, converted(x))


class NextByOne(nn.Module):
    """Predicts x_i + 1 for token i + 1, from token i alone."""

    dtype = torch.float32

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        logits = 50.0 * torch.nn.functional.one_hot((input_ids + 1) % VOCAB, VOCAB + 1).float()
        return type("Out", (), {"logits": logits})()


def test_only_aligned_logits_score_a_model_that_knows_the_next_token():
    x = (torch.arange(8) + torch.tensor([[0], [5]])) % VOCAB
    masked = torch.arange(8).expand(2, -1) % 2 == 1
    z, losses = x.masked_fill(masked, VOCAB), {}
    for shift in (True, False):
        model = ConvertedModel(NextByOne(), VOCAB, shift)  # type: ignore[arg-type]
        logits = model.at(z, None, masked)
        assert torch.equal(logits, model(z)[masked])
        losses[shift] = float(torch.nn.functional.cross_entropy(logits, x[masked]))
    assert losses[True] < 1e-6
    assert losses[False] > 1


@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_are_the_rows_alone(name):
    converted = ar_to_diffusion(make(name), anneal=None)
    x, mask = text(3), torch.arange(9) >= 9 - torch.tensor([9, 4, 1])[:, None]
    for kept in (mask, mask.flip(1)):
        together = converted(x, kept)
        assert not together[..., :VOCAB].isnan().any()
        for row in range(3):
            alone = converted(x[row : row + 1, kept[row]])[0]
            # eager attention takes its softmax in fp32, whatever the model is in
            bound = 1e-6 if name == "llama-tied-eager" else 1e-10
            torch.testing.assert_close(together[row, kept[row]], alone, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", ["llama-tied-eager", "qwen2", "gla-attention"])
def test_the_mask_token_is_a_row_of_its_own_or_a_reserved_one(name):
    model = make(name)
    mean = model.get_input_embeddings().weight.mean(0)
    converted = ar_to_diffusion(model)
    assert converted.mask_id == VOCAB
    assert model.config.vocab_size == VOCAB + 1
    assert model.get_input_embeddings().weight.shape[0] == VOCAB + 1
    torch.testing.assert_close(model.get_input_embeddings().weight[VOCAB], mean)
    reserved = ar_to_diffusion(make(name), mask_token=7)
    assert reserved.mask_id == 7
    assert reserved.model.config.vocab_size == VOCAB
    assert (reserved(text())[..., 7] == -torch.inf).all()


def test_the_whole_is_saved_with_its_model(tmp_path):
    converted = ar_to_diffusion(make("qwen2").float(), anneal=None)
    converted.model.save_pretrained(tmp_path)
    again = ConvertedModel(Qwen2ForCausalLM.from_pretrained(tmp_path).eval(), converted.mask_id)
    assert torch.equal(again(text()), converted(text()))


@pytest.mark.parametrize("name", ["llama-tied-eager", "qwen2", "gated_deltanet"])
def test_left_to_right_on_the_causal_mask_is_greedy_decoding(name):
    model, ids = make(name), text(2, 4)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    converted = ar_to_diffusion(model)
    config = DiffusionGenerationConfig(6, order="left_to_right", mask_id=converted.mask_id, eos_id=2)
    assert torch.equal(diffusion_generate(converted, ids, config).sequences, expected)


def test_the_loss_follows_the_recipe_and_the_causal_part_is_a_pass_of_its_own():
    """By masked tokens, never the first of a row; the gradient reaches the mask token's embedding."""
    model, x = make("qwen2"), text(4)
    with torch.no_grad():
        nll = model(x, labels=x).loss
    converted = ar_to_diffusion(model, anneal=5)
    converted.set_step(2)
    real = torch.arange(9) < torch.tensor([9, 9, 6, 3])[:, None]
    out = conversion_loss(converted, x, attention_mask=real, generator=torch.Generator().manual_seed(0))
    assert not out.masked[:, 0].any()
    assert out.n_maskable.tolist() == [8, 8, 5, 2]
    torch.testing.assert_close(out.loss.detach(), out.per_token.sum() / out.masked.sum())
    torch.testing.assert_close(causal_loss(converted, x).float(), nll)
    assert converted.step == 2
    both = conversion_loss(
        converted, x, attention_mask=real, ar_coefficient=0.5, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(both.loss, out.loss + 0.5 * causal_loss(converted, x, real))
    both.loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient[converted.mask_id].abs().max() > 0


@pytest.mark.parametrize("name", ["gla-attention", "gated_deltanet", "deltanet-gate", "retnet-hgrn2"])
def test_a_hybrid_becomes_a_block_model_that_computes_the_same(name):
    """Blocks of one token: NELBO = NLL, greedy samples = greedy decoding, before any step of training."""
    model, x = make(name), text()
    logits, expected = model(x).logits, model.generate(x, max_new_tokens=5, do_sample=False, eos_token_id=None)
    nll = -logits[:, :-1].log_softmax(-1).gather(-1, x[:, 1:, None])[..., 0].sum(1)
    blocks = ar_to_block_diffusion(model)
    out = block_diffusion_loss(blocks, x)
    torch.testing.assert_close(out.nelbo_nats, nll.detach(), rtol=0, atol=1e-10)
    config = DiffusionGenerationConfig(5, mask_id=blocks.mask_id, eos_id=2)
    assert torch.equal(block_generate(blocks, x, config).sequences, expected)


def test_blocks_grow_and_every_stage_trains():
    growth = BlockGrowth(6, steps_per_stage=10)
    assert growth.lengths == (1, 2, 4, 6)
    assert [growth.length(s) for s in (0, 9, 10, 20, 30, 500)] == [1, 1, 2, 4, 6, 6]
    assert [growth.rho(s) for s in (0, 9, 14, 19, 40)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert BlockGrowth(8, 1).lengths == (1, 2, 4, 8)
    assert BlockGrowth(1, 1).rho(9) == 0
    blocks, x = ar_to_block_diffusion(make("deltanet-gate")), text(8)
    optimiser, lengths = torch.optim.AdamW(blocks.parameters(), 3e-3), set()
    losses = []
    for step in range(40):
        growth.apply(blocks, step)
        lengths.add(blocks.block_length)
        loss = block_diffusion_loss(blocks, x, generator=torch.Generator().manual_seed(step)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert lengths == {1, 2, 4, 6}
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="causal language model of transformers, got Linear"):
        ar_to_diffusion(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask_id: 2 is also eos_token_id"):
        ar_to_diffusion(make("qwen2"), mask_token=2)
    with pytest.raises(ValueError, match=r"within 0\.\.20"):
        ar_to_diffusion(make("qwen2"), mask_token=VOCAB)
    with pytest.raises(ValueError, match="expected 'append' or the id"):
        ar_to_diffusion(make("qwen2"), mask_token="new")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive number of annealing steps"):
        ar_to_diffusion(make("qwen2"), anneal=0)
    converted, x = ar_to_diffusion(make("qwen2")), text()
    with pytest.raises(ValueError, match="optimiser step >= 0"):
        converted.set_step(-2)
    with pytest.raises(ValueError, match=r"attention_mask: shape \[2, 3\]"):
        converted(x, torch.ones(2, 3))
    with pytest.raises(ValueError, match="first token of a row"):
        conversion_loss(converted, x, maskable=torch.ones_like(x, dtype=torch.bool))
    with pytest.raises(ValueError, match="ar_coefficient"):
        conversion_loss(converted, x, ar_coefficient=-1)
    one_way = HybridForCausalLM(HybridConfig(VOCAB, 16, 1, "hgrn", intermediate_size=24))
    with pytest.raises(ValueError, match="hgrn layers see one direction only"):
        ar_to_diffusion(one_way)
    with pytest.raises(TypeError, match="whose layers have block forms, got Qwen2ForCausalLM"):
        ar_to_block_diffusion(make("qwen2"))
    with pytest.raises(ValueError, match="positive integer"):
        BlockGrowth(4, 0)


def test_a_model_that_can_not_look_ahead_is_refused():
    """Its attention ignores the mask it is given: found by running three tokens."""

    class Deaf(Qwen2ForCausalLM):
        def forward(self, *args: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
            return super().forward(*args, **options)

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="Deaf does not see what lies ahead"):
        ar_to_diffusion(Deaf(Qwen2Config(**SIZES)))
