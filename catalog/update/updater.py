"""``papers update``: find papers that nobody has judged, and put them into the queue.

For each query: the window from its watermark minus the overlap to the end of today, cut along a fixed grid of days into slices that
each are read to the end. Every page is worked off as it arrives: known papers and rejected ones are left out, the rest is scored, and
what passes the threshold becomes ``queue/<key>.json``. A slice that was read completely moves the watermark: to its end, or for the
last slice to the newest submission in it. Nothing that is written depends on the time of the run, so a second run on the same feed
changes no byte, and a run that was killed and started again ends like one that was not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from latentcot.catalog.acceptance import writing
from latentcot.catalog.enrich.comments import code_addresses
from latentcot.catalog.queue_store import (
    Candidate,
    Decision,
    Folders,
    Near,
    read_candidate,
    read_decision,
    write_candidate,
)
from latentcot.catalog.record import dump_json
from latentcot.catalog.store import write_atomic
from latentcot.catalog.text import normal_title
from latentcot.catalog.update.atom import Entry
from latentcot.catalog.update.client import FeedClient, FeedError, RejectedError, StoppedError
from latentcot.catalog.update.known import Known
from latentcot.catalog.update.queries import Query, QueryFile, Watermark, moment, parse_moment, read_watermarks
from latentcot.catalog.update.reader import MINUTE, Reading, Window, confirm_empty, read_window
from latentcot.catalog.update.report import QueryLine, UpdateReport
from latentcot.catalog.update.scoring import Scorer

SATURDAY = 5


@dataclass
class Updater:
    """One run. ``dry_run`` reads and reports, and writes nothing but the cache. ``progress`` is told (query, done, of)."""

    folders: Folders
    client: FeedClient
    config: QueryFile
    scorer: Scorer
    dry_run: bool = False
    overlap: timedelta | None = None
    progress: Callable[[str, int, int], None] = lambda name, done, of: None
    report: UpdateReport = field(default_factory=UpdateReport)

    def run(self, only: list[str] | None = None) -> UpdateReport:
        """Read all queries, or those named in ``only``."""
        queries = self.config.chosen(only)
        self._imagined: dict[str, Candidate] = {}  # what a dry run would have written
        with writing(self.folders) if not self.dry_run else _nothing():
            self._marks = read_watermarks(self.folders.watermarks)
        self._known = Known(self.folders.records())
        self._seen: set[str] = set()
        self._confirmed: dict[str, bool] = {}
        for number, query in enumerate(queries):
            self.progress(query.name, number, len(queries))
            line = QueryLine(query.name, "not read", until=self._until(query))
            self.report.queries.append(line)
            try:
                self._read(query, line)
            except RejectedError as error:
                line.problem = str(error)
            except FeedError as error:
                line.problem = str(error)
                # A budget that is spent or a tired server is partial; a client that is refused or a dead feed is a failure.
                self.report.failed = None if isinstance(error, StoppedError) else str(error)
                ended = "the run ended before"
                self.report.queries += [
                    QueryLine(later.name, "not read", until=self._until(later), problem=ended)
                    for later in queries[number + 1 :]
                ]
                break
            finally:
                line.until = self._until(query)
        self.report.changed = sorted(set(self.report.changed) - {candidate.key for candidate in self.report.new})
        return self.report

    def _until(self, query: Query) -> str | None:
        mark = self._marks.get(query.name)
        return mark.until if mark and mark.query == query.digest else None

    def _read(self, query: Query, line: QueryLine) -> None:
        now = self.client.clock.now()
        if query.name in self._marks and self._until(query) is None:
            self.report.notes.append(
                f"the query {query.name} has changed: it is read again from {self.config.first_day}"
            )
        until = parse_moment(mark) if (mark := self._until(query)) else self.config.start
        if until > now + timedelta(days=1):
            raise FeedError(f"the watermark of {query.name} ({moment(until)}) lies in the future: is the clock right?")
        slices = slices_of(until, now, self.config, self.overlap)
        line.window = str(Window(slices[0].start, slices[-1].end))
        for window in slices:
            last = window is slices[-1]
            reading = read_window(
                self.client, query.text, window, page_size=self.config.page_size, largest=self.config.largest_window,
                on_page=lambda entries: self._take(query, entries, line),
            )  # fmt: skip
            self._note_reading(query, reading)
            if reading.empty:
                self._confirm(query, window)
            if reading.problem is not None:
                line.problem = reading.problem
                return
            self._advance(query, reading.newest if last else window.end + MINUTE)

    def _note_reading(self, query: Query, reading: Reading) -> None:
        if reading.outside:
            self.report.notes.append(
                f"{query.name}: {reading.outside} entries outside the window that was asked for, left out"
            )
        for item in reading.refused:
            if item not in self.report.refused:
                self.report.refused.append(item)

    def _confirm(self, query: Query, window: Window) -> None:
        """An empty first page: nothing new, or a bad hour? A busy category tells; asked once a window."""
        clause = window.clause
        if clause not in self._confirmed:
            self._confirmed[clause] = confirm_empty(self.client, self.config.control, window)
        if self._confirmed[clause]:
            return
        told = f"{query.name} and the control query {self.config.control} are both empty from {window}: the feed is not to be trusted now"
        if self.client.clock.now().weekday() >= SATURDAY:
            raise RejectedError(told)
        raise FeedError(told)

    def _advance(self, query: Query, until: datetime | None) -> None:
        """Move the watermark, never back. Without entries there is nothing to move it by."""
        old = self._until(query)
        if until is None and old is not None:
            return
        value = moment(until) if until is not None else moment(self.config.start)
        if old is not None and value <= old:
            return
        self._marks[query.name] = Watermark(query=query.digest, until=value)
        if not self.dry_run:
            with writing(self.folders):
                table = {name: mark.model_dump(mode="json") for name, mark in sorted(self._marks.items())}
                write_atomic(self.folders.watermarks, dump_json(table))

    def _take(self, query: Query, entries: list[Entry], line: QueryLine) -> None:
        """Work off one page."""
        line.pages += 1
        line.papers += len(entries)
        with writing(self.folders) if not self.dry_run else _nothing():
            for entry in entries:
                self._consider(query, entry, line)

    def _consider(self, query: Query, entry: Entry, line: QueryLine) -> None:
        first, again = entry.key not in self._seen, None
        self._seen.add(entry.key)
        matches = self._known.match(entry)
        if matches and matches[0].outcome == "same":
            self.report.known += first
            if first and matches[0].rule != "arxiv id":
                self.report.other_ids.append((entry.key, matches[0]))
            return
        # Queue and decisions are looked up now, not at the beginning: a curator may be working while the feed is read.
        decision = read_decision(self.folders, entry.key)
        if decision is not None and (again := reopened(decision, entry)) is None:
            self.report.known += first and decision.verdict == "accepted"
            self.report.rejected += first and decision.verdict == "rejected"
            return
        old = self._imagined.get(entry.key) or read_candidate(self.folders, entry.key)
        candidate = self._candidate(query, entry, matches, old, again)
        if candidate.score.probability < self.config.queue_threshold and old is None:
            self.report.below += first
            return
        if candidate == old:
            return
        if self.dry_run:
            self._imagined[entry.key] = candidate
        else:
            write_candidate(self.folders, candidate)
        if old is None:
            line.new += 1
            self.report.new.append(candidate)
            self.report.near += [(entry.key, match) for match in matches]
        else:
            self.report.changed.append(entry.key)
            self.report.new = [candidate if item.key == candidate.key else item for item in self.report.new]

    def _candidate(
        self, query: Query, entry: Entry, matches: list, old: Candidate | None, again: str | None
    ) -> Candidate:
        """The candidate that ``entry`` is, on top of what the queue has of it; an older version changes nothing but the queries."""
        queries: list[str] = sorted({query.name, *(old.queries if old else [])})
        if old is not None and entry.version < old.version:
            return old.model_copy(update={"queries": queries})
        if old is not None and (entry.title, entry.abstract) == (old.title, old.abstract):
            score = (
                old.score
            )  # judged already, perhaps by an earlier scorer: the queue does not change under the curator's eyes
        else:
            score = self.scorer(entry.title, entry.abstract)
        high = self.config.prefill_threshold
        return Candidate(
            key=entry.key,
            arxiv=entry.base,
            version=entry.version,
            title=entry.title,
            authors=list(entry.authors),
            abstract=entry.abstract,
            published=moment(entry.published),
            updated=moment(entry.updated),
            comment=entry.comment,
            journal_ref=entry.journal_ref,
            doi=entry.doi,
            code=code_addresses(entry.comment, entry.abstract),
            primary_category=entry.primary_category,
            categories=list(entry.categories),
            queries=queries,
            near=[Near(key=match.key, rule=match.rule) for match in matches],
            score=score,
            prefilled=bool(high is not None and score.probability >= high and score.leaves),
            again=again,
        )


def reopened(decision: Decision, entry: Entry) -> str | None:
    """Why a decided paper is proposed again: a rejected one whose title or primary category has changed. ``None``: it is not."""
    if decision.verdict != "rejected":
        return None
    before = decision.candidate
    if normal_title(entry.title) != normal_title(before.title):
        return f"rejected on {decision.date} ({decision.reason}) under another title: {before.title[:200]}"
    if entry.primary_category and before.primary_category and entry.primary_category != before.primary_category:
        return (
            f"rejected on {decision.date} ({decision.reason}) when its primary category was {before.primary_category}"
        )
    return None


def slices_of(until: datetime, now: datetime, config: QueryFile, overlap: timedelta | None = None) -> list[Window]:
    """The windows to read: from ``until`` minus the overlap to the end of today, cut at a grid that does not depend on ``until``.

    The last one is never shorter than the overlap, because a window of some hours may well be empty.
    """
    start = (until - (overlap or timedelta(days=config.overlap_days))).replace(second=0, microsecond=0)
    end = now.replace(hour=23, minute=59, second=0, microsecond=0)
    step = timedelta(days=config.slice_days)
    grid = config.start + step * -(-(start - config.start) // step)
    cuts = []
    while end - grid >= timedelta(days=config.overlap_days):
        if grid > start:
            cuts.append(grid)
        grid += step
    edges = [start, *cuts]
    return [Window(a, b - MINUTE) for a, b in zip(edges, cuts, strict=False)] + [Window(edges[-1], end)]


class _nothing:
    """In place of the lock where nothing is written."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...
