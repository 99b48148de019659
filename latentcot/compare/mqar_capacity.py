"""How much a state holds: protocol B of MQAR, accuracy over queries against bytes of state.

One stack for each mixer and width is trained on a mixture of settings (:data:`latentcot.tasks.mqar.PROTOCOL_B_TRAIN`) and tested
on seven, up to 1024 tokens with 256 pairs, twice as many as it was trained on. Differences from the published protocol, to be
done in minutes on one GPU: two passes over the examples instead of 32, two learning rates instead of four, one head, and what
:mod:`latentcot.compare.mqar` lists. ``latentcot compare mqar-capacity`` runs it, on a GPU where there is one.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.compare.hybrid_ratio import MIXERS, measure_recall, mixer_options, state_bytes
from latentcot.compare.jobs import NOT_THE_RESULT, finish_job, plain, run_jobs, without
from latentcot.compare.run import check_places
from latentcot.compare.worker import Report
from latentcot.tasks.mqar import PROTOCOL_B_TEST, PROTOCOL_B_TRAIN, MQARSetting, MQARTask
from latentcot.training import TrainConfig, count_parameters, train
from latentcot.training.language import LanguageModel, TokenBatch
from latentcot.training.loop import Watcher

SCHEMA = 1
WITH_CONVOLUTION = ("hgrn", "gla", "hgrn2", "deltanet", "gated_deltanet")  # mixers that have the option


@dataclass(frozen=True)
class CapacityStudy:
    """
    Args:
        mixers, widths: every pair is one stack; heads have the whole width, so that states grow with its square.
        rates: learning rates; the one with the best mean accuracy on validation sequences counts.
        train: the loop's values; ``seed`` and ``learning_rate`` are set for each run.
        batch_size: sequences a step, all of one setting.
        layers, mlp_ratio: of the stack; the MLP has ``mlp_ratio`` times the width.
        short_convolution: give one to every mixer that can have it (RetNet and attention can not), so that what is measured is what a
            state holds and not whether two layers can bind a value to the key in front of it.
        items: sequences of each test setting.
        trained, tested: settings.
    """

    mixers: tuple[str, ...]
    widths: tuple[int, ...]
    rates: tuple[float, ...]
    train: TrainConfig
    batch_size: int = 256
    layers: int = 2
    mlp_ratio: int = 2
    short_convolution: bool = True
    items: int = 1000
    trained: tuple[MQARSetting, ...] = PROTOCOL_B_TRAIN
    tested: tuple[MQARSetting, ...] = PROTOCOL_B_TEST

    def backbone(self, mixer: str, width: int, vocab_size: int) -> HybridConfig:
        options = mixer_options(mixer, width, 1)
        if self.short_convolution and mixer in WITH_CONVOLUTION:
            options[mixer] |= {"use_short_conv": True}
        return HybridConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=self.layers,
            mixer=mixer,
            intermediate_size=self.mlp_ratio * width,
            initializer_range=0.1,
            convolution_init="uniform",
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            **options,
        )


def default_capacity() -> CapacityStudy:
    """Six mixers and full attention at three widths and two learning rates: 42 runs, minutes each on one GPU."""
    return CapacityStudy(
        mixers=(*MIXERS, "attention"),
        widths=(32, 64, 128),
        rates=(3e-3, 1e-2),
        train=TrainConfig(steps=1406, learning_rate=1e-2, warmup_steps=70, final_rate=0.0, checkpoint_every=400),
    )


def quick_capacity() -> CapacityStudy:
    """Two mixers, a few steps on the short settings, to see that it runs."""
    study = default_capacity()
    return replace(
        study,
        mixers=("hgrn", "gated_deltanet"),
        widths=(32,),
        rates=(1e-2,),
        train=replace(study.train, steps=20, warmup_steps=5),
        batch_size=16,
        items=40,
        trained=study.trained[:2],
        tested=study.tested[:4],
    )


@dataclass(frozen=True)
class Mixture:
    """Training sequences: settings take turns by their share of the examples, each batch is of one of them.

    Batch n depends on n alone. The examples of a setting come in order and begin again when all were seen.
    """

    settings: tuple[MQARSetting, ...]
    batch_size: int

    @cached_property
    def tasks(self) -> tuple[MQARTask, ...]:
        return tuple(setting.task(filler="zero") for setting in self.settings)

    @cached_property
    def turns(self) -> tuple[tuple[int, int], ...]:
        """One round: (setting, how many batches of it came before in this round), spread evenly."""
        least = min(setting.train for setting in self.settings)
        shares = [max(1, round(setting.train / least)) for setting in self.settings]
        places = [((i + 0.5) / share, s, i) for s, share in enumerate(shares) for i in range(share)]
        return tuple((s, i) for _, s, i in sorted(places))

    def stream(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[TokenBatch]:
        number = start
        while True:
            turn, place = divmod(number, len(self.turns))
            setting, before = self.turns[place]
            first = (turn * sum(s == setting for s, _ in self.turns) + before) * self.batch_size
            count = self.settings[setting].train
            made = self.tasks[setting].dense("train", [(first + i) % count for i in range(self.batch_size)])
            yield TokenBatch(made.ids, made.labels).share(rank, world_size)
            number += 1

    def describe(self) -> dict[str, Any]:
        return {"settings": [asdict(s) for s in self.settings], "batch_size": self.batch_size}


@dataclass(frozen=True)
class CapacityJob:
    """One run: a mixer, a width, a learning rate, a seed."""

    study: CapacityStudy
    mixer: str
    width: int
    rate: float
    seed: int
    folder: Path
    threads: int = 1

    @property
    def name(self) -> str:
        return f"{self.mixer}-{self.width}-lr{self.rate:g}-seed{self.seed}"

    @property
    def steps(self) -> int:
        return self.study.train.steps

    def identity(self) -> dict[str, Any]:
        """What the result is the result of."""
        study = without(asdict(self.study), ("mixers", "widths", "rates"))
        study["train"] = without(study["train"], (*NOT_THE_RESULT, "seed", "learning_rate"))
        cell = {"mixer": self.mixer, "width": self.width, "rate": self.rate, "seed": self.seed}
        return plain({**study, **cell})


def run_capacity_job(job: CapacityJob, report: Report | None = None) -> dict[str, Any]:
    """Train (or go on training), measure, write and return the result."""
    return finish_job(job, SCHEMA, report, lambda watch: _work(job, watch))


def _work(job: CapacityJob, watch: Watcher) -> dict[str, Any]:
    study = job.study
    data = Mixture(study.trained, study.batch_size)
    torch.manual_seed(job.seed)
    model = LanguageModel(HybridForCausalLM(study.backbone(job.mixer, job.width, data.tasks[0].config.vocabulary)))
    config = replace(study.train, seed=job.seed, learning_rate=job.rate)
    training = train(model, data, config, job.folder, watch)  # type: ignore[arg-type]
    model.eval()
    began = time.perf_counter()

    def accuracy(settings: tuple[MQARSetting, ...], items: int, split: str) -> list[float]:
        tasks = [setting.task(filler="zero") for setting in settings]
        return [
            measure_recall(model, t, (s.pairs,), items, split)[str(s.pairs)]
            for t, s in zip(tasks, settings, strict=True)
        ]

    return {
        "mixer": job.mixer,
        "width": job.width,
        "rate": job.rate,
        "seed": job.seed,
        "test": accuracy(study.tested, study.items, "test"),
        "validation": accuracy(study.trained, max(1, study.items // 4), "val"),
        "state_bytes": [state_bytes(model, setting.length) for setting in study.tested],
        "parameters": count_parameters(model),
        "training": asdict(training),
        "evaluation_seconds": time.perf_counter() - began,
    }


def run_capacity_study(
    study: CapacityStudy, out: Path, seeds: int = 1, jobs: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run what is not finished yet and write ``results.json``. Raises ``ValueError`` for a study that can not be run."""
    if seeds < 1:
        raise ValueError(f"seeds: at least 1 is needed, got {seeds}")
    for name in ("mixers", "widths", "rates", "trained", "tested"):
        if not getattr(study, name):
            raise ValueError(f"{name}: a study needs at least one")
    cores, jobs = check_places(out, jobs)
    console = console or Console()
    with torch.device("meta"):
        for mixer in study.mixers:
            for width in study.widths:
                HybridForCausalLM(study.backbone(mixer, width, 16))
    planned = [
        CapacityJob(study, mixer, width, rate, seed, Path(), max(1, cores // jobs))
        for seed in range(seeds)
        for width in sorted(study.widths, reverse=True)
        for mixer in study.mixers
        for rate in study.rates
    ]
    planned = [replace(job, folder=out / "runs" / job.name) for job in planned]
    about = {"study": {**asdict(study), "seeds": seeds}}
    return run_jobs(planned, run_capacity_job, SCHEMA, out, (cores, jobs), console, about)
