"""lm-eval's three requests on a tiny model, each against the model asked directly. No network."""

from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="extra eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from transformers import ByT5Tokenizer

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.evaluation import LatentCotLM

TOKENIZER: Any = ByT5Tokenizer(extra_ids=0)
PREFIX: int = TOKENIZER.eos_token_id  # stands in front of an empty context: there is no <bos>


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        num_hidden_layers=2,
        period=2,
        attention={"num_heads": 2},
        gated_deltanet={"num_heads": 1, "head_dim": 8},
        intermediate_size=16,
        initializer_range=0.3,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        bos_token_id=None,
    )
    return HybridForCausalLM(config).eval()


@pytest.fixture(scope="module")
def judge(model) -> LatentCotLM:
    return LatentCotLM(model, "bytes", max_length=24, batch_size=3)


def request(kind: str, *arguments) -> Instance:
    return Instance(kind, {}, arguments, 0)  # type: ignore[arg-type]


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """Of tokens 1, 2, ... given those before, and whether each is the likeliest: ``[2, n - 1]``."""
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    wanted = torch.tensor(ids[1:])
    return torch.stack([found.gather(1, wanted[:, None])[:, 0], (found.argmax(-1) == wanted).float()])


PAIRS = [("the cat", " sat"), ("", "alone"), ("a", "b"), ("one two three", " four five"), ("the cat", " ran")]


def test_loglikelihood_is_the_sum_over_the_continuation(model, judge):
    found = judge.loglikelihood([request("loglikelihood", *pair) for pair in PAIRS], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        before = ids_of(context) or [PREFIX]
        parts = log_probabilities(model, [*before, *ids_of(continuation)])[:, len(before) - 1 :]
        assert value == pytest.approx(float(parts[0].sum()), abs=1e-3), (context, continuation)
        assert greedy == bool(parts[1].all())


def test_what_the_model_would_write_is_greedy(model, judge):
    ids = ids_of("the cat")
    with torch.no_grad():
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1, 3:131].argmax()) + 3
        best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    ((_, greedy),) = judge.loglikelihood(
        [request("loglikelihood", "the cat", TOKENIZER.decode([token]))], disable_tqdm=True
    )
    assert greedy == (token == best)


def test_a_context_that_is_too_long_loses_its_beginning(model, judge):
    context, continuation = "0123456789" * 5, " end"
    ((value, _),) = judge.loglikelihood([request("loglikelihood", context, continuation)], disable_tqdm=True)
    ids = [*ids_of(context), *ids_of(continuation)][-25:]
    expected = log_probabilities(model, ids)[0, -4:].sum()
    assert value == pytest.approx(float(expected), abs=1e-3)


def test_rolling_counts_every_token_once(model, judge):
    short, long = "a short text", "a text of more than twenty-four bytes, in windows"
    found = judge.loglikelihood_rolling([request("loglikelihood_rolling", t) for t in (short, long)], disable_tqdm=True)
    assert found[0] == pytest.approx(float(log_probabilities(model, [PREFIX, *ids_of(short)])[0].sum()), abs=1e-3)
    ids, expected = [PREFIX, *ids_of(long)], 0.0
    for start in range(0, len(ids) - 1, 24):
        end = min(start + 24, len(ids) - 1)
        window = ids[max(0, end - 24) : end + 1]  # the last window is full: more context for the same tokens
        expected += float(log_probabilities(model, window)[0, -(end - start) :].sum())
    assert found[1] == pytest.approx(expected, abs=1e-3)


def test_generation_is_greedy_and_stops(model, judge):
    contexts = ["the cat", "x", "a longer beginning"]
    settings = {"until": [], "max_gen_toks": 5, "do_sample": False}
    found = judge.generate_until([request("generate_until", c, settings) for c in contexts], disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        ids = ids_of(context)
        for _ in range(5):
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == TOKENIZER.eos_token_id:
                break
            ids.append(token)
        assert text == TOKENIZER.decode(ids[len(ids_of(context)) :], skip_special_tokens=True), context
    stop = next(letter for text in found for letter in text[1:] if letter.isprintable())
    cut = judge.generate_until(
        [request("generate_until", c, {**settings, "until": [stop]}) for c in contexts], disable_tqdm=True
    )
    assert cut == [text.split(stop)[0] for text in found]


def test_a_saved_folder_is_the_same_model(model, judge, tmp_path):
    model.save_pretrained(tmp_path / "model")
    assert get_model("latentcot") is LatentCotLM
    loaded = LatentCotLM(str(tmp_path / "model"), tokenizer="bytes", max_length=24, batch_size=3)
    requests = [request("loglikelihood", *pair) for pair in PAIRS]
    assert loaded.loglikelihood(requests, disable_tqdm=True) == judge.loglikelihood(requests, disable_tqdm=True)
    with pytest.raises(ValueError, match=r"tokenizer: .* holds none"):
        LatentCotLM(tmp_path / "model")


def test_bad_input_is_named(model, tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        LatentCotLM(tmp_path, "bytes")
    with pytest.raises(ValueError, match="a model in memory has none"):
        LatentCotLM(model)
    with pytest.raises(TypeError, match="expected a HybridForCausalLM or a folder, got Linear"):
        LatentCotLM(torch.nn.Linear(2, 2), "bytes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length: expected an integer of at least 2"):
        LatentCotLM(model, "bytes", max_length=1)
    with pytest.raises(ValueError, match="it has 384 ids, the model knows 259"):
        LatentCotLM(model, ByT5Tokenizer())
