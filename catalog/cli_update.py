"""The commands that keep the catalog current: ``papers update | review | refresh | stats``."""

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from latentcot.catalog.acceptance import writing
from latentcot.catalog.cli_common import choices, make_console, one_line_errors, papers_app
from latentcot.catalog.queue_store import Candidate, Folders, open_catalog, read_decision
from latentcot.catalog.record import dump_json
from latentcot.catalog.store import CatalogError, write_output
from latentcot.catalog.update.client import ARXIV_API, GAP, FeedClient, Politeness, user_agent

review_app = typer.Typer(
    help="Judge the queue: one paper at a time in the terminal, or by flags.",
    invoke_without_command=True,
    add_completion=False,
)
papers_app.add_typer(review_app, name="review")

CatalogOption = Annotated[
    Path | None,
    typer.Option(
        "--catalog", envvar="LATENTCOT_CATALOG", help="Folder of the catalog; default the one of this checkout."
    ),
]
ByOption = Annotated[
    str | None, typer.Option("--by", help="Who decides; default LATENTCOT_CURATOR, then git's user.name.")
]
FeedOption = Annotated[str, typer.Option("--feed", envvar="LATENTCOT_FEED", help="Address of the query API.")]
ContactOption = Annotated[
    str | None,
    typer.Option(
        "--contact", envvar="LATENTCOT_CONTACT", help="Mail or https address for the user agent; arXiv asks for one."
    ),
]
GapOption = Annotated[
    float, typer.Option("--gap", help="Seconds between requests; less than 3 only for a server on this machine.")
]
BudgetOption = Annotated[int, typer.Option("--budget", help="The most requests of this run.")]
SummaryOption = Annotated[
    Path | None, typer.Option("--summary", help="File for the Markdown summary; standard output by default.")
]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Read and report, change nothing.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Ask again for pages that were read today.")]


def _client(
    folders: Folders, feed: str, contact: str | None, gap: float, budget: int, fresh: bool, console: Console
) -> FeedClient:
    from latentcot.catalog.update.cache import PageCache
    from latentcot.catalog.update.client import is_loopback
    from latentcot.catalog.update.clock import SystemClock

    clock = SystemClock()
    cache = PageCache(folders.cache, clock, fresh=fresh)
    cache.remove_old()
    # A server on this machine is a trial: whoever shortens the gap there does not want to wait half a minute either.
    short = gap / GAP if is_loopback(feed) else 1.0
    politeness = Politeness(gap=gap, budget=budget, slow_gap=15.0 * short, first_wait=30.0 * short)
    return FeedClient(
        feed,
        clock=clock,
        cache=cache,
        contact=contact,
        politeness=politeness,
        seed=int.from_bytes(
            os.urandom(4), "big"
        ),  # jitter only: machines that started together must not knock together
        say=lambda text: console.print(text, style="dim", markup=False),
    )


def _progress(console: Console) -> Progress:
    parts = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    return Progress(*parts, console=console, transient=True, disable=not console.is_terminal)


def _check_summary(summary: Path | None) -> None:
    """Before the run: a summary that cannot be written would be noticed when everything is over."""
    if summary is not None and (summary.is_dir() or not summary.absolute().parent.is_dir()):
        raise CatalogError(f"--summary expects a file in a folder that exists, given {summary}")


def _deliver(text: str, summary: Path | None) -> None:
    if summary is None:
        sys.stdout.write(text)
    else:
        write_output(summary, text)


@papers_app.command("update")
@one_line_errors
def update(
    catalog: CatalogOption = None,
    feed: FeedOption = ARXIV_API,
    contact: ContactOption = None,
    query: Annotated[list[str] | None, typer.Option("--query", help="Only this query; repeatable.")] = None,
    queries: Annotated[
        Path | None, typer.Option("--queries", help="File of queries; default the one that ships.")
    ] = None,
    overlap_days: Annotated[
        int | None, typer.Option(help="Days before the watermark to read again, at least 14.")
    ] = None,
    gap: GapOption = GAP,
    budget: BudgetOption = 100,
    summary: SummaryOption = None,
    dry_run: DryOption = False,
    fresh: FreshOption = False,
) -> None:
    """Find new papers and queue them. Exit code 0: nothing new, 10: new candidates, 11: partial, 12: failed."""
    from latentcot.catalog.update.cache import one_run
    from latentcot.catalog.update.queries import load_queries
    from latentcot.catalog.update.scoring import default_scorer
    from latentcot.catalog.update.summary import markdown
    from latentcot.catalog.update.updater import Updater

    folders = open_catalog(catalog)
    _check_summary(summary)
    config = load_queries(queries)
    if overlap_days is not None and not config.overlap_days <= overlap_days <= 400:
        raise CatalogError(f"--overlap-days expects {config.overlap_days} to 400, given {overlap_days}")
    console = Console(stderr=True, highlight=False)
    with one_run(folders.cache):
        client = _client(folders, feed, contact, gap, budget, fresh, console)
        scorer, note = default_scorer(config.phrases)
        overlap = timedelta(days=overlap_days) if overlap_days else None
        config.chosen(query)  # a wrong name shows before anything begins
        updater = Updater(folders, client, config, scorer, dry_run=dry_run, overlap=overlap)
        if note:
            updater.report.notes.append(note)
        with _progress(console) as bar:
            task = bar.add_task("queries", total=len(config.queries))
            updater.progress = lambda name, done, of: bar.update(task, description=name, completed=done, total=of)
            report = updater.run(query)
    _deliver(markdown(report), summary)
    gaps = client.log.gaps()
    told = f"{len(client.log.requests)} requests, {client.log.cached} pages from today's cache"
    told += f", smallest gap {min(gaps):.1f} s" if gaps else ""
    console.print(f"{report.headline} ({told})", markup=False)
    if report.failed:
        console.print(f"failed: {report.failed}", style="red", markup=False)
    raise typer.Exit(int(report.outcome))


@papers_app.command("refresh")
@one_line_errors
def refresh_command(
    paper: Annotated[
        list[str] | None, typer.Argument(help="Papers to refresh (key, id, citation key); default all on arXiv.")
    ] = None,
    catalog: CatalogOption = None,
    feed: FeedOption = ARXIV_API,
    contact: ContactOption = None,
    metadata: Annotated[
        bool, typer.Option("--metadata/--no-metadata", help="Versions, titles, withdrawals and venues from arXiv.")
    ] = True,
    code: Annotated[
        bool, typer.Option("--code", help="Look for repositories, and confirm them by their README.")
    ] = False,
    links: Annotated[
        bool, typer.Option("--links", help="Look whether links still work (a thirtieth of them each day).")
    ] = False,
    all_links: Annotated[bool, typer.Option("--all-links", help="With --links: all of them today.")] = False,
    gap: GapOption = GAP,
    budget: BudgetOption = 100,
    summary: SummaryOption = None,
    dry_run: DryOption = False,
    fresh: FreshOption = False,
) -> None:
    """See what has become of known papers. Exit code 0: nothing, 10: changes, 11: partial, 12: failed."""
    from latentcot.catalog.enrich.runner import EnrichReport, isolated, run_code, run_health
    from latentcot.catalog.enrich.web import Web
    from latentcot.catalog.refresh import RefreshReport, chosen, markdown, refresh
    from latentcot.catalog.update.cache import one_run
    from latentcot.catalog.update.clock import SystemClock
    from latentcot.catalog.update.report import Outcome

    if not (metadata or code or links):
        raise CatalogError("nothing to do: give --code or --links with --no-metadata")
    if dry_run and (code or links):
        raise CatalogError("--dry-run is for metadata alone; --code and --links write what they find")
    folders = open_catalog(catalog)
    _check_summary(summary)
    records = chosen(folders, paper or [])
    console = Console(stderr=True, highlight=False)
    report, extra = RefreshReport(asked=len(records)), EnrichReport()
    today = datetime.now(UTC).date()
    with one_run(folders.cache), _progress(console) as bar:
        task = bar.add_task("papers", total=len(records))
        show = lambda done, of: bar.update(task, completed=done, total=of)  # noqa: E731
        if metadata:
            client = _client(folders, feed, contact, gap, budget, fresh, console)
            report = refresh(folders, client, records, dry_run=dry_run, progress=show)
        if code or links:
            web = Web(user_agent(contact, ARXIV_API), SystemClock())
            if code:
                bar.update(task, description="code")
                now = {record.key: record for record in folders.records()}
                isolated(
                    "code",
                    extra,
                    lambda: run_code(
                        folders, [now[r.key] for r in records], web, extra, today.isoformat(), progress=show
                    ),
                )
            if links:
                bar.update(task, description="links")
                isolated(
                    "links",
                    extra,
                    lambda: run_health(folders, records, web, extra, today, everything=all_links, progress=show),
                )
    report.changes += [
        (key, "link", "unconfirmed or unknown", "repository found or confirmed") for key in extra.changed
    ]
    report.notes += [f"dead link: {url}" for url in extra.dead] + extra.problems
    _deliver(markdown(report), summary)
    console.print(report.headline, markup=False)
    outcome = report.outcome
    if extra.problems and outcome in (Outcome.NOTHING_NEW, Outcome.NEW):
        outcome = Outcome.PARTIAL
    raise typer.Exit(int(outcome))


@papers_app.command("stats")
@one_line_errors
def stats(
    catalog: CatalogOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the numbers as JSON.")] = False,
) -> None:
    """Count records, queue, decisions and links."""
    from rich.table import Table

    from latentcot.catalog.numbers import numbers

    found = numbers(open_catalog(catalog) if catalog else Folders(default_root()))
    if as_json:
        sys.stdout.write(dump_json(found))
        return
    console = make_console()
    for heading, values in found.items():
        table = Table(
            box=None, pad_edge=False, show_header=False, title=heading, title_justify="left", title_style="bold"
        )
        table.add_column(no_wrap=True)
        table.add_column(justify="right")
        for name, value in values.items():
            table.add_row(Text(name), "none" if value is None else str(value))
        console.print(table)


def default_root() -> Path:
    """The catalog that ships with the package: good for reading, wherever it is installed."""
    from latentcot.catalog.store import CATALOG

    return CATALOG


@review_app.callback()
@one_line_errors
def review(context: typer.Context, catalog: CatalogOption = None, by: ByOption = None) -> None:
    """Judge the queue in the terminal: keys only; ? lists them."""
    from latentcot.catalog.review import curator

    if context.invoked_subcommand is not None:
        given = [context.get_parameter_source(name) for name in ("catalog", "by")]
        if any(source is not None and source.name == "COMMANDLINE" for source in given):
            raise CatalogError(f"--catalog and --by belong behind {context.invoked_subcommand!r}")
        return
    from latentcot.catalog.review_terminal import Session
    from latentcot.catalog.terminal import Keyboard

    folders, name = open_catalog(catalog), curator(by)
    with writing(folders):
        pass  # whatever a killed session left is carried out before the queue is shown
    with Keyboard() as keyboard:
        Session(folders, name, _today(), Console(highlight=False), keyboard.key, keyboard.line).run()


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


@review_app.command("list")
@one_line_errors
def review_list(
    catalog: CatalogOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the candidates as JSON.")] = False,
) -> None:
    """List the queue, likeliest papers first."""
    from latentcot.catalog.review import ordered_queue
    from latentcot.catalog.review_terminal import summary_table

    queue = ordered_queue(open_catalog(catalog))
    if as_json:
        sys.stdout.write(dump_json([item.model_dump(mode="json") for item in queue]))
    elif not queue:
        print("The queue is empty.")
    else:
        make_console().print(summary_table(queue))


@review_app.command("show")
@one_line_errors
def review_show(
    paper: Annotated[str, typer.Argument(help="Key or arXiv id of the candidate.")],
    catalog: CatalogOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the candidate as JSON.")] = False,
) -> None:
    """Show one candidate."""
    from latentcot.catalog.review import find_candidate
    from latentcot.catalog.review_terminal import panel

    candidate = find_candidate(open_catalog(catalog), paper)
    if as_json:
        sys.stdout.write(dump_json(candidate.model_dump(mode="json")))
    else:
        make_console().print(panel(candidate))


def _candidate(folders: Folders, paper: str) -> Candidate:
    from latentcot.catalog.review import find_candidate

    with writing(folders):
        return find_candidate(folders, paper)


@review_app.command("accept")
@one_line_errors
def review_accept(
    paper: Annotated[str, typer.Argument(help="Key or arXiv id of the candidate.")],
    leaf: Annotated[str | None, typer.Option(help="Slug of the leaf; default the first proposal.")] = None,
    also: Annotated[list[str] | None, typer.Option(help="A further leaf; repeatable.")] = None,
    into: Annotated[str | None, typer.Option(help="Merge into this record instead of making one.")] = None,
    note: Annotated[str | None, typer.Option(help="One sentence of our own for the paper's page.")] = None,
    catalog: CatalogOption = None,
    by: ByOption = None,
) -> None:
    """Make a candidate a record."""
    from latentcot.catalog.review import accept, curator

    folders = open_catalog(catalog)
    candidate = _candidate(folders, paper)
    if leaf is None:
        if not candidate.score.leaves:
            raise CatalogError(f"nothing is proposed for {candidate.key}: give --leaf")
        leaf = candidate.score.leaves[0].leaf
    decision = accept(
        folders, candidate, leaf=leaf, also=also or (), by=curator(by), date=_today(), note=note, into=into
    )
    print(f"{candidate.key} merged into {decision.record}" if into else f"{candidate.key} accepted under {leaf}")


@review_app.command("reject")
@one_line_errors
def review_reject(
    paper: Annotated[str, typer.Argument(help="Key or arXiv id of the candidate.")],
    reason: Annotated[str, typer.Option(help="Why: off-topic, explicit-cot, other-latent, duplicate, withdrawn, …")],
    of: Annotated[str | None, typer.Option("--of", help="With --reason duplicate: the record that it repeats.")] = None,
    note: Annotated[str | None, typer.Option(help="A sentence about it.")] = None,
    catalog: CatalogOption = None,
    by: ByOption = None,
) -> None:
    """Keep a candidate out, for good unless its title or primary category changes."""
    from latentcot.catalog.queue_store import REASONS
    from latentcot.catalog.review import curator, reject

    if reason not in REASONS:
        raise CatalogError(f"--reason expects {choices(list(REASONS))}, given {reason!r}")
    folders = open_catalog(catalog)
    candidate = _candidate(folders, paper)
    reject(folders, candidate, reason=reason, by=curator(by), date=_today(), note=note, duplicate_of=of)
    print(f"{candidate.key} rejected: {reason}")


@review_app.command("undo")
@one_line_errors
def review_undo(
    paper: Annotated[str, typer.Argument(help="Key or arXiv id of the decided paper.")], catalog: CatalogOption = None
) -> None:
    """Take a decision back: the paper stands in the queue again."""
    from latentcot.catalog.identifiers import Identifier, IdentifierError, parse_arxiv, record_key
    from latentcot.catalog.review import undo

    folders = open_catalog(catalog)
    try:
        key = record_key(Identifier("arxiv", parse_arxiv(paper.replace("_", "/")).base))
    except IdentifierError as error:
        raise CatalogError(str(error)) from None
    if read_decision(folders, key) is None:
        raise CatalogError(f"{key!r} has no decision to undo")
    decision = undo(folders, key)
    print(f"{key} was {decision.verdict}, it stands in the queue again")
