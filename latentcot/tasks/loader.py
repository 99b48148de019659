"""Batches made ahead of the training step that uses them."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from latentcot.reasoner import PromptBatch, TaskBatch
from latentcot.tasks.base import SPLITS, Split, Task, TaskConfig, check_integer
from latentcot.tasks.counter import Draws, Integers, digest64

Arrays = dict[str, NDArray[Any]]


class BatchStream:
    """Endless iterator over batches of a split; batch number ``n`` depends on ``n`` alone.

    Without ``epoch_size``, batch n holds examples ``first_index + n * batch_size, ...`` and no number comes twice. With
    it, the examples ``first_index, ..., first_index + epoch_size - 1`` are gone through again and again, each time in
    another order fixed by the number of the epoch; a batch may reach over the end of an epoch.

    Use it as a context manager, or call :meth:`close`. An error while a batch is made is raised by the ``next`` that
    asks for that batch, and closes the stream.

    Args:
        task: where examples come from.
        split: ``"train"``, ``"val"`` or ``"test"``.
        batch_size: examples a batch.
        start_step: number of the first batch; a run resumed at step n gets what the first run got there.
        first_index: number of the first example. Runs that shall see other data get other ranges.
        prefetch: batches made ahead; 0 makes each when it is asked for.
        workers: 0 = one background thread (right where a batch takes a few milliseconds), otherwise so many processes.
        epoch_size: size of a finite training set; ``None`` = never repeat.
    """

    def __init__(
        self,
        task: Task,
        split: Split,
        batch_size: int,
        *,
        start_step: int = 0,
        first_index: int = 0,
        prefetch: int = 8,
        workers: int = 0,
        epoch_size: int | None = None,
    ):
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(map(repr, SPLITS))}, got {split!r}")
        check_integer("batch_size", batch_size, 1)
        check_integer("start_step", start_step, 0)
        check_integer("first_index", first_index, 0)
        check_integer("prefetch", prefetch, 0)
        check_integer("workers", workers, 0)
        if epoch_size is not None:
            check_integer("epoch_size", epoch_size, 1)
        if workers and not prefetch:
            raise ValueError(f"prefetch: {workers} workers need a prefetch of at least 1, got 0")
        self.task, self.batch_size = task, batch_size
        self.split: Split = split
        self.first_index, self.epoch_size, self.prefetch = first_index, epoch_size, prefetch
        self._next = start_step
        self._asked = start_step
        self._orders: dict[int, Integers] = {}
        self._waiting: deque[Future[TaskBatch] | Future[Arrays]] = deque()
        self._closed = False
        self._executor: ThreadPoolExecutor | ProcessPoolExecutor | None = None
        if workers:
            # Processes start afresh: a fork would copy the locks of the threads that torch runs.
            context = get_context("spawn")
            self._executor = ProcessPoolExecutor(workers, context, _adopt, (type(task), task.config))
        elif prefetch:
            self._executor = ThreadPoolExecutor(1, "batches")
        self._fill()

    @property
    def step(self) -> int:
        """Number of the batch that ``next`` returns next."""
        return self._next

    def indices(self, step: int) -> Integers:
        """Example numbers of batch ``step``."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        if self.epoch_size is None:
            return self.first_index + places
        epochs, within = np.divmod(places, self.epoch_size)
        shuffled = [self._order(int(e))[w] for e, w in zip(epochs, within, strict=True)]
        return self.first_index + np.array(shuffled, dtype=np.int64)

    def _order(self, epoch: int) -> Integers:
        if epoch not in self._orders:
            assert self.epoch_size is not None
            key = digest64("epoch", self.first_index, self.epoch_size)
            draws = Draws(key, np.array([epoch]), np.zeros(1, dtype=np.int64))
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = draws.permutation(self.epoch_size)[0]
        return self._orders[epoch]

    def __iter__(self) -> Iterator[TaskBatch]:
        return self

    def __next__(self) -> TaskBatch:
        if self._closed:
            raise ValueError("BatchStream: the stream is closed")
        try:
            if self._executor is None:
                made: TaskBatch | Arrays = self.task.batch(self.split, self.indices(self._next))
            else:
                self._fill()
                made = self._waiting.popleft().result()
        except BaseException:
            self.close()
            raise
        self._next += 1
        return made if isinstance(made, TaskBatch) else _unpack(made, self.task)

    def _fill(self) -> None:
        """Ask for the next batch and ``prefetch`` more."""
        if self._executor is None:
            return
        while len(self._waiting) <= self.prefetch:
            indices = self.indices(self._asked)
            if isinstance(self._executor, ThreadPoolExecutor):
                self._waiting.append(self._executor.submit(self.task.batch, self.split, indices))
            else:
                self._waiting.append(self._executor.submit(_make, self.split, indices))
            self._asked += 1

    def close(self) -> None:
        """Stop making batches and wait for the thread or the processes to end. Closing twice is fine."""
        self._closed = True
        for future in self._waiting:
            future.cancel()
        self._waiting.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


_adopted: Task | None = None  # the task of this worker process


def _adopt(kind: type[Task], config: TaskConfig) -> None:
    global _adopted
    _adopted = kind(config)


def _make(split: Split, indices: Integers) -> Arrays:
    """One batch as plain arrays: tensors would travel through shared-memory handles, one each."""
    assert _adopted is not None
    batch = _adopted.batch(split, indices)
    arrays = {f.name: getattr(batch, f.name).numpy() for f in fields(batch) if f.name != "prompts"}
    return {**arrays, "ids": batch.prompts.ids.numpy(), "mask": batch.prompts.mask.numpy()}


def _unpack(arrays: Arrays, task: Task) -> TaskBatch:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    prompts = PromptBatch(tensors.pop("ids"), tensors.pop("mask"), task.limits)
    return TaskBatch(prompts=prompts, **tensors)
