"""The command line: ``latentcot compare | tasks | backends | papers | site``.

Importing this module (and so ``latentcot --help`` and every paper command) loads no torch. Errors of the user's making are one
line on stderr and exit code 2.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from latentcot.catalog.cli import papers_app
from latentcot.site import site

INTERRUPTED = 130  # exit code of a program stopped by Ctrl-C
PRESETS = ("quickstart",)  # of latentcot.compare.presets; here so that a wrong name is said before torch is imported
STUDIES = (
    "hybrid-ratio",
    "mqar",
    "mqar-capacity",
    "depth",
    "depth-sudoku9",
    "diffusion",
)  # of latentcot.compare.studies

app = typer.Typer(
    name="latentcot",
    help="Latent reasoning in language models: compare methods, look at tasks, search the papers, build the site.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(papers_app, name="papers")
app.command("site")(site)


def _version(asked: bool) -> None:
    if asked:
        from latentcot import __version__

        typer.echo(f"latentcot {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Latent reasoning in language models."""


@app.command("compare")
def compare_command(
    preset: Annotated[
        str,
        typer.Argument(
            help="Name of the comparison: `quickstart` takes minutes on two CPU cores, `hybrid-ratio` (mixers x ratios) half an hour, "
            "`mqar` (recall at the published size) minutes, `mqar-capacity` (recall against state bytes) minutes on a GPU, "
            "`depth` (a loop against its controls) an hour, `depth-sudoku9` (the same on 9x9 Sudoku) minutes of a GPU, "
            "`diffusion` (any order against left to right) three quarters of an hour."
        ),
    ] = "quickstart",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; default out/PRESET. Run again: it continues there.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Training seeds for every method; default 1, 2 for `hybrid-ratio` and `depth`.", min=1),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Comma-separated methods (mixers of a study, arms of `diffusion`) instead of the preset's."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Another task instead of the preset's; for `depth` and `diffusion`, some of theirs."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps instead of the preset's.", min=1)] = None,
    items: Annotated[int | None, typer.Option(help="Evaluation items in all instead of the preset's.", min=1)] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Runs side by side, sharing the cores; default one a core, of one thread each.", min=1),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Of a study: about two minutes, to see that it runs.")] = False,
    page: Annotated[
        Path | None, typer.Option(help="Of a study: folder of the written page; default the results' folder.")
    ] = None,
) -> None:
    """Train and evaluate several methods on one backbone and task; write table, plots and a report page."""
    # Whatever can be refused without torch is refused before it is imported, which takes seconds.
    if preset not in PRESETS + STUDIES:
        raise ValueError(f"unknown preset {preset!r}, expected one of {', '.join(PRESETS + STUDIES)}")
    folder = out or Path("out") / preset
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file, expected a folder")
    of_methods, of_tasks = _names("methods", methods), _names("task", task) if preset in STUDIES else None
    if task is not None and preset in PRESETS:
        from latentcot.tasks import task_names, task_type

        if task not in task_names():
            task_type(task)  # raises, with close names
    _needs("compare", "accelerate", "matplotlib")
    if preset in STUDIES:
        of_depth = preset.startswith("depth")
        takes_task = of_depth or preset == "diffusion"
        for name, value in (("task", None if takes_task else task), ("steps", steps), ("items", items)):
            if value is not None:
                raise ValueError(f"--{name} belongs to other comparisons, not to {preset!r}")
        if of_depth and methods is not None:
            raise ValueError(f"--methods: {preset!r} has the loop and its controls; --task chooses tasks")
        from latentcot.compare.studies import run_study

        chosen = of_tasks if of_depth else of_methods
        parts = of_tasks if preset == "diffusion" else None
        run_study(preset, folder, Console(), quick, seeds, jobs, chosen, page, parts)
        return
    if quick or page is not None:
        raise ValueError(f"--quick and --page belong to studies ({', '.join(STUDIES)}), not to {preset!r}")
    from latentcot.compare import PRESETS as presets
    from latentcot.compare import run_comparison, with_options, write_report
    from latentcot.compare.report import claim_sentences, terminal_table

    comparison = with_options(presets[preset](), steps=steps, methods=of_methods, task=task, items=items)
    console = Console()
    results = run_comparison(comparison, folder, 1 if seeds is None else seeds, jobs, console)
    page = write_report(results, folder)
    console.print(terminal_table(results))
    for sentence in claim_sentences(results):
        console.print("• " + escape(sentence), highlight=False)
    console.print(f"Report: {page.resolve()}", soft_wrap=True, highlight=False)


@app.command("tasks")
def tasks_command(
    name: Annotated[str | None, typer.Argument(help="Task to look at; all are listed without it.")] = None,
    count: Annotated[int, typer.Option(help="Examples to print.", min=1, max=100)] = 3,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
) -> None:
    """List the tasks, or print examples of one with its baselines."""
    from latentcot.tasks import make_task, task_names

    console = Console()
    if name is None:
        for known in task_names():
            summary = next(
                line.strip() for line in (type(make_task(known)).__doc__ or known).splitlines() if line.strip()
            )
            console.print(f"[bold]{known}[/bold]  {escape(summary)}", highlight=False)
        return
    task = make_task(name)
    baselines = task.baselines(split, 500)  # type: ignore[arg-type]
    for index in range(count):
        example = task.example(split, index)  # type: ignore[arg-type]
        words = task.vocabulary.render
        console.print(f"[bold]example {index}[/bold], difficulty {example.meta['difficulty']}", highlight=False)
        console.print(f"  prompt  {escape(words(example.prompt_ids))}", highlight=False)
        console.print(f"  steps   {escape(' | '.join(words(step) for step in example.steps))}", highlight=False)
        console.print(f"  answer  {escape(words(example.answer_ids))}", highlight=False)
    console.print(
        f"chance {baselines['chance']:.3f}, best heuristic {baselines['heuristic']:.3f} ({baselines.heuristic_name}), on 500 examples",
        highlight=False,
    )


@app.command("backends")
def backends_command() -> None:
    """Say which back end each operator uses on this machine, and why."""
    import torch

    from latentcot.kernels import explain_backend

    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for operator in ("gated_scan", "decay_attention", "delta_rule"):
            typer.echo(str(explain_backend(operator, device=torch.device(device), dtype=torch.float32)))


def _names(option: str, listed: str | None) -> list[str] | None:
    """The names in a comma-separated option, ``None`` when it was not given; ``ValueError`` for none at all or one named twice."""
    if listed is None:
        return None
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--{option}: expected at least one name, got {listed!r}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--{option}: {', '.join(repeated)} named twice")
    return names


def _needs(extra: str, *modules: str) -> None:
    from importlib.util import find_spec

    missing = [m for m in modules if find_spec(m) is None]
    if missing:
        raise ValueError(f"this command needs {' and '.join(missing)}: pip install 'latentcot[{extra}]'")


def main() -> None:
    """Entry point of the console script."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # how typer hands on Ctrl-C
            _complain("stopped; run the same command again to continue")
    except (ValueError, OSError) as error:
        code = _complain(error)
    except FloatingPointError as error:
        code = _complain(error, 1)
    except KeyboardInterrupt:  # how older versions of typer do
        code = _complain("stopped; run the same command again to continue", INTERRUPTED)
    except Exception as error:
        # Usage errors: their class belongs to click or to typer's own copy of it, depending on typer's version.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # type: ignore[attr-defined]
        code = _complain(message) if message else 2  # no message: the help was shown instead
    sys.exit(code if isinstance(code, int) else 0)


def _complain(error: BaseException | str, code: int = 2) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
