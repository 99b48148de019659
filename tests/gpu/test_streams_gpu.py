"""Two streams on a CUDA device: attention in tiles against dense masks, and a whole training pass against fp64 on the CPU."""

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM, SequenceContext
from latentcot.backbone.mixers import stream_attention
from latentcot.backbone.mixers.stream_attention import attend_in_streams, takes_flex
from latentcot.diffusion_reasoning.block_diffusion import BlockDiffusionModel
from latentcot.kernels import BlockCausal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative RMS


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("length", "block", "kv_heads"), [(1024, 32, 4), (1100, 24, 2)])
def test_tiles_and_masks_agree_with_gradients(length, block, kv_heads, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, heads, length, 64) for heads in (4, kv_heads, kv_heads)]
    drawn = [torch.randn(*shape, generator=generator) for shape in shapes]
    weight = torch.randn(4, 4, length, 64, generator=generator).cuda()

    def run(kind: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to("cuda", kind).requires_grad_() for x in drawn]
        context = SequenceContext.build(2, length, "cuda", visibility=BlockCausal(block), streams=2)
        o = attend_in_streams(inputs[0], inputs[1], inputs[2], context)
        (o * weight.to(kind)).sum().backward()
        return [o, *(x.grad for x in inputs if x.grad is not None)]

    context = SequenceContext.build(2, length, "cuda", visibility=BlockCausal(block), streams=2)
    assert takes_flex(drawn[0].to("cuda", dtype), context, None)
    found = run(dtype)
    monkeypatch.setattr(stream_attention, "takes_flex", lambda *_: False)
    expected = run(torch.float64)
    assert len(found) == 4
    for name, a, b in zip(("o", "d_q", "d_k", "d_v"), found, expected, strict=True):
        assert apart(a, b) <= BOUNDS[dtype], name


@pytest.mark.parametrize("inside", ["softmax", "decayed"])
def test_a_training_pass_is_that_of_the_reference(inside):
    """A hybrid stack in bf16 against fp64 on the CPU: logits and the gradient of the embeddings within a relative RMS of 3e-2, which
    covers the rounding of weights and activations."""
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=2,
        mixers=["gated_deltanet", "attention"],
        attention={"num_heads": 2},
        gated_deltanet={"num_heads": 2, "head_dim": 64},
    )
    model = HybridForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(7, 64, (1, 1030), generator=generator)
    noisy = clean.masked_fill(torch.rand(1, 1030, generator=generator) < 0.5, 3)
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        copy = HybridForCausalLM(config).to(device, dtype)
        copy.load_state_dict(model.state_dict())
        wrapped = BlockDiffusionModel(copy, 32, 3, inside=inside)
        logits = wrapped.forward_two_stream(noisy.to(device), clean.to(device))
        logits.float().square().mean().backward()
        embedded = copy.get_input_embeddings().weight
        assert isinstance(embedded, torch.Tensor)
        assert embedded.grad is not None
        results.append((logits, embedded.grad))
    for expected, found in zip(*results, strict=True):
        assert apart(found, expected) <= 3e-2
