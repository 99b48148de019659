"""What the commands of the catalog share: the application, errors of one line, the reading of filters."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer
from rich.console import Console

from latentcot.catalog.store import CatalogError

papers_app = typer.Typer(
    name="papers", help="The paper catalog: check, search, show, export.", no_args_is_help=True, add_completion=False
)


def fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(2)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            raise  # the reader of a pipe has seen enough; click ends quietly
        except (CatalogError, OSError) as error:
            fail(str(error))

    return wrapped


def make_console() -> Console:
    console = Console(highlight=False)
    # In a pipe nobody sees an edge to wrap at: lines stay whole for the next program.
    return console if console.is_terminal else Console(highlight=False, width=200)


def choices(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def parse_facets(values: list[str]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for value in values:
        name, equals, wanted = value.partition("=")
        if not equals:
            raise CatalogError(f"--facet expects facet=value (for instance mechanism=loop), given {value!r}")
        pairs.append((name.strip(), wanted.strip()))
    return tuple(pairs)


def parse_years(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    first, dash, last = text.strip().partition("-")
    if not (first or last) or any(
        part and not (part.isascii() and part.isdigit() and len(part) == 4) for part in (first, last)
    ):
        raise CatalogError(f"--year expects a year or a range such as 2023-2025, given {text!r}")
    start = int(first) if first else None
    return start, (int(last) if last else None) if dash else start
