"""Methods × one task × one budget: a table, plots and a report page."""

from latentcot.compare.evaluate import DifficultyScore, evaluate
from latentcot.compare.presets import PRESETS, Comparison, MethodSpec, quickstart
from latentcot.compare.report import write_report
from latentcot.compare.run import run_comparison, with_options
from latentcot.compare.worker import TaskData, make_reasoner, make_tasks

__all__ = [
    "PRESETS",
    "Comparison",
    "DifficultyScore",
    "MethodSpec",
    "TaskData",
    "evaluate",
    "make_reasoner",
    "make_tasks",
    "quickstart",
    "run_comparison",
    "with_options",
    "write_report",
]
