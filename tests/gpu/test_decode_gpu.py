"""The decode engine on a CUDA device, graphs on and off: the tokens of transformers' ``generate``, greedy, in float32."""

# ``generate`` is typed by a protocol.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.backbone.batching import generate_many
from latentcot.backbone.engine import FIRST_WINDOW, DecodeEngine
from latentcot.backbone.generation import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MIXERS = ["gated_deltanet", "attention", "gla", "hgrn2", "deltanet"]


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    """One layer of each, with weights large enough that the likeliest token is no close call."""
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=len(MIXERS),
        mixers=MIXERS,
        attention={"num_heads": 4},
        gated_deltanet={"num_heads": 2, "head_dim": 64},
        gla={"num_heads": 2},
        hgrn2={"num_heads": 2, "expand_ratio": None},
        deltanet={"num_heads": 2},
        initializer_range=0.1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return HybridForCausalLM(config).to("cuda").eval()


def prompts(lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and their mask."""
    ids = torch.randint(3, 64, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    return (ids * mask).cuda(), mask.cuda()


@pytest.mark.parametrize("lengths", [[40], [40, 17, 1], [40, 31, 17, 9, 3, 1]], ids=["one", "few", "many"])
@pytest.mark.parametrize("cuda_graph", [True, False], ids=["graph", "no-graph"])
def test_greedy_tokens_are_those_of_generate(model, lengths, cuda_graph):
    """Up to four rows take the products of few rows, more take PyTorch's."""
    ids, mask = prompts(lengths, 40)
    engine = DecodeEngine(model, len(lengths), 160, cuda_graph=cuda_graph)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=100, do_sample=False)[:, 40:]
    for _ in range(2):  # buffers and graphs serve another prompt too
        engine.prefill(ids, mask)
        assert torch.equal(engine.generate(100), expected)


@pytest.mark.parametrize("cuda_graph", [True, False], ids=["graph", "no-graph"])
def test_windows_of_attention_widen_with_the_context(model, cuda_graph):
    ids, mask = prompts([FIRST_WINDOW - 10, 20], FIRST_WINDOW - 10)
    engine = DecodeEngine(model, 2, FIRST_WINDOW + 50, cuda_graph=cuda_graph)
    engine.prefill(ids, mask)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    assert torch.equal(engine.generate(40), expected[:, ids.shape[1] :])


def test_prompts_of_unequal_lengths_share_the_slots(model):
    ids, mask = prompts([40, 31, 17, 9, 3, 1], 40)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, 40:]
    rows = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    answers = generate_many(model, rows, slots=3, max_new_tokens=20, prefill_chunk=7, progress=False)
    assert answers == expected.tolist()


def test_a_graph_draws_new_numbers_every_token_and_repeats_them_by_their_seed(model):
    ids, mask = prompts([40, 17], 40)
    drawn = []
    for seed in (1, 1, 2):
        engine = DecodeEngine(model, 2, 160, sampling=Sampling(1.0), seed=seed)
        engine.prefill(ids, mask)
        drawn.append(engine.generate(60))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
