"""Reading and writing the catalog's files. Paths are relative to this package, never to the working directory."""

import os
import tempfile
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from latentcot.catalog.identifiers import identify
from latentcot.catalog.record import LINE_PATTERN, Record, dump_record, folder_of

CATALOG = Path(__file__).resolve().parent
PAPERS = CATALOG / "papers"


class CatalogError(ValueError):
    """The catalog's files are damaged, or something that was asked for is not there. One line, for the reader."""


class UnknownPaperError(CatalogError):
    """No record has this key, identifier or citation key."""


def write_atomic(path: Path, text: str) -> bool:
    """Write ``text`` under a temporary name in the same folder and rename it; says whether a byte changed."""
    return write_bytes_atomic(path, text.encode("utf-8"))


def write_output(path: Path, text: str) -> None:
    """Write ``text`` to a file that the user named: as :func:`write_atomic`, behind a link, and into a device or pipe.

    A rename would put a file in the place of ``/dev/null`` or ``/dev/stdout``, and of a link what it points to.
    """
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            file.write(text.encode("utf-8"))
    else:
        write_atomic(path.resolve(), text)


def write_bytes_atomic(path: Path, data: bytes, *, sync: bool = True) -> bool:
    """As :func:`write_atomic`, for bytes. ``sync=False`` does not wait for the disk: for what may be lost, such as a cache.

    Raises :class:`CatalogError` where something other than a file stands in the place.
    """
    if path.exists() and not path.is_file():
        raise CatalogError(f"{path} is a folder, a device or a pipe, expected a file or nothing")
    if path.is_file() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        # mkstemp makes the file private; give it the mode that an ordinary new file would have.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True


def explain(error: ValidationError) -> str:
    """The first problem of a validation error on one line, and how many more there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"]) or "record"
    given = first.get("input")
    shown = "" if isinstance(given, dict) or first["type"] == "missing" else f", given {_short(given)}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    told = first["msg"]
    if (first.get("ctx") or {}).get("pattern") == LINE_PATTERN:
        told = "expected one line without control characters and without blanks at its ends"
    return f"{where}: {told}{shown}{more}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def parse_record(text: bytes | str, name: str) -> Record:
    """A record from the text of its file; ``name`` says in the error which file it was."""
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        raise CatalogError(f"{name}: {explain(error)}") from None


def record_files(papers: Path = PAPERS) -> list[Path]:
    """All record files, in the order of folder and name."""
    return sorted(papers.glob("*/*.json"))


def read_records(papers: Path = PAPERS) -> list[Record]:
    """Read the records below ``papers``, sorted by key; raises :class:`CatalogError` at the first damaged file."""
    records = [parse_record(path.read_bytes(), f"{path.parent.name}/{path.name}") for path in record_files(papers)]
    return sorted(records, key=lambda record: record.key)


@cache
def _loaded() -> tuple[Record, ...]:
    return tuple(read_records())


def load_records() -> list[Record]:
    """All records of the catalog that ships with this package, sorted by key. Read once, then kept."""
    return list(_loaded())


@cache
def _lookup() -> MappingProxyType[str, Record]:
    return MappingProxyType(build_lookup(load_records()))


def build_lookup(records: list[Record]) -> dict[str, Record]:
    """Every exact name of a record: key, citation keys, ids and the addresses of its links (compared without case)."""
    table: dict[str, Record] = {}
    for record in records:
        names = [record.key, record.citekey, *record.citekey_aliases]
        names += [f"{kind}:{value}" for kind, value in record.ids.model_dump().items() if value]
        for name in names:
            table.setdefault(name.lower(), record)
    holders: dict[str, list[Record]] = {}
    for record in records:
        for url in dict.fromkeys(normal_url(link.url) for link in record.links):
            holders.setdefault(url, []).append(record)
    for url, found in holders.items():
        if len(found) == 1:  # a repository that two papers share names neither
            table.setdefault(url, found[0])
    return table


def normal_url(url: str) -> str:
    return url.strip().rstrip("/").lower().removeprefix("https://").removeprefix("http://").removeprefix("www.")


def lookup(table: dict[str, Record] | MappingProxyType[str, Record], text: str) -> Record | None:
    """The record that ``text`` names exactly (key, id, address, citation key), or ``None``."""
    text = text.strip()
    if not text or len(text) > 500:
        return None
    if found := table.get(text.lower()) or table.get(normal_url(text)):
        return found
    identifier = identify(text)
    return table.get(f"{identifier.kind}:{identifier.value}".lower()) if identifier else None


def find(text: str) -> Record | None:
    """The record with this key, identifier (id, DOI, address, any version) or citation key, or ``None``."""
    return lookup(_lookup(), text)


def get(text: str) -> Record:
    """As :func:`find`, but raises :class:`UnknownPaperError` naming the closest keys."""
    record = find(text)
    if record is not None:
        return record
    from difflib import get_close_matches

    near = get_close_matches(text.strip().lower()[:100], list(_lookup()), n=3, cutoff=0.75)
    names = list(dict.fromkeys(_lookup()[name].key for name in near))
    hint = f"; close: {', '.join(names)}" if names else "; find one with `latentcot papers search`"
    shown = text if len(text) <= 60 else text[:57] + "..."
    raise UnknownPaperError(f"no paper is called {shown!r} (key, arXiv id, DOI or citation key){hint}")


def write_record(record: Record, papers: Path = PAPERS, *, folder: str | None = None) -> bool:
    """Write a record to its canonical place; a record that is there already stays in its folder."""
    if folder is None:
        existing = sorted(papers.glob(f"*/{record.key}.json"))
        folder = existing[0].parent.name if existing else folder_of(record.key, record.published, record.venue)
    return write_atomic(papers / folder / f"{record.key}.json", dump_record(record))
