"""The numbers of ``papers stats``: what the catalog holds and how the curation goes."""

from collections import Counter
from typing import Any

from latentcot.catalog.queue_store import Decision, Folders, read_decisions, read_queue
from latentcot.catalog.record import Record
from latentcot.catalog.statistics import link_health, listing_time
from latentcot.catalog.update.queries import read_watermarks


def numbers(folders: Folders) -> dict[str, dict[str, Any]]:
    """Counts by heading. What cannot be known is ``None``, never 0."""
    records = folders.records()
    decisions = list(read_decisions(folders).values())
    queue = read_queue(folders)
    links = link_health(records, folders)
    return {
        "records": _records(records),
        "filed": dict(sorted(Counter(record.taxonomy.status for record in records).items())),
        "queue": {
            "candidates": len(queue),
            "possibly known": sum(1 for item in queue.values() if item.near),
            "oldest": min((item.published[:10] for item in queue.values()), default=None),
        },
        "decisions": _decisions(decisions),
        "links": {"links": links.links, "checked": links.checked, "failing": links.failing, "dead": links.dead},
        "read until": {name: mark.until for name, mark in read_watermarks(folders.watermarks).items()}
        or {"any query": None},
    }


def _records(records: list[Record]) -> dict[str, Any]:
    return {
        "papers": len(records),
        "on arXiv": sum(1 for record in records if record.ids.arxiv),
        "withdrawn": sum(1 for record in records if record.status == "withdrawn"),
        "superseded": sum(1 for record in records if record.status == "superseded"),
        "with a venue": sum(1 for record in records if record.venue),
        "with code": sum(1 for record in records if record.has_code),
        "runnable here": sum(1 for record in records if record.runnable),
        "authors not fetched": sum(1 for record in records if record.authors is None),
        "never refreshed": sum(1 for record in records if record.ids.arxiv and record.version is None),
    }


def _decisions(decisions: list[Decision]) -> dict[str, Any]:
    accepted = [decision for decision in decisions if decision.verdict == "accepted"]
    rejected = [decision for decision in decisions if decision.verdict == "rejected"]
    return {
        "accepted": len(accepted),
        "rejected": len(rejected),
        # Precision of what the updater proposes, as a curator sees it.
        "accepted share": round(len(accepted) / len(decisions), 3) if decisions else None,
        "median days from submission to listing": listing_time(decisions).median,
        **{
            f"rejected: {reason}": number
            for reason, number in sorted(Counter(d.reason for d in rejected if d.reason).items())
        },
    }
