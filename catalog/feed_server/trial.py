"""What tests, notebooks and the demonstration share: a clock that nobody waits for, invented papers, a small catalog."""

import hashlib
import random
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from latentcot.catalog.feed_server.corpus import Paper, paper
from latentcot.catalog.queue_store import Folders, Proposal, Score
from latentcot.catalog.store import get, write_record
from latentcot.catalog.update.queries import QueryFile


class FakeClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self, now: str = "2026-02-18T06:00:00") -> None:
        self._start = datetime.fromisoformat(now).replace(tzinfo=UTC)
        self._passed = 0.0
        self._lock = threading.Lock()
        self.slept: list[float] = []

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._passed)

    def monotonic(self) -> float:
        return self._passed

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.slept.append(seconds)
            self._passed += seconds


class PlainScorer:
    """Relevance by one word: enough to test what the updater does with it."""

    name = "plain 1"

    def __call__(self, title: str, abstract: str | None) -> Score:
        latent = "latent" in title.lower()
        return Score(
            probability=0.9 if latent else 0.05,
            leaves=[Proposal(leaf="vertical/feedback", probability=0.5)] if latent else [],
            reasons=["title: latent"] if latent else ["nothing"],
            scorer=self.name,
        )


def small_queries(**changes: Any) -> QueryFile:
    """Two queries that overlap, read three papers at a time."""
    values: dict[str, Any] = {
        "version": 1,
        "control": "cat:cs.LG",
        "first_day": "2026-01-31",
        "overlap_days": 14,
        "slice_days": 31,
        "page_size": 3,
        "largest_window": 1000,
        "queue_threshold": 0.2,
        "prefill_threshold": None,
        "queries": [
            {"name": "latent", "categories": ["cs.CL", "cs.LG"], "phrases": ["latent reasoning", "latent thought"]},
            {"name": "loops", "categories": ["cs.LG"], "phrases": ["looped transformer", "loops"]},
        ],
    }
    return QueryFile.model_validate(values | changes)


# Words that make titles differ by more than de-duplication forgives.
_WORDS = """
amber birch cedar delta ember fjord grove heath islet jetty knoll ledge marsh north ocean plain quay ridge slope tidal
"""


def sample_papers(number: int = 8) -> list[Paper]:
    """Papers of February 2026: all match `latent`, every other one matches `loops` too."""
    rng = random.Random(7)
    found = []
    for index in range(number):
        topic = "Latent reasoning with loops" if index % 2 else "Latent thought"
        found.append(
            paper(
                f"2602.{index + 1:05d}",
                f"{topic} of {' '.join(rng.sample(_WORDS.split(), 4))}",
                f"2026-02-{index % 14 + 2:02d}T{index % 24:02d}:30",
                abstract=f"We study case {index}.",
                categories=("cs.LG", "cs.CL"),
            )
        )
    return found


def busy_papers() -> list[Paper]:
    """What a busy category shows anyway: a paper every second day from December 2025 on, nothing that a query wants."""
    begin = datetime(2025, 12, 1, 9, tzinfo=UTC)
    days = [begin + timedelta(days=2 * step) for step in range(60)]
    return [
        paper(f"{day:%y%m}.{9000 + step:05d}", f"Weather number {step}", f"{day:%Y-%m-%dT%H:%M}", categories=("cs.LG",))
        for step, day in enumerate(days)
    ]


def tree(root: Path) -> dict[str, str]:
    """Digest of every file that counts (the cache may be lost at any time)."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".cache" not in path.relative_to(root).parts
    }


def small_catalog(root: Path, keys: tuple[str, ...] = ("2412.06769", "2402.07754", "openreview-9Pba4rcQbE")) -> Folders:
    """A catalog in ``root`` with copies of some shipped records."""
    (root / "papers").mkdir(parents=True)
    for key in keys:
        write_record(get(key), root / "papers")
    return Folders(root)
