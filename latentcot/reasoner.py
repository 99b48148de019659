r"""The one protocol of every method: what training, comparison and probes may ask of a way to reason.

A *method* (``direct``, ``cot``, ``depth_recurrence``, ``coconut``, ``masked_diffusion``, ...) wraps a backbone and answers
task prompts. Training calls :meth:`Reasoner.phases`, :meth:`Reasoner.begin` and :meth:`Reasoner.loss`; evaluation calls
:meth:`Reasoner.answer` with a :class:`PromptBatch`, which holds neither steps nor answers, so that nothing at evaluation
can depend on the gold solution.

Shape letters: ``B`` batch, ``P`` prompt tokens, ``T`` steps, ``M`` tokens a step, ``A`` answer tokens, ``S`` sequence, ``D`` width.
All ragged tensors are right-padded with ``SPECIAL.pad`` and come with a boolean mask (True = real token).
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.files import write_tensors, write_text

DataForm = Literal["direct", "cot", "latent", "denoise"]


@dataclass(frozen=True)
class SpecialIds:
    """Ids shared by every task vocabulary; the task's own symbols start at ``count``."""

    pad: int = 0
    bos: int = 1
    eos: int = 2
    sep: int = 3
    step: int = 4
    ans: int = 5
    mask: int = 6
    bot: int = 7
    eot: int = 8
    latent: int = 9
    pause: int = 10

    @property
    def count(self) -> int:
        return len(fields(self))

    @property
    def names(self) -> tuple[str, ...]:
        """Names in id order, as they appear in a rendered sequence (``<bos>``, ...)."""
        return tuple(f"<{f.name}>" for f in fields(self))


SPECIAL = SpecialIds()


@dataclass(frozen=True)
class TaskLimits:
    """Sizes that follow from a task's configuration alone, never from one example.

    Methods size canvases and token budgets by these, so that a length can not give the gold solution away.
    """

    vocab_size: int
    prompt_tokens: int
    steps: int
    step_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class PromptBatch:
    """Prompts alone: ``ids [B, P]`` right-padded, ``mask [B, P]``, and the task's limits. No steps, no answers."""

    ids: Tensor
    mask: Tensor
    limits: TaskLimits

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> "PromptBatch":
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device))

    def rows(self, index: Tensor | slice) -> "PromptBatch":
        return replace(self, ids=self.ids[index], mask=self.mask[index])


@dataclass(frozen=True)
class TaskBatch:
    """Examples for training and scoring.

    ``steps [B, T, M]`` with ``step_mask [B, T, M]``: gold intermediate steps, step t of row b being its real tokens;
    ``answer_ids [B, A]`` with ``answer_mask [B, A]``; ``difficulty [B]``: the task's one integer d; ``index [B]``: example number.
    """

    prompts: PromptBatch
    steps: Tensor
    step_mask: Tensor
    answer_ids: Tensor
    answer_mask: Tensor
    difficulty: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def n_steps(self) -> Tensor:
        """Number of gold steps of each row, ``[B]``."""
        return self.step_mask.any(-1).sum(-1)

    def to(self, device: torch.device | str) -> "TaskBatch":
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return TaskBatch(**moved)

    def rows(self, index: Tensor | slice) -> "TaskBatch":
        kept = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "prompts"}
        return TaskBatch(prompts=self.prompts.rows(index), **kept)


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Args:
        name: shown in logs.
        share: part of the training budget (the shares of a method's phases are normalised to sum to 1).
        form: data form the phase trains on.
        trainable: prefixes of the parameter names that learn; ``None`` = all.
        reset_optimizer: forget the optimiser's moments when the phase begins (Coconut does so at every stage).
        ema: decay of an exponential moving average of the weights, or ``None``.
        knobs: what else the method needs to know, for instance ``{"stage": 2}``.
    """

    name: str
    share: float = 1.0
    form: DataForm = "direct"
    trainable: tuple[str, ...] | None = None
    reset_optimizer: bool = False
    ema: float | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepContext:
    """Where training stands: optimiser step, phase, the generator for this step's draws, and the data-parallel position."""

    step: int
    total_steps: int
    phase: Phase
    generator: torch.Generator
    rank: int = 0
    world_size: int = 1


Carry = Any


@dataclass
class LossOutput:
    """``loss``: scalar to differentiate; ``parts``: named scalars for the log; ``flops``: forward FLOPs of this call;
    ``carry`` and ``finished [B]``: only for methods that carry rows over optimiser steps."""

    loss: Tensor
    parts: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    carry: Carry | None = None
    finished: Tensor | None = None


@dataclass(frozen=True)
class AnswerLimits:
    """What an answer may cost: ``new_tokens`` emitted, ``sequential_passes`` through the network, and the method's own ``knobs``
    (for instance ``{"recurrences": 8}``). ``None`` = what the task's limits imply."""

    new_tokens: int | None = None
    sequential_passes: int | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("new_tokens", "sequential_passes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"limits.{name}: {value!r} given, expected an integer of at least one, or None")


@dataclass
class AnswerOutput:
    """Answers and their price, row by row.

    ``ids [B, A]`` right-padded with pad; ``tokens_emitted [B]``: every token the method wrote, thinking text included, latent
    slots not; ``sequential_passes [B]``: network passes that had to wait for one another; ``flops [B]``: forward FLOPs spent.
    """

    ids: Tensor
    tokens_emitted: Tensor
    sequential_passes: Tensor
    flops: Tensor
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sites:
    """Where to record: block indices (``None`` = all), and at most how many reasoning steps."""

    blocks: tuple[int, ...] | None = None
    steps: int | None = None


@dataclass
class Trace:
    """Recorded hidden states ``hidden [steps, layers, B, S, D]`` with ``valid [steps, B, S]`` (ragged rows and steps) and,
    for each layer, where it came from."""

    hidden: Tensor
    valid: Tensor
    layers: tuple[str, ...]


class Reasoner(nn.Module):
    """Base class of every method. Sub-classes set ``method`` and override :meth:`loss` and :meth:`answer`.

    Args:
        backbone: the language model that does the thinking.
        settings: the method's own values, JSON-serialisable; saved beside the weights.
    """

    method: ClassVar[str] = ""

    def __init__(self, backbone: HybridForCausalLM, settings: Mapping[str, Any] | None = None):
        super().__init__()
        self.backbone = backbone
        self.settings: dict[str, Any] = dict(settings or {})

    def phases(self) -> Sequence[Phase]:
        """Stretches of training in order; one phase over everything by default."""
        return (Phase("train"),)

    def begin(self, batch: TaskBatch, ctx: StepContext) -> Carry | None:
        """Carry of fresh rows; ``None`` for methods without state between optimiser steps."""
        return None

    def loss(self, batch: TaskBatch, ctx: StepContext, carry: Carry | None = None) -> LossOutput:
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def forward(self, batch: TaskBatch, ctx: StepContext, carry: Carry | None = None) -> LossOutput:
        """The loss, so that wrappers which act on ``forward`` (data-parallel training) work."""
        return self.loss(batch, ctx, carry)

    def answer(
        self, prompts: PromptBatch, limits: AnswerLimits = AnswerLimits(), generator: torch.Generator | None = None
    ) -> AnswerOutput:
        raise NotImplementedError(f"{type(self).__name__} defines no answer")

    def trace(self, prompts: PromptBatch, sites: Sites = Sites()) -> Trace:
        raise NotImplementedError(f"{type(self).__name__} records no trace")

    # -- saving ------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``reasoner.json`` and ``model.safetensors``; each appears whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        meta = {
            "method": self.method,
            "module": type(self).__module__,
            "settings": self.settings,
            "backbone": self.backbone.config.to_diff_dict(),
        }
        write_tensors(folder / "model.safetensors", unique_tensors(self.state_dict()))
        write_text(folder / "reasoner.json", json.dumps(meta, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Rebuild a saved reasoner. Raises ``ValueError`` when the folder is not one, or holds another method's weights."""
        folder = Path(folder)
        description = folder / "reasoner.json"
        if not description.is_file():
            raise ValueError(f"folder: {folder} holds no reasoner.json, so it is not a saved reasoner")
        try:
            meta = json.loads(description.read_text())
            method, module = meta["method"], meta["module"]
            settings, backbone = meta["settings"], meta["backbone"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{description} is damaged: {error!r}") from error
        kind = find_method(method, module)
        if not issubclass(kind, cls):
            raise ValueError(f"{folder} holds method {method!r}; {cls.__name__} can not load it")
        reasoner = kind(HybridForCausalLM(HybridConfig(**backbone)), settings)
        try:
            weights = load_file(folder / "model.safetensors")
        except Exception as error:  # safetensors has its own error type; the file is damaged or missing
            raise ValueError(f"{folder / 'model.safetensors'} can not be read: {error}") from error
        expected = unique_tensors(reasoner.state_dict())
        if differing := sorted(set(weights) ^ set(expected)):
            raise ValueError(f"{folder}: weights do not fit method {method!r}; differing keys: {differing[:8]}")
        wrong = [k for k, v in weights.items() if v.shape != expected[k].shape]
        if wrong:
            raise ValueError(
                f"{folder}: shapes differ for {[(k, tuple(weights[k].shape), tuple(expected[k].shape)) for k in wrong[:4]]}"
            )
        reasoner.load_state_dict(
            weights, strict=False
        )  # tied tensors are stored once; the key sets were compared above
        return reasoner  # type: ignore[return-value]


def unique_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict with tied tensors kept once (under the first name), contiguous and on the CPU: what safetensors accepts."""
    seen: set[tuple[int, tuple[int, ...], int]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), int(tensor.storage_offset()))
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = tensor.detach().contiguous().cpu()
    return kept


METHODS: dict[str, type[Reasoner]] = {}


Kind = TypeVar("Kind", bound=type[Reasoner])


def register_method(name: str) -> Callable[[Kind], Kind]:
    """Class decorator that makes a method known to ``from_pretrained`` and to ``latentcot compare`` under ``name``."""

    def register(kind: Kind) -> Kind:
        if name in METHODS and METHODS[name].__qualname__ != kind.__qualname__:
            raise ValueError(f"method {name!r} is already registered by {METHODS[name].__module__}")
        kind.method = name
        METHODS[name] = kind
        return kind

    return register


def find_method(name: str, module: str | None = None) -> type[Reasoner]:
    """The class registered as ``name``; ``module`` (a ``latentcot.`` module) is imported first when it is not known yet."""
    if name not in METHODS and module is not None and module.startswith("latentcot."):
        import_module(module)
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(sorted(METHODS)) or 'none imported yet'}")
    return METHODS[name]
