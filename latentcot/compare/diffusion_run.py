"""One run of the diffusion study: an arm trained on a problem, and what it solves with every sampler."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from latentcot.compare.diffusion_arms import SAMPLERS, Arm, Sizes, make_arm, sampler_names
from latentcot.compare.diffusion_problems import Canvas, Problem
from latentcot.compare.worker import write_json
from latentcot.training import TrainConfig, TrainReport, count_parameters, train

SCHEMA = 1
PLAN_FILE = "plan.json"  # what a run that goes on must not work out anew
WARM_UP, TIMED = 5, 10  # steps that a calibration throws away, and those that it times at least
CALIBRATION = 0.05  # share of the time that it spends on that: by a few steps alone, runs came out a quarter off
OUTSIDE = 0.97  # share of the time that steps get; the rest is for checkpoints

Watcher = Callable[[int, int, float, str], None]


class Paused(Exception):
    """Training left off at a checkpoint, after so many steps."""


@dataclass(frozen=True)
class CanvasData:
    """Training batches; batch n depends on n and ``seed`` alone."""

    problem: Problem
    rows: int
    seed: int
    whole: bool

    def stream(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[Canvas]:
        step = start
        while True:
            batch = self.problem.training(step, self.rows * world_size, self.seed, self.whole)
            yield batch.rows(slice(rank * self.rows, (rank + 1) * self.rows))
            step += 1

    def describe(self) -> dict[str, Any]:
        return {"problem": self.problem.describe(), "rows": self.rows, "seed": self.seed, "whole": self.whole}


class Clock:
    """Seconds of work: of this process on a CPU, where others may be at work too, and of the clock on a GPU."""

    def __init__(self, device: str):
        self.cuda = torch.device(device).type == "cuda"
        self.started = self.now()

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    @property
    def seconds(self) -> float:
        return self.now() - self.started


def steps_within(arm: Arm, data: CanvasData, config: TrainConfig, seconds: float, device: str) -> int:
    """How many steps of training take ``seconds``, by some of them on a copy of the arm."""
    config = replace(config, warmup_steps=0, checkpoint_every=0)

    def spent(steps: int) -> float:
        clock = Clock(device)
        train(copy.deepcopy(arm), data, replace(config, steps=steps))  # type: ignore[arg-type]
        return clock.seconds

    spent(WARM_UP)
    each = spent(TIMED) / TIMED
    if (more := int(CALIBRATION * seconds / each)) > TIMED:
        each = spent(more) / more
    return max(1, int(OUTSIDE * seconds / each))


def run_arm(
    problem: Problem,
    name: str,
    sizes: Sizes,
    config: TrainConfig,
    rows: int,
    folder: Path,
    *,
    seconds: float | None = None,
    pause_after: float | None = None,
    device: str = "cpu",
    watch: Watcher | None = None,
) -> tuple[Arm, dict[str, Any]]:
    """Train an arm (or go on training it) and measure it.

    Args:
        name: of :data:`~latentcot.compare.diffusion_arms.ARMS`.
        config: of the loop; its ``steps`` count unless ``seconds`` are given.
        rows: of a batch.
        folder: of the checkpoint and the plan.
        seconds: train for about so long: steps are timed at the first call, and the number that fits is kept in the folder.
        pause_after: leave at the first checkpoint after so many seconds of this call; the same call goes on from it.
        watch: sees every step.

    Raises:
        Paused: after a pause.
        ValueError: a folder of another run.
    """
    arm = make_arm(name, sizes, problem.vocab_size, problem.length, problem.block, config.seed)
    data = CanvasData(problem, rows, config.seed, arm.whole)
    folder.mkdir(parents=True, exist_ok=True)
    plan = _plan(folder / PLAN_FILE)
    if seconds is not None:
        if plan.get("seconds") != seconds:
            if (folder / "checkpoint.safetensors").is_file():
                raise ValueError(
                    f"seconds: {seconds} given, but {folder} holds a run of {plan.get('seconds')}; choose another folder"
                )
            plan = {"seconds": seconds, "steps": steps_within(arm, data, config, seconds, device)}
            write_json(folder / PLAN_FILE, plan)
        config = replace(config, steps=plan["steps"])
    config = replace(config, warmup_steps=min(config.warmup_steps, config.steps // 10))
    clock = Clock(device)

    def each_step(step: int, of: int, loss: float, phase: str) -> None:
        if watch is not None:
            watch(step, of, loss, phase)
        if not config.checkpoint_every or step <= config.checkpoint_every:
            return
        if step % config.checkpoint_every != 1 % config.checkpoint_every:
            return
        # the step before this one was written down: a run that is killed goes on from there, with the work that it took
        write_json(folder / PLAN_FILE, {**plan, "spent": spent + clock.seconds})
        if pause_after is not None and clock.seconds >= pause_after:
            raise Paused(f"{step - 1} of {of} steps are done")

    spent = plan.get("spent", 0.0)
    report: TrainReport = train(arm, data, config, folder, each_step)  # type: ignore[arg-type]
    work = spent + clock.seconds
    write_json(folder / PLAN_FILE, {**plan, "spent": work})
    began = Clock(device)
    solved = measure(arm, problem)
    return arm, {
        "schema": SCHEMA,
        "arm": name,
        "way": arm.way,
        "seed": config.seed,
        "problem": problem.describe(),
        "sizes": asdict(sizes),
        "rows": rows,
        "train": asdict(config),
        "parameters": count_parameters(arm),
        "training": {**asdict(report), "work_seconds": work},
        "solved": solved,
        "evaluation_seconds": began.seconds,
    }


@torch.no_grad()
def measure(arm: Arm, problem: Problem, rows: int = 500) -> dict[str, dict[str, dict[str, float]]]:
    """Test set -> sampler -> shares, mean passes of an answer (``nfe``), and how many answers there are."""
    arm.eval()
    device = next(arm.parameters()).device
    found: dict[str, dict[str, dict[str, float]]] = {}
    for test in problem.tests:
        canvas = problem.test(test, arm.whole)
        found[test] = {}
        for sampler in sampler_names(arm.way):
            filled, passes = [], []
            for start in range(0, len(canvas), rows):
                ids, nfe = arm.fill(canvas.rows(slice(start, start + rows)).to(device), SAMPLERS[sampler])
                filled.append(ids.cpu())
                passes.append(nfe.cpu())
            scores = problem.score(test, torch.cat(filled), arm.whole)
            found[test][sampler] = {**scores, "nfe": torch.cat(passes).double().mean().item(), "items": len(canvas)}
    return found


def _plan(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder to begin anew") from error
