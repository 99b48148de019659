"""Where the papers of the catalog are implemented: the check of the paths, and the way back from a module to its papers.

A record's ``runnable`` names source files of this project by their path in the repository. The check asks that each
exists and is of the right kind; :func:`papers_of` answers for a module or a package, and :func:`unlinked` finds modules
that name a paper of the catalog without being linked from it.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentcot.catalog.record import Record, Runnable

# Folders of the repository that hold implementations, with the import name of each.
SOURCES = {
    "latentcot": "latentcot",
    "kernels": "latentcot.kernels",
    "recurrent_depth": "latentcot.recurrent_depth",
    "diffusion_reasoning": "latentcot.diffusion_reasoning",
}
_ARXIV = re.compile(r"(?<![\d.])(\d{4}\.\d{4,5})(?![\d.]*\d)")


def module_name(path: str) -> str:
    """Import name of a source file: ``kernels/delta_rule/op.py`` → ``latentcot.kernels.delta_rule.op``.

    Raises:
        ValueError: the path is no Python file of this project.
    """
    parts = Path(path).parts
    if not path.endswith(".py") or not parts or parts[0] not in SOURCES or ".." in parts:
        raise ValueError(f"path: expected a .py file below {', '.join(SOURCES)}, given {path!r}")
    names = [*SOURCES[parts[0]].split("."), *parts[1:-1]]
    stem = parts[-1].removesuffix(".py")
    return ".".join(names if stem == "__init__" else [*names, stem])


def runnable_problems(entry: Runnable, root: Path) -> Iterator[str]:
    """What is wrong with one ``runnable`` entry, seen from the root of a checkout."""
    kinds = (
        ("module", entry.module, tuple(f"{name}/" for name in SOURCES), ".py"),
        ("notebook", entry.notebook, ("notebooks/",), ".ipynb"),
        ("test", entry.test, ("tests/",), ".py"),
    )
    for name, path, folders, suffix in kinds:
        if path is None:
            continue
        parts = Path(path).parts
        if Path(path).is_absolute() or ".." in parts or not (root / path).is_file():
            yield f"{name}: the file {path!r} does not exist in the repository"
        elif not path.startswith(folders) or not path.endswith(suffix):
            where = " or ".join(folders)
            yield f"{name}: expected a {suffix} file below {where}, given {path!r}"
        elif name == "test" and not Path(path).name.startswith("test_"):
            yield f"{name}: expected a file that pytest collects (test_*.py), given {path!r}"


@dataclass(frozen=True)
class Implemented:
    """A paper and where one module implements it."""

    record: Record
    entry: Runnable


def reverse_index(records: Iterable[Record]) -> dict[str, list[Implemented]]:
    """Import name of a module → the papers that it implements, both in order."""
    found: dict[str, list[Implemented]] = {}
    for record in sorted(records, key=lambda record: record.key):
        for entry in record.runnable:
            try:
                name = module_name(entry.module)
            except ValueError:
                continue  # the check tells; an index has nothing to say about it
            found.setdefault(name, []).append(Implemented(record, entry))
    return dict(sorted(found.items()))


def papers_of(index: dict[str, list[Implemented]], name: str) -> dict[str, list[Implemented]]:
    """The part of a reverse index that lies in a module or below a package."""
    return {module: found for module, found in index.items() if module == name or module.startswith(f"{name}.")}


def unlinked(records: Sequence[Record], root: Path) -> list[tuple[str, str]]:
    """(path, key) of every module whose docstring names a paper of the catalog that does not link it.

    A docstring may name a paper for many reasons; the list is for a person who files links, and no error.
    """
    known = {record.key: record for record in records}
    found = []
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            inside = path.relative_to(root)
            if any((root / part).is_symlink() for part in inside.parents) or "__pycache__" in inside.parts:
                continue
            text = _docstring(path)
            for key in dict.fromkeys(_ARXIV.findall(text)):
                record = known.get(key)
                if record and inside.as_posix() not in {entry.module for entry in record.runnable}:
                    found.append((inside.as_posix(), key))
    return found


def _docstring(path: Path) -> str:
    try:
        return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    except (SyntaxError, UnicodeDecodeError):
        return ""
