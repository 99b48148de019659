"""Commands that write papers for other programs: ``papers export | cite | from-bib | related``."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from latentcot.catalog.cli_common import choices, make_console, one_line_errors, papers_app
from latentcot.catalog.export import FORMATS, feeds, lists, render
from latentcot.catalog.record import Record, dump_json
from latentcot.catalog.selection import select
from latentcot.catalog.store import CatalogError, get, load_records, write_output

_OF_ONE = ("bibtex", "csl", "ris", "text")


@papers_app.command("export")
@one_line_errors
def export(
    format: Annotated[str, typer.Option(help=f"{choices(list(FORMATS))}.")] = "bibtex",
    output: Annotated[Path | None, typer.Option(help="File to write; standard output by default.")] = None,
    leaf: Annotated[str | None, typer.Option(help="Only papers of this leaf or branch.")] = None,
    selection: Annotated[
        list[str] | None,
        typer.Option("--select", help="field=value: leaf, year, venue, code, mechanism, key, words, …; repeatable."),
    ] = None,
    into: Annotated[
        Path | None, typer.Option(help="Markdown file whose text between the two papers markers is replaced.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Feeds: the most entries.", show_default="50")] = None,
    site_url: Annotated[
        str | None, typer.Option(help="Feeds: address of the site, so that entries link to its pages.")
    ] = None,
) -> None:
    """Write all papers, or those that are selected, for another program."""
    if format not in FORMATS:
        raise CatalogError(f"--format expects {choices(list(FORMATS))}, given {format!r}")
    feed = format in ("atom", "rss")
    if (limit is not None or site_url is not None) and not feed:
        raise CatalogError(f"--limit and --site-url belong to atom and rss, not to {format}")
    if limit is not None and limit < 1:
        raise CatalogError(f"--limit expects at least 1, given {limit}")
    if site_url is not None and not site_url.startswith(("http://", "https://")):
        raise CatalogError(f"--site-url expects an absolute address (https://…), given {site_url!r}")
    if into is not None and (format != "markdown" or output is not None):
        raise CatalogError("--into belongs to --format markdown, without --output")
    records = select([*([f"leaf={leaf}"] if leaf is not None else []), *(selection or [])], load_records())
    if feed:
        make = feeds.atom if format == "atom" else feeds.rss
        text = make(records, site=site_url, limit=limit or 50, slug=leaf or "all")
    else:
        text = render(format, records)
    if into is not None:
        if not into.is_file():
            raise CatalogError(f"{into} is not a file")
        output, text = into, lists.between(into.read_text(encoding="utf-8"), text)
    _write(text, output, f"{len(records)} papers")


def _write(text: str, output: Path | None, what: str) -> None:
    if output is None:
        # Line ends are part of a format (RIS and CSV have CR LF), so the text goes out as it is.
        sys.stdout.flush()
        buffer = getattr(sys.stdout, "buffer", None)
        if buffer is None:
            sys.stdout.write(text)
        else:
            buffer.write(text.encode("utf-8"))
            buffer.flush()
        return
    if output.is_dir():
        raise CatalogError(f"{output} is a folder, expected a file to write")
    if not output.parent.is_dir():
        raise CatalogError(f"the folder {output.parent} does not exist")
    write_output(output, text)
    print(f"{what} written to {output}", file=sys.stderr)


@papers_app.command("cite")
@one_line_errors
def cite(
    papers: Annotated[list[str], typer.Argument(help="Keys, arXiv ids, DOIs, addresses or citation keys.")],
    format: Annotated[str, typer.Option(help=f"{choices(_OF_ONE)}.")] = "bibtex",
) -> None:
    """Print how to cite papers, ready to paste."""
    if format not in _OF_ONE:
        raise CatalogError(f"--format expects {choices(_OF_ONE)}, given {format!r}")
    found: dict[str, Record] = {}
    for name in papers:
        if not name.strip():
            raise CatalogError("the name of the paper is empty: give a key, arXiv id, DOI or citation key")
        record = get(name)
        found[record.key] = record
    _write(render(format, found.values()), None, "")


@papers_app.command("from-bib")
@one_line_errors
def from_bib(
    file: Annotated[Path, typer.Argument(help="A BibTeX file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as JSON.")] = False,
    score: Annotated[bool, typer.Option("--score/--no-score", help="Score missing entries for relevance.")] = True,
    every: Annotated[bool, typer.Option("--all", help="Show known entries as well.")] = False,
) -> None:
    """Tell which entries of a bibliography the catalog knows, and propose those that are missing."""
    from latentcot.catalog.from_bib import compare_bib, read_bib

    entries, problems = read_bib(file)
    if problems and not entries:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CatalogError(f"{file}: no entry could be read: {problems[0]}{more}")
    compared = compare_bib(entries, problems=problems, score=score)
    for problem in problems:
        print(f"{file}: {problem}", file=sys.stderr)
    if as_json:
        shown = [
            {
                "entry": one.entry.key, "title": one.entry.title, "arxiv": one.entry.arxiv, "doi": one.entry.doi,
                "outcome": one.outcome, "rule": one.rule, "key": one.record.key if one.record else None,
                "citekey": one.record.citekey if one.record else None, "remark": one.remark,
                "relevance": one.proposal.probability if one.proposal else None,
                "leaf": one.proposal.leaf if one.proposal else None,
                "reasons": list(one.proposal.reasons) if one.proposal else [],
            }
            for one in compared.found
        ]  # fmt: skip
        sys.stdout.write(dump_json({"counts": compared.counts, "problems": problems, "entries": shown}))
        return
    console = make_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("entry", "outcome", "paper or proposal", "title"):
        table.add_column(name, no_wrap=name != "title", ratio=1 if name == "title" else None)
    rank = {"likely": 0, "missing": 1, "known": 2}
    ordered = sorted(
        compared.found, key=lambda one: (rank[one.outcome], -(one.proposal.probability if one.proposal else 0.0))
    )
    for one in ordered:
        if one.outcome == "known" and not (every or one.remark):
            continue
        what = f"{one.record.key} ({one.rule})" if one.record else ""
        if one.proposal:
            what = f"{one.proposal.probability:.2f} {one.proposal.leaf}"
        title = f"{one.entry.title}  [{one.remark}]" if one.remark else one.entry.title
        table.add_row(Text(one.entry.key), one.outcome, Text(what), Text(title))
    if table.row_count:
        console.print(table)
    counts = compared.counts
    console.print(f"{counts['known']} known, {counts['likely']} likely, {counts['missing']} missing.", style="bold")
    if counts["missing"] and score:
        console.print("Missing entries stand in the order of their relevance; a curator decides.", style="dim")


@papers_app.command("related")
@one_line_errors
def related(
    paper: Annotated[str, typer.Argument(help="Key, arXiv id, DOI, address or citation key.")],
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as JSON.")] = False,
) -> None:
    """Show the papers most like one, and what they share with it."""
    from latentcot.catalog.related import related_papers

    record = get(paper)
    found = related_papers(load_records())[record.key]
    if as_json:
        shown = [{"key": one.key, "title": get(one.key).title, "score": round(one.score, 6), "terms": list(one.terms)}
                 for one in found]  # fmt: skip
        sys.stdout.write(dump_json({"key": record.key, "related": shown}))
        return
    console = make_console()
    console.print(Text(record.title, style="bold"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("key", "title", "shares"):
        table.add_column(name, no_wrap=name == "key", ratio=None if name == "key" else 1)
    for one in found:
        table.add_row(one.key, Text(get(one.key).title), Text(", ".join(one.terms)))
    console.print(table if found else "No paper is like it.")
