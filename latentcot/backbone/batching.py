r"""Continuous batching: many prompts of unequal lengths through a few slots.

A slot is a row of a :class:`~latentcot.backbone.engine.DecodeEngine`. A row that has ended leaves at once and the next prompt enters
its slot, so no row waits for the longest one and nothing is padded. Prompts are read one at a time, ``prefill_chunk`` tokens between
two decoding steps: a long prompt holds the running rows up by one chunk, not by all of it. Rows do not see each other, so every prompt
gets the tokens it would get alone (greedy; draws come from one generator, in the order in which they happen).

::

    answers = generate_many(model, prompts, slots=8, max_new_tokens=200)
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from latentcot.backbone.engine import DecodeEngine
from latentcot.backbone.generation import GREEDY, Sampling, prefill
from latentcot.backbone.model import HybridForCausalLM
from latentcot.backbone.state import ModelState

Prompt = Sequence[int] | Tensor


@dataclass
class _Request:
    ticket: int
    prompt: Tensor  # [1, S]
    most: int
    read: int = 0  # tokens of the prompt read so far
    state: ModelState | None = None
    ids: list[int] = field(default_factory=list)


class ContinuousBatcher:
    """Takes prompts at any time and hands out finished ones.

    ::

        batcher = ContinuousBatcher(model, slots=8, max_length=4096)
        tickets = [batcher.submit(prompt, max_new_tokens=200) for prompt in prompts]
        for ticket, ids in batcher.run():   # in the order in which they end
            ...

    Args:
        model: in the dtype and on the device to decode with.
        slots: prompts decoded at once.
        max_length: tokens of the longest prompt with its answer.
        eos_token_id: ends a row (it is part of the answer); ``None`` = only the number of tokens does.
        prefill_chunk: tokens of a prompt read between two decoding steps.
        sampling, seed, cuda_graph: see :class:`~latentcot.backbone.engine.DecodeEngine`.

    Raises:
        TypeError, ValueError: not a hybrid model, sizes below 1.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        slots: int,
        max_length: int,
        *,
        eos_token_id: int | None = None,
        prefill_chunk: int = 512,
        sampling: Sampling = GREEDY,
        seed: int | None = None,
        cuda_graph: bool = True,
    ):
        for name, value in (("slots", slots), ("prefill_chunk", prefill_chunk)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        self.model, self.max_length = model, max_length
        self.eos_token_id, self.prefill_chunk = eos_token_id, prefill_chunk
        self.engine = DecodeEngine(model, slots, max_length, cuda_graph=cuda_graph, sampling=sampling, seed=seed)
        self.passes = 0  # decoding steps so far
        self._slots: list[_Request | None] = [None] * slots
        self._waiting: deque[_Request] = deque()
        self._tickets = 0

    def submit(self, prompt: Prompt, max_new_tokens: int) -> int:
        """Queue a prompt; returns its ticket, a number that rises.

        Args:
            prompt: token ids, a sequence or a tensor ``[S]``.
            max_new_tokens: the most tokens of its answer.

        Raises:
            ValueError, TypeError: an empty prompt, ids outside the vocabulary, more tokens than ``max_length``.
        """
        ids = prompt if isinstance(prompt, Tensor) else torch.tensor(list(prompt))
        if ids.dim() != 1 or not len(ids):
            raise ValueError(f"prompt: shape {list(ids.shape)} given, expected at least one token id, [S]")
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"prompt: {ids.dtype} given, expected integer token ids")
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= self.model.config.vocab_size:
            raise ValueError(f"prompt: ids within {low}..{high} given, expected 0..{self.model.config.vocab_size - 1}")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected a positive integer, got {max_new_tokens!r}")
        if len(ids) + max_new_tokens > self.max_length:
            raise ValueError(
                f"prompt, max_new_tokens: {len(ids)} + {max_new_tokens} tokens given, but the batcher was made for {self.max_length}"
            )
        request = _Request(self._tickets, ids.long()[None].to(self.engine.device), max_new_tokens)
        self._waiting.append(request)
        self._tickets += 1
        return request.ticket

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting or running."""
        return not self._waiting and not any(self._slots)

    def advance(self) -> list[tuple[int, list[int]]]:
        """Read one chunk of the next prompt if a slot is free, decode one token of every running row; returns what ended."""
        finished = self._read_on()
        rows = [row for row, request in enumerate(self._slots) if request is not None]
        if rows:
            chosen = self.engine.step().tolist()
            self.passes += 1
            for row in rows:
                finished += self._took(row, chosen[row])
        return finished

    def run(self) -> Iterator[tuple[int, list[int]]]:
        """Until nothing is left: tickets and answers, in the order in which they end."""
        while not self.idle:
            yield from self.advance()

    def _read_on(self) -> list[tuple[int, list[int]]]:
        if not self._waiting or None not in self._slots:
            return []
        request = self._waiting[0]
        part = request.prompt[:, request.read : request.read + self.prefill_chunk]
        logits, request.state = prefill(self.model, part, state=request.state)
        request.read += part.shape[1]
        if request.read < request.prompt.shape[1]:
            return []
        self._waiting.popleft()
        row = self._slots.index(None)
        self._slots[row] = request
        first = self.engine.load(request.state, logits, rows=[row])
        request.state = None
        return self._took(row, int(first[0]))

    def _took(self, row: int, token: int) -> list[tuple[int, list[int]]]:
        """A token for a row; what ended by it."""
        request = self._slots[row]
        assert request is not None
        request.ids.append(token)
        if token != self.eos_token_id and len(request.ids) < request.most:
            return []
        self._slots[row] = None
        self.engine.stop([row])
        return [(request.ticket, request.ids)]


def generate_many(
    model: HybridForCausalLM,
    prompts: Sequence[Prompt],
    slots: int = 8,
    max_new_tokens: int | Sequence[int] = 128,
    *,
    eos_token_id: int | None = None,
    prefill_chunk: int = 512,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
    cuda_graph: bool = True,
    progress: bool | None = None,
    console: Console | None = None,
) -> list[list[int]]:
    """Answers to prompts of any lengths, in their order; see :class:`ContinuousBatcher`.

    Args:
        prompts: token ids of each.
        max_new_tokens: the most tokens of an answer, one number or one a prompt.
        progress: show a bar of finished prompts on the console; ``None`` = on a terminal.
        console: where; standard error unless given.

    Raises:
        ValueError, TypeError: as :meth:`ContinuousBatcher.submit`; nothing has been decoded then.
    """
    many = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(many) != len(prompts):
        raise ValueError(f"max_new_tokens: {len(many)} numbers given for {len(prompts)} prompts")
    if not prompts:
        return []
    longest = max(len(prompt) + most for prompt, most in zip(prompts, many, strict=True))
    batcher = ContinuousBatcher(
        model,
        min(slots, len(prompts)),
        max(1, longest),
        eos_token_id=eos_token_id,
        prefill_chunk=prefill_chunk,
        sampling=sampling,
        seed=seed,
        cuda_graph=cuda_graph,
    )
    for prompt, most in zip(prompts, many, strict=True):
        batcher.submit(prompt, most)
    answers: list[list[int]] = [[] for _ in prompts]
    console = console or Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("prompts, {task.fields[tokens]} tokens"),
        TimeRemainingColumn(),
        console=console,
        disable=not (console.is_terminal if progress is None else progress),
    ) as bar:
        task, tokens = bar.add_task("generate", total=len(prompts), tokens=0), 0
        for ticket, ids in batcher.run():
            answers[ticket], tokens = ids, tokens + len(ids)
            bar.update(task, advance=1, tokens=tokens)
    return answers
