"""Faults that users of neighbouring projects reported, checked on whole models."""

import itertools

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM, next_token_loss
from latentcot.kernels import Bidirectional

MIXERS = {
    "gla": {"mixer": "gla"},
    "gated_deltanet": {"mixer": "gated_deltanet"},
    "attention": {"mixer": "attention"},
    "hybrid": {"period": 2},
}


def make(stack: str, layers: int = 2, seed: int = 0) -> HybridForCausalLM:
    torch.manual_seed(seed)
    config = HybridConfig(
        vocab_size=23,
        hidden_size=32,
        num_hidden_layers=layers,
        attention={"num_heads": 4},
        gla={"num_heads": 2},
        gated_deltanet={"num_heads": 2, "head_dim": 12},
        initializer_range=0.2,
        **MIXERS[stack],
    )
    return HybridForCausalLM(config).double().eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 23, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("stack", MIXERS)
@pytest.mark.parametrize("cuts", [(5, 4, 1, 1, 1), (1,) * 12, (2, 10)], ids=str)
def test_S_1_a_filled_state_takes_any_number_of_tokens(stack, cuts):
    model, ids = make(stack), tokens(2, 12)
    state, pieces, start = None, [], 0
    for count in cuts:
        output = model(ids[:, start : start + count], state=state, use_cache=True)
        pieces.append(output.logits)
        state, start = output.state, start + count
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("stack", MIXERS)
@pytest.mark.parametrize("visibility", ["causal", "bidirectional"])
def test_S_2_packed_sequences_do_not_see_one_another(stack, visibility):
    model, ids = make(stack), tokens(1, 14)
    kinds = {} if visibility == "causal" else {"visibility": Bidirectional()}
    offsets = torch.tensor([0, 5, 6, 14])
    packed = model(ids, cu_seqlens=offsets, **kinds).logits
    for start, stop in itertools.pairwise(offsets):
        torch.testing.assert_close(packed[:, start:stop], model(ids[:, start:stop], **kinds).logits, rtol=0, atol=1e-10)
    other = ids.clone()
    other[:, :5] = (other[:, :5] + 1) % 23
    assert torch.equal(model(other, cu_seqlens=offsets, **kinds).logits[:, 5:], packed[:, 5:])
    embedded = model.embed(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, cu_seqlens=offsets, **kinds).logits[:, 6:].square().sum()
    gradient = torch.autograd.grad(loss, embedded)[0]
    assert torch.equal(gradient[:, :6], torch.zeros_like(gradient[:, :6]))
    assert gradient[:, 6:].abs().max() > 0


def test_S_2_the_loss_does_not_shift_across_a_border():
    logits, labels = torch.randn(1, 5, 7, dtype=torch.float64), torch.tensor([[1, 2, 3, 4, 5]])
    packed = next_token_loss(logits, labels, cu_seqlens=torch.tensor([0, 3, 5]))
    by_hand = -torch.stack([logits[0, i].log_softmax(-1)[labels[0, i + 1]] for i in (0, 1, 3)]).mean()
    torch.testing.assert_close(packed, by_hand)


@pytest.mark.parametrize("stack", ["gla", "gated_deltanet", "hybrid"])
def test_K_3_padding_takes_no_gradient_and_24_layers_stay_finite(stack):
    model = make(stack, layers=24).float()
    ids = tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    embedded = model.embed(ids).detach().clone().requires_grad_()
    zeroed = embedded * torch.tensor([1.0, 0.0]).view(2, 1, 1)  # a whole row of exact zeros goes through every norm
    loss = model(inputs_embeds=zeroed, attention_mask=mask).logits[:, 2:].square().sum()
    loss.backward()
    assert embedded.grad is not None
    assert torch.equal(embedded.grad[0, :2], torch.zeros_like(embedded.grad[0, :2]))
    assert embedded.grad[0, 2:].abs().max() > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
