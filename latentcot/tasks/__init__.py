"""Procedural reasoning tasks: generated from a seed, split by object, served in vectorised batches.

``make_task("group", group="S5", max_difficulty=16)`` builds one; :func:`task_names` lists them. Task modules are
imported when they are first asked for.
"""

import difflib
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentcot.tasks.base import SPLITS, Example, Task, TaskConfig
    from latentcot.tasks.loader import BatchStream
    from latentcot.tasks.vocabulary import Vocabulary

__all__ = [
    "SPLITS",
    "TASKS",
    "BatchStream",
    "Example",
    "Task",
    "TaskConfig",
    "Vocabulary",
    "make_task",
    "task_names",
    "task_type",
]

TASKS: dict[str, str] = {
    "addition": "latentcot.tasks.addition:AdditionTask",
    "group": "latentcot.tasks.group:GroupTask",
    "chain": "latentcot.tasks.chain:ChainTask",
    "copy": "latentcot.tasks.copying:CopyTask",
    "countdown": "latentcot.tasks.countdown:CountdownTask",
    "mano": "latentcot.tasks.mano:ManoTask",
    "mqar": "latentcot.tasks.mqar:MQARTask",
    "needle": "latentcot.tasks.needle:NeedleTask",
    "p_hop": "latentcot.tasks.p_hop:PHopTask",
    "prosqa": "latentcot.tasks.prosqa:ProsQATask",
    "prosqa_balanced": "latentcot.tasks.prosqa:ProsQABalancedTask",
    "prosqa_paper": "latentcot.tasks.prosqa:ProsQAPaperTask",
    "sudoku": "latentcot.tasks.sudoku:SudokuTask",
}
"""Task name -> ``module:class``."""

_HOMES = {
    "SPLITS": "base",
    "BatchStream": "loader",
    "Example": "base",
    "Task": "base",
    "TaskConfig": "base",
    "Vocabulary": "vocabulary",
}


def task_names() -> tuple[str, ...]:
    """Names that :func:`make_task` knows."""
    return tuple(sorted(TASKS))


def _unknown(argument: str, kind: str, given: Any, known: tuple[str, ...]) -> ValueError:
    close = difflib.get_close_matches(str(given), known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return ValueError(f"{argument}: unknown {kind} {given!r}; {hint}valid: {', '.join(known)}")


def task_type(name: str) -> "type[Task]":
    """The class of a task. Raises ``ValueError`` with close names for an unknown one."""
    if name not in TASKS:
        raise _unknown("name", "task", name, task_names())
    module, kind = TASKS[name].split(":")
    return getattr(import_module(module), kind)


def make_task(name: str, **config: Any) -> "Task":
    """Build a task from its name and options; options left out take their defaults.

    Raises:
        ValueError: for an unknown task or option (close names and all valid ones are listed) or a value out of range.
        TypeError: for a value of the wrong type.
    """
    kind = task_type(name)
    options = tuple(f.name for f in fields(kind.config_type))
    for option in config:
        if option not in options:
            raise _unknown("config", f"option of task {name!r}:", option, options)
    return kind(kind.config_type(**config))


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"latentcot.tasks.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'latentcot.tasks' has no attribute {name!r}")
