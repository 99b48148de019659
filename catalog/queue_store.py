"""Candidates and decisions: one JSON file each, in ``queue/`` and ``decisions/``.

The decision file is the one that counts. Accepting writes it first, in one rename; the record follows from it and the queue
file goes away. Whoever is killed in between leaves a decision that has not been carried out, and
:func:`latentcot.catalog.acceptance.settle`, which every command that writes runs first, carries it out. So a catalog is never
half decided.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, StringConstraints, ValidationError, model_validator

from latentcot.catalog.record import Day, Key, Note, Record, Slug, Text, Url, _Strict, dump_json
from latentcot.catalog.store import PAPERS, CatalogError, explain, read_records, write_atomic

Moment = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")]
Reason = Literal[
    "off-topic", "explicit-cot", "other-latent", "duplicate", "withdrawn", "out-of-scope-modality", "no-paper", "other"
]
REASONS: dict[str, str] = {
    "off-topic": "not about reasoning in hidden states, nor about what it rests on",
    "explicit-cot": "reasons in words",
    "other-latent": "latent in another sense (latent variables, spaces, attacks)",
    "duplicate": "another record is this paper",
    "withdrawn": "withdrawn by its authors or by arXiv",
    "out-of-scope-modality": "the method is for another modality, and reasoning is not the point",
    "no-paper": "a thesis chapter, proceedings front matter, a data dump",
    "other": "see the note",
}


class Proposal(_Strict):
    """A leaf that the scorer proposes."""

    leaf: Slug
    probability: Annotated[float, Field(ge=0, le=1)] | None


class Score(_Strict):
    """Relevance, up to three leaves, and why. ``scorer`` names what judged, with its version."""

    probability: Annotated[float, Field(ge=0, le=1)]
    leaves: Annotated[list[Proposal], Field(max_length=3)]
    reasons: list[Text]
    scorer: Text


class Near(_Strict):
    """A record that may be the same paper; a person decides."""

    key: Key
    rule: Text


class Candidate(_Strict):
    """A paper that the updater found and nobody has judged. Nothing in it depends on when the run took place."""

    key: Key
    arxiv: Text
    version: Annotated[int, Field(ge=1)]
    title: Text
    authors: list[Text]
    abstract: Text | None
    published: Moment
    updated: Moment
    comment: Text | None
    journal_ref: Text | None
    doi: Text | None
    code: list[Url]
    primary_category: Text | None
    categories: list[Text]
    queries: list[Text]
    near: list[Near]
    score: Score
    prefilled: bool
    again: Text | None


class Decision(_Strict):
    """What a person decided about a candidate, with the candidate (without its abstract) as it stood then.

    ``record`` is the record that an accepted paper became or was merged into; ``earlier`` are verdicts that this one replaced.
    """

    key: Key
    verdict: Literal["accepted", "rejected"]
    leaf: Slug | None
    also: list[Slug]
    record: Key | None
    reason: Reason | None
    duplicate_of: Key | None
    note: Note | None
    by: Text
    date: Day
    candidate: Candidate
    earlier: list[Text]

    @model_validator(mode="after")
    def _consistent(self) -> "Decision":
        if self.verdict == "accepted" and (
            self.leaf is None or self.record is None or self.reason or self.duplicate_of
        ):
            raise ValueError("an accepted paper has a leaf and a record, and no reason of rejection")
        if self.verdict == "rejected" and (self.reason is None or self.leaf or self.also or self.record):
            raise ValueError("a rejected paper has a reason, and neither leaf nor record")
        if self.duplicate_of is not None and self.reason != "duplicate":
            raise ValueError("duplicate_of is given exactly for the reason 'duplicate'")
        return self


assert set(get_args(Reason)) == set(REASONS)

Model = TypeVar("Model", bound=BaseModel)


@dataclass
class Folders:
    """The places of one catalog. ``root`` holds ``papers``, ``queue`` and ``decisions``."""

    root: Path
    settled: bool = field(default=False, compare=False)

    @property
    def papers(self) -> Path:
        return self.root / "papers"

    @property
    def queue(self) -> Path:
        return self.root / "queue"

    @property
    def decisions(self) -> Path:
        return self.root / "decisions"

    @property
    def watermarks(self) -> Path:
        return self.root / "watermarks.json"

    @property
    def health(self) -> Path:
        return self.root / "link_health.json"

    @property
    def cache(self) -> Path:
        """What may be lost: pages of today, locks. Not under version control."""
        return self.root / ".cache"

    def records(self) -> list[Record]:
        return read_records(self.papers)

    def queue_file(self, key: str) -> Path:
        return self.queue / f"{key}.json"

    def decision_file(self, key: str) -> Path:
        return self.decisions / f"{key}.json"

    def record_file(self, key: str) -> Path | None:
        found = sorted(self.papers.glob(f"*/{key}.json"))
        return found[0] if found else None


def open_catalog(root: Path | None = None) -> Folders:
    """The catalog in ``root``; by default the one of this checkout. An installed copy is not to be written into."""
    if root is None:
        from latentcot.catalog.check import repository_root

        if repository_root() is None:
            raise CatalogError(
                "this copy is installed, not a checkout: name the catalog to work on with --catalog FOLDER"
            )
        root = PAPERS.parent
    if not (root / "papers").is_dir():
        raise CatalogError(f"{root} is no catalog: it has no folder 'papers'")
    return Folders(root)


def dump(model: BaseModel) -> str:
    """The canonical text of a candidate or decision."""
    return dump_json(model.model_dump(mode="json"))


def _read(path: Path, model: type[Model]) -> Model:
    name = f"{path.parent.name}/{path.name}"
    try:
        found = model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CatalogError(f"{name}: {explain(error)}") from None
    if (key := getattr(found, "key", None)) != path.stem:
        raise CatalogError(f"{name}: the file holds the key {key!r}")
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))


def read_queue(folders: Folders) -> dict[str, Candidate]:
    """All candidates, by key."""
    return {path.stem: _read(path, Candidate) for path in _files(folders.queue)}


def read_decisions(folders: Folders) -> dict[str, Decision]:
    """All decisions, by key."""
    return {path.stem: _read(path, Decision) for path in _files(folders.decisions)}


def read_candidate(folders: Folders, key: str) -> Candidate | None:
    path = folders.queue_file(key)
    return _read(path, Candidate) if path.is_file() else None


def read_decision(folders: Folders, key: str) -> Decision | None:
    path = folders.decision_file(key)
    return _read(path, Decision) if path.is_file() else None


def write_candidate(folders: Folders, candidate: Candidate) -> bool:
    return write_atomic(folders.queue_file(candidate.key), dump(candidate))


def write_decision(folders: Folders, decision: Decision) -> bool:
    return write_atomic(folders.decision_file(decision.key), dump(decision))


def is_decided(candidate: Candidate | None, decision: Decision) -> bool:
    """Whether the queue file is the one that was decided, and not a paper proposed again because it has changed."""
    return candidate is not None and candidate.model_copy(update={"abstract": None}) == decision.candidate
