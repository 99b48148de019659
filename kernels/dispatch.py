"""Which back end runs an operator, and why."""

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from latentcot.kernels.cpu_threads import SHORT, missing_for_compiled
from latentcot.kernels.visibility import Causal, Visibility, check_visibility

Backend = Literal["auto", "triton", "compiled", "chunked", "reference"]

OPERATORS = ("gated_scan", "decay_attention", "delta_rule")
BACKENDS = ("auto", "triton", "compiled", "chunked", "reference")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_MINIMUM = (3, 6)


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The back end that runs a call, and the reason; ``str()`` is one sentence."""

    operator: str
    chosen: Literal["triton", "compiled", "chunked", "reference"]
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} runs on the {self.chosen} back end because {self.reason}."


def interpreting() -> bool:
    """Whether Triton's interpreter is switched on, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing_for_triton(operator: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps ``operator`` from running in Triton on this device and dtype, as a clause; None if nothing does."""
    if device.type != "cuda" and not interpreting():
        if not torch.cuda.is_available():
            return f"there is no CUDA device (the tensors are on {device.type})"
        return f"the tensors are on {device.type}, not on a CUDA device"
    try:
        import triton
    except ImportError:
        return "Triton is not installed (pip install 'latentcot[triton]')"
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if version < TRITON_MINIMUM:
        return f"Triton {triton.__version__} is older than 3.6"
    if dtype not in TRITON_DTYPES:
        return f"the Triton kernels compute in float32, which is too narrow for {dtype}"
    return None


def choose_backend(operator: str, device: torch.device, dtype: torch.dtype, backend: str) -> BackendChoice:
    """Resolve ``backend`` for one call; raises ValueError for an unknown one and for a missing Triton."""
    if backend == "chunked" or backend == "reference":
        return BackendChoice(operator, backend, "it was asked for by name")
    if backend == "auto":
        if device.type == "cpu":
            missing = missing_for_compiled()
            if missing is not None:
                return BackendChoice(operator, "chunked", f"the tensors are on cpu, and {missing}")
            short = f", where fewer than {SHORT[operator]} tokens take batched products" if SHORT[operator] > 1 else ""
            return BackendChoice(operator, "compiled", f"the tensors are on cpu and Numba is installed{short}")
        if device.type != "cuda":
            return BackendChoice(
                operator, "chunked", f"the tensors are on {device.type} and Triton kernels need a CUDA device"
            )
        missing = missing_for_triton(operator, device, dtype)
        if missing is None:
            return BackendChoice(
                operator, "triton", "the tensors are on a CUDA device and the operator has a Triton kernel"
            )
        return BackendChoice(operator, "chunked", missing)
    if backend == "compiled":
        missing = missing_for_compiled() if device.type == "cpu" else f"the tensors are on {device.type}, not on cpu"
        if missing is not None:
            raise ValueError(f"{operator}: backend='compiled' cannot run: {missing}; use backend='chunked' or 'auto'")
        return BackendChoice(operator, "compiled", "it was asked for by name")
    if backend == "triton":
        missing = missing_for_triton(operator, device, dtype)
        if missing is not None:
            raise ValueError(f"{operator}: backend='triton' cannot run: {missing}; use backend='chunked' or 'auto'")
        return BackendChoice(operator, "triton", "it was asked for by name")
    raise ValueError(f"{operator}: backend is {backend!r}, expected one of {BACKENDS}")


def explain_backend(
    operator: str | Callable[..., Any],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    backend: Backend = "auto",
    visibility: Visibility = Causal(),
) -> BackendChoice:
    """Say which back end a call would run on, and why, without running it.

    ``operator`` is a name (``"gated_scan"``, ``"decay_attention"``, ``"delta_rule"``) or the function itself. Raises
    what the call would raise: ValueError for an unknown back end, for ``backend="triton"`` where a part is missing, and
    for a visibility that the operator does not define.

    >>> print(explain_backend("gated_scan", device="cpu", dtype=torch.float32))
    gated_scan runs on the compiled back end because the tensors are on cpu and Numba is installed.
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))
    if name not in OPERATORS:
        raise ValueError(f"explain_backend: operator is {name!r}, expected one of {OPERATORS}")
    check_visibility(name, visibility, with_state=False)
    if name == "gated_scan" and not isinstance(visibility, Causal):
        raise ValueError("gated_scan: Bidirectional is not defined for this operator")
    return choose_backend(name, torch.device(device), dtype, backend)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off where it is on: the operators cast by their own rule (16-bit inputs, float32 inside)."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
