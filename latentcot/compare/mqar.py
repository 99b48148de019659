"""MQAR at the published sizes in minutes on a CPU: two layers, one setting a run, accuracy over queries on test sequences.

Protocol A of the literature (:data:`latentcot.tasks.mqar.PROTOCOL_A`) on this backbone. What differs from it, to be done in minutes:
fewer examples (each seen once), one learning rate instead of the best of four, embeddings and matrices drawn with deviation 0.1
instead of 0.02 (at 0.02 the same training takes several times as long to begin), uniform taps of
convolutions, a small MLP, RMSNorm, no dropout.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.compare.hybrid_ratio import MQARData, measure_recall, mixer_options, state_bytes
from latentcot.compare.jobs import NOT_THE_RESULT, finish_job, plain, run_jobs, without
from latentcot.compare.run import check_places
from latentcot.compare.worker import Report
from latentcot.tasks.mqar import PROTOCOL_A, MQARSetting, MQARTask
from latentcot.training import TrainConfig, count_parameters, train
from latentcot.training.language import LanguageModel
from latentcot.training.loop import Watcher

SCHEMA = 1


@dataclass(frozen=True)
class MQARStudy:
    """
    Args:
        mixers: by name; each is trained on each setting.
        settings: (length, pairs) of protocol A.
        train: the loop's values; ``seed`` is set for each run.
        batch_size: sequences a step.
        width, layers, heads, mlp_width: of the stack.
        items: test sequences.
    """

    mixers: tuple[str, ...]
    settings: tuple[tuple[int, int], ...]
    train: TrainConfig
    batch_size: int = 128
    width: int = 64
    layers: int = 2
    heads: int = 1
    mlp_width: int = 128
    items: int = 3000

    def task(self, length: int, pairs: int) -> MQARTask:
        """Of one setting, filler 0 as in the published figure."""
        known = {(s.length, s.pairs): s for s in PROTOCOL_A}
        if (length, pairs) not in known:
            raise ValueError(f"settings: {(length, pairs)} is not of protocol A: {', '.join(map(str, known))}")
        setting: MQARSetting = known[length, pairs]
        return setting.task(filler="zero")

    def backbone(self, mixer: str, vocab_size: int) -> HybridConfig:
        return HybridConfig(
            vocab_size=vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            mixer=mixer,
            intermediate_size=self.mlp_width,
            initializer_range=0.1,
            convolution_init="uniform",
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            **mixer_options(mixer, self.width, self.heads),
        )


def default_mqar() -> MQARStudy:
    """DeltaNet and Gated DeltaNet at (64, 4) and (128, 8): minutes on a laptop."""
    return MQARStudy(
        mixers=("deltanet", "gated_deltanet"),
        settings=((64, 4), (128, 8)),
        train=TrainConfig(steps=400, learning_rate=1e-2, warmup_steps=50, final_rate=0.0, checkpoint_every=100),
    )


def quick_mqar() -> MQARStudy:
    """A few steps of one mixer, to see that it runs."""
    study = default_mqar()
    return replace(
        study,
        mixers=("gated_deltanet",),
        settings=((64, 4),),
        train=replace(study.train, steps=20, warmup_steps=5),
        batch_size=32,
        items=200,
    )


@dataclass(frozen=True)
class MQARJob:
    """One run: a mixer, a setting, a seed."""

    study: MQARStudy
    mixer: str
    length: int
    pairs: int
    seed: int
    folder: Path
    threads: int = 1

    @property
    def name(self) -> str:
        return f"{self.mixer}-{self.length}-{self.pairs}-seed{self.seed}"

    @property
    def steps(self) -> int:
        return self.study.train.steps

    def identity(self) -> dict[str, Any]:
        """What the result is the result of."""
        study = without(asdict(self.study), ("mixers", "settings"))
        study["train"] = without(study["train"], (*NOT_THE_RESULT, "seed"))
        cell = {"mixer": self.mixer, "length": self.length, "pairs": self.pairs, "seed": self.seed}
        return plain({**study, **cell})


def run_mqar_job(job: MQARJob, report: Report | None = None) -> dict[str, Any]:
    """Train (or go on training), measure, write and return the result."""
    return finish_job(job, SCHEMA, report, lambda watch: _work(job, watch))


def _work(job: MQARJob, watch: Watcher) -> dict[str, Any]:
    study, task = job.study, job.study.task(job.length, job.pairs)
    torch.manual_seed(job.seed)
    model = LanguageModel(HybridForCausalLM(study.backbone(job.mixer, task.config.vocabulary)))
    config = replace(study.train, seed=job.seed)
    training = train(model, MQARData(task, study.batch_size), config, job.folder, watch)  # type: ignore[arg-type]
    began = time.perf_counter()
    accuracy = measure_recall(model, task, (job.pairs,), study.items, "test")[str(job.pairs)]
    return {
        "mixer": job.mixer,
        "length": job.length,
        "pairs": job.pairs,
        "seed": job.seed,
        "accuracy": accuracy,
        "state_bytes": state_bytes(model, job.length),
        "parameters": count_parameters(model),
        "training": asdict(training),
        "evaluation_seconds": time.perf_counter() - began,
    }


def run_mqar_study(
    study: MQARStudy, out: Path, seeds: int = 1, jobs: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run what is not finished yet and write ``results.json``. Raises ``ValueError`` for a study that can not be run."""
    if seeds < 1:
        raise ValueError(f"seeds: at least 1 is needed, got {seeds}")
    if not study.mixers:
        raise ValueError("mixers: a study needs at least one")
    cores, jobs = check_places(out, jobs)
    console = console or Console()
    with torch.device("meta"):
        for mixer in study.mixers:
            HybridForCausalLM(study.backbone(mixer, study.task(*study.settings[0]).config.vocabulary))
    planned = [
        MQARJob(study, mixer, length, pairs, seed, Path(), max(1, cores // jobs))
        for seed in range(seeds)
        for length, pairs in sorted(study.settings, reverse=True)
        for mixer in study.mixers
    ]
    planned = [replace(job, folder=out / "runs" / job.name) for job in planned]
    about = {"study": {**asdict(study), "seeds": seeds}}
    return run_jobs(planned, run_mqar_job, SCHEMA, out, (cores, jobs), console, about)


def mqar_table(results: dict[str, Any]) -> Table:
    """Accuracy of every run."""
    table = Table(title="MQAR: accuracy over queries", box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    columns: Sequence[str] = ("mixer", "length", "pairs", "seed", "accuracy", "state bytes", "train s")
    for name in columns:
        table.add_column(name, justify="left" if name == "mixer" else "right", no_wrap=True)
    for run in sorted(results["runs"], key=lambda r: (r["length"], r["mixer"], r["seed"])):
        cells = (run["length"], run["pairs"], run["seed"], f"{run['accuracy']:.4f}", f"{run['state_bytes']:,}")
        table.add_row(run["mixer"], *map(str, cells), f"{run['training']['seconds']:.0f}")
    return table
