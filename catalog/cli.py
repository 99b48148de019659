"""The command line of the catalog: ``papers check | search | show``; further commands register themselves.

Bad input is one line on standard error and exit code 2. ``check`` ends with 1 when it found problems.
"""

import sys
from collections import Counter
from typing import Annotated, get_args

import typer
from rich.table import Table
from rich.text import Text

from latentcot.catalog import bibtex
from latentcot.catalog.check import check_catalog
from latentcot.catalog.cli_common import choices, make_console, one_line_errors, papers_app, parse_facets, parse_years
from latentcot.catalog.filters import Filters
from latentcot.catalog.leaves import load_taxonomy
from latentcot.catalog.record import Record, dump_json
from latentcot.catalog.search import Hit, Result, Sort, default_index
from latentcot.catalog.search_words import clean_query
from latentcot.catalog.store import CatalogError, get


@papers_app.command("check")
@one_line_errors
def check(
    as_json: Annotated[bool, typer.Option("--json", help="Write the problems as JSON.")] = False,
) -> None:
    """Check every record: schema, identifiers, titles, slugs, paths, citation keys, canonical form, BibTeX."""
    checked = check_catalog()
    if as_json:
        problems = [{"where": p.where, "rule": p.rule, "message": p.message} for p in checked.problems]
        sys.stdout.write(dump_json({"records": len(checked.records), "problems": problems}))
    else:
        for problem in checked.problems:
            print(problem)
        number = len(checked.problems)
        told = "no problems" if not number else f"{number} problem{'s' if number > 1 else ''}"
        note = "" if checked.paths_checked else " (not a checkout: paths of runnable code were not checked)"
        print(f"{len(checked.records)} records, {len(load_taxonomy().leaves)} leaves: {told}{note}")
    if checked.problems:
        raise typer.Exit(1)


@papers_app.command("search")
@one_line_errors
def search(
    query: Annotated[list[str] | None, typer.Argument(help="Words, an arXiv id, a DOI or a citation key.")] = None,
    leaf: Annotated[str | None, typer.Option(help="Slug of a leaf or branch, for instance vertical/feedback.")] = None,
    facet: Annotated[
        list[str] | None, typer.Option(help="facet=value, for instance mechanism=loop; repeatable.")
    ] = None,
    year: Annotated[str | None, typer.Option(help="A year or a range: 2024, 2023-2025, 2024-, -2020.")] = None,
    venue: Annotated[str | None, typer.Option(help="A venue, with or without year: ICLR, NeurIPS2024.")] = None,
    code: Annotated[bool | None, typer.Option("--code/--no-code", help="Only papers with (without) code.")] = None,
    runnable: Annotated[
        bool | None, typer.Option("--runnable/--not-runnable", help="Only papers (not) implemented here.")
    ] = None,
    status: Annotated[str | None, typer.Option(help="active, withdrawn or superseded.")] = None,
    filed: Annotated[str | None, typer.Option(help="How the leaf came about: listed, proposed, reviewed.")] = None,
    sort: Annotated[str, typer.Option(help="relevance, date or added.")] = "relevance",
    limit: Annotated[int, typer.Option(help="The most papers to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Write the results as JSON.")] = False,
    as_bibtex: Annotated[bool, typer.Option("--bibtex", help="Write the results as BibTeX.")] = False,
    counted: Annotated[
        bool, typer.Option("--counts", help="Also tell how many of all found papers each leaf, year and facet has.")
    ] = False,
) -> None:
    """Search titles, authors, topics and venues. Nothing you type is query syntax."""
    if as_json and as_bibtex:
        raise CatalogError("--json and --bibtex exclude each other")
    if counted and as_bibtex:
        raise CatalogError("--counts and --bibtex exclude each other")
    text = " ".join(query or [])
    filters = Filters(leaf, parse_facets(facet or []), *parse_years(year), venue, code, runnable, status, filed)
    if not clean_query(text) and filters == Filters():
        raise CatalogError("the query is empty: give words, an identifier or a filter such as --leaf")
    order = _sort(sort)
    if limit < 1:
        raise CatalogError(f"--limit expects at least 1, given {limit}")
    result = default_index().search(text, filters=filters, sort=order, limit=limit)
    if as_json:
        hits = [
            {"score": round(h.score, 6), "spans": h.spans, "record": h.record.model_dump(mode="json")}
            for h in result.hits
        ]
        found = {"query": text, "match": result.match, "total": result.total, "hits": hits}
        if counted:
            found["counts"] = {name: dict(values.most_common()) for name, values in _counts(text, filters).items()}
        sys.stdout.write(dump_json(found))
    elif as_bibtex:
        sys.stdout.write(bibtex.export(hit.record for hit in result.hits))
    else:
        _print_result(result)
        if counted and result.hits:
            for name, values in _counts(text, filters).items():
                if values:
                    shown = ", ".join(f"{value} {count}" for value, count in values.most_common(8))
                    make_console().print(Text(f"{name}: {shown}", style="dim"))


def _counts(text: str, filters: Filters) -> dict[str, Counter[str]]:
    return default_index().counts(text, filters=filters)


def _sort(text: str) -> Sort:
    for order in get_args(Sort):
        if text == order:
            return order
    raise CatalogError(f"--sort expects {choices(get_args(Sort))}, given {text!r}")


def _print_result(result: Result) -> None:
    console = make_console()
    if not result.hits:
        console.print("No paper found.")
        return
    if result.match == "some":
        console.print("No paper has every word; these have most of them.", style="dim")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("key", "year", "title", "venue", "topic"):
        table.add_column(name, no_wrap=name != "title", ratio=1 if name == "title" else None)
    for hit in result.hits:
        record = hit.record
        table.add_row(record.key, str(record.year or "?"), _title(hit), _venue(record) or "", record.taxonomy.primary)
    console.print(table)
    if result.total > len(result.hits):
        console.print(f"{len(result.hits)} of {result.total} papers shown; --limit shows more.", style="dim")


def _title(hit: Hit) -> Text:
    text = Text(hit.record.title)
    for start, end in hit.spans:
        text.stylize("bold", start, end)
    return text


def _venue(record: Record) -> str | None:
    venue = record.venue
    return " ".join(str(part) for part in (venue.name, venue.year, venue.track) if part) if venue else None


@papers_app.command("show")
@one_line_errors
def show(
    paper: Annotated[str, typer.Argument(help="Key, arXiv id, DOI, address or citation key.")],
    as_json: Annotated[bool, typer.Option("--json", help="Write the record as JSON.")] = False,
    as_bibtex: Annotated[bool, typer.Option("--bibtex", help="Write the BibTeX entry.")] = False,
) -> None:
    """Show one paper."""
    if as_json and as_bibtex:
        raise CatalogError("--json and --bibtex exclude each other")
    if not paper.strip():
        raise CatalogError("the name of the paper is empty: give a key, arXiv id, DOI or citation key")
    record = get(paper)
    if as_json:
        sys.stdout.write(dump_json(record.model_dump(mode="json")))
    elif as_bibtex:
        sys.stdout.write(bibtex.entry(record))
    else:
        _print_record(record)


def _print_record(record: Record) -> None:
    console = make_console()
    leaves = load_taxonomy().leaves
    console.print(Text(record.title, style="bold"))
    for title in record.other_titles:
        console.print(Text(f"also: {title}", style="dim"))
    if record.status != "active":
        console.print(
            Text(f"{record.status}{f' by {record.superseded_by}' if record.superseded_by else ''}", style="bold red")
        )
    rows = [
        ("authors", ", ".join(record.author_names) or "not fetched yet"),
        ("published", record.published.value if record.published else "unknown"),
        ("venue", _venue(record)),
        ("topic", _leaf(leaves[record.taxonomy.primary].name, record.taxonomy.primary, record.taxonomy.status)),
        *(("", f"{leaves[slug].name} ({slug})") for slug in record.taxonomy.also),
        *((name, ", ".join(values)) for name, values in record.facets.model_dump().items() if values),
        *((link.kind, f"{link.url}{_officially(link.official)}") for link in record.links),
        *(("runnable", " ".join(p for p in (r.module, r.notebook, r.test) if p)) for r in record.runnable),
        ("note", record.note),
        ("cite as", record.citekey),
        ("listed by", ", ".join(dict.fromkeys(source.source for source in record.sources))),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value:
            table.add_row(name, Text(value))
    console.print(table)


def _leaf(name: str, slug: str, status: str) -> str:
    return f"{name} ({slug}, {status})"


def _officially(official: bool | None) -> str:
    return {True: "", False: " (not by the authors)", None: " (not confirmed)"}[official]


from latentcot.catalog import cli_export, cli_relevance, cli_runnable, cli_update  # noqa: E402, F401  # these register


def main() -> None:
    """Entry point of ``python -m latentcot.catalog``."""
    papers_app(prog_name="latentcot papers")
