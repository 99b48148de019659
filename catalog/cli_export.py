"""Commands that write papers for other programs: ``papers export | cite | from-bib``."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from latentcot.catalog import bibtex
from latentcot.catalog.cli_common import choices, one_line_errors, papers_app
from latentcot.catalog.filters import Filters
from latentcot.catalog.record import SCHEMA_VERSION
from latentcot.catalog.store import CatalogError, load_records, write_atomic

FORMATS = ("bibtex", "json")


@papers_app.command("export")
@one_line_errors
def export(
    format: Annotated[str, typer.Option(help="bibtex or json.")] = "bibtex",
    output: Annotated[Path | None, typer.Option(help="File to write; standard output by default.")] = None,
    leaf: Annotated[str | None, typer.Option(help="Only papers of this leaf or branch.")] = None,
) -> None:
    """Write all papers, or those of one leaf, as BibTeX or JSON."""
    if format not in FORMATS:
        raise CatalogError(f"--format expects {choices(FORMATS)}, given {format!r}")
    accept = Filters(leaf=leaf).compile()
    records = [record for record in load_records() if accept(record)]
    if format == "bibtex":
        text = bibtex.export(records)
    else:
        dump = {
            "schema_version": SCHEMA_VERSION,
            "licence": "Facts about papers, no abstracts; arXiv's descriptive metadata are CC0.",
            "records": [record.model_dump(mode="json") for record in records],
        }
        text = json.dumps(dump, ensure_ascii=False, indent=2) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    if output.is_dir():
        raise CatalogError(f"{output} is a folder, expected a file to write")
    if not output.parent.is_dir():
        raise CatalogError(f"the folder {output.parent} does not exist")
    write_atomic(output, text)
    print(f"{len(records)} papers written to {output}", file=sys.stderr)
