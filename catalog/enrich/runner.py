"""Runs enrichers over records, each by itself: what one cannot do is reported, and the next one works all the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date

from latentcot.catalog.acceptance import writing
from latentcot.catalog.enrich.code import README_HOST, TRACKER_API, enrich_code
from latentcot.catalog.enrich.health import ARCHIVE_API, checked, due, look_at, read_health, write_health
from latentcot.catalog.enrich.web import SpentError, Web
from latentcot.catalog.queue_store import Folders
from latentcot.catalog.record import Record, dump_record
from latentcot.catalog.store import parse_record, write_atomic

GIVE_UP = 5


@dataclass
class EnrichReport:
    """What the enrichers did: records with new links, dead links, and what went wrong, by enricher."""

    changed: list[str] = field(default_factory=list)
    looked_at: int = 0
    dead: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run_code(
    folders: Folders, records: Sequence[Record], web: Web, report: EnrichReport, today: str, *,
    api: str = TRACKER_API, readmes: str = README_HOST, progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:  # fmt: skip
    """Look for repositories. After five failures in a row the host is taken to be down, and the rest waits for the next run."""
    failures = 0
    for done, record in enumerate(records):
        progress(done, len(records))
        try:
            found = enrich_code(record, web, today, api=api, readmes=readmes)
        except SpentError as error:
            report.problems.append(f"code: {error} after {done} of {len(records)} papers")
            return
        except Exception as error:  # whatever a stranger's answer does to us, the others go on
            failures += 1
            if failures <= GIVE_UP:
                report.problems.append(f"code: {record.key}: {type(error).__name__}: {error}")
            if failures == GIVE_UP:
                report.problems.append(
                    f"code: gave up after {GIVE_UP} failures in a row, at {done + 1} of {len(records)} papers"
                )
                return
            continue
        failures = 0
        if found != record:
            _save(folders, record, found, report)


def _save(folders: Folders, before: Record, found: Record, report: EnrichReport) -> None:
    with writing(folders):
        path = folders.record_file(before.key)
        if path is None or parse_record(path.read_bytes(), path.name) != before:
            report.problems.append(f"code: {before.key} was edited meanwhile, left for the next run")
            return
        write_atomic(path, dump_record(found))
        report.changed.append(before.key)


def run_health(
    folders: Folders, records: Sequence[Record], web: Web, report: EnrichReport, today: date, *,
    everything: bool = False, archive: str = ARCHIVE_API, progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:  # fmt: skip
    """Look at the links whose turn it is. The table is written whatever happens to single links."""
    table = read_health(folders)
    known = {link.url for record in folders.records() for link in record.links}
    table = {url: failure for url, failure in table.items() if url in known}
    urls = due(records, table, today, everything=everything)
    working: set[str] = set()
    for done, url in enumerate(urls):
        progress(done, len(urls))
        try:
            look_at(url, table, web, today.isoformat(), archive=archive)
        except SpentError as error:
            report.problems.append(f"links: {error} after {done} of {len(urls)} links")
            break
        except Exception as error:
            report.problems.append(f"links: {url[:120]}: {type(error).__name__}: {error}")
            continue
        report.looked_at += 1
        if url not in table:
            working.add(url)
    report.dead = sorted(url for url, failure in table.items() if failure.dead)
    with writing(folders):
        write_health(folders, table)
        for record in records:
            path = folders.record_file(record.key) if any(link.url in working for link in record.links) else None
            if path is not None:  # read again: somebody may have edited it
                current = parse_record(path.read_bytes(), path.name)
                write_atomic(path, dump_record(checked(current, working, today)))


def isolated(name: str, report: EnrichReport, run: Callable[[], None]) -> None:
    """Run an enricher; nothing but an interruption gets out of it."""
    try:
        run()
    except Exception as error:
        report.problems.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
