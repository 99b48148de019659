"""Matrices laid out for decoding: the same model, in memory alone another."""

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM, lay_out_for_decoding
from latentcot.recurrent_depth import DepthLoop


def make(**more) -> HybridForCausalLM:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=3,
        mixers=["attention", "gated_deltanet", "attention"],
        attention={"num_heads": 2},
        gated_deltanet={"num_heads": 2, "head_dim": 16},
        **more,
    )
    return HybridForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_numbers_gradients_and_files_stay(tied, tmp_path):
    ids = torch.arange(12).view(2, 6)
    model, other = make(tie_word_embeddings=tied), lay_out_for_decoding(make(tie_word_embeddings=tied))
    results = []
    for each in (model, other):
        loss = each.forward(input_ids=ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        results.append((loss, {name: p.grad for name, p in each.named_parameters()}))
    torch.testing.assert_close(results[0], results[1])
    before, after = (dict(each.named_parameters()) for each in (model, other))
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert after[gate].shape == before[gate].shape
    assert after[gate].t().is_contiguous()
    embedded = other.get_input_embeddings().weight
    assert isinstance(embedded, torch.Tensor)
    assert embedded.is_contiguous()
    assert after.get("lm_head.weight", embedded).is_contiguous() == tied
    other.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_an_optimiser_made_before_goes_on():
    ids = torch.arange(12).view(2, 6)
    losses = []
    for change in (lambda m: m, lay_out_for_decoding):
        model = make()
        optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
        for step in range(4):
            if step == 2:
                change(model)
            optimiser.zero_grad()
            loss = model.forward(input_ids=ids, labels=ids).loss
            assert loss is not None
            loss.backward()
            optimiser.step()
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)


def test_every_matrix_of_a_method_is_laid_out():
    loop = lay_out_for_decoding(DepthLoop(make(), {"prelude": 1, "core": 1, "coda": 1}))
    assert loop.adapter.weight.t().is_contiguous()
