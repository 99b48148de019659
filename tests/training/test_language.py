"""Language-model data and loss: packing against documents alone, exact resume, the recipe, and what bad input gets."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import ByT5Tokenizer

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.reasoner import Phase, StepContext
from latentcot.training import TrainConfig, train
from latentcot.training.language import IGNORED, LanguageModel, TokenBatch, offsets, scores
from latentcot.training.packing import PackedText, TokenizedText, dataset_documents, read_documents, tokenize_corpus
from latentcot.training.recipe import RECIPES, recipe

TOKENIZER = ByT5Tokenizer(extra_ids=0)
DOCUMENTS = [f"document {i} " + "abcdefgh"[i % 8] * (5 + 7 * i % 23) for i in range(24)]
CONFIG = TrainConfig(steps=6, warmup_steps=2, checkpoint_every=2, log_every=1)


@pytest.fixture
def text(tmp_path) -> TokenizedText:
    return tokenize_corpus(tmp_path / "text", DOCUMENTS, TOKENIZER)


def make(**changes) -> LanguageModel:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        num_hidden_layers=2,
        period=2,
        attention={"num_heads": 2},
        gated_deltanet={"num_heads": 1, "head_dim": 8},
        intermediate_size=16,
        **changes,
    )
    return LanguageModel(HybridForCausalLM(config))


def context(world_size: int = 1) -> StepContext:
    return StepContext(0, 1, Phase("train"), torch.Generator(), world_size=world_size)


def test_the_file_holds_every_document_closed_by_the_end_token(text):
    assert len(text.starts) == len(DOCUMENTS)
    ends = [*text.starts[1:], len(text)]
    for start, end, document in zip(text.starts, ends, DOCUMENTS, strict=True):
        assert text.tokens[end - 1] == TOKENIZER.eos_token_id
        assert TOKENIZER.decode(text.tokens[start : end - 1].astype(int)) == document
    again = TokenizedText(text.folder)
    assert again.sha256 == text.sha256
    assert np.array_equal(again.tokens, text.tokens)


def test_rows_are_the_text_and_labels_the_next_tokens(text):
    plain = PackedText(text, 16, 4, resets=False).take(np.arange(5))
    assert torch.equal(plain.ids.flatten(), torch.from_numpy(text.tokens[:80].astype(np.int64)))
    assert torch.equal(plain.labels.flatten(), torch.from_numpy(text.tokens[1:81].astype(np.int64)))
    assert plain.resets is None
    packed = PackedText(text, 16, 4).take(np.arange(5))
    assert torch.equal(packed.ids, plain.ids)
    assert packed.resets is not None
    assert torch.equal(packed.resets.flatten().nonzero()[:, 0], torch.from_numpy(text.starts[text.starts < 80]))
    crossing = torch.isin(torch.arange(1, 81), torch.from_numpy(text.starts))
    assert torch.equal(packed.labels.flatten() == IGNORED, crossing)
    assert torch.equal(packed.labels[packed.labels != IGNORED], plain.labels[packed.labels != IGNORED])


def test_documents_in_a_row_are_as_if_alone(text):
    """The packed loss is the mean over pieces that the model saw by themselves."""
    model = make().double()
    batch = PackedText(text, 24, 12).batch(0)
    assert batch.resets is not None
    bounds = offsets(batch.resets).tolist()
    assert set(range(0, 289, 24)) <= set(bounds)
    assert len(bounds) > 16
    ids, labels = batch.ids.flatten(), batch.labels.flatten()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for start, end in itertools.pairwise(bounds):
        logits = model.backbone(input_ids=ids[None, start:end]).logits[0]
        kept = labels[start:end] != IGNORED
        total = total + F.cross_entropy(logits[kept], labels[start:end][kept], reduction="sum")
        count += int(kept.sum())
    output = model.loss(batch, context())
    torch.testing.assert_close(output.loss, total / count, rtol=1e-12, atol=0)
    nats, _, labelled = scores(model, batch)
    assert labelled == count
    assert nats == pytest.approx(float(total.detach()), rel=1e-12)


def test_loss_and_hits_of_rows_without_resets():
    model = make()
    ids = torch.randint(0, 250, (3, 9))
    labels = torch.randint(0, 250, (3, 9))
    labels[:, ::2] = IGNORED
    logits = model.backbone(input_ids=ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    batch = TokenBatch(ids, labels)
    torch.testing.assert_close(model.loss(batch, context()).loss, expected)
    _, right, count = scores(model, batch)
    assert count == 12
    assert right == int((logits.argmax(-1) == labels)[labels != IGNORED].sum())
    with pytest.raises(ValueError, match="no position to score"):
        model.loss(TokenBatch(ids, torch.full_like(ids, IGNORED)), context())


def test_every_epoch_is_every_row_once_in_an_order_of_its_own(text):
    data = PackedText(text, 16, 4, resets=False)
    first = torch.cat([data.batch(n).ids for n in range(2 * data.rows // 4 + 1)])[: 2 * data.rows]
    everything = {tuple(row) for row in data.take(np.arange(data.rows)).ids.tolist()}
    halves = [[tuple(row) for row in part.tolist()] for part in first.split(data.rows)]
    assert all(set(half) == everything for half in halves)
    assert halves[0] != halves[1]
    other = replace(data, seed=1)
    assert not torch.equal(other.batch(0).ids, data.batch(0).ids)
    assert torch.equal(replace(data).batch(7).ids, data.batch(7).ids)


def test_processes_share_a_batch(text):
    data = PackedText(text, 16, 6)
    whole = next(data.stream(3))
    shares = [next(data.stream(3, rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([s.ids for s in shares]), whole.ids)
    assert whole.resets is not None
    assert torch.equal(torch.cat([s.resets for s in shares if s.resets is not None]), whole.resets)
    with pytest.raises(ValueError, match="6 rows can not be dealt out evenly to 4 processes"):
        next(data.stream(0, 0, 4))


class Killed(PackedText):
    def stream(self, start, rank=0, world_size=1):
        for number, batch in enumerate(super().stream(start, rank, world_size), start):
            if number == 3:
                raise KeyboardInterrupt
            yield batch


def test_a_killed_run_reads_on_where_it_was(text, tmp_path):
    data = PackedText(text, 16, 4)
    whole = make()
    first = train(whole, data, CONFIG, tmp_path / "whole")  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        train(make(), Killed(text, 16, 4), CONFIG, tmp_path / "cut")  # type: ignore[arg-type]
    resumed = make()
    second = train(resumed, data, CONFIG, tmp_path / "cut")  # type: ignore[arg-type]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert first.history == second.history
    with pytest.raises(ValueError, match="another configuration"):
        train(make(), replace(data, seed=1), CONFIG, tmp_path / "cut")  # type: ignore[arg-type]


def test_the_loss_falls(text):
    report = train(make(initializer_range=0.1), PackedText(text, 32, 8), replace(CONFIG, steps=40, learning_rate=1e-2))  # type: ignore[arg-type]
    assert report.history[-1]["loss"] < 0.8 * report.history[0]["loss"]


def test_a_datasets_set_is_read_by_column(tmp_path):
    datasets = pytest.importorskip("datasets", reason="extra eval")
    path = tmp_path / "set"
    path.mkdir()
    datasets.Dataset.from_dict({"body": DOCUMENTS}).to_parquet(str(path / "train.parquet"))
    found = list(
        dataset_documents("parquet", column="body", data_files=str(path / "train.parquet"), cache_dir=str(tmp_path))
    )
    assert found == DOCUMENTS
    with pytest.raises(ValueError, match="column: the set has no 'text'; it has 'body'"):
        next(dataset_documents("parquet", data_files=str(path / "train.parquet"), cache_dir=str(tmp_path)))


def test_files_are_documents(tmp_path):
    one, two = tmp_path / "a.txt", tmp_path / "b.txt"
    one.write_text("first\n---\nsecond\n---\n \n")
    two.write_text("third")
    assert list(read_documents([one, two])) == ["first\n---\nsecond\n---\n \n", "third"]
    assert list(read_documents([one, two], "---\n")) == ["first\n", "second\n", "third"]
    with pytest.raises(ValueError, match="is not a file"):
        list(read_documents([tmp_path / "c.txt"]))
    two.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(read_documents([two]))


def test_bad_text_is_named_and_nothing_is_left(text, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        tokenize_corpus(text.folder, DOCUMENTS, TOKENIZER)
    with pytest.raises(ValueError, match="there is no text"):
        tokenize_corpus(tmp_path / "none", [], TOKENIZER)
    assert [p.name for p in tmp_path.iterdir()] == ["text"]
    with pytest.raises(ValueError, match="holds no tokenised text"):
        TokenizedText(tmp_path)
    with pytest.raises(ValueError, match=r"the text has \d+ rows of 64 tokens"):
        PackedText(text, 64, 4, last=10_000)
    with pytest.raises(ValueError, match="batch_size: expected an integer of at least 1"):
        PackedText(text, 64, 0)
    (text.folder / "tokens.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match="is damaged: 2 bytes"):
        TokenizedText(text.folder)


def test_the_recipes_are_the_papers():
    small, large = RECIPES["340M"], RECIPES["1.3B"]
    assert (small.tokens, large.tokens) == (20 * 10**9, 100 * 10**9)
    assert (small.batch_size, large.batch_size) == (12, 244)
    assert small.train.steps == pytest.approx(400_000, rel=0.03)
    assert large.train.steps == pytest.approx(100_000, rel=0.03)
    for each in (small.train, large.train):
        assert (each.learning_rate, each.warmup_steps, each.final_rate, each.eps) == (3e-4, 1024, 0.1, 1e-15)
        assert (each.weight_decay, each.grad_clip, each.betas, each.seed) == (0.1, 1.0, (0.9, 0.95), 42)
        assert each.mixed_precision == "bf16"
    assert small.skip_nonfinite
    assert large.skip_nonfinite
    assert recipe("340M") == small
    assert not recipe("340M", skip_nonfinite=False).skip_nonfinite


def test_a_scaled_recipe_counts_its_own_steps():
    tiny = recipe("340M", tokens=1_000_000, batch_tokens=4096, length=256, learning_rate=1e-3, mixed_precision="no")
    assert tiny.batch_size == 16
    assert tiny.train.steps == round(1_000_000 / 4096)
    assert tiny.train.warmup_steps == 24
    assert tiny.train.learning_rate == 1e-3
    assert recipe("340M", tokens=10**9, warmup_steps=5).train.warmup_steps == 5
    for call, message in (
        (lambda: recipe("340m"), "did you mean '340M'"),
        (lambda: recipe(steps=3), "steps: they follow from tokens"),
        (lambda: recipe(batch_tokens=100), "batch_tokens: 100 hold no sequence of length 4096"),
        (lambda: recipe(tokens=0), "tokens: expected a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
