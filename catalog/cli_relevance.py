"""``papers train-relevance`` and ``papers score``: the relevance scorer on the command line."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from latentcot.catalog.cli_common import one_line_errors, papers_app
from latentcot.catalog.record import dump_json
from latentcot.catalog.store import CatalogError


@papers_app.command("train-relevance")
@one_line_errors
def train_relevance(
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for model and report.", show_default="the catalog's own, in a checkout"),
    ] = None,
) -> None:
    """Train the relevance scorer anew on records, rejected candidates and background titles, and measure it."""
    from latentcot.catalog.check import repository_root
    from latentcot.catalog.relevance.make import REPORT_FILE, make_model, report_lines
    from latentcot.catalog.relevance.model import MODEL_FILE

    if output is None and repository_root() is None:
        raise CatalogError("this copy is installed, not a checkout: name a folder with --output")
    if output is not None and not output.is_dir():
        raise CatalogError(f"--output: {output} is not a folder")
    model = MODEL_FILE if output is None else output / MODEL_FILE.name
    report = REPORT_FILE if output is None else output / REPORT_FILE.name
    with Console(stderr=True).status("reading titles") as status:
        made = make_model(model_file=model, report_file=report, say=status.update)
    print("\n".join(report_lines(made)))


@papers_app.command("score")
@one_line_errors
def score_title(
    title: Annotated[list[str], typer.Argument(help="A title; `-` reads one title a line from standard input.")],
    as_json: Annotated[bool, typer.Option("--json", help="Write everything as JSON, one object a title.")] = False,
) -> None:
    """Say how likely a title belongs to the catalog, under which leaf, and why."""
    from latentcot.catalog.relevance import score

    titles = [line.strip() for line in sys.stdin] if title == ["-"] else [" ".join(title)]
    for text in filter(None, titles):
        found = score(text)
        if as_json:
            near = [{"key": n.key, "cosine": n.cosine, "shared": list(n.shared)} for n in found.nearest]
            leaves = [{"leaf": p.leaf, "share": round(p.share, 4), "reasons": list(p.reasons)} for p in found.leaves]
            sys.stdout.write(
                dump_json({
                    "title": text, "probability": round(found.probability, 6), "relevant": found.relevant,
                    "reasons": list(found.reasons), "leaves": leaves, "nearest": near,
                })
            )  # fmt: skip
            continue
        print(f"{found.probability:.3f} {'relevant' if found.relevant else 'below the threshold'}: {text}")
        print(f"  because: {', '.join(found.reasons)}")
        for proposal in found.leaves:
            why = f" ({', '.join(proposal.reasons)})" if proposal.reasons else ""
            print(f"  {proposal.share:.2f} {proposal.leaf}{why}")
        for near in found.nearest:
            print(f"  like {near.key}: {', '.join(near.shared)}")
    if not any(titles):
        raise CatalogError("title: expected some text, given nothing")
