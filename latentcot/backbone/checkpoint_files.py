"""Weight files, whole or in shards, opened so that shapes are known before numbers are read."""

import json
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from latentcot.backbone.checkpoint_config import CheckpointError
from latentcot.backbone.checkpoint_keys import Piece

Reader = Callable[[Piece], Tensor]


class StoredTensors:
    """Tensors of open files: ``shapes`` at once, numbers when :meth:`read`. Close it, or use it in a ``with`` statement.

    Args:
        files: their names.
        shapes: by name of the tensor.
        readers: how to read each.
        stack: closes the files.
    """

    def __init__(
        self, files: list[str], shapes: dict[str, tuple[int, ...]], readers: Mapping[str, Reader], stack: ExitStack
    ):
        self.files, self.shapes = files, shapes
        self._readers, self._stack = readers, stack

    def read(self, piece: Piece) -> Tensor:
        """A tensor, or some of its rows, on the CPU. Raises ``CheckpointError`` when it holds no floating-point numbers."""
        tensor = self._readers[piece.source](piece)
        if not tensor.is_floating_point():
            raise CheckpointError(f"checkpoint: {piece.source} holds {tensor.dtype}, expected floating-point numbers")
        return tensor

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def open_tensors(folder: Path, stem: str, ending: str) -> StoredTensors | None:
    """Open ``<stem><ending>``, or the shards that ``<stem><ending>.index.json`` lists; ``None`` when there is neither.

    Raises:
        CheckpointError: a file is missing or damaged, or the index does not match the files.
    """
    index, whole = folder / f"{stem}{ending}.index.json", folder / f"{stem}{ending}"
    if index.is_file():
        where = _read_index(index)
    elif whole.is_file():
        where = None
    else:
        return None
    names = [whole.name] if where is None else sorted(set(where.values()))
    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, Reader] = {}
    with ExitStack() as stack:
        for name in names:
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"checkpoint: {index.name} lists {name}, which is not in {folder}")
            try:
                held = _open_safe(path, stack) if ending == ".safetensors" else _open_pickle(path)
            except Exception as error:  # safetensors, zip, pickle and torch errors alike mean: not readable
                raise CheckpointError(f"checkpoint: {path} is damaged ({type(error).__name__}: {error})") from error
            for key, (shape, reader) in held.items():
                if where is None or where.get(key) == name:
                    shapes[key], readers[key] = shape, reader
        if where is not None and (absent := sorted(set(where) - set(shapes))):
            raise CheckpointError(f"checkpoint: {index.name} lists tensors that their files do not hold: {absent[:8]}")
        return StoredTensors(names, shapes, readers, stack.pop_all())
    raise AssertionError("unreachable: the stack passes on every error")


def _read_index(path: Path) -> dict[str, str]:
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        listed = {str(key): str(name) for key, name in where.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint: {path} is damaged ({type(error).__name__}: {error})") from error
    for name in set(listed.values()):
        if Path(name).name != name:  # an index is data from outside: it names files beside it, never paths
            raise CheckpointError(f"checkpoint: {path} lists {name!r}, expected the name of a file in the same folder")
    return listed


def _open_safe(path: Path, stack: ExitStack) -> dict[str, tuple[tuple[int, ...], Reader]]:
    file: Any = stack.enter_context(safe_open(path, framework="pt"))

    def read(piece: Piece) -> Tensor:
        if piece.start is None and piece.stop is None:
            return file.get_tensor(piece.source)
        return file.get_slice(piece.source)[piece.start : piece.stop]

    return {key: (tuple(file.get_slice(key).get_shape()), read) for key in file.keys()}  # noqa: SIM118 (not a mapping)


def _open_pickle(path: Path) -> dict[str, tuple[tuple[int, ...], Reader]]:
    """Tensors alone are unpickled, lazily from the disk where the file allows it."""
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if wrong := sorted(str(key) for key, value in tensors.items() if not isinstance(value, Tensor)):
        raise ValueError(f"a mapping of names to tensors is needed; {wrong[:4]} hold something else")

    def read(piece: Piece) -> Tensor:
        whole = tensors[piece.source]
        if piece.start is None and piece.stop is None:
            return whole
        return whole[piece.start : piece.stop].clone()  # two halves of one storage could not be saved apart

    return {key: (tuple(tensor.shape), read) for key, tensor in tensors.items()}
