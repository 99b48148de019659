"""Self-speculative decoding: the tokens of plain decoding, whatever the draft; and retrofitting of a decoder."""

from typing import Any

import pytest
import torch

from latentcot.backbone import HybridForCausalLM, SequenceContext
from latentcot.recurrent_depth import Cut, DepthLoop, retrofit, self_speculative_generate

ATTENTION = {"mixers": ["attention"] * 4}


def plain(loop: DepthLoop, prompt: torch.Tensor, count: int, r: int, seed: int) -> list[int]:
    """Greedy tokens by reading everything anew for each, from the same initial states."""
    n = prompt.shape[1]
    noise = loop.initial.draw(torch.empty(n + count, 32).double(), torch.Generator().manual_seed(seed))
    ids = prompt
    for _ in range(count):
        logits = loop.recur(ids, r, initial_state=noise[None, : ids.shape[1]]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, n:].tolist()


@pytest.fixture(params=[ATTENTION, {}], ids=["attention", "hybrid"])
def loop(make_backbone, request) -> DepthLoop:
    made = DepthLoop(make_backbone(initializer_range=0.1, **request.param)).double()
    with torch.no_grad():
        made.adapter.weight[:, :32] *= 0.05
    return made


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(11, 20, (1, 5), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("draft", "drafted"), [(1, 8), (2, 3), (5, 8), (1, 1)])
def test_tokens_are_those_of_plain_greedy_decoding(loop, prompt, draft, drafted):
    output = self_speculative_generate(
        loop,
        prompt,
        20,
        draft_recurrences=draft,
        recurrences=6,
        drafted=drafted,
        generator=torch.Generator().manual_seed(7),
    )
    assert output.ids[0].tolist() == plain(loop, prompt, 20, 6, 7)
    assert 0 <= output.accepted <= output.proposed
    assert output.recurrences == 6 * output.passes + draft * output.draft_passes
    if draft == 5:
        assert output.acceptance_rate > 0.5
        assert output.passes < 20


def test_any_draft_passes_where_everything_is_accepted(loop, prompt):
    always = self_speculative_generate(
        loop, prompt, 9, draft_recurrences=1, recurrences=6, drafted=2, accept=1e-9, generator=torch.Generator()
    )
    assert (always.proposed, always.accepted, always.passes) == (6, 6, 3)


def test_the_end_token_ends(loop, prompt):
    tokens = plain(loop, prompt, 20, 6, 7)
    stop = tokens[4]
    output = self_speculative_generate(
        loop,
        prompt,
        20,
        draft_recurrences=2,
        recurrences=6,
        eos_token_id=stop,
        generator=torch.Generator().manual_seed(7),
    )
    assert output.ids[0].tolist() == tokens[: tokens.index(stop) + 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"draft_recurrences": 6}, "draft_recurrences: 6"),
        ({"draft_recurrences": 0}, "draft_recurrences"),
        ({"drafted": 0}, "drafted"),
        ({"accept": 0.0}, "accept"),
        ({"recurrences": 1}, "recurrences"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, "one prompt"),
    ],
)
def test_bad_arguments_are_refused_by_name(loop, prompt, arguments, words):
    given: dict[str, Any] = {"input_ids": prompt, "draft_recurrences": 2, "recurrences": 6} | arguments
    with pytest.raises(ValueError, match=words):
        self_speculative_generate(loop, **given)


# -- retrofitting ------------------------------------------------------------------------------------------------------


def test_published_cut():
    cut = Cut.of_sizes(22, 4, 8, 4)
    assert cut == Cut(tuple(range(4)), tuple(range(10, 18)), tuple(range(18, 22)))


def test_retrofitted_model_is_made_of_the_decoders_own_blocks(make_backbone):
    decoder = make_backbone(num_hidden_layers=6, mixers=["gated_deltanet", "attention"] * 3, embedding_scale=3.0)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    model = retrofit(decoder, (1, 2, 1), 8, {"gradient_window": 4, "injection": "add", "initial_state": "zeros"})
    assert model.backbone.config.mixers == ["gated_deltanet", "attention", "gated_deltanet", "attention"]
    assert (model.sampler.mean, model.sampler.ramp, model.window.last) == (8, "linear", 4)
    # one recurrence from zero, written out with the decoder's own blocks 0, 3, 4 and 5
    ids, context = torch.randint(11, 20, (2, 7)), SequenceContext.build(2, 7)
    e, _ = decoder.run(decoder.embed(ids), context, slice(0, 1))
    s, _ = decoder.run(e, context, slice(3, 5))
    expected = decoder.head(decoder.run(decoder.model.norm(s), context, slice(5, 6))[0])
    torch.testing.assert_close(model.recur(ids, 1).logits, expected, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in decoder.state_dict().items())


def test_bad_cuts_are_refused_by_name(make_backbone):
    decoder: HybridForCausalLM = make_backbone()
    for cut, words in (
        ((2, 2, 1), "4 blocks"),
        ((2, 2), "sizes"),
        (Cut((0,), (2,), (4,)), "block 4"),
    ):
        with pytest.raises(ValueError, match=words):
            retrofit(decoder, cut)
    with pytest.raises(ValueError, match="rise"):
        Cut((0, 1), (1,), ())
    with pytest.raises(ValueError, match="core"):
        Cut((0,), (), (1,))
