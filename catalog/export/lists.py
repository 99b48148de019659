"""The list of papers as Markdown, as READMEs carry it, written between two markers."""

import re
from collections.abc import Iterable

from latentcot.catalog.export.plain import newest_first, one_line
from latentcot.catalog.leaves import load_taxonomy
from latentcot.catalog.record import Record
from latentcot.catalog.store import CatalogError

BEGIN, END = "<!-- papers:begin -->", "<!-- papers:end -->"
_SPECIAL = re.compile(r"[\\`*_{}\[\]<>#|~$&!^]")


def export(records: Iterable[Record]) -> str:
    """Papers under the names of branches and leaves, in the taxonomy's order, newest first; leaves without papers are
    left out. Titles are escaped: nothing in them is Markdown."""
    in_leaf: dict[str, list[Record]] = {}
    for record in records:
        in_leaf.setdefault(record.taxonomy.primary, []).append(record)
    lines: list[str] = []
    for branch in load_taxonomy().branches:
        leaves = [leaf for leaf in branch.leaves if leaf.slug in in_leaf]
        if leaves:
            lines += [f"## {_escape(branch.name)}", ""]
        for leaf in leaves:
            lines += [f"### {_escape(leaf.name)}", ""]
            lines += [_line(record) for record in newest_first(in_leaf.pop(leaf.slug))]
            lines.append("")
    if in_leaf:
        raise CatalogError(f"no leaf has the slug {sorted(in_leaf)[0]!r}")
    return "\n".join(lines).rstrip("\n") + "\n" if lines else ""


def between(text: str, content: str) -> str:
    """``text`` with what stands between the two markers replaced by ``content``.

    Raises :class:`CatalogError` unless each marker stands there once, the begin before the end.
    """
    for marker in (BEGIN, END):
        if (count := text.count(marker)) != 1:
            raise CatalogError(f"expected the marker {marker} once, found it {count} times")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise CatalogError(f"the marker {END} stands before {BEGIN}")
    return f"{before}{BEGIN}\n\n{content.strip()}\n\n{END}{after}"


def _line(record: Record) -> str:
    title = _escape(record.title)
    parts = [f"[{title}](<{record.url}>)" if record.url else title]
    if record.published or record.year:
        parts.append(record.published.value if record.published else str(record.year))
    if record.venue:
        parts.append(_escape(f"{record.venue.name} {record.venue.year or ''}".strip()))
    code = record.link("code")
    if code is not None and code.official is not False:
        parts.append(f"[code](<{code.url}>)")
    if record.status != "active":
        parts.append(record.status)
    return f"- {' · '.join(parts)}"


def _escape(text: str) -> str:
    return _SPECIAL.sub(lambda match: f"\\{match.group()}", one_line(text))
