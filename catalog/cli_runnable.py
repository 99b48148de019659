"""``papers runnable``: which modules implement which papers, and which name a paper that does not link them."""

import sys
from typing import Annotated

import typer

from latentcot.catalog.check import repository_root
from latentcot.catalog.cli_common import one_line_errors, papers_app
from latentcot.catalog.record import dump_json
from latentcot.catalog.runnable import papers_of, reverse_index, unlinked
from latentcot.catalog.store import CatalogError, load_records


@papers_app.command("runnable")
@one_line_errors
def runnable(
    module: Annotated[str, typer.Argument(help="A module or package, by its import name.")] = "latentcot",
    missing: Annotated[
        bool, typer.Option("--unlinked", help="List modules whose docstring names a paper that does not link them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """List the modules of this project with the papers that they implement."""
    records = load_records()
    if missing:
        root = repository_root()
        if root is None:
            raise CatalogError("--unlinked reads the sources of a checkout; this copy is installed")
        pairs = unlinked(records, root)
        if as_json:
            sys.stdout.write(dump_json([{"module": path, "paper": key} for path, key in pairs]))
        for path, key in () if as_json else pairs:
            print(f"{path}: {key}")
        return
    found = papers_of(reverse_index(records), module)
    if not found:
        raise CatalogError(f"no paper is linked to {module!r}; `latentcot papers runnable` lists all modules")
    if as_json:
        sys.stdout.write(
            dump_json({
                name: [{"key": held.record.key, "test": held.entry.test, "notebook": held.entry.notebook} for held in part]
                for name, part in found.items()
            })
        )  # fmt: skip
        return
    for name, part in found.items():
        print(name)
        for held in part:
            print(f"  {held.record.key}  {held.record.title}" + (f"  ({held.entry.test})" if held.entry.test else ""))
