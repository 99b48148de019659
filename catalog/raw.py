"""Reading the raw lists: one :class:`Row` per row of the four source files, nothing interpreted yet."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentcot.catalog.store import CatalogError

FILES = ("horizon", "awesome_latent_cot", "neighbours", "seeds")
SEEDS = "latentcot/seeds"


@dataclass(frozen=True)
class Listing:
    """One list that holds the paper and the path of section names it was filed under."""

    source: str
    section: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A raw row. ``ref`` is ``<file>:<number>``; neighbours and seeds have no numbers and are counted from 0."""

    ref: str
    title: str
    title_on_arxiv: str | None
    other_titles: tuple[str, ...]
    arxiv: str | None
    listed_arxiv: str | None
    id_status: str
    url: str
    alt_urls: tuple[str, ...]
    doi: str | None
    authors: tuple[str, ...] | None
    venue: str | None
    date: str | None
    code_url: str | None
    project_url: str | None
    related_code: tuple[str, ...]
    kind: str
    listings: tuple[Listing, ...]
    badges: tuple[str, ...]
    suspect: tuple[str, ...]
    file: str
    number: int


@dataclass(frozen=True)
class RawSource:
    """A repository that was listed, and the commit that was read."""

    repository: str
    commit: str
    date: str


def read_sources(folder: Path) -> tuple[list[Row], list[RawSource]]:
    """All rows in the order horizon, awesome_latent_cot, neighbours, seeds, and the repositories they come from."""
    rows: list[Row] = []
    sources: list[RawSource] = []
    for file in FILES:
        path = folder / f"{file}.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            papers = data["papers"]
        except FileNotFoundError:
            raise CatalogError(f"the source folder {folder} has no {file}.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise CatalogError(f"{path.name} is damaged: {error}") from None
        if data.get("count") != len(papers):
            raise CatalogError(f"{path.name} says count {data.get('count')} and holds {len(papers)} rows")
        found = [data["source"]] if "source" in data else data.get("sources", [])
        sources += [RawSource(s["repository"], s["commit"], s["commit_date"]) for s in found]
        for index, paper in enumerate(papers):
            rows.append(_row(file, index, paper, found))
    return rows, sources


def _row(file: str, index: int, paper: dict[str, Any], found: list[dict[str, Any]]) -> Row:
    number = paper.get("row", index)
    if file == "neighbours":
        listings = tuple(Listing(entry["list"], tuple(entry["section"])) for entry in paper["lists"])
    elif file == "seeds":
        listings = (Listing(SEEDS, (paper["theme"],)),)
    else:
        listings = (Listing(found[0]["repository"], tuple(paper["section"])),)
    if paper.get("authors_truncated"):
        raise CatalogError(f"{file} row {number}: the author list is cut short and cannot become a record's authors")
    alternatives = [*paper.get("alt_urls", []), *([paper["alt_url"]] if paper.get("alt_url") else [])]
    return Row(
        ref=f"{file}:{number}",
        title=paper["title"],
        title_on_arxiv=paper.get("title_on_arxiv"),
        other_titles=tuple(paper.get("other_titles", [])),
        arxiv=paper.get("arxiv_id_checked", paper["arxiv_id"]),
        listed_arxiv=paper["arxiv_id"],
        id_status=paper.get("id_status", "unchecked" if file == "neighbours" else "agrees"),
        url=paper["url"],
        alt_urls=tuple(alternatives),
        doi=paper.get("doi"),
        authors=tuple(paper["authors"]) if paper.get("authors") else None,
        venue=paper["venue"],
        date=paper.get("date"),
        code_url=paper["code_url"],
        project_url=paper["project_url"],
        related_code=tuple(paper.get("related_code", [])),
        kind=paper.get("kind", "paper"),
        listings=listings,
        badges=tuple(paper.get("features", [])),
        suspect=tuple(paper.get("suspect", [])),
        file=file,
        number=number,
    )
