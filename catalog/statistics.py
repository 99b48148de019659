"""What the catalog can say about itself: growth, coverage of the source lists, links, time to listing, relevance.

The numbers of the statistics page, from the records and the files beside them; nothing here is written by hand. What
cannot be known is ``None``, never 0.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import combinations
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from latentcot.catalog.enrich.health import read_health
from latentcot.catalog.leaves import Tree
from latentcot.catalog.queue_store import Decision, Folders, read_decisions, read_queue
from latentcot.catalog.record import Record
from latentcot.catalog.runnable import reverse_index
from latentcot.catalog.store import CATALOG, CatalogError

FIRST_QUARTER = "2023-1"
EARLIER = "before 2023"


@dataclass(frozen=True)
class ListCoverage:
    """One source list against the catalog: its papers here, those that no other list has, and their share of all."""

    source: str
    papers: int
    alone: int
    share: float


@dataclass(frozen=True)
class ListingTime:
    """Days from submission to the decision that listed a paper, over accepted candidates; ``None`` without any."""

    papers: int
    median: float | None
    ninetieth: float | None


@dataclass(frozen=True)
class LinkHealth:
    """Links of all records: how many, how many were looked at, how many failed last time, how many count as dead."""

    links: int
    checked: int
    failing: int
    dead: int


def coverage(records: Sequence[Record]) -> list[ListCoverage]:
    """Every source list, the largest first: how far each alone would have come."""
    lists = [sorted({entry.source for entry in record.sources}) for record in records]
    papers = Counter(source for found in lists for source in found)
    alone = Counter(found[0] for found in lists if len(found) == 1)
    return [
        ListCoverage(source, count, alone[source], count / len(records))
        for source, count in sorted(papers.items(), key=lambda item: (-item[1], item[0]))
    ]


def overlaps(records: Sequence[Record], most: int = 10) -> list[tuple[str, str, int]]:
    """The pairs of source lists that share most papers."""
    pairs: Counter[tuple[str, str]] = Counter()
    for record in records:
        pairs.update(combinations(sorted({entry.source for entry in record.sources}), 2))
    return [(a, b, n) for (a, b), n in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:most]]


def import_account(path: Path = CATALOG / "import_report.json") -> dict[str, dict[str, int]] | None:
    """What became of the rows of each raw file: rows, kept, merged, left out. ``None`` where nothing was imported."""
    if not path.is_file():
        return None
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {name: {field: int(value) for field, value in counts.items()} for name, counts in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CatalogError(f"{path.name}: cannot be read ({type(error).__name__}: {error})") from None


def quarter(record: Record) -> str | None:
    """``2024-3`` for the third quarter of 2024; ``None`` where the month is not known."""
    if record.published is None or record.published.precision == "year":
        return None
    year, month = record.published.value[:4], int(record.published.value[5:7])
    return f"{year}-{(month + 2) // 3}"


def timeline(records: Sequence[Record], tree: Tree) -> tuple[list[str], dict[str, list[int]]]:
    """Papers by quarter of first publication and by branch of the primary leaf.

    Returns the labels (``before 2023`` first, then every quarter up to the last one seen) and the counts of each
    branch. Papers whose year is known and month is not stand under ``before 2023`` or are left out.
    """
    quarters = [q for record in records if (q := quarter(record)) and q >= FIRST_QUARTER]
    labels = [EARLIER, *_quarters(FIRST_QUARTER, max(quarters, default=FIRST_QUARTER))]
    counts = {branch.slug: [0] * len(labels) for branch in tree.branches}
    place = {label: i for i, label in enumerate(labels)}
    for record in records:
        label = quarter(record)
        if record.year is not None and record.year < 2023:
            label = EARLIER
        if label in place:
            counts[tree.branch_of(record.taxonomy.primary).slug][place[label]] += 1
    return labels, counts


def _quarters(first: str, last: str) -> list[str]:
    found, (year, part) = [first], map(int, first.split("-"))
    while found[-1] < last:
        year, part = (year + 1, 1) if part == 4 else (year, part + 1)
        found.append(f"{year}-{part}")
    return found


def growth(records: Sequence[Record]) -> list[tuple[str, int, int]]:
    """(month, papers added in it, papers held at its end), for every month in which papers were added."""
    added = Counter(record.added[:7] for record in records)
    held, found = 0, []
    for month in sorted(added):
        held += added[month]
        found.append((month, added[month], held))
    return found


def listing_time(decisions: Sequence[Decision]) -> ListingTime:
    """How long papers waited between submission and being accepted."""
    days = [
        (date.fromisoformat(decision.date) - date.fromisoformat(decision.candidate.published[:10])).days
        for decision in decisions
        if decision.verdict == "accepted"
    ]
    if not days:
        return ListingTime(0, None, None)
    ninetieth = quantiles(days, n=10, method="inclusive")[8] if len(days) > 1 else float(days[0])
    return ListingTime(len(days), float(median(days)), float(ninetieth))


def link_health(records: Sequence[Record], folders: Folders) -> LinkHealth:
    """The state of the links as the last refresh left it."""
    failures = read_health(folders)
    return LinkHealth(
        links=sum(len(record.links) for record in records),
        checked=sum(link.checked is not None for record in records for link in record.links),
        failing=len(failures),
        dead=sum(failure.dead for failure in failures.values()),
    )


def relevance_report(path: Path = CATALOG / "data" / "relevance_report.json") -> dict[str, Any] | None:
    """What the last training of the relevance scorer measured; ``None`` where it was never trained."""
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not report["cuts"] or not report["about"]:
            raise ValueError("it holds no cut")
        return report
    except (ValueError, KeyError, TypeError) as error:
        raise CatalogError(f"{path.name}: cannot be read ({type(error).__name__}: {error}); train it anew") from None


def statistics(records: Sequence[Record], tree: Tree, root: Path = CATALOG) -> dict[str, Any]:
    """Everything above at once. ``root`` is the folder of queue, decisions and link health."""
    folders = Folders(root)
    decisions = list(read_decisions(folders).values())
    labels, branches = timeline(records, tree)
    index = reverse_index(records)
    return {
        "labels": labels,
        "branches": branches,
        "growth": growth(records),
        "lists": coverage(records),
        "overlaps": overlaps(records),
        "account": import_account(root / "import_report.json"),
        "links": link_health(records, folders),
        "queue": len(read_queue(folders)),
        "accepted": sum(decision.verdict == "accepted" for decision in decisions),
        "rejected": sum(decision.verdict == "rejected" for decision in decisions),
        "listing": listing_time(decisions),
        "relevance": relevance_report(root / "data" / "relevance_report.json"),
        "modules": {module: [entry.record.key for entry in found] for module, found in index.items()},
    }
