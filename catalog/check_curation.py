"""The part of ``papers check`` that looks at queue, decisions, watermarks and link health."""

from collections.abc import Iterator
from pathlib import Path

from latentcot.catalog.enrich.health import read_health
from latentcot.catalog.leaves import load_taxonomy
from latentcot.catalog.queue_store import Candidate, Decision, Folders, dump, is_decided, read_candidate, read_decision
from latentcot.catalog.store import CatalogError
from latentcot.catalog.update.queries import load_queries, read_watermarks


def curation_problems(root: Path) -> Iterator[tuple[str, str, str]]:
    """(where, rule, message) of everything wrong below ``root`` that is no record."""
    folders = Folders(root)
    leaves = load_taxonomy().leaves
    decisions: dict[str, Decision] = {}
    for where, folder, read in (
        ("decisions", folders.decisions, read_decision),
        ("queue", folders.queue, read_candidate),
    ):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = f"{where}/{path.name}"
            if path.suffix != ".json" or path.name.startswith("."):
                yield name, "place", "expected <key>.json and nothing else"
                continue
            try:
                found = read(folders, path.stem)
            except CatalogError as error:
                yield name, "schema", str(error).removeprefix(f"{name}: ")
                continue
            if found is None:
                continue
            if path.read_bytes() != dump(found).encode("utf-8"):
                yield (
                    name,
                    "format",
                    "the file is not in canonical form (field order, two spaces, UTF-8, final newline)",
                )
            if isinstance(found, Decision):
                decisions[found.key] = found
                yield from _decision(folders, found, leaves)
            elif isinstance(found, Candidate):
                yield from _candidate(folders, found, decisions)
    for name, read_table in (
        ("watermarks.json", lambda: read_watermarks(folders.watermarks)),
        ("link_health.json", lambda: read_health(folders)),
    ):
        try:
            read_table()
        except CatalogError as error:
            yield name, "schema", str(error)
    try:
        load_queries()
    except CatalogError as error:
        yield "update/queries.json", "schema", str(error)


def _decision(folders: Folders, decision: Decision, leaves: dict) -> Iterator[tuple[str, str, str]]:
    name = f"decisions/{decision.key}.json"
    for slug in filter(None, (decision.leaf, *decision.also)):
        if slug not in leaves:
            yield name, "leaf", f"no leaf has the slug {slug!r}"
    for key in filter(None, (decision.record, decision.duplicate_of)):
        if folders.record_file(key) is None:
            yield (
                name,
                "record",
                f"there is no record {key!r}; `latentcot papers review` carries out what was not carried out",
            )


def _candidate(
    folders: Folders, candidate: Candidate, decisions: dict[str, Decision]
) -> Iterator[tuple[str, str, str]]:
    name = f"queue/{candidate.key}.json"
    decision = decisions.get(candidate.key)
    if decision is not None and (is_decided(candidate, decision) or not candidate.again):
        yield (
            name,
            "queue",
            f"the candidate was {decision.verdict} on {decision.date}; `latentcot papers review` carries that out",
        )
    elif decision is None and folders.record_file(candidate.key) is not None:
        yield name, "queue", "the candidate is a record already"
