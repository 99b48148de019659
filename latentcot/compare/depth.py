r"""Does a loop over depth pay? The same blocks again and again, against the same parameters once and against the same FLOPs.

For each task three stacks, trained on the same examples for the same number of steps (arXiv:2502.17416 asks for both controls):

================= ================================================ ================================================
stack             p-hop, chains, mano                               Sudoku
================= ================================================ ================================================
looped            k blocks, r times (``depth_recurrence``)         TRM: T cycles of n updates, several segments
same_parameters   the k blocks once (``direct``)                   its network, once for each of both states
same_flops        k r blocks of their own (``direct``)             a network so deep that it costs what a segment costs
================= ================================================ ================================================

In the first column the looped stack is the stack of the control and nothing else: no adapter, s_0 = the embeddings, the last norm also
between turns, so that parameters (with ``same_parameters``) and FLOPs (with ``same_flops``) are equal exactly. In the second FLOPs are
those of one segment, the unit of a training step; answers may take several, and the page says what they cost.

Runs are jobs of :mod:`latentcot.compare.run`: one process each, a checkpoint while they train, ``result.json`` when they are done.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.compare.jobs import NOT_THE_RESULT, plain, run_jobs, without
from latentcot.compare.methods import find
from latentcot.compare.run import check_places
from latentcot.reasoner import SPECIAL, Reasoner
from latentcot.recurrent_depth.recursive_solvers import (
    DeepSupervision,
    RecursiveSolver,
    SolverConfig,
    SolverTraining,
    SupervisionConfig,
    trm,
)
from latentcot.tasks import make_task
from latentcot.tasks.base import Task
from latentcot.tasks.sudoku import SudokuConfig, SudokuTask
from latentcot.training import TrainConfig

SCHEMA = 1
STACKS = ("looped", "same_parameters", "same_flops")
Stack = Literal["looped", "same_parameters", "same_flops"]


@dataclass(frozen=True)
class TokenPart:
    """A task with an answer of tokens.

    Args:
        task, options: by name, with its configuration.
        layers, recurrences: k and r.
        readout: where the loop's norm is, see :class:`~latentcot.recurrent_depth.Readout`. Between turns it keeps the size of a state
            from growing with r.
        width, heads, mlp_width: of the blocks, softmax attention with rotary positions.
        dial: numbers of recurrences that the looped stack is asked with.
        train: of the loop; ``seed`` is set for each run.
        batch: examples a step.
        items: test examples of each difficulty.
        exit_rule: of the exit statistics, with at most the largest number of the dial.
    """

    task: str
    options: Mapping[str, Any]
    train: TrainConfig
    layers: int = 1
    recurrences: int = 4
    readout: str = "every_recurrence"
    width: int = 32
    heads: int = 2
    mlp_width: int = 64
    dial: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    batch: int = 128
    items: int = 300
    exit_rule: Mapping[str, Any] = field(default_factory=lambda: {"kind": "kl", "threshold": 5e-4})

    def make_task(self) -> Task:
        return make_task(self.task, **self.options)

    def backbone(self, stack: Stack, task: Task) -> HybridConfig:
        """Configuration of a stack's blocks."""
        return HybridConfig(
            vocab_size=task.limits.vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.layers * (self.recurrences if stack == "same_flops" else 1),
            mixer="attention",
            attention={"num_heads": self.heads, "rope_theta": 100.0},
            intermediate_size=self.mlp_width,
            initializer_range=0.85 * self.width**-0.5,
            pad_token_id=SPECIAL.pad,
            bos_token_id=SPECIAL.bos,
            eos_token_id=SPECIAL.eos,
        )

    def reasoner(self, stack: Stack, task: Task, seed: int) -> Reasoner:
        """A freshly initialised stack as a method."""
        torch.manual_seed(seed)
        backbone = HybridForCausalLM(self.backbone(stack, task))
        if stack != "looped":
            return find("direct")(backbone, {})
        settings = {
            "prelude": 0,
            "core": self.layers,
            "coda": 0,
            "initial_state": "embedding",
            "injection": "none",
            "readout": self.readout,
            "sampler": {"kind": "fixed", "mean": self.recurrences},
            "gradient_window": {"last": None},
            "monitor_every": max(1, self.train.steps // 10),
        }
        return find("depth_recurrence")(backbone, settings)


@dataclass(frozen=True)
class SudokuPart:
    """Sudoku by a recursive solver.

    Args:
        options: of :class:`~latentcot.tasks.sudoku.SudokuConfig`.
        sizes: changes of :func:`~latentcot.recurrent_depth.recursive_solvers.trm`.
        segments: of the looped stack; its controls have one.
        training: of :class:`~latentcot.recurrent_depth.recursive_solvers.SolverTraining`; ``seed`` is set for each run.
        puzzles, test: distinct training puzzles, each seen under fresh symmetries, and test puzzles.
        batch: rows a step.
        dial: numbers of segments that the looped stack is asked with.
        level: what difficulty means: ``blanks`` (4x4, where all puzzles fall to singles) or ``guesses`` (the task's own classes).
        same_flops_rate: learning rate of the control of equal FLOPs, which is deeper than the loop's network and learns nothing at a
            rate that suits it; ``None`` = the loop's.
        compiled: blocks through ``torch.compile``, for a GPU; speed alone.
    """

    options: Mapping[str, Any]
    sizes: Mapping[str, Any]
    training: SolverTraining
    segments: int = 8
    puzzles: int = 1000
    test: int = 500
    batch: int = 64
    dial: tuple[int, ...] = (1, 2, 4, 8, 16)
    level: Literal["blanks", "guesses"] = "blanks"
    same_flops_rate: float | None = None
    compiled: bool = False

    @property
    def task(self) -> str:
        return "sudoku"

    def make_task(self) -> SudokuTask:
        return SudokuTask(SudokuConfig(**self.options))

    def solver(self, stack: Stack) -> SolverConfig:
        """Configuration of a stack's network."""
        size = self.make_task().config.size
        looped = trm(size + 2, size**2, **self.sizes)
        if stack == "looped":
            return looped
        updates = looped.cycles * (looped.latent_updates + 1)
        layers = looped.layers if stack == "same_parameters" else looped.layers * updates // 2
        return replace(looped, cycles=1, latent_updates=1, layers=layers)

    def model(self, stack: Stack, seed: int) -> DeepSupervision:
        """A freshly initialised stack."""
        torch.manual_seed(seed)
        segments = self.segments if stack == "looped" else 1
        solver = RecursiveSolver(self.solver(stack))
        if self.compiled:
            solver.compile_blocks()
        return DeepSupervision(solver, SupervisionConfig(segments=segments))

    def train(self, stack: Stack, seed: int) -> SolverTraining:
        """How a stack is trained."""
        changes: dict[str, Any] = {"seed": seed}
        if stack == "same_flops" and self.same_flops_rate is not None:
            changes["learning_rate"] = self.same_flops_rate
        return replace(self.training, **changes)


@dataclass(frozen=True)
class DepthStudy:
    """Parts of a study, one a task; ``device``: ``cpu`` or ``cuda``."""

    name: str
    parts: tuple[TokenPart | SudokuPart, ...]
    device: str = "cpu"


def _token_train(steps: int, rate: float = 5e-3) -> TrainConfig:
    return TrainConfig(steps=steps, learning_rate=rate, warmup_steps=50, final_rate=0.05, checkpoint_every=100)


def default_depth() -> DepthStudy:
    """Tiny: stacks of one block and a few thousand parameters; about 40 minutes of a CPU core a seed (the loop of p-hop alone some six)."""
    solver = {"hidden_size": 48, "num_heads": 2, "multiple_of": 32, "mixing": "mlp", "prefix": 1, "cycles": 2}
    return DepthStudy(
        name="depth",
        parts=(
            TokenPart(
                "p_hop",
                {"alphabet": 4, "length": 12, "max_difficulty": 3},
                _token_train(4000),
                recurrences=6,
                dial=(1, 2, 3, 4, 6, 8, 12),
            ),
            TokenPart(
                "chain",
                {"modulus": 5, "distractors": 0, "variables": 5, "max_difficulty": 3},
                _token_train(3000),
                recurrences=6,
                dial=(1, 2, 3, 4, 6, 8, 12),
                batch=64,
            ),
            TokenPart(
                "mano",
                {"modulus": 5, "max_difficulty": 4},
                _token_train(5000),
                recurrences=6,
                dial=(1, 2, 3, 4, 6, 8, 12),
                batch=64,
            ),
            SudokuPart(
                {"size": 4, "blanks": 8, "fewest_blanks": 3},
                {**solver, "latent_updates": 2},
                SolverTraining(
                    steps=2000, learning_rate=2e-3, warmup_steps=50, weight_decay=0.1, average=0.98, grad_clip=1.0
                ),
                same_flops_rate=1e-3,  # of 2e-3, 1e-3, 5e-4 and 2e-4 the one that it learns most with
            ),
        ),
    )


def quick_depth() -> DepthStudy:
    """The same with a few steps: shows that everything runs and claims nothing."""
    study = default_depth()
    parts: list[TokenPart | SudokuPart] = []
    for part in study.parts:
        if isinstance(part, TokenPart):
            parts.append(replace(part, train=replace(part.train, steps=20, warmup_steps=5), items=40, batch=32))
        else:
            parts.append(replace(part, training=replace(part.training, steps=20), puzzles=100, test=60, batch=32))
    return replace(study, name="depth-quick", parts=tuple(parts))


def sudoku9_depth() -> DepthStudy:
    """Sudoku 9x9 by canonical grid, for some ten minutes of a GPU a seed, before which puzzles take minutes of a processor."""
    part = SudokuPart(
        {"size": 9, "blanks": 54},
        {"hidden_size": 256, "num_heads": 4, "mixing": "mlp"},
        SolverTraining(
            steps=4000,
            learning_rate=5e-4,
            warmup_steps=500,
            weight_decay=1.0,
            average=0.99,
            grad_clip=1.0,
            precision="bfloat16",
        ),
        segments=16,
        test=1000,
        batch=256,
        dial=(1, 2, 4, 8, 16, 32),
        level="guesses",
        same_flops_rate=1e-4,
        compiled=True,
    )
    return DepthStudy("depth-sudoku9", (part,), "cuda")


@dataclass(frozen=True)
class DepthJob:
    """One run: a part, a stack, a seed."""

    part: TokenPart | SudokuPart
    stack: Stack
    seed: int
    folder: Path = field(default_factory=Path)
    shared: Path = field(default_factory=Path)
    device: str = "cpu"
    threads: int = 1

    @property
    def name(self) -> str:
        return f"{self.part.task}-{self.stack}-seed{self.seed}"

    @property
    def steps(self) -> int:
        return self.part.train.steps if isinstance(self.part, TokenPart) else self.part.training.steps

    def identity(self) -> dict[str, Any]:
        """What the result is the result of; how often is saved or logged does not count."""
        part = asdict(self.part)
        if isinstance(self.part, TokenPart):
            part["train"] = without(part["train"], NOT_THE_RESULT)
        else:
            part = without(part, ("same_flops_rate", "compiled"))
            if self.stack == "same_flops":
                part["training"]["learning_rate"] = self.part.train(self.stack, self.seed).learning_rate
        return plain({"part": part, "task": self.part.task, "stack": self.stack, "seed": self.seed})


def plan(study: DepthStudy, out: Path, seeds: int, threads: int = 1) -> list[DepthJob]:
    """Every run, the costly ones of each part first, so that no core is idle at the end."""
    order: tuple[Stack, ...] = ("looped", "same_flops", "same_parameters")
    jobs = [
        DepthJob(part, stack, seed, Path(), out / f"{part.task}-puzzles.safetensors", study.device, threads)
        for stack in order
        for part in study.parts
        for seed in range(seeds)
    ]
    return [replace(job, folder=out / "runs" / job.name) for job in jobs]


def check_depth(study: DepthStudy) -> None:
    """Find what can be wrong with a study before anything runs. Raises ``ValueError``."""
    if not study.parts:
        raise ValueError("parts: a study needs at least one task")
    names = [part.task for part in study.parts]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"parts: {repeated} named twice")
    if study.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"study {study.name!r} is for a GPU, but torch {torch.__version__} finds no CUDA device")
    for part in study.parts:
        if list(part.dial) != sorted(set(part.dial)) or not part.dial or part.dial[0] < 1:
            raise ValueError(f"dial of {part.task!r}: expected rising numbers of at least 1, got {part.dial}")
        trained = part.recurrences if isinstance(part, TokenPart) else part.segments
        if trained not in part.dial:
            raise ValueError(f"dial of {part.task!r}: {part.dial} leaves out the number that is trained, {trained}")
        task = part.make_task()
        if isinstance(part, TokenPart):
            if not task.levels("test"):
                raise ValueError(f"task {part.task!r}: no difficulty has test examples")
            with torch.device("meta"):
                for stack in STACKS:
                    HybridForCausalLM(part.backbone(stack, task))
        else:
            looped = part.solver("looped")
            if looped.cycles * (looped.latent_updates + 1) * looped.layers % 2:
                raise ValueError(
                    "sizes: cycles * (latent_updates + 1) * layers must be even, to have a control of equal FLOPs"
                )


def select_tasks(study: DepthStudy, names: list[str] | None) -> DepthStudy:
    """The study with some of its tasks. Raises ``ValueError`` for a name that it does not have."""
    if names is None:
        return study
    known = [part.task for part in study.parts]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"tasks: {unknown} given, expected some of {', '.join(known)}")
    return replace(study, parts=tuple(part for part in study.parts if part.task in names))


def run_depth_study(
    study: DepthStudy, out: Path, seeds: int = 2, jobs: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run what is not finished yet and write ``results.json``; run it again with the same folder and it goes on.

    Args:
        seeds: training seeds 0 .. seeds - 1 of every stack.
        jobs: runs side by side; default one a core, of one thread each (one on a GPU).

    Raises:
        ValueError: a study that can not be run, or a damaged or foreign file in ``out``.
    """
    from latentcot.compare.depth_runs import baselines, run_depth_job

    if seeds < 1:
        raise ValueError(f"seeds: at least 1 is needed, got {seeds}")
    cores, jobs = check_places(out, 1 if jobs is None and study.device == "cuda" else jobs)
    console = console or Console()
    check_depth(study)
    out.mkdir(parents=True, exist_ok=True)
    planned = plan(study, out, seeds, max(1, cores // jobs))
    # In front of the training: it makes the puzzles that all runs share.
    without_training = {
        part.task: baselines(part, out / f"{part.task}-puzzles.safetensors", console) for part in study.parts
    }
    about = {
        "study": {"name": study.name, "device": study.device, "seeds": seeds},
        "parts": {part.task: {"kind": type(part).__name__, **asdict(part)} for part in study.parts},
        "baselines": without_training,
    }
    return run_jobs(planned, run_depth_job, SCHEMA, out, (cores, jobs), console, about)
