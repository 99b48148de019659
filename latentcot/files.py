"""Writing files whole or not at all: everything goes to a temporary name in the same folder and is renamed into place."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_text(path: Path, text: str) -> None:
    """``text`` as UTF-8."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file; tensors are detached, copied to the CPU and made contiguous."""
    partial = path.with_name(path.name + ".tmp")
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(plain, partial, dict(metadata) if metadata else None)
    os.replace(partial, path)
