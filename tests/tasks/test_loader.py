"""Batches made ahead: the same whatever makes them, resumable, with errors that surface."""

import threading

import pytest
import torch

from latentcot.tasks import BatchStream, make_task


def numbers(stream: BatchStream, count: int) -> list[list[int]]:
    return [next(stream).index.tolist() for _ in range(count)]


def test_batch_n_holds_its_own_examples():
    task = make_task("group")
    with BatchStream(task, "train", 4, prefetch=3) as stream:
        for n in range(6):
            assert stream.step == n
            batch, direct = next(stream), task.batch("train", range(4 * n, 4 * n + 4))
            assert torch.equal(batch.prompts.ids, direct.prompts.ids)
            assert torch.equal(batch.answer_ids, direct.answer_ids)


@pytest.mark.parametrize("epoch_size", [None, 10])
@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_resumed_stream_continues_exactly(epoch_size, prefetch):
    task = make_task("chain")
    with BatchStream(task, "train", 4, prefetch=prefetch, epoch_size=epoch_size, first_index=100) as whole:
        expected = numbers(whole, 9)
    with BatchStream(task, "train", 4, prefetch=0, epoch_size=epoch_size, first_index=100, start_step=5) as rest:
        assert numbers(rest, 4) == expected[5:]
    assert min(min(batch) for batch in expected) == 100


def test_every_epoch_holds_every_example_once_in_another_order():
    with BatchStream(make_task("group"), "train", 5, epoch_size=20, first_index=7) as stream:
        seen = [i for batch in numbers(stream, 12) for i in batch]
    epochs = [seen[20 * e : 20 * e + 20] for e in range(3)]
    assert all(sorted(epoch) == list(range(7, 27)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_worker_processes_make_the_same_batches_and_pass_on_errors():
    task = make_task("prosqa", nodes=12, min_difficulty=2, max_difficulty=4)
    with BatchStream(task, "val", 3, prefetch=2, workers=1) as ahead, BatchStream(task, "val", 3, prefetch=0) as direct:
        for _ in range(4):
            one, other = next(ahead), next(direct)
            assert torch.equal(one.prompts.ids, other.prompts.ids)
            assert torch.equal(one.prompts.mask, other.prompts.mask)
            assert torch.equal(one.steps, other.steps)
            assert torch.equal(one.difficulty, other.difficulty)
            assert one.prompts.limits == task.limits
    with pytest.raises(ValueError, match="the stream is closed"):
        next(ahead)


def test_an_error_surfaces_at_its_batch_and_closes_the_stream(monkeypatch):
    task = make_task("group")
    make = task.batch

    def failing(split, indices):
        if indices[0] >= 6:
            raise RuntimeError("no more data")
        return make(split, indices)

    monkeypatch.setattr(task, "batch", failing)
    stream = BatchStream(task, "train", 2, prefetch=4)
    assert numbers(stream, 3) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(RuntimeError, match="no more data"):
        next(stream)
    with pytest.raises(ValueError, match="the stream is closed"):
        next(stream)


def test_closing_ends_the_thread_and_may_be_repeated():
    before = threading.active_count()
    stream = BatchStream(make_task("group"), "train", 8)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    stream.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split: expected one of"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"start_step": -1}, "start_step: expected an integer >= 0, got -1"),
        ({"first_index": -1}, "first_index: expected an integer >= 0, got -1"),
        ({"epoch_size": 0}, "epoch_size: expected an integer >= 1, got 0"),
        ({"prefetch": 0, "workers": 2}, "prefetch: 2 workers need a prefetch of at least 1, got 0"),
    ],
    ids=["split", "batch", "step", "index", "epoch", "prefetch"],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BatchStream(make_task("group"), **{"split": "train", "batch_size": 4, **options})
