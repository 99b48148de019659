r"""Text for language modelling: tokenised once into one flat file, then cut into rows; batch n of a run depends on n alone.

:func:`tokenize_corpus` writes a folder with ``tokens.bin`` (all documents end to end, each closed by the end token), ``starts.npy``
(where each document begins) and ``corpus.json``. :class:`PackedText` serves it: row r of S tokens is the stretch from r·S to
(r + 1)·S, its labels are the next tokens. Rows are drawn in a new order every epoch, fixed by (seed, epoch), and the place in the data
is the number of optimiser steps, which every checkpoint holds: a resumed run reads what the run that was not killed read, whatever
the number of processes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentcot.files import write_text
from latentcot.training.language import IGNORED, TokenBatch

FORMAT = 1
_TOGETHER = 256  # documents a call of the tokenizer

Watcher = Callable[[int, int], None]
"""Called with (documents so far, tokens so far)."""


def read_documents(paths: Iterable[Path], separator: str | None = None) -> Iterator[str]:
    """Text files as documents: one a file, or the pieces between ``separator`` lines. Empty ones are left out.

    Raises:
        ValueError: a path that is no file, or a file that is not UTF-8.
    """
    for path in paths:
        if not path.is_file():
            raise ValueError(f"paths: {path} is not a file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"paths: {path} is not UTF-8 text ({error})") from error
        for piece in [text] if separator is None else text.split(separator):
            if piece.strip():
                yield piece


def dataset_documents(name: str, split: str = "train", column: str = "text", **options: Any) -> Iterator[str]:
    """The ``column`` of any text set that ``datasets.load_dataset(name, split=split, **options)`` knows (extra ``eval``); with
    ``streaming=True`` it is read as it comes.

    Raises:
        ValueError: ``datasets`` is missing, or the set has no such column.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("dataset_documents needs datasets: pip install 'latentcot[eval]'") from error
    for row in load_dataset(name, split=split, **options):
        if column not in row:
            raise ValueError(f"column: the set has no {column!r}; it has {', '.join(map(repr, row))}")
        yield row[column]  # type: ignore[index]


def tokenize_corpus(
    folder: Path, documents: Iterable[str], tokenizer: Any, watch: Watcher | None = None
) -> "TokenizedText":
    """Tokenise ``documents`` into ``folder``, which appears whole or not at all.

    Args:
        folder: must not exist yet.
        tokenizer: of transformers; its end token closes each document, no other special token is added.

    Raises:
        ValueError: the folder exists, the tokenizer has no end token, or there is no text.
    """
    if folder.exists():
        raise ValueError(f"folder: {folder} exists already; open it with TokenizedText({str(folder)!r}) or remove it")
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("tokenizer: it has no end token (eos_token), which closes each document")
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    partial = folder.with_name(folder.name + ".tmp")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        starts, count = _write_tokens(partial / "tokens.bin", documents, tokenizer, dtype, watch)
        if not count:
            raise ValueError("documents: there is no text")
    except BaseException:
        shutil.rmtree(partial)
        raise
    np.save(partial / "starts.npy", np.array(starts, dtype=np.int64))
    digest = hashlib.sha256()
    with open(partial / "tokens.bin", "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    description = {
        "format": FORMAT,
        "tokens": count,
        "documents": len(starts),
        "dtype": np.dtype(dtype).name,
        "vocab_size": len(tokenizer),
        "end": end,
        "sha256": digest.hexdigest(),
    }
    write_text(partial / "corpus.json", json.dumps(description, indent=1, sort_keys=True) + "\n")
    os.replace(partial, folder)
    return TokenizedText(folder)


def _write_tokens(
    path: Path, documents: Iterable[str], tokenizer: Any, dtype: Any, watch: Watcher | None
) -> tuple[list[int], int]:
    """Where each document begins, and the tokens in all."""
    starts, count = [], 0
    with open(path, "wb") as file:
        for together in _chunks(documents, _TOGETHER):
            for ids in tokenizer(together, add_special_tokens=False)["input_ids"]:
                starts.append(count)
                count += len(ids) + 1
                file.write(np.array([*ids, tokenizer.eos_token_id], dtype=dtype).tobytes())
            if watch is not None:
                watch(len(starts), count)
    return starts, count


def _chunks(items: Iterable[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class TokenizedText:
    """A folder that :func:`tokenize_corpus` wrote; tokens are read from disk as they are needed.

    Raises:
        ValueError: the folder is not one, or is damaged.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / "corpus.json").read_text())
            self.count, self.vocab_size, self.sha256 = about["tokens"], about["vocab_size"], about["sha256"]
            self._dtype, version = np.dtype(about["dtype"]), about["format"]
            self.starts: NDArray[np.int64] = np.load(self.folder / "starts.npy", allow_pickle=False)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"folder: {self.folder} holds no tokenised text ({error!r})") from error
        if version != FORMAT:
            raise ValueError(f"folder: {self.folder} has format {version}, this version reads format {FORMAT}")
        size = (self.folder / "tokens.bin").stat().st_size if (self.folder / "tokens.bin").is_file() else 0
        if size != self.count * self._dtype.itemsize:
            raise ValueError(f"folder: {self.folder / 'tokens.bin'} is damaged: {size} bytes for {self.count} tokens")

    def __len__(self) -> int:
        return self.count

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """All tokens ``[n]``, mapped from disk."""
        return np.memmap(self.folder / "tokens.bin", dtype=self._dtype, mode="r")


@dataclass(frozen=True)
class PackedText:
    """Rows of a tokenised text, as a data source of :func:`~latentcot.training.train`.

    Args:
        text: the tokens.
        length: S, tokens a row.
        batch_size: rows a step, over all processes.
        first, last: rows ``first`` to ``last - 1`` are served (``last=None``: to the end), so that validation can keep others.
        resets: state, convolution, positions and attention restart at each document, and no label crosses a border. ``False`` = a row is
            one sequence; documents are told apart by their end token alone.
        seed: of the order of rows.
    """

    text: TokenizedText
    length: int
    batch_size: int
    first: int = 0
    last: int | None = None
    resets: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("batch_size", 1), ("first", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        whole = (len(self.text) - 1) // self.length
        last = whole if self.last is None else self.last
        if not self.first < last <= whole:
            raise ValueError(
                f"first, last: rows {self.first} to {last} asked for, the text has {whole} rows of {self.length} tokens"
            )

    @property
    def rows(self) -> int:
        """How many rows there are."""
        last = (len(self.text) - 1) // self.length if self.last is None else self.last
        return last - self.first

    def take(self, rows: NDArray[np.int64]) -> TokenBatch:
        """Rows by number, counted from ``first``."""
        place = (self.first + rows)[:, None] * self.length + np.arange(self.length + 1)
        tokens = self.text.tokens[place].astype(np.int64)
        ids, labels = tokens[:, :-1], tokens[:, 1:].copy()
        if not self.resets:
            return TokenBatch(torch.from_numpy(ids.copy()), torch.from_numpy(labels))
        begins = np.isin(place, self.text.starts)
        labels[begins[:, 1:]] = IGNORED  # the first token of a document follows from nothing
        return TokenBatch(torch.from_numpy(ids.copy()), torch.from_numpy(labels), torch.from_numpy(begins[:, :-1]))

    def batch(self, number: int) -> TokenBatch:
        """Global batch ``number``; it may reach over the end of an epoch."""
        epochs, within = np.divmod(np.arange(number * self.batch_size, (number + 1) * self.batch_size), self.rows)
        orders = {int(e): self._order(int(e)) for e in np.unique(epochs)}
        return self.take(np.array([orders[int(e)][w] for e, w in zip(epochs, within, strict=True)], dtype=np.int64))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in _orders.get(self._key, {}):
            order = np.random.Generator(np.random.Philox([self.seed, epoch])).permutation(self.rows)
            kept = {e: o for e, o in _orders.get(self._key, {}).items() if e == epoch - 1}
            _orders[self._key] = {**kept, epoch: order}
        return _orders[self._key][epoch]

    @property
    def _key(self) -> tuple[int, int]:
        return self.seed, self.rows

    def stream(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[TokenBatch]:
        """This process's share of batches ``start, start + 1, ...``."""
        number = start
        while True:
            yield self.batch(number).share(rank, world_size)
            number += 1

    def describe(self) -> dict[str, Any]:
        return {
            "text": self.text.sha256,
            "length": self.length,
            "batch_size": self.batch_size,
            "rows": [self.first, self.last],
            "resets": self.resets,
            "seed": self.seed,
        }


_orders: dict[tuple[int, int], dict[int, NDArray[np.int64]]] = {}  # the order of the current epoch and the one before
