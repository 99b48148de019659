"""The diffusion study: autoregression, masked diffusion and block diffusion on two stacks, by task and number of passes.

Every run is an arm (:data:`~latentcot.compare.diffusion_arms.ARMS`) on a part of the study. The arms of a part have equal parameters and
equal time to train, so that cheaper steps are more steps; both are reported. ``latentcot compare diffusion`` runs it on a CPU; 9x9 Sudoku
is for a GPU (:mod:`~latentcot.compare.diffusion_sudoku`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from latentcot.compare.diffusion_arms import ARMS, Sizes, make_arm, split_arm
from latentcot.compare.diffusion_problems import Problem, RecallProblem, SudokuProblem, TextProblem
from latentcot.compare.diffusion_run import SCHEMA, run_arm
from latentcot.compare.diffusion_sudoku import PRESETS
from latentcot.compare.jobs import NOT_THE_RESULT, finish_job, plain, run_jobs, without
from latentcot.compare.run import check_places, machine
from latentcot.compare.worker import Report
from latentcot.training import TrainConfig
from latentcot.training.loop import Watcher

_BAR = 1000  # ticks of a run's progress bar: how many steps it takes is found out when it begins


@dataclass(frozen=True)
class Part:
    """One task of the study.

    Args:
        name, title: in files and on the page.
        kind, problem: arguments of :class:`SudokuProblem`, :class:`TextProblem` or :class:`RecallProblem`.
        arms: which run.
        seconds: of training, each arm; ``None`` = ``train.steps`` count.
        claim: what the part may be quoted for.
    """

    name: str
    title: str
    kind: Literal["sudoku", "text", "recall"]
    problem: Mapping[str, Any]
    train: TrainConfig
    rows: int
    arms: tuple[str, ...] = ARMS
    seconds: float | None = None
    sizes: Sizes = field(default_factory=Sizes)
    claim: str = ""

    def build(self, folder: Path, console: Console | None = None) -> Problem:
        """The problem; puzzles are kept in ``folder``."""
        if self.kind == "text":
            return TextProblem(**self.problem)
        if self.kind == "recall":
            return RecallProblem(**self.problem)
        return SudokuProblem(**self.problem, file=folder / f"{self.name}.safetensors", console=console)


@dataclass(frozen=True)
class DiffusionStudy:
    parts: tuple[Part, ...]


SECONDS = 40.0
"""Of training, each arm of a part that compares arms."""

_SHORT = TrainConfig(steps=1, learning_rate=3e-3, final_rate=0.0, warmup_steps=50, checkpoint_every=50)


def default_diffusion() -> DiffusionStudy:
    """Eight parts, thirty-three runs: about three quarters of an hour of one CPU core."""
    sanity, classes = PRESETS["sanity4"], PRESETS["classes4"]
    return DiffusionStudy(
        (
            Part(
                "sanity4",
                "Sudoku 4x4, sanity split",
                "sudoku",
                sanity.problem,
                sanity.train,
                sanity.rows,
                arms=("masked-softmax",),
                sizes=sanity.sizes,
                claim="Unseen clue patterns of grids that training has seen: it shows that training and sampling work, and says nothing "
                "about reasoning.",
            ),
            Part(
                "classes4",
                "Sudoku 4x4, unseen classes",
                "sudoku",
                classes.problem,
                replace(_SHORT, learning_rate=2e-3),
                64,
                seconds=SECONDS,
                sizes=classes.sizes,
                claim="Training has 8 of the 12 classes of grids up to relabelling, the test the other 4. Under all symmetries there are "
                "two classes only, so this too is no claim about reasoning.",
            ),
            *_text_parts(),
        )
    )


def _text_parts() -> tuple[Part, ...]:
    def part(
        task: str, title: str, block: int, claim: str, *, name: str = "", arms: tuple[str, ...] = ARMS, **options: Any
    ) -> Part:
        problem = {"options": options, "examples": 20_000, "test": 250, "block": block}
        return Part(
            name or task,
            title,
            "recall" if task == "mqar" else "text",
            problem if task == "mqar" else {"name": task, **problem},
            _SHORT,
            64,
            arms=arms,
            seconds=SECONDS,
            sizes=Sizes(layers=2, width=64, heads=4, mlp_width=192),
            claim=claim,
        )

    blocks = tuple(arm for arm in ARMS if not arm.startswith("masked"))
    orders = tuple(arm for arm in ARMS if not arm.startswith("block"))
    return (
        part(
            "countdown",
            "Countdown, 3 numbers",
            6,
            "Numbers and targets of the test were not seen together in training; any expression that reaches the target counts.",
            min_difficulty=3,
            max_difficulty=3,
            largest=9,
            bound=50,
        ),
        part(
            "chain",
            "Chains of equations, 1 to 4 operations",
            4,
            "The steps are written, then the answer, modulo 7; lines of the prompt are in random order.",
            max_difficulty=4,
            modulus=7,
            distractors=0,
            variables=8,
        ),
        part(
            "addition",
            "Addition, 3 digits",
            4,
            "The sum is written as people write it, so that its length, and with it the place of every digit, hangs on the last carry.",
            arms=orders,
            min_difficulty=3,
            max_difficulty=3,
        ),
        part(
            "addition",
            "Addition, 5 digits, least digit first",
            4,
            "The sum is written from its least digit on: every digit has its place, and carries come in the order of writing.",
            name="addition-reverse",
            arms=("autoregressive-softmax", "masked-softmax"),
            min_difficulty=5,
            max_difficulty=5,
            reverse=True,
        ),
        part(
            "mqar",
            "Associative recall (MQAR), 2 pairs",
            4,
            "As it is published: a value is filled in behind each query. With four pairs block diffusion on softmax did not get "
            "beyond the shortcut in this time. How much a state can hold is the question of `latentcot compare mqar-capacity`.",
            arms=blocks,
            min_difficulty=2,
            max_difficulty=2,
            length=8,
            vocabulary=16,
        ),
        part(
            "copy",
            "Copying, 35 and 36 symbols",
            4,
            "Sequences over an alphabet of 16, none of the test seen in training; a copy counts when all of it is right.",
            arms=blocks,
            min_difficulty=35,
            max_difficulty=36,
            alphabet=16,
        ),
    )


def quick_diffusion() -> DiffusionStudy:
    """Two parts, a few seconds a run: shows that everything runs and claims nothing."""
    parts = [
        replace(
            part,
            problem={**part.problem, "test": 40, **({"puzzles": 200} if part.kind == "sudoku" else {})},
            train=replace(_SHORT, warmup_steps=5),
            rows=16,
            seconds=3.0,
            arms=("autoregressive-softmax", "masked-softmax", "masked-hybrid", "block-softmax"),
        )
        for part in default_diffusion().parts
        if part.name in ("classes4", "chain")
    ]
    return DiffusionStudy(tuple(parts))


def select(study: DiffusionStudy, parts: Sequence[str] | None, arms: Sequence[str] | None) -> DiffusionStudy:
    """The study with these parts and arms alone; parts that have none of the arms are left out. ``ValueError`` for an unknown one."""
    known = [part.name for part in study.parts]
    if unknown := sorted(set(parts or ()) - set(known)):
        raise ValueError(f"parts: {unknown} unknown; the study has {', '.join(known)}")
    for arm in arms or ():
        split_arm(arm)
    kept = [
        replace(part, arms=tuple(arm for arm in part.arms if arms is None or arm in arms))
        for part in study.parts
        if parts is None or part.name in parts
    ]
    return DiffusionStudy(tuple(part for part in kept if part.arms))


@dataclass(frozen=True)
class DiffusionJob:
    """One run: an arm on a part, a seed."""

    part: Part
    arm: str
    seed: int
    folder: Path
    puzzles: Path
    threads: int = 1  # networks this small lose by more, on a busy machine many times over

    @property
    def name(self) -> str:
        return f"{self.part.name}-{self.arm}-seed{self.seed}"

    @property
    def steps(self) -> int:
        return _BAR

    def identity(self) -> dict[str, Any]:
        """What the result is the result of."""
        part = without(asdict(self.part), ("title", "claim", "arms"))
        found_out = () if self.part.seconds is None else ("steps",)
        part["train"] = without(part["train"], (*NOT_THE_RESULT, "seed", *found_out))
        return plain({"part": part, "arm": self.arm, "seed": self.seed})


def run_diffusion_job(job: DiffusionJob, report: Report | None = None) -> dict[str, Any]:
    """Train (or go on training), measure, write and return the result."""

    def say(step: int, of: int, loss: float, _: str) -> None:
        tick = _BAR * step // of // 10 * 10
        if report is not None and (step == of or tick != _BAR * (step - 1) // of // 10 * 10):
            report(job.name, tick, _BAR, f"step {step} of {of}, loss {loss:.3f}")

    return finish_job(job, SCHEMA, None, lambda _: _work(job, say))


def _work(job: DiffusionJob, watch: Watcher) -> dict[str, Any]:
    _, found = run_arm(
        job.part.build(job.puzzles),
        job.arm,
        job.part.sizes,
        replace(job.part.train, seed=job.seed),
        job.part.rows,
        job.folder,
        seconds=job.part.seconds,
        device="cuda" if torch.cuda.is_available() else "cpu",
        watch=watch,
    )
    made_on = without(machine(0, 0), ("cores", "jobs"))
    return {**found, "part": job.part.name, "name": job.name, "machine": made_on}


def check_study(study: DiffusionStudy, seeds: int) -> None:
    """Find what can be wrong with a study before anything runs. Raises ``ValueError``."""
    if seeds < 1:
        raise ValueError(f"seeds: at least 1 is needed, got {seeds}")
    if not study.parts:
        raise ValueError("parts: a study needs at least one")
    for part in study.parts:
        if not part.arms:
            raise ValueError(f"arms: part {part.name!r} has none")
        for arm in part.arms:
            split_arm(arm)


def run_diffusion_study(
    study: DiffusionStudy, out: Path, seeds: int = 1, jobs: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run what is not finished yet and write ``results.json``; run it again with the same folder and it goes on.

    Args:
        seeds: training seeds 0 .. seeds - 1 of every arm.
        jobs: runs side by side, of one thread each; default one a core.

    Raises:
        ValueError: a study that can not be run, or a damaged or foreign file in ``out``.
    """
    check_study(study, seeds)
    cores, jobs = check_places(out, jobs)
    console = console or Console()
    puzzles = out / "puzzles"
    problems = {part.name: part.build(puzzles, console) for part in study.parts}
    for part in study.parts:
        problem = problems[part.name]
        for arm in part.arms:
            make_arm(arm, part.sizes, problem.vocab_size, problem.length, problem.block)
    planned = [
        DiffusionJob(part, arm, seed, out / "runs" / f"{part.name}-{arm}-seed{seed}", puzzles)
        for seed in range(seeds)
        for part in study.parts
        for arm in part.arms
    ]
    about = {
        "seeds": seeds,
        "parts": [{**asdict(part), "baselines": problems[part.name].baselines()} for part in study.parts],
    }
    return run_jobs(planned, run_diffusion_job, SCHEMA, out, (cores, jobs), console, about)
