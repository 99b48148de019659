"""One run of a comparison: one method, one seed; trained, evaluated, saved. Runs in a process of its own.

Each run has a folder, ``runs/<method>-seed<k>/``, with ``checkpoint.safetensors`` while it trains, and the saved reasoner and
``result.json`` when it is done. A killed run goes on from its checkpoint; a finished one is not repeated.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.compare.evaluate import evaluate
from latentcot.compare.methods import find
from latentcot.compare.presets import Comparison, MethodSpec
from latentcot.files import write_text
from latentcot.reasoner import SPECIAL, Reasoner, TaskBatch, TaskLimits
from latentcot.tasks import make_task
from latentcot.tasks.base import Task
from latentcot.tasks.loader import BatchStream
from latentcot.training import train

RESULT_SCHEMA = 1

Report = Callable[[str, int, int, str], None]
"""Called with (run name, step, of how many, what is going on)."""


@dataclass(frozen=True)
class Job:
    comparison: Comparison
    method: MethodSpec
    seed: int
    folder: Path
    threads: int = 1

    @property
    def name(self) -> str:
        return run_name(self.method.name, self.seed)

    @property
    def steps(self) -> int:
        return self.comparison.train.steps


def run_name(method: str, seed: int) -> str:
    return f"{method}-seed{seed}"


@dataclass(frozen=True)
class TaskData:
    """Training batches of a task. They carry the limits of the evaluation task, so that methods which size a canvas by them train on
    the canvas that they are evaluated on."""

    task: Task
    limits: TaskLimits
    batch_size: int

    def stream(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[TaskBatch]:
        rows = slice(rank * self.batch_size, (rank + 1) * self.batch_size)
        with BatchStream(self.task, "train", self.batch_size * world_size, start_step=start) as batches:
            for batch in batches:
                yield replace(batch, prompts=replace(batch.prompts, limits=self.limits)).rows(rows)

    def describe(self) -> dict[str, Any]:
        return {"task": repr(self.task), "limits": asdict(self.limits), "batch_size": self.batch_size}


def make_tasks(comparison: Comparison) -> tuple[Task, Task]:
    """Training and evaluation task; they differ in the largest difficulty alone."""
    training = make_task(comparison.task, **comparison.task_config)
    evaluation = make_task(comparison.task, **{**comparison.task_config, "max_difficulty": comparison.evaluate_to})
    return training, evaluation


def make_reasoner(comparison: Comparison, method: MethodSpec, task: Task, seed: int) -> Reasoner:
    """The method on a freshly initialised backbone; the same seed gives every method the same backbone weights."""
    torch.manual_seed(seed)
    config = HybridConfig(
        vocab_size=task.limits.vocab_size,
        pad_token_id=SPECIAL.pad,
        bos_token_id=SPECIAL.bos,
        eos_token_id=SPECIAL.eos,
        **comparison.backbone,
    )
    return find(method.name)(HybridForCausalLM(config), method.settings)


def run_job(job: Job, report: Report | None = None) -> dict[str, Any]:
    """Train (or go on training), evaluate, save; returns and writes the result."""
    finished = load_result(job)
    if finished is not None:
        return finished
    torch.set_num_threads(job.threads)
    say = report or (lambda *_: None)
    comparison, method = job.comparison, job.method
    task, evaluation = make_tasks(comparison)
    reasoner = make_reasoner(comparison, method, evaluation, job.seed)
    job.folder.mkdir(parents=True, exist_ok=True)
    data = TaskData(task, evaluation.limits, comparison.batch_size)
    report_training = train(
        reasoner,
        data,
        replace(comparison.train, seed=job.seed),
        job.folder,
        watch=lambda step, of, loss, phase: say(job.name, step, of, f"{phase}, loss {loss:.3f}"),
    )
    say(job.name, comparison.train.steps, comparison.train.steps, "evaluating")
    levels = evaluation.levels("test")
    began = time.perf_counter()
    scores = evaluate(
        reasoner, evaluation, levels, -(-comparison.items // len(levels)), knobs=method.knobs, seed=job.seed
    )
    result = {
        "schema": RESULT_SCHEMA,
        "identity": identity(job),
        "method": method.name,
        "role": method.role,
        "seed": job.seed,
        "settings": dict(reasoner.settings),
        "knobs": dict(method.knobs),
        "parameters": report_training.parameters,
        "training": asdict(report_training),
        "evaluation": {"seconds": time.perf_counter() - began, "by_difficulty": [s.to_json() for s in scores]},
    }
    reasoner.save_pretrained(job.folder / "model")
    write_json(job.folder / "result.json", result)
    (job.folder / "checkpoint.safetensors").unlink(missing_ok=True)  # as large as three models; the saved one stays
    return result


def identity(job: Job) -> dict[str, Any]:
    """What a result is the result of; another configuration does not reuse it."""
    comparison = asdict(job.comparison)
    for name in ("methods", "title", "name"):
        comparison.pop(name)
    comparison["train"].pop("checkpoint_every")
    comparison["train"].pop("log_every")
    return json.loads(json.dumps({**comparison, "method": asdict(job.method), "seed": job.seed}, default=str))


def load_result(job: Job) -> dict[str, Any] | None:
    """The finished result of a job, or ``None``. Raises ``ValueError`` when the file is damaged or another configuration's."""
    return read_result(job.folder, job.name, identity(job), RESULT_SCHEMA)


def read_result(folder: Path, name: str, expected: dict[str, Any], schema: int) -> dict[str, Any] | None:
    """``folder/result.json`` of the run ``name``, ``None`` when there is none. Raises ``ValueError`` when the file is damaged, or its
    ``schema`` or ``identity`` is not the expected one."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text())
        known, found = result["identity"], result["schema"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"result {path} is damaged ({error!r}); delete it to run {name} again") from error
    if found != schema or known != expected:
        raise ValueError(
            f"result {path} belongs to another configuration; choose another output folder (--out) or delete {folder}"
        )
    return result


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
