"""The import report: what happened to every raw row, as JSON for tests and as Markdown for readers."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentcot.catalog.dedupe import near_pairs
from latentcot.catalog.raw import RawSource, Row
from latentcot.catalog.record import Record, dump_json
from latentcot.catalog.store import normal_url, write_atomic


@dataclass
class Report:
    """Collected while importing; ``finish`` adds what can be seen from the records only."""

    sources: list[RawSource]
    rows: list[dict[str, Any]] = field(default_factory=list)
    resolved: list[dict[str, Any]] = field(default_factory=list)
    merged: list[dict[str, str]] = field(default_factory=list)
    reviews: list[dict[str, str]] = field(default_factory=list)
    conflicts: list[dict[str, Any]] = field(default_factory=list)
    links: list[dict[str, str]] = field(default_factory=list)
    notes: list[dict[str, str]] = field(default_factory=list)
    shared_code: list[dict[str, Any]] = field(default_factory=list)
    retitled: list[dict[str, Any]] = field(default_factory=list)
    records: int = 0
    records_before_seeds: int = 0

    def leave_out(self, row: Row, reason: str) -> None:
        self.rows.append(_entry(row, "left_out", None, reason))

    def place(self, row: Row, key: str) -> None:
        """A paper row: ``kept`` for the first row of a record, ``merged`` for every other."""
        first = all(entry["key"] != key for entry in self.rows)
        reason = None if first else next(r["row"] for r in self.rows if r["key"] == key)
        self.rows.append(_entry(row, "kept" if first else "merged", key, reason and f"same paper as {reason}"))

    def resolve(self, row: Row, listed: str | None, right: str | None, reason: str) -> None:
        entry = {"row": row.ref, "title": row.title, "listed": listed, "right": right, "reason": reason}
        self.resolved.append(entry)

    def merged_by_title(self, row: Row, into: Row, rule: str) -> None:
        self.merged.append({"row": row.ref, "into": into.ref, "title": row.title, "rule": rule})

    def review(self, one: Row, other: Row, rule: str) -> None:
        self.reviews.append({"one": one.ref, "other": other.ref, "rule": rule})

    def conflict(self, key: str, name: str, claims: str, chosen: str | None) -> None:
        self.conflicts.append({"key": key, "field": name, "claims": claims, "chosen": chosen})

    def link_left_out(self, key: str, row: Row, url: str, reason: str) -> None:
        self.links.append({"key": key, "row": row.ref, "url": url, "reason": reason})

    def note(self, key: str, name: str, text: str) -> None:
        self.notes.append({"key": key, "field": name, "note": text})

    def finish(self, records: list[Record]) -> None:
        """Counts, retitles, repositories that several papers share, near titles for review."""
        order = {"horizon": 0, "awesome_latent_cot": 1, "neighbours": 2, "seeds": 3}
        self.rows.sort(key=lambda entry: (order[entry["row"].partition(":")[0]], int(entry["row"].partition(":")[2])))
        self.records = len(records)
        self.records_before_seeds = sum(any(not s.ref.startswith("seeds:") for s in r.sources) for r in records)
        self.retitled = [
            {"key": r.key, "title": r.title, "other_titles": r.other_titles} for r in records if r.other_titles
        ]
        holders: dict[str, list[str]] = {}
        for record in records:
            for link in record.links:
                if link.kind == "code":
                    holders.setdefault(normal_url(link.url), []).append(record.key)
        self.shared_code = [{"url": url, "keys": keys} for url, keys in sorted(holders.items()) if len(keys) > 1]
        titles = {record.key: record.title for record in records}
        self.reviews += [
            {"one": one, "other": other, "rule": f"near titles: {titles[one]!r} and {titles[other]!r}"}
            for one, other in near_pairs((record.key, record.title) for record in records)
        ]
        self.conflicts.sort(key=lambda entry: (entry["field"], entry["key"]))
        self.links.sort(key=lambda entry: (entry["row"].partition(":")[0], int(entry["row"].partition(":")[2])))

    def counts(self) -> dict[str, int]:
        outcomes = Counter(entry["outcome"] for entry in self.rows)
        return {
            "rows": len(self.rows),
            "kept": outcomes["kept"],
            "merged": outcomes["merged"],
            "left_out": outcomes["left_out"],
            "records": self.records,
            "records_before_seeds": self.records_before_seeds,
        }

    def files(self) -> dict[str, dict[str, int]]:
        table: dict[str, dict[str, int]] = {}
        for entry in self.rows:
            line = table.setdefault(entry["row"].partition(":")[0], {"rows": 0, "kept": 0, "merged": 0, "left_out": 0})
            line["rows"] += 1
            line[entry["outcome"]] += 1
        return table


def _entry(row: Row, outcome: str, key: str | None, reason: str | None) -> dict[str, Any]:
    return {
        "row": row.ref,
        "outcome": outcome,
        "key": key,
        "listed_arxiv": row.listed_arxiv,
        "title": row.title,
        "reason": reason,
        "doubts": list(row.suspect),
    }


def write_report(report: Report, catalog: Path) -> int:
    """Write ``import_report.json`` and ``import_report.md``; returns how many of them changed."""
    data = {
        "counts": report.counts(),
        "files": report.files(),
        "sources": [{"repository": s.repository, "commit": s.commit, "date": s.date} for s in report.sources],
        "resolved_ids": report.resolved,
        "merged_by_title": report.merged,
        "retitled": report.retitled,
        "links_left_out": report.links,
        "conflicts": report.conflicts,
        "notes": report.notes,
        "shared_code": report.shared_code,
        "review": report.reviews,
        "rows": report.rows,
    }
    changed = write_atomic(catalog / "import_report.json", dump_json(data))
    return changed + write_atomic(catalog / "import_report.md", markdown(report))


def markdown(report: Report) -> str:
    """The summary for readers."""
    counts = report.counts()
    left = [entry for entry in report.rows if entry["outcome"] == "left_out"]
    files = report.files()
    parts = [
        "# Import report\n\n"
        "Written by `python -m latentcot.catalog.importer`; the same facts for programs are in `import_report.json`,\n"
        "where every raw row stands with what became of it. Rows of `neighbours` and `seeds` are counted from 0.\n\n"
        f"{counts['rows']} rows gave **{counts['records']} records** "
        f"({counts['records_before_seeds']} before the seeds).\n",
        _table(
            ["file", "rows", "kept", "merged", "left out"], [[file, *map(str, n.values())] for file, n in files.items()]
        ),
        "`kept` is the first row of a record, `merged` every further row of it.\n",
        "## Rows left out\n",
        _list(f"{entry['row']}: {_md(entry['title'])} ({entry['reason']})" for entry in left),
        "## Identifiers resolved\n",
        _table(
            ["row", "title", "listed", "right", "why"],
            [[e["row"], _md(e["title"]), e["listed"] or "none", e["right"], _md(e["reason"])] for e in report.resolved],
        ),
        "## Merged by title\n",
        _list(f"{e['row']} into {e['into']} by {e['rule']}: {_md(e['title'])}" for e in report.merged),
        "## Several titles\n\nThe current title first, then earlier, published or differently listed ones.\n",
        _list(f"{e['key']}: {_md(e['title'])}; also: {_md('; '.join(e['other_titles']))}" for e in report.retitled),
        "## Links left out\n",
        _table(
            ["record", "row", "link", "why"], [[e["key"], e["row"], e["url"], _md(e["reason"])] for e in report.links]
        ),
        "## Conflicts between lists\n\n"
        "A venue that as many lists deny as state is `null`; contradicting repositories are all kept, unconfirmed.\n",
        _table(
            ["record", "field", "claims", "taken"],
            [[e["key"], e["field"], _md(e["claims"]), e["chosen"] or "none"] for e in report.conflicts],
        ),
        "## Doubts about rows\n\n"
        "As they came with the lists; ids, links and venues are settled above, dates follow the arXiv id.\n",
        _list(f"{e['row']} ({e['key']}): {_md('; '.join(e['doubts']))}" for e in report.rows if e["doubts"]),
        "## Notes\n",
        _list(f"{e['key']}, {e['field']}: {_md(e['note'])}" for e in report.notes),
        "## Repositories listed for several papers\n",
        _list(f"{e['url']}: {', '.join(e['keys'])}" for e in report.shared_code),
        "## To be reviewed: near or equal titles\n\nNever merged automatically.\n",
        _list(f"{e['one']} and {e['other']}: {_md(e['rule'])}" for e in report.reviews),
    ]
    return "\n".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _list(items: Iterable[str]) -> str:
    return "".join(f"- {item}\n" for item in items) or "None.\n"


def _md(text: str) -> str:
    """Text from outside inside a table cell or list item."""
    for char in "\\`*_[]<>|":
        text = text.replace(char, f"\\{char}")
    return text
