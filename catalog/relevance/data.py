"""Titles to learn from: records, rejected candidates, and titles that no list holds."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentcot.catalog.record import Record
from latentcot.catalog.relevance.concepts import FAMILIES
from latentcot.catalog.store import CATALOG, CatalogError

BACKGROUND = CATALOG / "data" / "background.tsv"
DECISIONS = CATALOG / "decisions"
KINDS = ("random", "trap", "near", "rejected")

_LATENT_LISTS = {
    "EIT-NLP/Awesome-Latent-CoT", "digailab/awesome-llm-implicit-reasoning", "hemingkx/Awesome-Efficient-Reasoning",
    "matinaghaei/awesome-latent-refinement",
}  # fmt: skip
_LOOP_LIST = "huskydoge/Awesome-Loop-Models"
_DIFFUSION_LIST = "VILA-Lab/Awesome-DLMs"
_LINEAR_LIST = "weigao266/Awesome-Efficient-Arch"
_BROAD_LIST = "YU-deep/Awesome-Latent-Space"
_SURVEY_LIST = "multimodal-art-projection/LatentCoT-Horizon"
_LEAF_FAMILY = {
    "vertical/architecture": "looped",
    "vertical": "latent",
    "horizontal": "linear",
    "mechanisms": "mechanisms",
    "unbounded-depth/fixed-point": "looped",
    "unbounded-depth/optimizer-network": "linear",
    "unbounded-depth/outlook": "mechanisms",
    "unbounded-depth": "diffusion",
    "beyond/hybrid-attention": "linear",
    "beyond": "broad",
}
# Reasons of rejection that say nothing about the topic.
_NO_NEGATIVE = {"duplicate", "withdrawn", "no-paper", "other"}


@dataclass(frozen=True)
class Paper:
    """A title with its month (``YYYY-MM``), the families it belongs to (none: a negative), its leaves or its kind."""

    title: str
    month: str
    families: frozenset[str]
    leaves: tuple[str, ...] = ()
    kind: str | None = None
    key: str | None = None


def families_of(record: Record) -> frozenset[str]:
    """The families of a record: from the lists that have it, else from its leaves. Empty for ``beyond/context``."""
    if record.taxonomy.primary == "beyond/context":
        return frozenset()
    lists = {entry.source for entry in record.sources}
    mechanism = record.facets.mechanism
    found = set()
    if lists & _LATENT_LISTS or (_SURVEY_LIST in lists and any(leaf.startswith("vertical/") for leaf in record.leaves)):
        found.add("latent")
    if _LOOP_LIST in lists or "loop" in mechanism:
        found.add("looped")
    if _DIFFUSION_LIST in lists or (
        "diffusion" in mechanism and any(leaf.startswith("unbounded-depth/") for leaf in record.leaves)
    ):
        found.add("diffusion")
    if _LINEAR_LIST in lists or any(leaf.startswith("horizontal/") for leaf in record.leaves):
        found.add("linear")
    if not found and _BROAD_LIST in lists:
        found.add("broad")
    if not found:
        leaf = record.taxonomy.primary
        found.add(_LEAF_FAMILY.get(leaf) or _LEAF_FAMILY.get(leaf.partition("/")[0], "broad"))
    assert found <= set(FAMILIES)
    return frozenset(found)


def known_papers(records: Iterable[Record]) -> list[Paper]:
    """The records as positives, by key. Context papers are left out: they are here for reasons that no title shows."""
    found = []
    for record in sorted(records, key=lambda record: record.key):
        if families := families_of(record):
            month = (record.published.value if record.published else f"{record.year or 0:04d}")[:7].ljust(7, "-")
            month = month.replace("---", "-01")
            found.append(Paper(record.title, month, families, tuple(record.leaves), key=record.key))
    return found


def month_of_id(arxiv: str) -> str:
    """``2410.01234`` → ``2024-10``."""
    return f"20{arxiv[:2]}-{arxiv[2:4]}"


def background_papers(path: Path = BACKGROUND) -> list[Paper]:
    """The titles that no list holds.

    Raises:
        CatalogError: the file is missing, or a line does not have its three columns.
    """
    if not path.is_file():
        raise CatalogError(f"{path.name} is missing: it ships with the package, in the folder data")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("#"):
            continue
        parts = line.split("\t")
        if len(parts) != 3 or parts[1] not in KINDS or not parts[2].strip():
            raise CatalogError(f"{path.name}, line {number}: expected arXiv id, kind and title, given {line[:80]!r}")
        found.append(Paper(parts[2], month_of_id(parts[0]), frozenset(), kind=parts[1], key=parts[0]))
    return found


def rejected_papers(folder: Path = DECISIONS) -> list[Paper]:
    """Candidates that a person rejected for their topic: negatives of the hardest kind."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            decision = json.loads(path.read_text(encoding="utf-8"))
            if decision["verdict"] != "rejected" or decision["reason"] in _NO_NEGATIVE:
                continue
            candidate = decision["candidate"]
            month = str(candidate["published"])[:7]
            found.append(Paper(candidate["title"], month, frozenset(), kind="rejected", key=decision["key"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CatalogError(f"decisions/{path.name}: cannot be read ({type(error).__name__}: {error})") from None
    return found


def all_papers(records: Iterable[Record], folder: Path = DECISIONS) -> list[Paper]:
    """Everything to learn from. A background title that is now a record counts as the record."""
    positives = known_papers(records)
    negatives = background_papers() + rejected_papers(folder)
    keys = {paper.key for paper in positives}
    latest = {paper.key: paper for paper in negatives if paper.key not in keys}  # a rejection replaces the background
    return positives + list(latest.values())


def before(papers: Sequence[Paper], month: str) -> list[Paper]:
    """Papers earlier than a month."""
    return [paper for paper in papers if paper.month < month]


def between(papers: Sequence[Paper], first: str, last: str) -> list[Paper]:
    """Papers of the months from ``first`` to ``last``, both included."""
    return [paper for paper in papers if first <= paper.month <= last]
