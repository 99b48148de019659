"""Run a comparison: every method, every seed, side by side in worker processes, with one progress bar each."""

import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from queue import Empty
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from latentcot.compare.methods import find
from latentcot.compare.presets import Comparison, MethodSpec
from latentcot.compare.worker import (
    RESULT_SCHEMA,
    Job,
    Report,
    load_result,
    make_reasoner,
    make_tasks,
    run_job,
    run_name,
    write_json,
)
from latentcot.tasks import make_task
from latentcot.training import training_progress

_QUEUE: Any = None  # set in worker processes
REPORT_EVERY = 10  # steps between two messages of a worker


def _adopt(queue: Any) -> None:
    global _QUEUE
    _QUEUE = queue


class AnyJob(Protocol):
    """What :func:`run_all` asks of a job; it must pickle."""

    @property
    def name(self) -> str: ...

    @property
    def steps(self) -> int: ...


Runner = Callable[[Any, Report], dict[str, Any]]
"""Runs one job to its result; a function of a module, so that worker processes find it."""


def _work(run: Runner, job: AnyJob) -> dict[str, Any]:
    def say(name: str, step: int, of: int, what: str) -> None:
        if step % REPORT_EVERY == 0 or step == of:
            _QUEUE.put((name, step, what))

    return run(job, say)


def check(comparison: Comparison) -> None:
    """Everything that can be wrong with a configuration is found before the first run starts: unknown task or method, settings
    that do not fit. Raises ``ValueError``."""
    if not comparison.methods:
        raise ValueError("methods: a comparison needs at least one")
    names = [m.name for m in comparison.methods]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"methods: {repeated} named twice")
    for method in comparison.methods:
        find(method.name)
    if comparison.items < 1:
        raise ValueError(f"items: at least 1 is needed, got {comparison.items}")
    task, evaluation = make_tasks(comparison)
    levels, longest = evaluation.levels("test"), task.config.max_difficulty
    if longest not in levels:
        there = f"its test split has difficulties {', '.join(map(str, levels)) or 'of none'}"
        raise ValueError(
            f"task {comparison.task!r} has no test examples of difficulty {longest}, the longest trained; {there}"
        )
    task.batch("train", [0])
    for method in comparison.methods:
        make_reasoner(comparison, method, evaluation, 0)


def run_comparison(
    comparison: Comparison, out: Path, seeds: int = 1, jobs: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run what is not finished yet and write ``results.json``.

    Args:
        out: folder of the comparison; run it again with the same folder and it continues where it was.
        seeds: training seeds 0 .. seeds - 1 for every method.
        jobs: runs side by side, sharing the cores; default one a core, of one thread each.

    Returns:
        The contents of ``results.json``.

    Raises:
        ValueError: a configuration that can not be run, or a damaged or foreign file in ``out``.
    """
    if seeds < 1:
        raise ValueError(f"seeds: at least 1 is needed, got {seeds}")
    cores, jobs = check_places(out, jobs)
    console = console or Console()
    check(comparison)
    planned = [
        Job(comparison, method, seed, out / "runs" / run_name(method.name, seed), threads=max(1, cores // jobs))
        for seed in range(seeds)
        for method in comparison.methods
    ]
    results = {job.name: done for job in planned if (done := load_result(job)) is not None}
    task, evaluation = make_tasks(comparison)
    items = -(-comparison.items // len(evaluation.levels("test")))
    # In front of the training: it makes every test item, and one that can not be made must not cost the runs.
    baselines = {
        str(d): {**b, "heuristic_name": b.heuristic_name}
        for d, b in evaluation.baselines_by_difficulty("test", items).items()
    }
    out.mkdir(parents=True, exist_ok=True)
    todo = [job for job in planned if job.name not in results]
    if results:
        console.print(f"{len(results)} of {len(planned)} runs are finished already in {out}")
    # The longest runs first, so that no core is idle at the end.
    todo.sort(key=lambda job: _expected_cost(job), reverse=True)
    results |= run_all(todo, run_job, jobs, console)
    summary = {
        "schema": RESULT_SCHEMA,
        "comparison": {**{k: v for k, v in asdict(comparison).items() if k != "methods"}, "seeds": seeds},
        "methods": [asdict(m) for m in comparison.methods],
        "vocabulary": evaluation.limits.vocab_size,
        "trained_to": task.config.max_difficulty,
        "baselines": baselines,
        "machine": machine(cores, jobs),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": [results[job.name] for job in planned],
    }
    write_json(out / "results.json", summary)
    return json.loads((out / "results.json").read_text())  # as any later reader sees it


def check_places(out: Path, jobs: int | None) -> tuple[int, int]:
    """Cores of this machine, and how many runs go side by side (default one a core). Raises ``ValueError`` for less than one, or when
    ``out`` is a file."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = cores if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"jobs: at least 1 is needed, got {jobs}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder")
    return cores, jobs


def machine(cores: int, jobs: int) -> dict[str, Any]:
    """What a result was made on."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "jobs": jobs,
        **{name: version(name) for name in ("latentcot", "torch", "transformers", "accelerate")},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _expected_cost(job: Job) -> float:
    """Rough order of training cost, only to start the long runs first."""
    order = {"coconut": 3.0, "depth_recurrence": 2.5, "masked_diffusion": 2.0, "cot": 1.5}
    return order.get(job.method.name, 1.0)


def run_all(todo: Sequence[AnyJob], run: Runner, jobs: int, console: Console) -> dict[str, dict[str, Any]]:
    """Run jobs in ``jobs`` worker processes, one bar each; results by name. When one fails or the user stops, the others are ended:
    they go on from their checkpoints next time."""
    if not todo:
        return {}
    results: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        training_progress(console) as progress,
    ):
        queue = manager.Queue()
        bars: dict[str, TaskID] = {
            job.name: progress.add_task(job.name, total=job.steps, what="waiting", start=False) for job in todo
        }
        executor = ProcessPoolExecutor(min(jobs, len(todo)), context, _adopt, (queue,))
        try:
            running: dict[Future[dict[str, Any]], AnyJob] = {executor.submit(_work, run, job): job for job in todo}
            while running:
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                _drain(queue, progress, bars)
                for future in done:
                    job = running.pop(future)
                    results[job.name] = future.result()
                    progress.update(bars[job.name], completed=job.steps, what="done")
                    if not console.is_terminal:
                        console.print(
                            f"{job.name}: done in {results[job.name]['training']['seconds']:.0f} s ({len(running)} to go)"
                        )
        except BaseException:
            for process in list(
                (executor._processes or {}).values()
            ):  # what runs goes on from its checkpoint next time
                process.terminate()
            raise
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
    return results


def _drain(queue: Any, progress: Progress, bars: dict[str, TaskID]) -> None:
    while True:
        try:
            name, step, what = queue.get_nowait()
        except Empty:
            return
        bar = bars[name]
        if not progress.tasks[progress.task_ids.index(bar)].started:
            # A run that goes on from a checkpoint must not count its earlier steps as speed.
            progress.update(bar, completed=step)
            progress.start_task(bar)
        progress.update(bar, completed=step, what=what)


def with_options(
    comparison: Comparison,
    *,
    steps: int | None = None,
    methods: Sequence[str] | None = None,
    task: str | None = None,
    items: int | None = None,
) -> Comparison:
    """A preset with some values replaced. Methods outside the preset run with their default settings."""
    if methods is not None:
        known = {m.name: m for m in comparison.methods}
        comparison = replace(comparison, methods=tuple(known.get(name, MethodSpec(name, "latent")) for name in methods))
    if task is not None and task != comparison.task:
        # Another task has levels of its own: its default range is trained on and evaluated on, and nothing beyond.
        comparison = replace(comparison, task=task, task_config={}, evaluate_to=make_task(task).config.max_difficulty)
    if steps is not None:
        comparison = replace(comparison, train=replace(comparison.train, steps=steps))
    if items is not None:
        comparison = replace(comparison, items=items)
    return comparison
