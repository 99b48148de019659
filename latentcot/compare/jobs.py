"""What the studies share: a job is one training run in a folder, and a study runs those of its jobs that are not finished.

A job's folder holds a checkpoint while it trains and ``result.json`` when it is done. The result holds the job's *identity*, everything
that it is the result of, so that a folder of another configuration is refused. A study's ``results.json`` holds what all of its jobs
found.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from latentcot.compare.run import AnyJob, Runner, machine, run_all
from latentcot.compare.worker import Report, read_result, write_json
from latentcot.training.loop import Watcher

NOT_THE_RESULT = ("checkpoint_every", "log_every")
"""Values of :class:`~latentcot.training.TrainConfig` that say how a run is watched, not what comes of it."""


class StudyJob(AnyJob, Protocol):
    """A job of a study; :attr:`threads` are those that it may use."""

    @property
    def folder(self) -> Path: ...

    @property
    def threads(self) -> int: ...

    def identity(self) -> dict[str, Any]: ...


def without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """``values`` but those of these ``names``."""
    left_out = set(names)
    return {name: value for name, value in values.items() if name not in left_out}


def plain(value: Any) -> Any:
    """``value`` as a later reader finds it in a JSON file: tuples are lists, numbers as keys are strings."""
    return json.loads(json.dumps(value))


def load_job(job: StudyJob, schema: int) -> dict[str, Any] | None:
    """The finished result of a job, or ``None``; ``ValueError`` when the file is damaged or another configuration's."""
    return read_result(job.folder, job.name, job.identity(), schema)


def finish_job(
    job: StudyJob, schema: int, report: Report | None, work: Callable[[Watcher], dict[str, Any]]
) -> dict[str, Any]:
    """The result of a job: read if it is there, otherwise found by ``work`` and written; its checkpoint is deleted then.

    Args:
        report: told of every step that ``work`` says to its watcher.
        work: trains (or goes on training) and measures. ``schema`` and ``identity`` are added to what it returns.
    """
    if (finished := load_job(job, schema)) is not None:
        return finished
    torch.set_num_threads(job.threads)

    def watch(step: int, of: int, loss: float, _: str) -> None:
        if report is not None:
            report(job.name, step, of, f"loss {loss:.3f}")

    result = {**work(watch), "schema": schema, "identity": job.identity()}
    write_json(job.folder / "result.json", result)
    (job.folder / "checkpoint.safetensors").unlink(missing_ok=True)
    return result


def run_jobs(
    planned: Sequence[StudyJob],
    run: Runner,
    schema: int,
    out: Path,
    places: tuple[int, int],
    console: Console,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Run what is not finished yet and write ``out/results.json``: ``about`` the study, the machine, the time, all results in order.

    Args:
        run: of one job, a function of a module.
        places: cores, and jobs side by side, as :func:`~latentcot.compare.run.check_places` gives them.

    Returns:
        The contents of ``results.json``.

    Raises:
        ValueError: a damaged or foreign result among those that are there.
    """
    done = [load_job(job, schema) for job in planned]
    results = {job.name: found for job, found in zip(planned, done, strict=True) if found is not None}
    if results:
        console.print(f"{len(results)} of {len(planned)} runs are finished already in {out}")
    cores, jobs = places
    results |= run_all([job for job in planned if job.name not in results], run, jobs, console)
    summary = {
        **about,
        "schema": schema,
        "machine": machine(cores, jobs),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": [results[job.name] for job in planned],
    }
    write_json(out / "results.json", summary)
    return json.loads((out / "results.json").read_text())
