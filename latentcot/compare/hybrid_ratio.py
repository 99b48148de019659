r"""The ratio study in small: six linear mixers, how many full-attention layers, recall and language modelling (arXiv:2507.06457).

A *cell* is one stack: a mixer with ``period`` r (layer i is full attention if (i + 1) mod r = 0), ``None`` = pure, or the transformer.
The study has 24 layers, where 24-1, 12-1, 6-1 and 3-1 are one full layer in 24, 12, 6 and 3. A stack of L layers holds those
whose r divides L: six layers 6-1 and 3-1, as they are; 12-1 and 24-1 need at least 12 and 24 layers (``layers=12``).
Every cell is trained from scratch, for each seed, on

* MQAR: recall = accuracy over queries, by number of pairs;
* text: bytes of a local corpus; loss = nats a byte on the last tenth of it, which no cell trains on.

Runs are jobs of :mod:`latentcot.compare.run`: one process each, a checkpoint while they train, ``result.json`` when they are done.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.compare.jobs import NOT_THE_RESULT, finish_job, plain, run_jobs, without
from latentcot.compare.run import check_places
from latentcot.compare.worker import Report
from latentcot.tasks.mqar import MQARConfig, MQARTask
from latentcot.training import TrainConfig, count_parameters, train
from latentcot.training.language import LanguageModel, TokenBatch, TokenSource, scores
from latentcot.training.loop import Watcher
from latentcot.training.packing import PackedText, TokenizedText, read_documents, tokenize_corpus

SCHEMA = 1
MIXERS = ("hgrn", "retnet", "gla", "hgrn2", "deltanet", "gated_deltanet")
STUDY_PERIODS = (24, 12, 6, 3)
TRANSFORMER = "transformer"

Part = Literal["mqar", "text"]


@dataclass(frozen=True)
class RatioStudy:
    """
    Args:
        mixers: linear mixers, by name.
        layers, width, heads, mlp_width: of every stack; all mixers have ``heads`` heads.
        initializer_range, embedding_scale: weights start small and embeddings near one, so that six layers do not drown the tokens.
        rope_theta: base of the rotary angles of full attention; a few dozen tokens need no wavelengths of thousands.
        mqar: options of :class:`~latentcot.tasks.mqar.MQARConfig`.
        pairs: numbers of pairs that recall is measured at; the last one is what claims are about.
        mqar_rates: learning rates of the MQAR runs; the better one on validation sequences counts.
        mqar_train, text_train: of the loop; ``seed`` is set for each run.
        mqar_batch, text_batch: rows a step.
        text_length: tokens a row of text.
        items: test sequences for each number of pairs.
        text_items: validation rows.
    """

    name: str
    mixers: tuple[str, ...]
    layers: int
    width: int
    heads: int
    mlp_width: int
    mqar: Mapping[str, Any]
    pairs: tuple[int, ...]
    mqar_rates: tuple[float, ...]
    mqar_train: TrainConfig
    text_train: TrainConfig
    mqar_batch: int = 64
    text_batch: int = 8
    text_length: int = 128
    items: int = 500
    text_items: int = 64
    initializer_range: float = 0.05
    embedding_scale: float = 6.0
    rope_theta: float = 100.0

    @property
    def periods(self) -> tuple[int | None, ...]:
        """Pure, then the study's ratios that these layers can hold, fewest full layers first."""
        return (None, *(r for r in STUDY_PERIODS if self.layers % r == 0))

    @property
    def cells(self) -> tuple[tuple[str, int | None], ...]:
        """``(mixer, period)`` of every stack; the transformer last, as ``("transformer", 1)``."""
        return (*((mixer, period) for mixer in self.mixers for period in self.periods), (TRANSFORMER, 1))

    def backbone(self, mixer: str, period: int | None, vocab_size: int) -> HybridConfig:
        """Configuration of one cell."""
        options = mixer_options("attention" if mixer == TRANSFORMER else mixer, self.width, self.heads)
        options["attention"] |= {"rope_theta": self.rope_theta}
        return HybridConfig(
            vocab_size=vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            mixer="attention" if mixer == TRANSFORMER else mixer,
            period=None if mixer == TRANSFORMER else period,
            intermediate_size=self.mlp_width,
            initializer_range=self.initializer_range,
            convolution_init="uniform",
            embedding_scale=self.embedding_scale,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            **options,
        )


def mixer_options(mixer: str, width: int, heads: int) -> dict[str, Any]:
    """Configuration of ``mixer``, and of the full attention between its layers, with ``heads`` heads each."""
    options: dict[str, Any] = {
        "attention": {"num_heads": heads},
        "hgrn": {},
        "retnet": {"num_heads": heads},
        "gla": {"num_heads": heads},
        "hgrn2": {"num_heads": heads, "expand_ratio": None},
        "deltanet": {"num_heads": heads},
        "gated_deltanet": {"num_heads": heads, "head_dim": width // heads},
    }
    return {name: values for name, values in options.items() if name in (mixer, "attention")}


def ratio_name(period: int | None) -> str:
    """``pure``, ``6-1``, or ``full`` for nothing but full attention."""
    return "pure" if period is None else "full" if period == 1 else f"{period}-1"


def default_study() -> RatioStudy:
    """About half an hour on two CPU cores with two seeds (added up from single runs on a busy machine)."""
    return RatioStudy(
        name="hybrid-ratio",
        mixers=MIXERS,
        layers=6,
        width=32,
        heads=1,
        mlp_width=64,
        mqar={"length": 32, "min_difficulty": 4, "max_difficulty": 4, "vocabulary": 256, "filler": "zero"},
        pairs=(4,),
        mqar_rates=(1e-2,),
        mqar_train=TrainConfig(steps=1200, learning_rate=1e-2, warmup_steps=30, final_rate=0.0, checkpoint_every=200),
        text_train=TrainConfig(steps=600, learning_rate=5e-3, warmup_steps=30, checkpoint_every=100),
    )


def quick_study() -> RatioStudy:
    """About two minutes: two mixers, a few steps; shows that everything runs and claims next to nothing."""
    study = default_study()
    return replace(
        study,
        name="hybrid-ratio-quick",
        mixers=("gla", "gated_deltanet"),
        mqar_train=replace(study.mqar_train, steps=40),
        text_train=replace(study.text_train, steps=30),
        items=60,
        text_items=16,
    )


@dataclass(frozen=True)
class RatioJob:
    """One run: a cell, a seed, and what it learns."""

    study: RatioStudy
    part: Part
    mixer: str
    period: int | None
    seed: int
    rate: float
    folder: Path
    text: Path = field(default_factory=Path)
    threads: int = 1

    @property
    def name(self) -> str:
        cell = self.mixer if self.mixer == TRANSFORMER else f"{self.mixer}-{ratio_name(self.period)}"
        return f"{self.part}-{cell}-lr{self.rate:g}-seed{self.seed}"

    @property
    def steps(self) -> int:
        return self.train_config.steps

    @property
    def train_config(self) -> TrainConfig:
        chosen = self.study.mqar_train if self.part == "mqar" else self.study.text_train
        return replace(chosen, seed=self.seed, learning_rate=self.rate)

    def identity(self) -> dict[str, Any]:
        """What the result is the result of: what it was trained and measured on, but not which other cells the study has."""
        of_mqar, of_text = (
            ("mqar", "mqar_train", "mqar_batch", "items", "pairs"),
            ("text_train", "text_batch", "text_length", "text_items"),
        )
        others = of_mqar if self.part == "text" else of_text
        study = without(asdict(self.study), ("name", "mixers", "mqar_rates", *others))
        own = f"{self.part}_train"
        study[own] = without(study[own], NOT_THE_RESULT)
        text = TokenizedText(self.text).sha256 if self.part == "text" else None
        cell = {"part": self.part, "mixer": self.mixer, "period": self.period, "seed": self.seed, "rate": self.rate}
        return plain({**study, **cell, "text": text})


@dataclass(frozen=True)
class MQARData:
    """Training sequences of MQAR: batch n holds examples n·B to (n + 1)·B - 1, over all processes."""

    task: MQARTask
    batch_size: int

    def stream(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[TokenBatch]:
        number = start
        while True:
            made = self.task.dense("train", range(number * self.batch_size, (number + 1) * self.batch_size))
            yield TokenBatch(made.ids, made.labels).share(rank, world_size)
            number += 1

    def describe(self) -> dict[str, Any]:
        return {"task": repr(self.task), "batch_size": self.batch_size}


def text_rows(study: RatioStudy, text: TokenizedText) -> tuple[PackedText, np.ndarray]:
    """Training rows (the first nine tenths), and the numbers of the validation rows, spread evenly over the last tenth."""
    whole = (len(text) - 1) // study.text_length
    border = whole * 9 // 10
    data = PackedText(text, study.text_length, study.text_batch, last=border, resets=False)
    held = np.unique(np.linspace(border, whole - 1, study.text_items).round().astype(np.int64))
    return data, held


@lru_cache(maxsize=4)
def _mqar_task(options: str) -> MQARTask:
    return MQARTask(MQARConfig(**json.loads(options)))


def measure_recall(
    model: LanguageModel, task: MQARTask, pairs: tuple[int, ...], items: int, split: Any
) -> dict[str, float]:
    """Accuracy over queries by number of pairs."""
    found = {}
    for n in pairs:
        right = asked = 0
        for start in range(0, items, 250):
            made = task.dense(split, range(start, min(items, start + 250)), n)
            _, hits, labels = scores(model, TokenBatch(made.ids, made.labels).to(model.backbone.device))
            right, asked = right + hits, asked + labels
        found[str(n)] = right / asked
    return found


def state_bytes(model: LanguageModel, length: int) -> int:
    """Bytes of the state after ``length`` tokens of one sequence, keys and values included, as the model holds it."""
    with torch.no_grad():
        ids = torch.zeros(1, length, dtype=torch.long, device=model.backbone.device)
        state = model.backbone(input_ids=ids, use_cache=True).state
    return int(state.nbytes)


def run_ratio_job(job: RatioJob, report: Report | None = None) -> dict[str, Any]:
    """Train (or go on training), measure, write and return the result."""
    return finish_job(job, SCHEMA, report, lambda watch: _work(job, watch))


def _work(job: RatioJob, watch: Watcher) -> dict[str, Any]:
    study = job.study
    task = _mqar_task(json.dumps(dict(study.mqar)))
    text = TokenizedText(job.text) if job.part == "text" else None
    vocab_size = text.vocab_size if text is not None else task.config.vocabulary
    torch.manual_seed(job.seed)
    model = LanguageModel(HybridForCausalLM(study.backbone(job.mixer, job.period, vocab_size)))
    data: TokenSource = MQARData(task, study.mqar_batch) if text is None else text_rows(study, text)[0]
    training = train(model, data, job.train_config, job.folder, watch)  # type: ignore[arg-type]
    began = time.perf_counter()
    if text is None:
        measured: dict[str, Any] = {
            "recall": measure_recall(model, task, study.pairs, study.items, "test"),
            "validation": measure_recall(model, task, study.pairs, study.items, "val"),
            "state_bytes": state_bytes(model, task.config.length),
        }
    else:
        rows, held = text_rows(study, text)
        nats, _, count = scores(model, replace(rows, last=None).take(held).to(model.backbone.device))
        measured = {"loss": nats / count, "state_bytes": state_bytes(model, study.text_length)}
    return {
        "name": job.name,
        **{k: v for k, v in job.identity().items() if k in ("part", "mixer", "period", "seed", "rate")},
        "parameters": count_parameters(model),
        "training": asdict(training),
        "measured": {**measured, "seconds": time.perf_counter() - began},
    }


def plan(study: RatioStudy, out: Path, seeds: int, threads: int = 1) -> list[RatioJob]:
    """Every run of the study: MQAR at each learning rate, and text; long runs first, so that no core is idle at the end."""
    jobs = []
    for seed in range(seeds):
        for mixer, period in study.cells:
            for part, rates in (("mqar", study.mqar_rates), ("text", (study.text_train.learning_rate,))):
                for rate in rates:
                    job = RatioJob(study, part, mixer, period, seed, rate, out, out / "text", threads)  # type: ignore[arg-type]
                    jobs.append(replace(job, folder=out / "runs" / job.name))
    return sorted(jobs, key=lambda job: job.part == "text")


def check_study(study: RatioStudy) -> None:
    """Find what can be wrong with a study before anything runs. Raises ``ValueError``."""
    if not study.mixers:
        raise ValueError("mixers: a study needs at least one")
    if repeated := sorted({m for m in study.mixers if study.mixers.count(m) > 1}):
        raise ValueError(f"mixers: {repeated} named twice")
    task = MQARTask(MQARConfig(**study.mqar))
    if not study.pairs or list(study.pairs) != sorted(set(study.pairs)):
        raise ValueError(f"pairs: expected rising numbers, got {study.pairs}")
    outside = [n for n in study.pairs if not task.config.min_difficulty <= n <= task.config.max_difficulty]
    if outside:
        raise ValueError(
            f"pairs: {outside} are not trained on ({task.config.min_difficulty} to {task.config.max_difficulty})"
        )
    for split in ("test", "val"):
        for n in study.pairs:
            task.dense(split, [0], n)  # raises where the split has none
    with torch.device("meta"):
        for mixer, period in study.cells:
            HybridForCausalLM(study.backbone(mixer, period, task.config.vocabulary))


def run_ratio_study(
    study: RatioStudy,
    out: Path,
    text: list[Path] | None = None,
    seeds: int = 2,
    jobs: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not finished yet and write ``results.json``; run it again with the same folder and it goes on.

    Args:
        text: UTF-8 files, one document each, read as bytes; ``None`` = the Python sources of this package, as they are at the first call.
        seeds: training seeds 0 .. seeds - 1 of every cell.
        jobs: runs side by side; default one a core, of one thread each.

    Raises:
        ValueError: a study that can not be run, text too short, or a damaged or foreign file in ``out``.
    """
    if seeds < 1:
        raise ValueError(f"seeds: at least 1 is needed, got {seeds}")
    cores, jobs = check_places(out, jobs)
    console = console or Console()
    check_study(study)
    corpus = byte_corpus(out / "text", text)
    text_rows(study, corpus)
    planned = plan(study, out, seeds, max(1, cores // jobs))
    about = {
        "study": {**asdict(study), "seeds": seeds},
        "text": {
            "source": "the Python sources of this package" if text is None else "files given",
            "documents": len(corpus.starts),
            "bytes": len(corpus) - len(corpus.starts),
            "sha256": corpus.sha256,
        },
    }
    return run_jobs(planned, run_ratio_job, SCHEMA, out, (cores, jobs), console, about)


def own_sources() -> list[Path]:
    """The Python files of this package: text that is there wherever the study runs."""
    root = Path(find_spec("latentcot").submodule_search_locations[0])  # type: ignore[union-attr,index]
    return sorted({path for path in root.rglob("*.py") if "__pycache__" not in path.parts})


def byte_corpus(folder: Path, files: list[Path] | None) -> TokenizedText:
    """The files as bytes, tokenised into ``folder`` once; see :func:`run_ratio_study`. Raises ``ValueError`` when what is there came from
    other files than the given ones."""
    if files is not None and not files:
        raise ValueError("text: no file given")
    if folder.exists() and files is None:
        return TokenizedText(folder)  # the sources may have changed since: a study that goes on keeps its text
    from transformers import ByT5Tokenizer

    documents, tokenizer = read_documents(own_sources() if files is None else files), ByT5Tokenizer(extra_ids=0)
    if not folder.exists():
        return tokenize_corpus(folder, documents, tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        fresh = tokenize_corpus(Path(temporary) / "text", documents, tokenizer)
    there = TokenizedText(folder)
    if there.sha256 != fresh.sha256:
        raise ValueError(f"text: {folder} holds other text than the files given; choose another output folder (--out)")
    return there
