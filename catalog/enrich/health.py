"""Health of links: HEAD, then GET where HEAD is not liked; *dead* only after failures on two different days.

The state is ``link_health.json``: an entry for every address that failed last time, with the days of its failures. An address that
answers again is removed. A link is looked at once in thirty days, on a day that its address decides, and daily while it fails.
"""

import hashlib
import json
from collections.abc import Iterable
from datetime import date
from typing import Annotated
from urllib.parse import quote, urlsplit

from pydantic import Field, ValidationError

from latentcot.catalog.enrich.web import Web, WebError
from latentcot.catalog.queue_store import Folders
from latentcot.catalog.record import Day, Record, Text, Url, _Strict, dump_json
from latentcot.catalog.store import CatalogError, explain, write_atomic

ROUND = 30
NOTED_AGAIN = 90  # days after which a record notes anew that a link works: a day of checks is not a day of diffs
KEPT = 5
ARCHIVE_API = "https://archive.org/wayback/available"
# The API says whether arXiv's own pages exist; publishers answer programs with 403 whatever is there.
NOT_ASKED = (
    "arxiv.org",
    "export.arxiv.org",
    "doi.org",
    "dl.acm.org",
    "ieeexplore.ieee.org",
    "sciencedirect.com",
    "openreview.net",
)


class Failure(_Strict):
    """An address that does not answer: days of failures (the last five), the last reason, an archived copy to propose."""

    failed: Annotated[list[Day], Field(min_length=1)]
    reason: Text
    archived: Url | None

    @property
    def dead(self) -> bool:
        return len(set(self.failed)) >= 2


def read_health(folders: Folders) -> dict[str, Failure]:
    if not folders.health.is_file():
        return {}
    try:
        data = json.loads(folders.health.read_text(encoding="utf-8"))
        return {url: Failure.model_validate(value) for url, value in data.items()}
    except ValidationError as error:
        raise CatalogError(f"{folders.health.name}: {explain(error)}") from None
    except (ValueError, AttributeError) as error:
        raise CatalogError(f"{folders.health.name}: is no table of links: {error}") from None


def write_health(folders: Folders, table: dict[str, Failure]) -> bool:
    data = {url: failure.model_dump(mode="json") for url, failure in sorted(table.items())}
    if not data and not folders.health.exists():
        return False
    return write_atomic(folders.health, dump_json(data))


def due(records: Iterable[Record], table: dict[str, Failure], today: date, *, everything: bool = False) -> list[str]:
    """Addresses to look at today, sorted."""
    urls = {link.url for record in records for link in record.links}
    urls = {url for url in urls if (urlsplit(url).hostname or "").removeprefix("www.") not in NOT_ASKED}
    if everything:
        return sorted(urls)
    turn = today.toordinal() % ROUND
    return sorted(
        url for url in urls if url in table or int(hashlib.sha256(url.encode()).hexdigest()[:8], 16) % ROUND == turn
    )


def problem_of(url: str, web: Web) -> str | None:
    """Why a link does not work, ``None`` where it does. What says "not now" or "not you" (429, 5xx, 401, 403) proves nothing."""
    for ask in (web.head, web.get):
        answer = ask(url)
        if answer.status < 400 or answer.status in (401, 403, 429) or answer.status >= 500:
            return None
    return f"status {answer.status}"


def look_at(url: str, table: dict[str, Failure], web: Web, today: str, *, archive: str = ARCHIVE_API) -> None:
    """Check one address and note the result in ``table``."""
    try:
        problem = problem_of(url, web)
    except WebError as error:
        from latentcot.catalog.enrich.web import SpentError

        if isinstance(error, SpentError):
            raise
        problem = str(error)
    if problem is None:
        table.pop(url, None)
        return
    old = table.get(url)
    days = [*(old.failed if old else []), today]
    days = list(dict.fromkeys(days))
    failure = Failure(
        failed=[days[0], *days[1:][-(KEPT - 1) :]], reason=problem, archived=old.archived if old else None
    )
    if failure.dead and failure.archived is None:
        failure = failure.model_copy(update={"archived": _archived(url, web, archive)})
    table[url] = failure


def checked(record: Record, working: set[str], today: date) -> Record:
    """``record`` with today's date at the links that work, unless a date of the last ninety days is there already."""
    links = [
        link.model_copy(update={"checked": today.isoformat()})
        if link.url in working
        and (link.checked is None or (today - date.fromisoformat(link.checked)).days >= NOTED_AGAIN)
        else link
        for link in record.links
    ]
    return record if links == record.links else record.model_copy(update={"links": links})


def _archived(url: str, web: Web, archive: str) -> str | None:
    """An archived copy to propose. Whoever edits the record decides."""
    try:
        answer = web.get(f"{archive}?url={quote(url, safe='')}")
        closest = json.loads(answer.body)["archived_snapshots"]["closest"]
        found = closest["url"] if closest.get("available") else None
    except (WebError, ValueError, KeyError, TypeError):
        return None
    return (
        found
        if isinstance(found, str) and found.startswith(("http://web.archive.org/", "https://web.archive.org/"))
        else None
    )
