"""Published benchmarks through lm-eval (extra ``eval``): :class:`LatentCotLM`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentcot.evaluation.harness import LatentCotLM

__all__ = ["LatentCotLM"]


def __getattr__(name: str) -> Any:
    if name == "LatentCotLM":
        try:
            return import_module("latentcot.evaluation.harness").LatentCotLM
        except ModuleNotFoundError as error:
            if error.name != "lm_eval":
                raise
            raise ImportError("LatentCotLM needs lm-eval: pip install 'latentcot[eval]'") from error
    raise AttributeError(f"module 'latentcot.evaluation' has no attribute {name!r}")
