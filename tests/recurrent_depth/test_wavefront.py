"""Wavefront generation: sequential decoding in its limits, less waiting between them, and nothing revised once it is frozen."""

from typing import Any

import pytest
import torch

from latentcot.recurrent_depth import DepthLoop, Wavefront, wavefront_generate
from latentcot.recurrent_depth.wavefront import _Front

EXACT: dict[str, Any] = {"noise_mixing": 1.0, "embedding_average": 0.0}


@pytest.fixture(
    params=[["attention"] * 4, ["attention", "gated_deltanet", "attention", "gla"]], ids=["attention", "hybrid"]
)
def loop(make_backbone, request) -> DepthLoop:
    made = DepthLoop(make_backbone(initializer_range=0.1, mixers=request.param, gla={"num_heads": 2})).double()
    with torch.no_grad():
        made.adapter.weight[:, :32] *= 0.1
    return made


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(11, 20, (1, 5), generator=torch.Generator().manual_seed(4))


def sequential(loop: DepthLoop, prompt: torch.Tensor, count: int, r: int, seed: int, warm: bool = False) -> list[int]:
    """Greedy tokens one after the other, by reading everything anew for each."""
    n = prompt.shape[1]
    start = loop.initial.draw(torch.empty(n + count, 32).double(), torch.Generator().manual_seed(seed))[None]
    ids = prompt
    with torch.no_grad():
        for _ in range(count):
            out = loop.recur(ids, r, initial_state=start[:, : ids.shape[1]])
            if warm:
                start[:, ids.shape[1]] = out.final_state[:, -1]
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
    return ids[0, n:].tolist()


@pytest.mark.parametrize("length", [1, 5])
def test_at_full_depth_it_is_sequential_decoding(loop, prompt, length):
    prompt = prompt[:, :length]
    for mixing in (1.0, 0.0):
        values = Wavefront(6, noise_mixing=mixing, embedding_average=0.3)
        generator = torch.Generator().manual_seed(7)
        output = wavefront_generate(loop, prompt, 15, values, recurrences=6, generator=generator)
        assert output.ids[0].tolist() == sequential(loop, prompt, 15, 6, 7, warm=mixing == 0)
        assert (output.steps, output.widest) == (15, 1)
        assert output.sequential_passes == 15 * 7
        assert output.recurrences.tolist() == [[6] * 15]


def test_where_everything_is_frozen_at_once_it_is_decoding_with_the_inner_recurrences(loop, prompt):
    values = Wavefront(3, threshold=float("inf"), **EXACT)
    one = wavefront_generate(loop, prompt[:, :1], 12, values, recurrences=3, generator=torch.Generator().manual_seed(7))
    assert one.ids[0].tolist() == sequential(loop, prompt[:, :1], 12, 3, 7)


def test_settled_states_give_the_tokens_of_deep_sequential_decoding_in_fewer_passes(make_backbone, prompt):
    """States that forget their beginning end where sequential ones end, whatever was read provisionally."""
    loop = DepthLoop(make_backbone(initializer_range=0.1, mixers=["attention"] * 4)).double()
    with torch.no_grad():
        loop.adapter.weight[:, :32] *= 0.05
    expected = sequential(loop, prompt, 20, 40, 7)
    for values in (
        Wavefront(2, threshold=1e-8, **EXACT),
        Wavefront(4, threshold=1e-8),
        Wavefront(3, headway=2, most_open=5, threshold=1e-8),
    ):
        output = wavefront_generate(
            loop, prompt, 20, values, recurrences=60, generator=torch.Generator().manual_seed(7)
        )
        assert output.ids[0].tolist() == expected, values
        assert output.widest > 1
        assert output.widest <= values.most_open
        deep = int(output.recurrences.max())
        assert deep < 60
        assert output.sequential_passes < 20 * (deep + 1)
        assert output.computed >= int(output.recurrences.sum())


def test_frozen_positions_hold_what_reading_the_tokens_gives(loop, prompt):
    """The state of what is frozen, also of linear mixers, is that of a pass over the final tokens from the same states."""
    front = _Front(loop, Wavefront(2, threshold=0.2, **EXACT), prompt, 12, 20, torch.Generator().manual_seed(7))
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < 6:
            held, inputs, s, before = front.state, list(front.inputs), front.s, front.before
            given, _ = front.step()
            if given and len(inputs) > len(given):
                n = len(given)
                front.state, kept = held, front.state
                alone = front._run(inputs[:n], s[:, :n], None if before is None else before[:, :n]).state
                front.state = kept
                assert kept.get_seq_length() == alone.get_seq_length() == held.get_seq_length() + n
                for place, entry in alone.entries.items():
                    for name, tensor in entry.tensors.items():
                        torch.testing.assert_close(kept.entries[place][name], tensor, atol=1e-9, rtol=0)
            tokens += given


def test_the_end_token_ends(loop, prompt):
    values = Wavefront(6, **EXACT)
    tokens = sequential(loop, prompt, 15, 6, 7)
    stop = tokens[4]
    output = wavefront_generate(
        loop, prompt, 15, values, recurrences=6, eos_token_id=stop, generator=torch.Generator().manual_seed(7)
    )
    assert output.ids[0].tolist() == tokens[: tokens.index(stop) + 1]
    assert output.recurrences.shape == output.ids.shape


def test_published_values_and_refusals(loop, prompt):
    w = Wavefront()
    assert (w.inner, w.headway, w.most_open, w.threshold, w.embedding_average, w.noise_mixing) == (
        4,
        1,
        128,
        0.03,
        0.1,
        0.5,
    )
    for changes, words in (
        ({"inner": 0}, "inner"),
        ({"headway": 0}, "headway"),
        ({"most_open": 0}, "most_open"),
        ({"threshold": -1.0}, "threshold"),
        ({"embedding_average": 1.5}, "embedding_average"),
        ({"noise_mixing": -0.1}, "noise_mixing"),
    ):
        with pytest.raises(ValueError, match=words):
            Wavefront(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inner = 4 given, but a position is frozen after 3"):
        wavefront_generate(loop, prompt, recurrences=3)
    with pytest.raises(ValueError, match="one prompt"):
        wavefront_generate(loop, prompt.expand(2, 5))
    with pytest.raises(ValueError, match="max_new_tokens"):
        wavefront_generate(loop, prompt, 0)


def test_a_window_is_refused(make_backbone, prompt):
    loop = DepthLoop(make_backbone(attention={"num_heads": 4, "window_size": 4})).double()
    for ids in (prompt, prompt[:, :1]):
        with pytest.raises(ValueError, match="window_size = 4"):
            wavefront_generate(loop, ids, 3)
