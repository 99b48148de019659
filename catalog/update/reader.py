"""Reading one window of one query to its end, whatever the server does on the way.

The window ``[start, end]`` is asked for ascending by submission. ``start`` of the next page advances by what arrived, not by what was
asked. An empty page is the end only behind the announced total; before it, the same place is asked for again with growing waits and
smaller pages. A page that stays unreadable is asked for in smaller and smaller parts; where even one entry cannot be had, the window
stays incomplete and what came before it counts. A window is complete when as many different papers arrived as the feed announced.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from latentcot.catalog.update.atom import Entry, FeedPage, Refused
from latentcot.catalog.update.client import FeedClient, FeedError, GaveUpError

MINUTE = timedelta(minutes=1)
EMPTY_RETRIES = 5


@dataclass(frozen=True)
class Window:
    """From the minute ``start`` to the minute ``end``, both included, UTC."""

    start: datetime
    end: datetime

    def contains(self, moment: datetime) -> bool:
        return self.start <= moment < self.end + MINUTE

    @property
    def clause(self) -> str:
        """The window in arXiv's syntax; the submission time is that of version 1."""
        form = "%Y%m%d%H%M"
        return (
            f"submittedDate:[{self.start.astimezone(UTC).strftime(form)} TO {self.end.astimezone(UTC).strftime(form)}]"
        )

    def halves(self) -> tuple["Window", "Window"]:
        middle = (self.start + (self.end - self.start) / 2).replace(second=0, microsecond=0)
        return Window(self.start, middle - MINUTE), Window(middle, self.end)

    def __str__(self) -> str:
        return f"{self.start:%Y-%m-%d} to {self.end:%Y-%m-%d}"


@dataclass
class Reading:
    """What came of a window. ``problem`` says why it is not complete, ``None`` when it is."""

    total: int = 0
    pages: int = 0
    seen: set[str] = field(default_factory=set)
    outside: int = 0
    refused: list[Refused] = field(default_factory=list)
    newest: datetime | None = None
    problem: str | None = None
    empty: bool = False
    too_large: bool = False

    def add(self, other: "Reading") -> None:
        """Take over what another part of the same window gave."""
        self.total += other.total
        self.pages += other.pages
        self.seen |= other.seen
        self.outside += other.outside
        self.refused += other.refused
        self.newest = max(filter(None, (self.newest, other.newest)), default=None)
        self.problem = self.problem or other.problem


def parameters(query: str, window: Window, start: int, size: int) -> dict[str, str | int]:
    return {
        "search_query": f"{query} AND {window.clause}",
        "start": start,
        "max_results": size,
        "sortBy": "submittedDate",
        "sortOrder": "ascending",
    }


def read_window(
    client: FeedClient,
    query: str,
    window: Window,
    *,
    page_size: int,
    largest: int,
    on_page: Callable[[list[Entry]], None],
) -> Reading:
    """Read the window, handing each page's entries to ``on_page`` as they come.

    Errors that end the whole run pass through. When a page cannot be had, what came before it counts and ``problem`` says the rest.
    """
    reading = Reading()
    first, second = window.halves()
    try:
        _pages(
            client,
            query,
            window,
            page_size,
            reading,
            on_page,
            largest if second.start - first.start >= timedelta(days=1) else None,
        )
    except GaveUpError as error:
        reading.problem = str(error)
    if reading.too_large:
        whole = Reading()
        for half in (first, second):
            whole.add(read_window(client, query, half, page_size=page_size, largest=largest, on_page=on_page))
            if whole.problem:
                break
        whole.pages += 1
        return whole
    return reading


def _pages(
    client: FeedClient,
    query: str,
    window: Window,
    page_size: int,
    reading: Reading,
    on_page: Callable[[list[Entry]], None],
    largest: int | None,
) -> None:
    offset, size, empties, irregular = 0, page_size, 0, False
    counted, asked = 0, []
    while True:
        address = parameters(query, window, offset, size)
        asked.append(address)
        try:
            # A smaller page that fails as well is tried less often: the wish to know has its price.
            page = client.page(address, attempts=None if size == page_size else 2)
        except GaveUpError:
            # Particular pairs of start and size fail, and one damaged entry spoils a page: a smaller page may pass.
            if size == 1:
                raise
            size, irregular = max(1, size // 4), True
            client.say(f"trying pages of {size}")
            continue
        if not page.arrived:
            reading.total = max(reading.total, page.total)
            if offset == 0 and page.total == 0:
                reading.empty = True
                return
            if offset >= reading.total:
                break
            empties += 1
            if empties > EMPTY_RETRIES:
                reading.problem = f"an empty page at {offset} of {reading.total}, {empties} times"
                return
            if empties > 2:
                size = max(1, size // 2)
            irregular = True
            client.wait(empties, f"an empty page at {offset} of {page.total}")
            continue
        empties = 0
        reading.pages += 1
        reading.total = page.total
        if largest is not None and offset == 0 and page.total > largest:
            reading.too_large = True
            return
        counted += _take(page, window, reading, on_page)
        irregular = irregular or (page.arrived < size and offset + page.arrived < page.total)
        full = page.arrived >= size
        offset += page.arrived
        # Behind a full page, or after any oddity, the total is not believed until a page behind the end is empty.
        if offset >= page.total and not (full or irregular):
            break
    if counted != reading.total:
        for address in asked:  # the pages contradict each other, so a later run today must not build on them
            client.forget(address)
        reading.problem = f"{counted} different papers arrived, {reading.total} were announced"


def _take(page: FeedPage, window: Window, reading: Reading, on_page: Callable[[list[Entry]], None]) -> int:
    """Count a page and hand its entries on; returns how many papers are new in it. Entries outside the window are dropped."""
    new = [entry for entry in page.entries if entry.base not in reading.seen]
    reading.seen.update(entry.base for entry in new)
    refused = [item for item in page.refused if item not in reading.refused]
    reading.refused += refused
    inside = [entry for entry in new if window.contains(entry.published)]
    reading.outside += len(new) - len(inside)
    for entry in inside:
        reading.newest = max(reading.newest, entry.published) if reading.newest else entry.published
    on_page(inside)
    return len({entry.base for entry in new}) + len(refused)


def confirm_empty(client: FeedClient, control: str, window: Window) -> bool:
    """Whether a busy category shows papers in the window: then an empty page means that there is nothing new."""
    try:
        page = client.page(parameters(control, window, 0, 1))
    except GaveUpError as error:
        raise FeedError(f"the control query got no answer: {error}") from None
    return page.arrived > 0
