"""Speculative decoding: the target's own tokens, greedy to the letter and sampled in distribution."""

# ``generate`` is typed by a protocol.
# pyright: reportCallIssue=false, reportArgumentType=false

import itertools

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM, speculative
from latentcot.backbone.generation import Sampling
from latentcot.backbone.speculative import speculative_generate


def make(seed: int, mixer: str = "gated_deltanet", period: int | None = 2, vocab: int = 29, layers: int = 2):
    torch.manual_seed(seed)
    config = HybridConfig(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=layers,
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


def near(model: HybridForCausalLM, noise: float) -> HybridForCausalLM:
    """A draft that mostly agrees with its target."""
    other = make(0, model.config.mixer, model.config.period, model.config.vocab_size)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return other


def prompt(length: int = 6, vocab: int = 29) -> torch.Tensor:
    return torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("mixer", "period"), [("gated_deltanet", 2), ("gla", None), ("attention", None)])
@pytest.mark.parametrize("drafted", [1, 3, 6])
@pytest.mark.parametrize("kind", ["stranger", "near", "same"])
def test_greedy_tokens_are_the_targets(mixer, period, drafted, kind):
    target = make(0, mixer, period)
    draft = {
        "stranger": lambda: make(1, "gla", None, layers=1),
        "near": lambda: near(target, 0.01),
        "same": lambda: target,
    }
    out = speculative_generate(target, draft[kind](), prompt(), 25, drafted=drafted, prefill_chunk=4)
    expected = target.generate(prompt(), max_new_tokens=25, do_sample=False)[:, 6:]
    assert torch.equal(out.ids, expected)
    if kind == "same":
        assert out.acceptance_rate == 1


def test_passes_and_acceptance_are_counted():
    target = make(0)
    out = speculative_generate(target, target, prompt(), 21, drafted=4)
    assert (out.proposed, out.accepted) == (
        16,
        16,
    )  # four rounds of four guesses and a token of the target's, and one token
    assert (out.target_passes, out.draft_passes) == (5, 16)
    some = speculative_generate(target, near(target, 0.02), prompt(), 25, drafted=4)
    assert 0 < some.accepted < some.proposed
    assert some.target_passes < 25
    assert some.acceptance_rate == some.accepted / some.proposed
    none = speculative_generate(target, target, prompt(), 1)
    assert (none.proposed, none.acceptance_rate, none.ids.shape) == (0, 0.0, (1, 1))


def test_a_long_backlog_gets_a_pass_of_its_own(monkeypatch):
    monkeypatch.setattr(speculative, "LONGEST_BACKLOG", 3)
    target, stranger = make(0), make(1, "gla", None, layers=1)
    out = speculative_generate(target, stranger, prompt(), 25, drafted=2)
    assert torch.equal(out.ids, target.generate(prompt(), max_new_tokens=25, do_sample=False)[:, 6:])
    longest = speculative_generate(target, stranger, prompt(1), 25, drafted=2)
    assert torch.equal(longest.ids, target.generate(prompt(1), max_new_tokens=25, do_sample=False)[:, 1:])


@pytest.mark.parametrize("kind", ["near", "stranger"])
def test_it_stops_at_the_end_token(kind):
    target = make(0)
    draft = near(target, 0.01) if kind == "near" else make(1)
    whole = target.generate(prompt(), max_new_tokens=25, do_sample=False)[0, 6:].tolist()
    for end in set(whole):
        out = speculative_generate(target, draft, prompt(), 25, eos_token_id=end)
        assert out.ids[0].tolist() == whole[: whole.index(end) + 1]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=3)], ids=["plain", "cut"])
def test_samples_have_the_distribution_of_the_target(sampling):
    """All sequences of three tokens over a vocabulary of four: counts against the target's own probabilities."""
    vocab, length, runs = 4, 3, 1500
    target, draft = make(0, "gla", None, vocab, 1), make(3, "gla", None, vocab, 1)
    start, generator = prompt(4, vocab), torch.Generator().manual_seed(0)
    chance = {}
    for line in itertools.product(range(vocab), repeat=length):
        logits = target(torch.cat([start, torch.tensor([line])], 1)).logits[0, 3:-1].detach()
        chances = sampling.scores(logits).softmax(-1)
        chance[line] = float(chances[torch.arange(length), torch.tensor(line)].prod())
    counts = dict.fromkeys(chance, 0)
    accepted = proposed = 0
    for _ in range(runs):
        out = speculative_generate(target, draft, start, length, drafted=2, sampling=sampling, generator=generator)
        counts[tuple(out.ids[0].tolist())] += 1
        accepted, proposed = accepted + out.accepted, proposed + out.proposed
    assert 0.1 < accepted / proposed < 0.95  # both branches of the rule were taken
    assert all(counts[line] == 0 for line, p in chance.items() if p == 0)
    # cells of few expected counts together, then chi square at 1 in 10,000 (normal approximation of Wilson and Hilferty)
    cells = [(counts[line], runs * p) for line, p in chance.items() if runs * p >= 5]
    rest = [(counts[line], runs * p) for line, p in chance.items() if 0 < runs * p < 5]
    if rest and sum(e for _, e in rest) >= 5:
        cells.append((sum(c for c, _ in rest), sum(e for _, e in rest)))
    chi_square, free = sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1
    limit = free * (1 - 2 / (9 * free) + 3.72 * (2 / (9 * free)) ** 0.5) ** 3
    assert chi_square < limit, (chi_square, limit)


def test_bad_calls_are_named():
    target = make(0)
    with pytest.raises(ValueError, match="its vocabulary has 13"):
        speculative_generate(target, make(1, vocab=13), prompt(), 4)
    with pytest.raises(ValueError, match="one prompt"):
        speculative_generate(target, target, prompt().expand(2, -1), 4)
    for options in ({"max_new_tokens": 0}, {"drafted": 0}):
        with pytest.raises(ValueError, match="positive integer"):
            speculative_generate(target, target, prompt(), **{"max_new_tokens": 4, **options})
