r"""What every procedural task shares: examples by number, splits by object, batches, scoring.

Example ``i`` of split ``s`` depends on (task, configuration, s, i) alone. It is the first attempt ``a = 0, 1, ...``
of the counter (task, configuration, s, i, a) whose object belongs to split ``s``; an *object* is what the example is
about, up to whatever does not change the problem (:meth:`Task.canonical`), and a keyed hash of it decides its split.
The splits are therefore disjoint as sets of objects, and the membership depends on the data seed but not on the
difficulties asked for: a training configuration up to 9 and an evaluation configuration up to 16 agree about every
object.

Shape letters: ``n`` rows, ``P`` prompt tokens, ``T`` steps, ``M`` tokens a step, ``A`` answer tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentcot.reasoner import SPECIAL, PromptBatch, TaskBatch, TaskLimits
from latentcot.tasks.baselines import Baselines, measure_baselines, most_frequent_answer
from latentcot.tasks.counter import Draws, Integers, Words, digest64, sequence_hash
from latentcot.tasks.vocabulary import Vocabulary

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_SHARES = {"train": 8, "val": 1, "test": 1}  # tenths of all objects
_EDGES = np.array([(2**64 * tenths) // 10 for tenths in (8, 9)], dtype=np.uint64)
# Part of every key; to be raised when the meaning of a draw changes. The first value for which the smallest level of
# the default task (the 36 products of two elements of S3) has several objects in every split under data seed 0.
_SCHEME = 2
_ROWS_AT_ONCE = 4096

Latents = dict[str, NDArray[Any]]


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ``TypeError`` / ``ValueError`` naming the argument unless ``value`` is an integer in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {value!r} of type {type(value).__name__}")
    if value < low or (high is not None and value > high):
        wanted = f">= {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name}: expected an integer {wanted}, got {value}")


class NoSuchObject(ValueError):
    """A split holds no object of the difficulty asked for."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Options of every task.

    Args:
        data_seed: seeds the data and the splits; the training seed never touches either.
        min_difficulty, max_difficulty: range of the task's one integer d, both ends included.
    """

    data_seed: int = 0
    min_difficulty: int = 1
    max_difficulty: int = 8

    def __post_init__(self) -> None:
        check_integer("data_seed", self.data_seed, 0, 2**63 - 1)
        check_integer("min_difficulty", self.min_difficulty, 1)
        check_integer("max_difficulty", self.max_difficulty, self.min_difficulty, 4096)


@dataclass(frozen=True)
class Example:
    """One problem: the prompt (from ``<bos>`` on; a method appends ``<ans>`` or whatever it thinks with), the gold
    steps in order, the gold answer, and where it came from."""

    prompt_ids: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    answer_ids: tuple[int, ...]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """Token arrays of ``n`` examples, right-padded: ``prompt [n, P]``, ``steps [n, T, M]``, ``answer [n, A]``; a
    negative entry is padding."""

    prompt: Integers
    steps: Integers
    answer: Integers


def left_align(tokens: Integers) -> Integers:
    """Move the entries ``>= 0`` of each row of ``tokens [n, c]`` to the front, in order; the rest becomes ``-1``."""
    order = np.argsort(tokens < 0, axis=1, kind="stable")
    return np.take_along_axis(tokens, order, axis=1)


class Task(ABC):
    """A family of problems. Sub-classes set ``name`` and ``config_type`` and say how objects are drawn, written and
    solved.

    Args:
        config: the task's frozen options; ``None`` = all defaults.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[TaskConfig]]
    attempts: ClassVar[int] = 1000
    """Objects of the wanted difficulty that are tried for one example before giving up."""
    layout_options: ClassVar[tuple[str, ...]] = ()
    """Options that change how an example is written, and not which examples there are."""
    draws_per_attempt: ClassVar[int] = 1
    """How many raw draws an attempt may take on average; above 1 where a draw has a difficulty of its own."""

    draws_together: ClassVar[int] = 1
    """How many draws of one training example are looked at in one go; a matter of speed alone."""

    def __init__(self, config: TaskConfig | None = None):
        config = self.config_type() if config is None else config
        if not isinstance(config, self.config_type):
            raise TypeError(f"config: {self.name} takes a {self.config_type.__name__}, got {type(config).__name__}")
        self.config = config
        self.vocabulary = self._make_vocabulary()
        self.limits = self._make_limits()
        self._membership_key = digest64(_SCHEME, "membership", self.domain, self.config.data_seed)

    def __repr__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self.config, f.name)!r}" for f in fields(self.config))
        return f"{type(self).__name__}({options})"

    # -- what a task defines -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def domain(self) -> str:
        """Names the set of objects; tasks of one domain put an object into the same split."""

    @abstractmethod
    def _make_vocabulary(self) -> Vocabulary: ...

    @abstractmethod
    def _make_limits(self) -> TaskLimits: ...

    @abstractmethod
    def _draw(self, draws: Draws, lowest: int, highest: int) -> Latents:
        """Arrays with ``len(draws)`` rows that describe one object a row, with difficulties in ``[lowest, highest]``.

        ``"difficulty" [n]`` is required; ``"valid" [n]`` marks draws that are of use (default: all). Array shapes
        depend on the configuration alone.
        """

    @abstractmethod
    def _canonical_words(self, latents: Latents) -> tuple[Words, Integers]:
        """The canonical form of each object as ``(words [n, c], lengths [n])``."""

    @abstractmethod
    def _write(self, latents: Latents) -> Rows:
        """Token arrays of the objects."""

    @abstractmethod
    def oracle(self, example: Example) -> tuple[int, ...]:
        """The right answer, worked out from ``prompt_ids`` alone by another way than the generator's."""

    @abstractmethod
    def canonical(self, example: Example) -> tuple[int, ...]:
        """What the example is about, from ``prompt_ids`` alone: equal for examples that are the same problem."""

    @abstractmethod
    def guesses(self, batch: TaskBatch) -> dict[str, Tensor]:
        """Answers ``[B, A]`` of the task's shortcuts, by name."""

    @abstractmethod
    def chance(self, batch: TaskBatch) -> Tensor:
        """Probability ``[B]`` that a uniformly random admissible answer is right."""

    def majority(self, seen: TaskBatch, batch: TaskBatch) -> Tensor:
        """The most frequent answer of the training examples ``seen`` as the answer ``[B, A]`` to every row of
        ``batch``."""
        return most_frequent_answer(seen, batch)

    # -- examples ----------------------------------------------------------------------------------------------

    def example(self, split: Split, index: int) -> Example:
        """Example number ``index`` of ``split``."""
        return self._examples(split, [index], None)[0]

    def difficulty_example(self, split: Split, difficulty: int, index: int) -> Example:
        """Example number ``index`` of ``split`` among those of one difficulty (see :meth:`difficulty_batch`)."""
        return self._examples(split, [index], difficulty)[0]

    def batch(self, split: Split, indices: Sequence[int] | Tensor | NDArray[np.int64]) -> TaskBatch:
        """Examples ``indices`` of ``split``, right-padded to the longest of them."""
        return self._batch(split, indices, None)

    def difficulty_batch(
        self, split: Split, difficulty: int, indices: Sequence[int] | Tensor | NDArray[np.int64]
    ) -> TaskBatch:
        """As :meth:`batch` with the difficulty pinned, for accuracy by d.

        A series of its own: it depends on ``difficulty`` but not on the configured range, so every configuration that
        admits d sees the same examples.
        """
        return self._batch(split, indices, difficulty)

    def iterate(self, split: Split, start: int = 0, stop: int | None = None) -> Iterator[Example]:
        """Examples ``start, start + 1, ...`` of ``split``, without end when ``stop`` is ``None``."""
        while stop is None or start < stop:
            upper = start + 256 if stop is None else min(start + 256, stop)
            yield from self._examples(split, range(start, upper), None)
            start = upper

    def __iter__(self) -> Iterator[Example]:
        return self.iterate("train")

    # -- scoring -----------------------------------------------------------------------------------------------

    def verify(self, example: Example, output_ids: Sequence[int] | Tensor) -> bool:
        """Is ``output_ids`` the answer? What follows the first ``<eos>`` or ``<pad>`` does not count."""
        given: list[int] = []
        for token in output_ids.tolist() if isinstance(output_ids, Tensor) else output_ids:
            if token in (SPECIAL.eos, SPECIAL.pad):
                break
            given.append(int(token))
        return tuple(given) == example.answer_ids

    def score(self, batch: TaskBatch, ids: Tensor) -> Tensor:
        """:meth:`verify` of every row: ``ids [B, any width]`` -> bool ``[B]``."""
        if ids.ndim != 2 or ids.shape[0] != len(batch):
            raise ValueError(f"ids: expected shape [{len(batch)}, A], got {list(ids.shape)}")
        width = batch.answer_ids.shape[1] + 1
        given = torch.nn.functional.pad(ids[:, :width], (0, max(0, width - ids.shape[1])), value=SPECIAL.pad)
        ended = ((given == SPECIAL.eos) | (given == SPECIAL.pad)).cumsum(1) > 0
        given = given.masked_fill(ended, SPECIAL.pad)
        wanted = batch.answer_ids.masked_fill(~batch.answer_mask, SPECIAL.pad)
        wanted = torch.nn.functional.pad(wanted, (0, 1), value=SPECIAL.pad).to(given.device)
        return (given == wanted).all(1)

    def split_of(self, example: Example) -> Split:
        """The split that the example's object belongs to."""
        words = np.array([self.canonical(example)], dtype=np.uint64)
        return SPLITS[int(self._membership(words, np.array([words.shape[1]]))[0])]

    def baselines(self, split: Split, n: int = 1000) -> Baselines:
        """Accuracies of answers that take no reasoning, on the first ``n`` examples of ``split``; see
        :class:`Baselines`."""
        return measure_baselines(self, split, n, None)

    def baselines_by_difficulty(self, split: Split, n: int = 1000) -> dict[int, Baselines]:
        """:meth:`baselines` on ``n`` examples of each of :meth:`levels`."""
        return {d: measure_baselines(self, split, n, d) for d in self.levels(split)}

    def levels(self, split: Split) -> tuple[int, ...]:
        """The configured difficulties that ``split`` has examples of: a small level may have no object in a split."""
        self._check_request(split, [0], None)
        difficulties = range(self.config.min_difficulty, self.config.max_difficulty + 1)
        return tuple(d for d in difficulties if self._has(split, d))

    def _has(self, split: Split, difficulty: int) -> bool:
        try:
            self._objects(split, np.zeros(1, dtype=np.int64), difficulty)
        except NoSuchObject:
            return False
        return True

    # -- how it is done ----------------------------------------------------------------------------------------

    def _series_key(self, split: Split, difficulty: int | None) -> int:
        options = {name: value for name, value in asdict(self.config).items() if name not in self.layout_options}
        if difficulty is not None:
            options |= {"min_difficulty": difficulty, "max_difficulty": difficulty}
        return digest64(_SCHEME, "series", self.name, options, split, difficulty is None)

    def _membership(self, words: Words, lengths: Integers) -> Integers:
        hashes = sequence_hash(self._membership_key, words, lengths)
        return np.searchsorted(_EDGES, hashes, side="right")

    def _check_request(self, split: Any, indices: Any, difficulty: Any) -> Integers:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(map(repr, SPLITS))}, got {split!r}")
        if difficulty is not None:
            check_integer("difficulty", difficulty, self.config.min_difficulty, self.config.max_difficulty)
        if isinstance(indices, Tensor):
            indices = indices.cpu().numpy()
        numbers = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
        if numbers.ndim != 1 or numbers.size == 0 or not np.issubdtype(numbers.dtype, np.integer):
            got = f"{numbers.dtype} of shape {numbers.shape}"
            raise ValueError(f"indices: expected a non-empty list of integers, got {got}")
        if numbers.min() < 0:
            raise ValueError(f"indices: example numbers start at 0, got {numbers.min()}")
        return numbers.astype(np.int64)

    def _objects(self, split: Split, index: Integers, difficulty: int | None) -> Latents:
        """The accepted draw of each example, found for all examples at once."""
        lowest = self.config.min_difficulty if difficulty is None else difficulty
        highest = self.config.max_difficulty if difficulty is None else difficulty
        key = self._series_key(split, difficulty)
        wanted = SPLITS.index(split)
        found: Latents = {}
        pending = np.arange(len(index))
        first, limit = 0, self.attempts * self.draws_per_attempt
        # How many draws of a row are looked at together changes no result, only how often the loop runs.
        together = self.draws_together * (1 if split == "train" else 8)
        while len(pending) and first < limit:
            together = int(min(together, limit - first, max(1, _ROWS_AT_ONCE // len(pending))))
            attempt = np.tile(np.arange(first, first + together), len(pending))
            latents = self._draw(Draws(key, np.repeat(index[pending], together), attempt), lowest, highest)
            fits = latents.get("valid", np.ones(len(attempt), dtype=bool)).copy()
            rows = np.flatnonzero(fits)
            if len(rows):
                words, lengths = self._canonical_words({name: array[rows] for name, array in latents.items()})
                fits[rows] = self._membership(words, lengths) == wanted
            fits = fits.reshape(len(pending), together)
            done, chosen = fits.any(axis=1), fits.argmax(axis=1)
            rows = np.flatnonzero(done) * together + chosen[done]
            for name, array in latents.items():
                if name not in found:
                    found[name] = np.zeros((len(index), *array.shape[1:]), dtype=array.dtype)
                found[name][pending[done]] = array[rows]
            pending = pending[~done]
            first += together
            together *= 2
        if len(pending):
            raise NoSuchObject(self._nothing_found(split, int(index[pending[0]]), lowest, highest, limit))
        return found

    def _nothing_found(self, split: str, index: int, lowest: int, highest: int, limit: int) -> str:
        level = f"difficulty {lowest}" if lowest == highest else f"difficulties {lowest} to {highest}"
        return (
            f"split: no object of {level} in split {split!r} of {self!r} after {limit} attempts (example {index}); "
            f"{split!r} holds {_SHARES[split]} in 10 of all objects, so a level of few or rare ones may have none: "
            "choose another difficulty or data_seed (levels() lists what there is)"
        )

    def _rows(self, split: Split, indices: Any, difficulty: int | None) -> tuple[Rows, Latents, Integers]:
        index = self._check_request(split, indices, difficulty)
        latents = self._objects(split, index, difficulty)
        return self._write(latents), latents, index

    def _batch(self, split: Split, indices: Any, difficulty: int | None) -> TaskBatch:
        rows, latents, index = self._rows(split, indices, difficulty)
        prompt, prompt_mask = _padded(rows.prompt)
        answer, answer_mask = _padded(rows.answer)
        steps, step_mask = _padded(rows.steps)
        longest = int(step_mask.any(-1).sum(-1).max()) if steps.shape[1] else 0
        return TaskBatch(
            prompts=PromptBatch(prompt, prompt_mask, self.limits),
            steps=steps[:, :longest].contiguous(),
            step_mask=step_mask[:, :longest].contiguous(),
            answer_ids=answer,
            answer_mask=answer_mask,
            difficulty=torch.from_numpy(latents["difficulty"].astype(np.int64)),
            index=torch.from_numpy(index),
        )

    def _examples(self, split: Split, indices: Any, difficulty: int | None) -> list[Example]:
        rows, latents, index = self._rows(split, indices, difficulty)
        out = []
        for row, (number, d) in enumerate(zip(index.tolist(), latents["difficulty"].tolist(), strict=True)):
            steps = [tuple(t for t in step if t >= 0) for step in rows.steps[row].tolist()]
            out.append(
                Example(
                    prompt_ids=tuple(t for t in rows.prompt[row].tolist() if t >= 0),
                    steps=tuple(step for step in steps if step),
                    answer_ids=tuple(t for t in rows.answer[row].tolist() if t >= 0),
                    meta={"task": self.name, "split": split, "index": number, "difficulty": d},
                )
            )
        return out


def _padded(tokens: Integers) -> tuple[Tensor, Tensor]:
    """Ids with pad for negative entries, and the mask of real tokens; the last axis is cut to the longest row."""
    mask = tokens >= 0
    used = np.flatnonzero(mask.reshape(-1, mask.shape[-1]).any(axis=0))
    width = int(used[-1]) + 1 if len(used) else tokens.shape[-1]
    ids = np.where(mask, tokens, SPECIAL.pad)[..., :width]
    return torch.from_numpy(np.ascontiguousarray(ids)), torch.from_numpy(np.ascontiguousarray(mask[..., :width]))
