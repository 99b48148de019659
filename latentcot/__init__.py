"""latentcot: models that think in hidden states, on one backbone, compared fairly, with the literature beside the code.

Importing this package loads nothing heavy: sub-modules (and with them torch) load on first attribute access, so that
``latentcot --help`` and the paper commands start at once and work where torch is not installed.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and completion; at run time each loads when it is first asked for
    from latentcot import (
        backbone,
        catalog,
        compare,
        diffusion_reasoning,
        evaluation,
        kernels,
        reasoner,
        recurrent_depth,
        tasks,
        training,
    )

__all__ = [
    "backbone",
    "catalog",
    "compare",
    "diffusion_reasoning",
    "evaluation",
    "kernels",
    "reasoner",
    "recurrent_depth",
    "tasks",
    "training",
]

try:
    __version__ = version("latentcot")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"latentcot.{name}")
    raise AttributeError(
        f"module 'latentcot' has no attribute {name!r}; its public sub-modules are {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
