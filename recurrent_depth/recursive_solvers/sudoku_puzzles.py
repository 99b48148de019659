"""Sets of puzzles for a run: made once, by several processes where that pays, and kept in one file."""

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from torch import Tensor

from latentcot.files import write_tensors
from latentcot.tasks.base import Split
from latentcot.tasks.sudoku import GridBatch, SudokuConfig, SudokuTask, rename_to_fit
from latentcot.tasks.sudoku_rules import relabelled

FORMAT = "1"
AT_ONCE = 20  # puzzles of one piece of work
_NAMES = tuple(f.name for f in fields(GridBatch))


def pick(batch: GridBatch, rows: Tensor | slice) -> GridBatch:
    """Some rows of a batch."""
    return GridBatch(*(getattr(batch, name)[rows] for name in _NAMES))


def puzzle_sets(
    task: SudokuTask,
    wanted: Mapping[Split, int],
    file: Path | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> dict[Split, GridBatch]:
    """The first so many puzzles of each split, as ``task.grids`` makes them.

    Args:
        wanted: split -> number.
        file: read when it holds these puzzles, written otherwise; ``None`` = neither.
        workers: processes; 0 = this one alone; default one a core for 9x9 and 0 otherwise.

    Raises:
        ValueError: a damaged file, or one that holds other puzzles.
    """
    for split, count in wanted.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"puzzles: {count!r} of split {split!r} asked for, expected an integer of at least 1")
    about = {"task": asdict(task.config), "wanted": dict(wanted), "format": FORMAT}
    if file is not None and file.is_file():
        return _read(file, about)
    if workers is None:
        workers = (os.cpu_count() or 1) if task.config.size == 9 else 0
    made = _make_all(task, wanted, workers, console or Console(quiet=True))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{split}.{name}": getattr(batch, name) for split, batch in made.items() for name in _NAMES}
        write_tensors(file, tensors, {"puzzles": json.dumps(about)})
    return made


def _read(file: Path, about: dict[str, object]) -> dict[Split, GridBatch]:
    try:
        with safe_open(file, framework="pt") as stored:
            found = json.loads((stored.metadata() or {})["puzzles"])
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a mapping)
        sets = {split: GridBatch(*(tensors[f"{split}.{name}"] for name in _NAMES)) for split in found["wanted"]}
    except Exception as error:  # safetensors, json and key errors alike mean: not such a file
        raise ValueError(f"{file} is damaged ({error}); delete it to make the puzzles anew") from error
    if found != about:
        raise ValueError(
            f"{file} holds other puzzles than this run asks for; delete it or choose another output folder"
        )
    return sets


def _make_all(task: SudokuTask, wanted: Mapping[Split, int], workers: int, console: Console) -> dict[Split, GridBatch]:
    pieces: list[tuple[Split, range]] = [
        (split, range(start, min(count, start + AT_ONCE)))
        for split, count in wanted.items()
        for start in range(0, count, AT_ONCE)
    ]
    done: dict[tuple[Split, int], GridBatch] = {}
    with Progress(console=console) as progress:
        bar = progress.add_task("puzzles", total=sum(wanted.values()))
        if not workers:
            for split, rows in pieces:
                done[split, rows.start] = task.grids(split, rows)
                progress.advance(bar, len(rows))
        else:
            with ProcessPoolExecutor(min(workers, len(pieces)), get_context("spawn")) as pool:
                futures: dict[Future[GridBatch], tuple[Split, range]] = {
                    pool.submit(_make, task.config, split, rows): (split, rows) for split, rows in pieces
                }
                for future in as_completed(futures):
                    split, rows = futures[future]
                    done[split, rows.start] = future.result()
                    progress.advance(bar, len(rows))
    return {
        split: GridBatch(
            *(
                torch.cat([getattr(done[split, rows.start], name) for s, rows in pieces if s == split])
                for name in _NAMES
            )
        )
        for split in wanted
    }


def _make(config: SudokuConfig, split: Split, rows: range) -> GridBatch:
    torch.set_num_threads(1)
    return SudokuTask(config).grids(split, rows)


def look_up(train: GridBatch, test: GridBatch, size: int) -> float:
    """Share of ``test`` that is solved by the first solution of ``train`` which fits the clues after renaming its digits."""
    seen = sorted({relabelled(grid) for grid in (train.targets - 1).tolist()})
    right = 0
    for puzzle, target in zip((test.inputs - 1).tolist(), (test.targets - 1).tolist(), strict=True):
        named = (rename_to_fit(grid, puzzle, size) for grid in seen)
        found = next((grid for grid in named if grid is not None), None)
        right += found is not None and list(found) == target
    return right / len(test)
