"""The progress bar of training: steps, steps a second, remaining time, phase and loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class RateColumn(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:5.1f} it/s", style="progress.data.speed")


def training_progress(console: Console | None = None) -> Progress:
    """A rich ``Progress`` for training runs; each of its tasks has a field ``what`` for phase and loss."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
        console=console,
    )


@contextmanager
def progress_bar(name: str, console: Console | None = None) -> Iterator[Callable[[int, int, float, str], None]]:
    """Watch one run::

        with progress_bar("cot") as watch:
            train(reasoner, data, config, watch=watch)

    A run that goes on from a checkpoint starts its rate where it goes on.
    """
    with training_progress(console) as progress:
        bar = progress.add_task(name, total=None, start=False, what="")

        def watch(step: int, of: int, loss: float, phase: str) -> None:
            if not progress.tasks[0].started:
                progress.update(bar, total=of, completed=step)
                progress.start_task(bar)
            progress.update(bar, completed=step, what=f"{phase}, loss {loss:.3f}")

        yield watch
