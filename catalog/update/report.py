"""What an update did, and the exit code that tells it."""

from dataclasses import dataclass, field
from enum import IntEnum

from latentcot.catalog.queue_store import Candidate
from latentcot.catalog.update.atom import Refused
from latentcot.catalog.update.known import Match


class Outcome(IntEnum):
    """Exit codes of ``papers update``. 2 is a bad call, 130 an interruption, as everywhere."""

    NOTHING_NEW = 0
    NEW = 10
    PARTIAL = 11
    FAILED = 12


@dataclass
class QueryLine:
    """One query: window, papers that arrived, pages, candidates new with it, its watermark after the run."""

    name: str
    window: str
    papers: int = 0
    pages: int = 0
    new: int = 0
    until: str | None = None
    problem: str | None = None


@dataclass
class UpdateReport:
    """Everything a run has to say. ``failed`` is the reason why it is worth nothing, if it is."""

    queries: list[QueryLine] = field(default_factory=list)
    new: list[Candidate] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    other_ids: list[tuple[str, Match]] = field(default_factory=list)
    near: list[tuple[str, Match]] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    known: int = 0
    rejected: int = 0
    below: int = 0
    failed: str | None = None

    @property
    def outcome(self) -> Outcome:
        if self.failed is not None:
            return Outcome.FAILED
        if any(line.problem for line in self.queries):
            if all(line.problem and not line.pages for line in self.queries):
                return Outcome.FAILED
            return Outcome.PARTIAL
        return Outcome.NEW if self.new else Outcome.NOTHING_NEW

    @property
    def headline(self) -> str:
        number = f"{len(self.new)} new candidate{'' if len(self.new) == 1 else 's'}" if self.new else "nothing new"
        incomplete = sum(1 for line in self.queries if line.problem)
        if self.outcome is Outcome.FAILED:
            return f"failed, {number}"
        if self.outcome is Outcome.PARTIAL:
            return f"partial ({incomplete} of {len(self.queries)} queries incomplete), {number}"
        return number
