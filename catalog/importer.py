"""Import of the raw lists: ``python -m latentcot.catalog.importer SOURCE_FOLDER``.

Rows become clusters (one paper each) by the rules of :mod:`latentcot.catalog.dedupe`, clusters become records. What a
person decided about the lists stands in ``taxonomy/import_rules.json``; a suspect note that nobody judged stops the
import. A second run changes no byte, and a run over existing records keeps what a person or the updater wrote.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from latentcot.catalog import dedupe, raw
from latentcot.catalog.build import Cluster, build_record
from latentcot.catalog.identifiers import IdentifierError, identify, parse_arxiv
from latentcot.catalog.import_report import Report, write_report
from latentcot.catalog.leaves import load_table
from latentcot.catalog.names import base_citekey, unique_citekey
from latentcot.catalog.raw import RawSource, Row
from latentcot.catalog.record import Record, dump_json, dump_record, record_schema
from latentcot.catalog.store import CATALOG, PAPERS, CatalogError, read_records, write_atomic, write_record
from latentcot.catalog.text import bare_title, normal_title

# Fields that a re-import takes from the existing record, whatever the lists say.
PERMANENT = ("citekey", "citekey_aliases", "runnable", "note", "decision", "added")
# Fields that only the updater or a person fills.
UPDATER = ("updated", "version", "status", "superseded_by", "categories", "primary_category")
# Notes on a row that the importer resolves by itself; notes on links and venues need an entry in the rules.
_RESOLVED = ("arxiv_id is wrong", "date follows", "listed month", "listed date", "current arXiv title", "same arXiv id")
_RESOLVED += ("same paper listed again", "linked to", "listed with its SSRN number", "title has a spelling slip")


def main(arguments: list[str]) -> int:
    """Import the folder named on the command line; 0 when done, 2 for a bad call or damaged sources."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m latentcot.catalog.importer SOURCE_FOLDER", file=sys.stderr)
        return 2
    try:
        report, changed = import_lists(Path(arguments[0]))
    except (CatalogError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = report.counts()
    print(
        f"{counts['rows']} rows: {counts['kept']} kept, {counts['merged']} merged, {counts['left_out']} left out; "
        f"{counts['records']} records ({counts['records_before_seeds']} before the seeds), {changed} files changed"
    )
    return 0


def import_lists(
    folder: Path, papers: Path = PAPERS, catalog: Path = CATALOG, rules: dict | None = None
) -> tuple[Report, int]:
    """Read the lists, write the records below ``papers`` and the report; returns the report and the changed files."""
    rows, sources = raw.read_sources(folder)
    existing = {record.key: record for record in read_records(papers)}
    report, records = build_records(rows, sources, existing, rules or load_table("import_rules.json"))
    changed = sum(write_record(record, papers) for record in records)
    changed += write_report(report, catalog)
    changed += write_atomic(catalog / "schema" / "record.schema.json", dump_json(record_schema()))
    return report, changed


def build_records(
    rows: list[Row], sources: list[RawSource], existing: dict[str, Record], rules: dict
) -> tuple[Report, list[Record]]:
    """The records that the rows give, with what happened to every row."""
    report = Report(sources=sources)
    _check_judged(rows, rules)
    rows = [_apply_id_rules(row, rules, report) for row in rows]
    papers = []
    for row in rows:
        if row.kind == "paper":
            papers.append(row)
        else:
            report.leave_out(row, "kind: other (a blog, model page or library, not a paper)")
    clusters = cluster_rows(papers, report)
    dates = {source.repository: source.date for source in sources} | {raw.SEEDS: rules["import_date"]}
    drafts = sorted((build_record(cluster, rules, dates, report) for cluster in clusters), key=lambda r: r.key)
    records = _finish(drafts, existing, set(dates))
    by_ref = {row.ref: record.key for cluster, record in _paired(clusters, records) for row in cluster.rows}
    for row in papers:
        report.place(row, by_ref[row.ref])
    report.finish(records)
    return report, records


def _paired(clusters: Iterable[Cluster], records: list[Record]) -> Iterable[tuple[Cluster, Record]]:
    table = {source.ref: record for record in records for source in record.sources}
    for cluster in clusters:
        yield cluster, table[cluster.rows[0].ref]


def _check_judged(rows: list[Row], rules: dict) -> None:
    judged = {(entry["row"], "link") for entry in rules["links_left_out"]}
    judged |= {(entry["row"], "venue") for entry in rules["venues_left_out"]}
    known = {row.ref for row in rows}
    for section in ("links_left_out", "venues_left_out", "venues_completed", "ids", "title_unknown"):
        if missing := [entry["row"] for entry in rules[section] if entry["row"] not in known]:
            raise CatalogError(f"import_rules.json, {section}: no such row {missing[0]!r}")
    for row in rows:
        for note in row.suspect:
            if note.startswith(_RESOLVED):
                continue
            kind = "link" if note.startswith(("code ", "project ")) else "venue" if note.startswith("venue ") else None
            if kind is None or (row.ref, kind) not in judged:
                raise CatalogError(f"{row.ref}: the note {note!r} is judged nowhere in import_rules.json")


def _apply_id_rules(row: Row, rules: dict, report: Report) -> Row:
    """The row with the id we believe; a wrong one is reported and goes no further."""
    for rule in rules["ids"]:
        if rule["row"] == row.ref:
            report.resolve(row, row.arxiv, rule["arxiv"], rule["reason"])
            return replace(row, arxiv=rule["arxiv"], id_status="wrong")
    if row.id_status == "wrong":
        reason = next(note for note in row.suspect if note.startswith("arxiv_id is wrong"))
        report.resolve(row, row.listed_arxiv, row.arxiv, reason)
    elif row.id_status == "added":
        report.resolve(row, None, row.arxiv, next(iter(row.suspect), "the row links another host"))
    if row.arxiv is not None:
        try:
            parsed = parse_arxiv(row.arxiv)
        except IdentifierError as error:
            raise CatalogError(f"{row.ref}: {error}") from None
        return replace(row, arxiv=parsed.base)
    return row


@dataclass
class _Union:
    """Union of rows into clusters."""

    parent: dict[str, str] = field(default_factory=dict)

    def find(self, ref: str) -> str:
        while self.parent.setdefault(ref, ref) != ref:
            ref = self.parent[ref]
        return ref

    def join(self, one: str, other: str) -> None:
        self.parent[self.find(other)] = self.find(one)


def cluster_rows(rows: list[Row], report: Report) -> list[Cluster]:
    """Rows of one paper together, in the order of their first row."""
    union = _Union()
    first: dict[tuple[str, str], str] = {}
    for row in rows:
        union.find(row.ref)
        for kind, value in strong_ids(row):
            anchor = first.setdefault((kind, value), row.ref)
            union.join(anchor, row.ref)
    clusters = _collect(rows, union)
    titles: dict[str, list[Cluster]] = defaultdict(list)
    for cluster in clusters:
        for title in sorted({form for row in cluster.rows for form in _title_forms(row)}):
            titles[title].append(cluster)
    seen: set[tuple[str, str]] = set()
    for group in titles.values():
        for index, one in enumerate(group):
            for other in group[index + 1 :]:
                pair = (one.rows[0].ref, other.rows[0].ref)
                if pair in seen:
                    continue
                seen.add(pair)
                verdict = dedupe.compare(_evidence(one), _evidence(other))
                if verdict.outcome == "same":
                    union.join(*pair)
                    report.merged_by_title(other.rows[0], one.rows[0], verdict.rule)
                else:
                    report.review(one.rows[0], other.rows[0], verdict.rule)
    return _collect(rows, union)


def strong_ids(row: Row) -> list[tuple[str, str]]:
    """The strong identifiers of a row: the checked arXiv id, the DOI and what its other addresses hold."""
    found = [("arxiv", row.arxiv)] if row.arxiv else []
    if row.doi:
        found.append(("doi", row.doi.lower()))
    for url in (row.url, *row.alt_urls):
        identifier = identify(url)
        if identifier and identifier.kind != "arxiv":  # the arXiv address is the listed id, which may be wrong
            found.append((identifier.kind, identifier.value))
    return found


def _collect(rows: list[Row], union: _Union) -> list[Cluster]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[union.find(row.ref)].append(row)
    return [Cluster(tuple(group)) for group in groups.values()]


def _title_forms(row: Row) -> set[str]:
    titles = [row.title, *([row.title_on_arxiv] if row.title_on_arxiv else []), *row.other_titles]
    return {form(title) for title in titles for form in (normal_title, bare_title)}


def _evidence(cluster: Cluster) -> dedupe.Evidence:
    return dedupe.Evidence(
        title=cluster.title().title,
        arxiv=cluster.arxiv,
        first_author=next((row.authors[0] for row in cluster.rows if row.authors), None),
        year=cluster.year,
        venues=cluster.venue_names,
        lists=frozenset(listing.source for row in cluster.rows for listing in row.listings),
    )


def _finish(drafts: list[Record], existing: dict[str, Record], import_sources: set[str]) -> list[Record]:
    """Keep what is permanent or was written by somebody else, and give citation keys to new records."""
    taken = {name.lower() for record in existing.values() for name in (record.citekey, *record.citekey_aliases)}
    records = []
    for draft in drafts:
        old = existing.get(draft.key)
        if old is None:
            names = draft.author_names or None
            key = unique_citekey(base_citekey(draft.key, draft.title, names, draft.year), taken)
            taken.add(key.lower())
            records.append(draft.model_copy(update={"citekey": key}))
        else:
            records.append(_keep(draft, old, import_sources))
    return records


def _keep(draft: Record, old: Record, import_sources: set[str]) -> Record:
    update = {name: getattr(old, name) for name in (*PERMANENT, *UPDATER)}
    if old.taxonomy.status == "reviewed":
        update["taxonomy"] = old.taxonomy
    foreign = {name: value for name, value in old.provenance.items() if value.source not in import_sources}
    for name in foreign:
        update[name.partition(".")[0]] = getattr(old, name.partition(".")[0])
    update["provenance"] = dict(sorted({**draft.provenance, **foreign}.items(), key=_field_order))
    if "ids" not in foreign:
        merged = {kind: value or getattr(old.ids, kind) for kind, value in draft.ids.model_dump().items()}
        update["ids"] = type(draft.ids)(**merged)
    if "other_titles" not in foreign:
        extra = [title for title in old.other_titles if title not in (*draft.other_titles, draft.title)]
        update["other_titles"] = [*draft.other_titles, *extra]
    known = {link.url for link in draft.links}
    if "links" not in foreign:
        update["links"] = draft.links + [
            link for link in old.links if link.url not in known and link.source not in import_sources
        ]
    refs = {(source.source, source.ref, source.section) for source in draft.sources}
    added = [source for source in old.sources if (source.source, source.ref, source.section) not in refs]
    update["sources"] = draft.sources + [source for source in added if source.source not in import_sources]
    kept = draft.model_copy(update=update)
    return Record.model_validate_json(dump_record(kept))


def _field_order(item: tuple[str, object]) -> tuple[int, str]:
    name = item[0]
    order = list(Record.model_fields)
    head = name.partition(".")[0]
    return (order.index(head) if head in order else len(order)), name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
