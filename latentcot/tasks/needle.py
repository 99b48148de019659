r"""Needles in a haystack, with token ids instead of essays: recall over distance, and counting (after RULER, arXiv 2404.06654).

The context is ``block``·d tokens long, d the difficulty. Needle kinds put statements ``key = value ;`` of four tokens on a grid of
four-token slots and fill what is free with random noise words; the first statement stands at one of 40 depths, drawn uniformly (or
fixed by ``depth``), the others in slots drawn without replacement.

=================== ========================================= ===========================================
kind                context                                   question and answer
=================== ========================================= ===========================================
single              one statement                             ``? key``: its value
multi_key           statements with ``needles`` other keys    the same
multi_value         ``needles`` statements of one key         all values, in the order they stand
multi_query         ``needles`` keys, all asked               ``? key key ...``: values, in the order asked
variable_tracking   ``x1 = v ; x2 = x1 ; ...``                ``? v``: the names, in the order of the chain
common_words        10 words often, the others 3 times each   ``?``: the 10, in the order of their ids
frequent_words      words with p ~ rank^(-2)                  ``?``: the 3 most frequent, in that order
=================== ========================================= ===========================================

All expected tokens are needed, in the order given. Two examples are the same problem when they hold the same statements (words: the
same answer), wherever they stand.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from latentcot.reasoner import SPECIAL, TaskBatch, TaskLimits
from latentcot.tasks.base import Example, Latents, Rows, Task, TaskConfig, check_integer
from latentcot.tasks.counter import Draws, Integers, Words, scale_words
from latentcot.tasks.mqar import first_distinct
from latentcot.tasks.vocabulary import Vocabulary

Kind = Literal[
    "single", "multi_key", "multi_value", "multi_query", "variable_tracking", "common_words", "frequent_words"
]
DEPTHS = 40
_SLOT = 4  # tokens of a statement
_COMMON, _RARE_COUNT = 10, 3
_TOP, _ALPHA = 3, 2.0
_ABSENT = 2**40


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(TaskConfig):
    """Options of :class:`NeedleTask`; the difficulty is the length of the context in blocks.

    Args:
        kind: see the module.
        block: tokens of a block, a multiple of four.
        needles: how many statements beside the asked one (multi_key), of one key (multi_value), asked (multi_query), or links of the
            chain after the first (variable_tracking); ignored by the others.
        symbols: keys, values and noise words there are, each; words of the counting kinds.
        depth: where the first statement stands, from 0 (beginning) to 39; ``None`` = drawn.
    """

    kind: Kind = "single"
    min_difficulty: int = 2
    max_difficulty: int = 4
    block: int = 32
    needles: int = 4
    symbols: int = 256
    depth: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        check_integer("block", self.block, _SLOT, 2**16)
        if self.block % _SLOT:
            raise ValueError(f"block: expected a multiple of {_SLOT}, got {self.block}")
        check_integer("needles", self.needles, 1, 1000)
        check_integer("symbols", self.symbols, 2 * _COMMON, 2**16)
        if self.depth is not None:
            check_integer("depth", self.depth, 0, DEPTHS - 1)
        if self.statements > self.symbols // 2:
            raise ValueError(
                f"symbols: {self.symbols} are too few for {self.statements} statements with keys of their own"
            )
        shortest = self.min_difficulty * self.block
        words = {"common_words": 4 * _COMMON * _RARE_COUNT, "frequent_words": 2 * _COMMON * _RARE_COUNT}
        needed = words.get(self.kind, _SLOT * self.statements)  # common words: at least twice as often as the others
        if shortest < needed:
            raise ValueError(
                f"min_difficulty: contexts of {shortest} tokens are too short for kind {self.kind!r}, which needs {needed}"
            )
        if (
            self.kind == "common_words"
            and (self.max_difficulty * self.block) // 2 // _RARE_COUNT > self.symbols - _COMMON
        ):
            raise ValueError(
                f"symbols: {self.symbols} words do not fill contexts of {self.max_difficulty * self.block} tokens"
            )

    @property
    def counting(self) -> bool:
        """Is it a task about how often words occur?"""
        return self.kind in ("common_words", "frequent_words")

    @property
    def statements(self) -> int:
        """Statements in a context."""
        if self.counting:
            return 0
        return {"single": 1, "multi_value": self.needles, "multi_query": self.needles}.get(self.kind, 1 + self.needles)

    @property
    def answers(self) -> int:
        """Tokens of an answer."""
        fixed = {"single": 1, "multi_key": 1, "common_words": _COMMON, "frequent_words": _TOP}
        return fixed.get(self.kind, self.statements)


class NeedleTask(Task):
    """Needles in a haystack; see the module for kinds and layouts."""

    name = "needle"
    config_type = NeedleConfig
    config: NeedleConfig
    draws_per_attempt = 20  # frequent words must have a clear order, which not every draw has

    @property
    def domain(self) -> str:
        return f"needle/{self.config.kind}/{self.config.symbols}"

    def _make_vocabulary(self) -> Vocabulary:
        count = self.config.symbols
        self._equals, self._end, self._ask = (SPECIAL.count + i for i in range(3))
        self._noise = SPECIAL.count + 3
        self._key, self._value = self._noise + count, self._noise + 2 * count
        kinds = (f"{letter}{i}" for letter in ("w", "k", "v") for i in range(count))
        return Vocabulary(("=", ";", "?", *kinds))

    def _make_limits(self) -> TaskLimits:
        c = self.config
        asked = c.needles if c.kind == "multi_query" else 0 if c.counting else 1
        return TaskLimits(
            vocab_size=len(self.vocabulary),
            prompt_tokens=1 + c.block * c.max_difficulty + 1 + asked,
            steps=0,
            step_tokens=1,
            answer_tokens=c.answers,
        )

    # Latents: ``context`` [B, S] of token ids (-1 behind the end), ``asked`` [B, Q], ``answer`` [B, A], ``object`` [B, W].

    def _draw(self, draws: Draws, lowest: int, highest: int) -> Latents:
        d = lowest + draws.integers(1, highest - lowest + 1)[:, 0]
        tokens = self.config.block * d
        made = self._words(draws, tokens) if self.config.counting else self._needles(draws, tokens)
        width = made["context"].shape[1]
        made["context"] = np.where(np.arange(width) < tokens[:, None], made["context"], -1)
        return {"difficulty": d, **made}

    def _needles(self, draws: Draws, tokens: Integers) -> Latents:
        c, n = self.config, self.config.statements
        rows = np.full(len(draws), n)
        key, enough_keys = first_distinct(draws, rows, n, c.symbols)
        value, enough_values = first_distinct(draws, rows, n, c.symbols)
        key, value = self._key + key, self._value + value
        most = c.block * c.max_difficulty
        slots = tokens // _SLOT
        order = draws.permutation(most // _SLOT, slots)
        depth = draws.integers(1, DEPTHS) if c.depth is None else np.full((len(draws), 1), c.depth)
        first = (depth * (slots[:, None] - 1) + (DEPTHS - 1) // 2) // (DEPTHS - 1)
        # The others take the slots of the permutation, without the first statement's.
        others = np.argsort(order[:, :n] == first, axis=1, kind="stable")
        slot = np.concatenate((first, np.take_along_axis(order[:, :n], others, axis=1)), axis=1)[:, :n]
        if c.kind == "multi_value":
            key = np.repeat(key[:, :1], n, axis=1)
        if c.kind in ("multi_value", "variable_tracking"):
            slot = np.sort(slot, axis=1)
        right = value if c.kind != "variable_tracking" else np.concatenate((value[:, :1], key[:, :-1]), axis=1)
        context = self._noise + scale_words(draws.words(most), c.symbols)
        row = np.arange(len(draws))[:, None]
        for offset, part in enumerate((key, np.full_like(key, self._equals), right, np.full_like(key, self._end))):
            context[row, _SLOT * slot + offset] = part
        asked, answer = key[:, :1], value[:, :1]
        if c.kind == "multi_value":
            answer = value
        elif c.kind == "multi_query":
            turned = draws.permutation(n)
            asked, answer = np.take_along_axis(key, turned, axis=1), np.take_along_axis(value, turned, axis=1)
        elif c.kind == "variable_tracking":
            asked, answer = value[:, :1], key
        pairs = np.sort(key * _ABSENT + right, axis=1)
        objects = np.stack((pairs // _ABSENT, pairs % _ABSENT), axis=-1).reshape(len(draws), -1)
        valid = enough_keys & enough_values
        return {"context": context, "asked": asked, "answer": answer, "object": objects, "valid": valid}

    def _words(self, draws: Draws, tokens: Integers) -> Latents:
        c, n = self.config, len(draws)
        most = c.block * c.max_difficulty
        names = self._noise + draws.permutation(c.symbols)
        if c.kind == "common_words":
            # Half of the context are the common words, as often as one another; the rest are three of each rare word.
            often = tokens[:, None] // 2 // _COMMON
            place = np.arange(most)[None]
            rank = np.where(
                place < _COMMON * often, place % _COMMON, _COMMON + (place - _COMMON * often) // _RARE_COUNT
            )
            rank = np.take_along_axis(np.minimum(rank, c.symbols - 1), draws.permutation(most, tokens), axis=1)
            answer, valid = np.sort(names[:, :_COMMON], axis=1), np.ones(n, dtype=bool)
        else:
            weights = np.array([round(2**24 * r**-_ALPHA) for r in range(1, c.symbols + 1)], dtype=np.int64).cumsum()
            rank = np.searchsorted(weights, scale_words(draws.words(most), int(weights[-1])), side="right")
            inside = np.arange(most) < tokens[:, None]
            counts = np.zeros((n, c.symbols), dtype=np.int64)
            np.add.at(counts, (np.arange(n)[:, None].repeat(most, 1)[inside], rank[inside]), 1)
            order = np.argsort(-counts, axis=1, kind="stable")[:, : _TOP + 1]
            top = np.take_along_axis(counts, order, axis=1)
            answer, valid = np.take_along_axis(names, order[:, :_TOP], axis=1), (top[:, :-1] > top[:, 1:]).all(axis=1)
        context = np.take_along_axis(names, rank, axis=1)
        none = np.zeros((n, 0), dtype=np.int64)
        return {"context": context, "asked": none, "answer": answer, "object": answer, "valid": np.asarray(valid)}

    def _canonical_words(self, latents: Latents) -> tuple[Words, Integers]:
        words = latents["object"].astype(np.uint64)
        return words, np.full(len(words), words.shape[1])

    def _write(self, latents: Latents) -> Rows:
        context, asked = latents["context"], latents["asked"]
        n, width = context.shape
        prompt = np.full((n, 1 + width + 1 + asked.shape[1]), -1, dtype=np.int64)
        prompt[:, 0] = SPECIAL.bos
        prompt[:, 1 : 1 + width] = context
        end = 1 + (context >= 0).sum(axis=1)
        row = np.arange(n)
        prompt[row, end] = self._ask
        for i in range(asked.shape[1]):
            prompt[row, end + 1 + i] = asked[:, i]
        return Rows(prompt=prompt, steps=np.full((n, 0, 1), -1, dtype=np.int64), answer=latents["answer"])

    def _read(self, example: Example) -> tuple[list[tuple[int, int]], list[int], list[int]]:
        """Statements in order, words of the context, and what is asked, from the prompt."""
        split = example.prompt_ids.index(self._ask)
        context, asked = list(example.prompt_ids[1:split]), list(example.prompt_ids[split + 1 :])
        found = [(context[i - 1], context[i + 1]) for i, token in enumerate(context) if token == self._equals]
        return found, context, asked

    def oracle(self, example: Example) -> tuple[int, ...]:
        """Read the statements, or count the words."""
        statements, context, asked = self._read(example)
        if self.config.counting:
            counts = {word: context.count(word) for word in set(context)}
            ranked = sorted(counts, key=lambda word: -counts[word])
            if self.config.kind == "common_words":
                return tuple(sorted(ranked[:_COMMON]))
            return tuple(ranked[:_TOP])
        if self.config.kind == "variable_tracking":
            after = {right: left for left, right in statements}
            chain = [asked[0]]
            while chain[-1] in after:
                chain.append(after[chain[-1]])
            return tuple(chain[1:])
        return tuple(right for key in asked for left, right in statements if left == key)

    def canonical(self, example: Example) -> tuple[int, ...]:
        if self.config.counting:
            return self.oracle(example)
        return tuple(token for pair in sorted(self._read(example)[0]) for token in pair)

    def chance(self, batch: TaskBatch) -> Tensor:
        """Every token of the answer one of its kind at random."""
        share = torch.full((len(batch),), 1.0 / self.config.symbols, dtype=torch.float64)
        return share ** batch.answer_mask.sum(1).double()

    def guesses(self, batch: TaskBatch) -> dict[str, Tensor]:
        """``last_value``: what the last statement says, for every token asked; ``last_words`` of the context for the counting kinds."""
        ids, width = batch.prompts.ids, batch.answer_ids.shape[1]
        place = torch.arange(ids.shape[1])[None]
        end = (ids == self._ask).long().argmax(1, keepdim=True)
        if self.config.counting:
            return {"last_words": ids.gather(1, end - width + torch.arange(width)[None])}
        last = torch.where(ids == self._equals, place, -1).amax(1, keepdim=True)
        side = -1 if self.config.kind == "variable_tracking" else 1
        return {"last_value": ids.gather(1, last + side).expand(-1, width)}
