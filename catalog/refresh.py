"""``papers refresh``: what has become of known papers: versions, titles, withdrawals, venues, links.

Records are asked for by id, some dozens at a time, through the same polite client as the updater. Each batch is written when it has
come, so a run that was killed goes on from the pages of today.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from latentcot.catalog.acceptance import writing
from latentcot.catalog.enrich.arxiv import merge_entry
from latentcot.catalog.queue_store import Folders
from latentcot.catalog.record import Record, dump_record
from latentcot.catalog.store import CatalogError, build_lookup, lookup, parse_record, write_atomic
from latentcot.catalog.update.atom import Entry, FeedPage, Refused
from latentcot.catalog.update.client import (
    BlockedError,
    FeedClient,
    FeedError,
    GaveUpError,
    RejectedError,
    StoppedError,
)
from latentcot.catalog.update.report import Outcome
from latentcot.catalog.update.summary import harmless

BATCH = 50
EMPTY_RETRIES = 3


@dataclass
class RefreshReport:
    """What changed: (key, field, before, after); what disagrees; ids that the feed does not know; why the run is not complete."""

    asked: int = 0
    answered: int = 0
    changes: list[tuple[str, str, str, str]] = field(default_factory=list)
    conflicts: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problem: str | None = None

    @property
    def outcome(self) -> Outcome:
        if self.problem is not None:
            return Outcome.PARTIAL if self.answered else Outcome.FAILED
        return Outcome.NEW if self.changes else Outcome.NOTHING_NEW

    @property
    def headline(self) -> str:
        papers = len({key for key, *_ in self.changes})
        told = f"{papers} of {self.asked} papers changed" if papers else f"nothing new about {self.asked} papers"
        return told if self.problem is None else f"{self.outcome.name.lower()}, {told}"


def chosen(folders: Folders, names: Sequence[str]) -> list[Record]:
    """The records called ``names``, or all with an arXiv id."""
    records = folders.records()
    if not names:
        return [record for record in records if record.ids.arxiv]
    table = build_lookup(records)
    found = []
    for name in names:
        record = lookup(table, name)
        if record is None:
            raise CatalogError(f"no paper is called {name[:60]!r} (key, arXiv id, DOI or citation key)")
        if not record.ids.arxiv:
            raise CatalogError(f"{record.key} has no arXiv id: there is nothing to ask arXiv about it")
        found.append(record)
    return list({record.key: record for record in found}.values())


def refresh(
    folders: Folders,
    client: FeedClient,
    records: Sequence[Record],
    *,
    dry_run: bool = False,
    batch: int = BATCH,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> RefreshReport:
    """Ask for ``records`` and write what is new about them."""
    report = RefreshReport(asked=len(records))
    everyone = folders.records()
    keys = {record.key: {name.lower() for name in (record.citekey, *record.citekey_aliases)} for record in everyone}
    groups = [list(records[place : place + batch]) for place in range(0, len(records), batch)]
    done = 0
    try:
        for group in groups:
            progress(done, len(records))
            found = _fetch(client, group, report)
            _write(folders, group, found, keys, report, dry_run)
            done += len(group)
    except (BlockedError, StoppedError, RejectedError, FeedError) as error:
        report.problem = str(error)
    progress(done, len(records))
    report.missing.sort()
    return report


def _fetch(client: FeedClient, group: list[Record], report: RefreshReport) -> dict[str, Entry]:
    """The entries of a group by base id. A page that cannot be had is asked for in halves; one paper alone is given up."""
    ids = [record.ids.arxiv or "" for record in group]
    try:
        page = _page(client, ids)
    except GaveUpError as error:
        if len(group) == 1:
            report.problem = report.problem or f"{ids[0]}: {error}"
            return {}
        middle = len(group) // 2
        return _fetch(client, group[:middle], report) | _fetch(client, group[middle:], report)
    found = {entry.base: entry for entry in page.entries if entry.base in ids}
    report.refused += page.refused
    left = [base for base in ids if base not in found]
    if left and len(found) + len(page.refused) < len(ids) and found:
        # A short page, or ids that arXiv does not know: asked once more by themselves, it is clear which.
        again = _page(client, left)
        found |= {entry.base: entry for entry in again.entries if entry.base in left}
    report.answered += len(found)
    report.missing += [
        base for base in ids if base not in found and not any(base in item.name for item in page.refused)
    ]
    return found


def _page(client: FeedClient, ids: list[str]) -> FeedPage:
    asked = {"id_list": ",".join(ids), "start": 0, "max_results": len(ids)}
    page = client.page(asked)
    for attempt in range(1, EMPTY_RETRIES + 1):
        # One unknown id gives an empty page too; a whole empty batch is a bad hour.
        if page.arrived or len(ids) == 1:
            return page
        client.wait(attempt, f"an empty page for {len(ids)} papers")
        page = client.page(asked)
    if page.arrived:
        return page
    raise GaveUpError(f"an empty page for {len(ids)} papers, {EMPTY_RETRIES + 1} times")


def _write(
    folders: Folders,
    group: list[Record],
    found: dict[str, Entry],
    keys: dict[str, set[str]],
    report: RefreshReport,
    dry_run: bool,
) -> None:
    if dry_run:
        for record in group:
            _merge(record, found, keys, report)
        return
    with writing(folders):
        for record in group:
            path = folders.record_file(record.key)
            if path is None:
                report.notes.append(f"{record.key} has gone while the feed was read")
                continue
            # Read again: somebody may have edited it since the run began.
            current = parse_record(path.read_bytes(), f"{path.parent.name}/{path.name}")
            merged = _merge(current, found, keys, report)
            if merged != current:
                write_atomic(path, dump_record(merged))


def _merge(record: Record, found: dict[str, Entry], keys: dict[str, set[str]], report: RefreshReport) -> Record:
    entry = found.get(record.ids.arxiv or "")
    if entry is None:
        return record
    others = set().union(*(names for key, names in keys.items() if key != record.key))
    merge = merge_entry(record, entry, others)
    keys[record.key] = {name.lower() for name in (merge.record.citekey, *merge.record.citekey_aliases)}
    report.changes += [(record.key, *change) for change in merge.changes]
    report.conflicts += [(record.key, text) for text in merge.conflicts]
    return merge.record


def markdown(report: RefreshReport) -> str:
    """The summary of a refresh for a pull request."""
    lines = [f"# Catalog refresh: {report.headline}"]
    if report.problem:
        lines += ["", f"**Not complete**: {harmless(report.problem)}"]
    important = [change for change in report.changes if change[1] in ("status", "title", "venue", "doi", "link")]
    if important:
        lines += ["", "| paper | what | before | now |", "| --- | --- | --- | --- |"]
        lines += [
            f"| `{key}` | {name} | {harmless(before)} | {harmless(after)} |"
            for key, name, before, after in important[:200]
        ]
    counts: dict[str, int] = {}
    for _, name, _, _ in report.changes:
        counts[name] = counts.get(name, 0) + 1
    if counts:
        lines += ["", "Fields: " + ", ".join(f"{name} {number}" for name, number in sorted(counts.items())) + "."]
    for heading, items in (
        ("Disagreements, left as they are", [f"`{key}`: {harmless(text)}" for key, text in report.conflicts]),
        ("Unknown to arXiv", [f"`{base}`" for base in report.missing]),
        ("Refused", [f"{harmless(item.name)}: {harmless(item.reason)}" for item in report.refused]),
        ("Notes", [harmless(note, 600) for note in report.notes]),
    ):
        if items:
            lines += ["", f"## {heading} ({len(items)})", "", *(f"* {item}" for item in items[:200])]
    return "\n".join(lines) + "\n"
