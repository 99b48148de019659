"""Checkpoints in the format of the hybrid study (arXiv:2507.06457): load them from a folder or the Hugging Face hub, and write them.

>>> model, report = load_checkpoint("out/gated_deltanet-3-1")  # doctest: +SKIP
>>> print(report)  # doctest: +SKIP

A checkpoint is a folder with ``config.json`` and weights: ``model.safetensors``, the same in shards beside
``model.safetensors.index.json``, or, where there are no such files, ``pytorch_model.bin`` and its shards (read as tensors alone, so
that no code in them runs). Which names and fields are understood: :mod:`~latentcot.backbone.checkpoint_config` and
:mod:`~latentcot.backbone.checkpoint_keys`. Our own folders (``save_pretrained``) are read too.

Names and shapes are compared before any number is read. The model is built without memory and its tensors are read one by one, cast
and laid into place, so that a checkpoint is never in memory twice.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from latentcot.backbone.checkpoint_config import (
    CheckpointError,
    config_from_published,
    config_to_published,
    resolved_options,
)
from latentcot.backbone.checkpoint_files import StoredTensors, open_tensors
from latentcot.backbone.checkpoint_keys import (
    EMBEDDING,
    HEAD,
    CheckpointMismatchError,
    KeyPlan,
    Piece,
    keeps_precision,
    plan_keys,
)
from latentcot.backbone.config import HybridConfig
from latentcot.backbone.model import HybridForCausalLM
from latentcot.files import write_text

SAFE_PATTERNS = ["model*.safetensors", "model.safetensors.index.json"]
PICKLE_PATTERNS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint held and what became of it. ``print`` it.

    Args:
        source: folder or hub name.
        family: its ``model_type``.
        files: weight files read.
        tensors, parameters: of the model, all of them from the checkpoint.
        renamed: name in the checkpoint to name in the model.
        split: fused tensors, to the two names in the model.
        dropped: name in the checkpoint and the reason.
        ignored_fields: configuration fields that only say how to run.
        unknown_fields: configuration fields that mean nothing here: one of them could change what the model computes.
    """

    source: str
    family: str
    files: list[str]
    tensors: int
    parameters: int
    renamed: dict[str, str] = field(default_factory=dict)
    split: dict[str, tuple[str, str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    ignored_fields: dict[str, Any] = field(default_factory=dict)
    unknown_fields: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.family}, {self.tensors} tensors, {self.parameters:,} parameters from {len(self.files)} file(s)"
        ]
        lines += [f"  renamed {old} to {new}" for old, new in self.renamed.items()]
        lines += [f"  split {old} into {first} and {second}" for old, (first, second) in self.split.items()]
        lines += [f"  dropped {name}: {reason}" for name, reason in self.dropped.items()]
        if self.ignored_fields:
            lines.append(f"  ignored hints of the configuration: {', '.join(sorted(self.ignored_fields))}")
        if self.unknown_fields:
            lines.append(f"  unknown fields of the configuration: {self.unknown_fields}")
        return "\n".join(lines)


class Loaded(NamedTuple):
    model: HybridForCausalLM
    report: LoadReport


def load_checkpoint(
    source: str | os.PathLike[str],
    *,
    model: HybridForCausalLM | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> Loaded:
    """Read a checkpoint.

    Args:
        source: folder, or name on the hub (``owner/name``) when there is no such folder.
        model: put the weights into this model, in its dtype and on its device, instead of building one.
        dtype: of the new model; ``None`` as stored. With 16 bits, norm weights, ``A_log`` and ``dt_bias`` are fp32.
        device: of the new model; ``None`` = CPU.
        revision: branch, tag or commit on the hub.

    Returns:
        the model, in evaluation mode when it was built here, and a :class:`LoadReport`.

    Raises:
        UnknownFamilyError: the checkpoint is of a model family that is not here.
        CheckpointMismatchError: tensors are missing, too many, or of other shapes, or ``model`` computes something else with them;
            lists them all. A ``model`` that was given is as it was.
        CheckpointError: no such folder or name, a file is missing or damaged, the configuration is not understood.

    Warns:
        UserWarning: for configuration fields that mean nothing here.
    """
    if model is not None and (dtype is not None or device is not None):
        raise ValueError("dtype, device: a model was given, which has its own; leave them out")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype} given, expected a floating-point dtype")
    fetch = _local(Path(source)) if Path(source).exists() else _hub(source, revision)
    folder = fetch(["config.json"])
    config, family, ignored, unknown = _read_config(folder)
    if unknown:
        warnings.warn(
            f"{source}: config.json has fields that mean nothing here and may matter: {unknown}", stacklevel=2
        )
    if model is not None:
        _compare_configs(config, model.config)
    folder = fetch(SAFE_PATTERNS)
    with open_tensors(folder, "model", ".safetensors") or _open_pickles(fetch) as stored:
        target = _empty_model(config) if model is None else model
        wanted = _wanted(target)
        plan = plan_keys(stored.shapes, {name: tuple(tensor.shape) for name, tensor in wanted.items()})
        for first, second in plan.equal:
            if not torch.equal(stored.read(Piece(first)), stored.read(Piece(second))):
                raise CheckpointError(f"checkpoint: {first} and {second} differ, though the configuration ties them")
        if model is None:
            _lay_into(target, plan, stored, dtype, torch.device(device or "cpu"))
            target.eval()
        else:
            _copy_into(wanted, plan, stored)
        report = LoadReport(
            source=str(source),
            family=family,
            files=stored.files,
            tensors=len(wanted),
            parameters=sum(tensor.numel() for tensor in wanted.values()),
            renamed=plan.renamed,
            split=plan.split,
            dropped=plan.dropped,
            ignored_fields=ignored,
            unknown_fields=unknown,
        )
    return Loaded(target, report)


def export_checkpoint(
    model: HybridForCausalLM,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write ``config.json`` and safetensors in the study's format; the folder appears whole or not at all.

    Args:
        folder: must not exist, or be empty, unless ``overwrite``.
        dtype: cast on the way (norm weights and the like stay fp32 then); ``None`` = as they are.
        max_shard_size: bytes, or a string such as ``"5GB"``; larger models are written in shards with an index.
        overwrite: replace an earlier checkpoint in ``folder``; a folder that holds anything else is refused.

    Raises:
        CheckpointError: the format can not say what this model is (``save_pretrained`` can), or the folder is in use.
    """
    folder = Path(folder)
    values = config_to_published(model.config)
    _check_free(folder, overwrite)
    tensors = {
        name: tensor.detach() if dtype is None else tensor.detach().to(_dtype_of(name, dtype))
        for name, tensor in _wanted(model).items()
    }
    values["torch_dtype"] = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
        huggingface_hub.save_torch_state_dict(tensors, partial, max_shard_size=max_shard_size)
        write_text(partial / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    finally:
        if replaced.exists() and not folder.exists():  # interrupted between the two
            replaced.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return folder


# -- where from --------------------------------------------------------------------------------------------------------

Fetch = Callable[[list[str]], Path]
"""Makes sure that files of these patterns are there, if they exist at all, and says in which folder."""


def _local(path: Path) -> Fetch:
    if not path.is_dir():
        raise CheckpointError(f"source: {path} is a file, expected the folder that holds it and its config.json")
    return lambda patterns: path


def _hub(source: str | os.PathLike[str], revision: str | None) -> Fetch:
    name = os.fspath(source)
    if not isinstance(source, str):
        raise CheckpointError(f"source: there is no folder {name!r} (a name on the hub is given as a string)")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"source: there is no folder {name!r}, and as a name on the hub it would be owner/name")

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
        except Exception as error:  # no network, no such name, no permission: many kinds, one meaning
            raise CheckpointError(
                f"source: there is no folder {name!r}, and the hub did not give it either ({type(error).__name__}: {error})"
            ) from error

    return fetch


def _open_pickles(fetch: Fetch) -> StoredTensors:
    folder = fetch(PICKLE_PATTERNS)
    stored = open_tensors(folder, "pytorch_model", ".bin")
    if stored is None:
        there = sorted(path.name for path in folder.iterdir())
        raise CheckpointError(
            f"checkpoint: no weights in {folder}, expected model.safetensors or pytorch_model.bin, whole or with an index; "
            f"there is {there[:12]}"
        )
    return stored


def _read_config(folder: Path) -> tuple[HybridConfig, str, dict[str, Any], dict[str, Any]]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"checkpoint: no config.json in {folder}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {path} is damaged ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"checkpoint: {path} is damaged: an object is needed, got {type(values).__name__}")
    family = str(values.get("model_type"))
    if family == HybridConfig.model_type:
        return HybridConfig.from_dict(values), family, {}, {}
    config, ignored, unknown = config_from_published(values)
    return config, family, ignored, unknown


def _compare_configs(stored: HybridConfig, given: HybridConfig) -> None:
    """Raises ``CheckpointMismatchError`` where the same tensors would compute something else."""
    names = ["hidden_size", "mixers", "norm_eps", "norm_placement", "embedding_scale", "tie_word_embeddings"]
    pairs = {name: (getattr(stored, name), getattr(given, name)) for name in names}
    if stored.mixers == given.mixers and stored.hidden_size == given.hidden_size:
        for mixer in sorted(set(given.mixers)):
            there, here = resolved_options(stored, mixer), resolved_options(given, mixer)
            pairs |= {f"{mixer}.{name}": (there.get(name), value) for name, value in here.items()}
    if differing := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
        raise CheckpointMismatchError([], [], {}, differing)


# -- into a model --------------------------------------------------------------------------------------------------------


def _empty_model(config: HybridConfig) -> HybridForCausalLM:
    with torch.device("meta"), no_init_weights():
        return HybridForCausalLM(config)


def _wanted(model: HybridForCausalLM) -> dict[str, Tensor]:
    """The tensors of a checkpoint of ``model``; a tied head is no tensor of its own."""
    tensors: dict[str, Tensor] = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    return tensors


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if keeps_precision(name) else dtype


def _lay_into(
    model: HybridForCausalLM, plan: KeyPlan, stored: StoredTensors, dtype: torch.dtype | None, device: torch.device
) -> None:
    tensors = {}
    for name, piece in plan.pieces.items():
        tensor = stored.read(piece)
        tensors[name] = tensor.to(device, tensor.dtype if dtype is None else _dtype_of(name, dtype))
    model.load_state_dict(tensors, strict=False, assign=True)  # a tied head is absent; everything else was planned
    model.tie_weights()
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:  # a buffer that is not saved: nothing would fill it
        raise RuntimeError(f"load_checkpoint: nothing gives {left} a value")
    model.config.dtype = tensors[EMBEDDING].dtype


def _copy_into(targets: dict[str, Tensor], plan: KeyPlan, stored: StoredTensors) -> None:
    """Everything is read before anything is written: a damaged file leaves the model as it was."""
    values = {name: stored.read(piece) for name, piece in plan.pieces.items()}
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"folder: {folder} is a file")
    names = sorted(path.name for path in folder.iterdir())
    if names and not overwrite:
        raise CheckpointError(f"folder: {folder} is not empty; give another, or overwrite=True to replace it")
    ours = re.compile(r"(config|generation_config|model\.safetensors\.index)\.json|model[\w-]*\.safetensors")
    if foreign := [name for name in names if not ours.fullmatch(name)]:
        raise CheckpointError(f"folder: {folder} holds more than a checkpoint ({foreign[:6]}); it is not replaced")
