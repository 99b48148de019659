"""``papers check``: everything that can be wrong with the records, found without the network."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentcot.catalog.bibtex import entry
from latentcot.catalog.check_curation import curation_problems
from latentcot.catalog.identifiers import Identifier, IdentifierError, parse_acl, parse_arxiv, parse_doi, record_key
from latentcot.catalog.leaves import load_facets, load_taxonomy
from latentcot.catalog.names import CITEKEY
from latentcot.catalog.record import Record, dump_fast, dump_json, dump_record, folder_of, record_schema
from latentcot.catalog.runnable import runnable_problems
from latentcot.catalog.store import CATALOG, PAPERS, CatalogError, parse_record
from latentcot.catalog.text import normal_title, without_name

_TEX = re.compile(r"[{}\\$]")
_OWN_KEYS = ("doi-", "openreview-", "acl-", "x-")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, which rule, and what."""

    where: str
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}: {self.message}"


@dataclass(frozen=True)
class Checked:
    """What a check saw: keys of the records, and problems.

    ``paths_checked`` is false in an installed copy, which has no repository around it.
    """

    records: list[str]
    problems: list[Problem]
    paths_checked: bool


def repository_root() -> Path | None:
    """The checkout that this package lies in, or ``None`` for an installed copy."""
    root = CATALOG.parent
    return root if (root / "pyproject.toml").is_file() and (root / "catalog").is_dir() else None


def check_catalog(papers: Path = PAPERS, root: Path | None = None) -> Checked:
    """Check every file below ``papers``; runnable paths are taken relative to ``root``."""
    root = root or repository_root()
    across = _Across()
    problems: list[Problem] = []
    later: list[Problem] = []
    for folder, file in _files(papers):
        name = f"{folder}/{file}" if folder else file
        if not file.endswith(".json") or not folder or "/" in folder:
            problems.append(Problem(name, "place", "expected <yymm>/<key>.json and nothing else"))
            continue
        try:
            with open(os.path.join(papers, folder, file), "rb") as opened:
                data = opened.read()
            record = parse_record(data, name)
        except CatalogError as error:
            problems.append(Problem(name, "schema", str(error).removeprefix(f"{name}: ")))
            continue
        problems += _file(folder, file, data, record)
        later += _record(record, root)
        if record.decision and not (papers.parent / record.decision).is_file():
            later.append(Problem(record.key, "decision", f"there is no file {record.decision!r}"))
        across.add(record)
    problems += [*later, *across.problems(), *_tables()]
    problems += [Problem(*problem) for problem in curation_problems(papers.parent)]
    return Checked(sorted(across.keys), problems, root is not None)


def _files(papers: Path) -> list[tuple[str, str]]:
    """Folder (below ``papers``, with slashes) and name of every file, in order."""
    found = []
    for place, _, files in os.walk(papers):
        folder = os.path.relpath(place, papers).replace(os.sep, "/")
        found += [("" if folder == "." else folder, file) for file in files]
    return sorted(found)


def _file(folder: str, file: str, data: bytes, record: Record) -> Iterator[Problem]:
    name = f"{folder}/{file}"
    # The fast writer gives the same text; the slow one is the definition and has the last word.
    if data != dump_fast(record) and data != dump_record(record).encode():
        yield Problem(
            name, "format", "the file is not in canonical form (field order, two spaces, UTF-8, final newline)"
        )
    if file != f"{record.key}.json":
        yield Problem(name, "key", f"the file holds the key {record.key!r}")
    if not re.fullmatch(r"\d{4}", folder):
        yield Problem(name, "folder", f"expected four digits, given {folder!r}")
    elif not record.key.startswith(_OWN_KEYS) and folder != folder_of(record.key, record.published, record.venue):
        yield Problem(
            name, "folder", f"expected {folder_of(record.key, record.published, record.venue)}, given {folder}"
        )


def _record(record: Record, root: Path | None) -> Iterator[Problem]:
    where = record.key
    tree, facets = load_taxonomy(), load_facets()
    for slug in record.leaves:
        if slug not in tree.leaves:
            yield Problem(where, "leaf", f"no leaf has the slug {slug!r}")
    for facet, values in record.facets.model_dump().items():
        for value in values:
            if value not in facets.allowed(facet):
                yield Problem(where, "facet", f"{facet} has no value {value!r}")
        if len(set(values)) < len(values):
            yield Problem(where, "facet", f"{facet} repeats a value")
    yield from _identifiers(record)
    if record.title != " ".join(record.title.split()):
        yield Problem(where, "title", "white space is not collapsed")
    if not CITEKEY.match(record.citekey):
        yield Problem(where, "citekey", f"{record.citekey!r} does not match {CITEKEY.pattern}")
    # Without TeX in the record every brace of the entry is one of a pair that the export writes.
    if _TEX.search(" ".join(_texts(record))):
        text = entry(record)
        if text.count("{") != text.count("}"):
            yield Problem(where, "bibtex", "braces of the BibTeX entry are not balanced")
    if not record.sources and record.decision is None:
        yield Problem(where, "sources", "neither a source nor a decision says why the record is here")
    seen: set[tuple[str, str]] = set()
    for link in record.links:
        if (link.kind, link.url) in seen:
            yield Problem(where, "links", f"{link.url} is given twice as {link.kind}")
        seen.add((link.kind, link.url))
    for place in record.runnable:
        for message in runnable_problems(place, root) if root else ():
            yield Problem(where, "runnable", message)


def _texts(record: Record) -> Iterator[str]:
    yield record.title
    yield from record.author_names
    yield record.venue.name if record.venue else ""
    yield record.ids.doi or ""
    yield record.url or ""


def _identifiers(record: Record) -> Iterator[Problem]:
    ids = record.ids
    try:
        if ids.arxiv and str(parse_arxiv(ids.arxiv)) != ids.arxiv:
            yield Problem(record.key, "id", f"{ids.arxiv!r} is not the base form of the arXiv id")
        if ids.doi and parse_doi(ids.doi) != ids.doi:
            yield Problem(record.key, "id", f"{ids.doi!r} is not the canonical form of the DOI")
        if ids.acl and parse_acl(ids.acl) != ids.acl:
            yield Problem(record.key, "id", f"{ids.acl!r} is not the canonical form of the Anthology id")
    except IdentifierError as error:
        yield Problem(record.key, "id", str(error))
    # A key is permanent: a record that began without an arXiv id keeps its own, one that is called by an arXiv id has that id.
    if ids.arxiv and not record.key.startswith(_OWN_KEYS) and record_key(Identifier("arxiv", ids.arxiv)) != record.key:
        yield Problem(record.key, "key", f"a paper with the arXiv id {ids.arxiv} must have it as its key")


class _Across:
    """What must differ between records. Records are not kept: a hundred thousand would fill the memory."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self._superseded: list[tuple[str, str]] = []
        self._first: dict[tuple[str, str], str] = {}
        self._several: dict[tuple[str, str], list[str]] = {}

    def add(self, record: Record) -> None:
        key = record.key
        self.keys.append(key)
        self._see("key", key.lower(), key)
        for kind, value in record.ids:
            if value:
                self._see(f"{kind} id", value if kind == "openreview" else value.lower(), key)
        for name in dict.fromkeys(name.lower() for name in (record.citekey, *record.citekey_aliases)):
            self._see("citation key", name, key)
        for form in sorted({form for title in (record.title, *record.other_titles) for form in _forms(title)}):
            self._see("title", form, key)
        if record.superseded_by:
            self._superseded.append((key, record.superseded_by))

    def _see(self, rule: str, value: str, key: str) -> None:
        first = self._first.setdefault((rule, value), key)
        if first is not key:
            self._several.setdefault((rule, value), [first]).append(key)

    def problems(self) -> Iterator[Problem]:
        known = set(self.keys)
        for key, successor in self._superseded:
            if successor not in known:
                yield Problem(key, "superseded", f"superseded_by names no record: {successor!r}")
        for (rule, value), keys in self._several.items():
            yield Problem(", ".join(keys), f"duplicate {rule}", repr(value))


def _forms(title: str) -> set[str]:
    """A title and, unless too little would remain, the title without a leading ``Name:``."""
    short = normal_title(without_name(title))
    return {normal_title(title), short} if len(short.split()) >= 4 else {normal_title(title)}


def _tables() -> Iterator[Problem]:
    tree = load_taxonomy()
    retired = {entry.slug for entry in tree.retired}
    for slug in retired & set(tree.leaves):
        yield Problem("taxonomy.json", "leaf", f"the retired slug {slug!r} is in use again")
    for item in tree.retired:
        if item.replaced_by not in tree.leaves:
            yield Problem(
                "taxonomy.json", "leaf", f"{item.slug!r} is replaced by {item.replaced_by!r}, which is no leaf"
            )
    schema = CATALOG / "schema" / "record.schema.json"
    if not schema.is_file() or schema.read_text(encoding="utf-8") != dump_json(record_schema()):
        yield Problem("schema/record.schema.json", "schema", "is not the one made from the model")
    report = CATALOG / "import_report.json"
    if report.is_file():
        try:
            json.loads(report.read_text(encoding="utf-8"))
        except ValueError as error:
            yield Problem("import_report.json", "format", str(error))
