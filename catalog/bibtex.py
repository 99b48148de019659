r"""BibTeX of records: UTF-8, deterministic, one entry a record.

A venue counts as *confirmed* when a list names it, its year is known, its status is ``accepted`` or ``published``, and
no tie between lists left it open; such a paper is ``@inproceedings`` or ``@article``, every other one ``@misc``.
Words with a capital are braced, so that no style lower-cases them. TeX special characters are escaped once; TeX that
a title already holds (``$O(n)$``, ``\&``) is kept. Names are written ``Last, First`` where
:mod:`~latentcot.catalog.names` finds one reading, else in their order; single words (organisations) are braced.
Unknown authors give no author field.
"""

import re
from collections.abc import Iterable

from latentcot.catalog.names import split_name
from latentcot.catalog.record import Record

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_ESCAPES = {
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"{\textasciitilde}", "^": r"{\textasciicircum}", "\\": r"{\textbackslash}",
    "{": r"{\textbraceleft}", "}": r"{\textbraceright}",
}  # fmt: skip
_TABLE = str.maketrans(_ESCAPES)
_SPECIAL = re.compile(r"[&%$#_~^\\{}]")
# Math, escaped characters, accents and commands that a title may already hold.
_TEX = re.compile(r"\$[^$]+\$|\\[&%$#_{}]|\\[`'^\"~=.]\{?[A-Za-z]\}?|\\[A-Za-z]+(?:\{[^{}]*\})?")
TRACKS = {
    "findings": "Findings",
    "workshop": "Workshop",
    "tiny-papers": "Tiny Papers",
    "srw": "Student Research Workshop",
}


def is_confirmed(record: Record) -> bool:
    """Whether the venue of a record is certain enough for ``@inproceedings`` or ``@article``."""
    venue = record.venue
    return venue is not None and venue.status in ("accepted", "published") and venue_year(record) is not None


def venue_year(record: Record) -> int | None:
    """The year of the venue.

    A published paper that is not on arXiv has no date but that of its publication, so that one stands in for it.
    """
    venue = record.venue
    if venue is None or venue.year is not None:
        return venue.year if venue else None
    return record.year if venue.status == "published" and record.ids.arxiv is None else None


def escape(text: str) -> str:
    """TeX special characters escaped, exactly once."""
    if not _SPECIAL.search(text):
        return text
    parts, last = [], 0
    for match in _TEX.finditer(text):
        if _balanced(match.group()):
            parts += [_plain(text[last : match.start()]), match.group()]
            last = match.end()
    return "".join([*parts, _plain(text[last:])])


def _plain(text: str) -> str:
    return text.translate(_TABLE)


def _balanced(tex: str) -> bool:
    bare = re.sub(r"\\[{}]", "", tex)
    return bare.count("{") == bare.count("}") and not re.search(r"\\[{}]", tex)


def protect(title: str) -> str:
    """An escaped title in which every word with a capital, and all mathematics, is braced."""
    pieces = []
    for word in re.split(r"(\s+)", title):
        escaped = escape(word) if "$" not in title else word
        pieces.append(f"{{{escaped}}}" if not word.islower() and any(map(str.isupper, word)) else escaped)
    if "$" not in title:
        return "".join(pieces)
    # Mathematics may hold blanks, so such a title is braced as a whole.
    return f"{{{escape(title)}}}"


def author(name: str) -> str:
    """One name in BibTeX's form."""
    parts = split_name(name)
    if " and " in f" {name.lower()} " or not parts.given:
        return f"{{{escape(parts.full)}}}"
    if not parts.certain:
        return escape(parts.full)
    middle = f"{escape(parts.suffix)}, " if parts.suffix else ""
    return f"{escape(parts.family)}, {middle}{escape(parts.given)}"


def entry(record: Record) -> str:
    """The BibTeX entry of a record, with a final newline."""
    kind, fields = "misc", {"title": protect(record.title)}
    if record.authors:
        fields["author"] = " and ".join(author(name) for name in record.author_names)
    venue = record.venue
    if venue is not None and is_confirmed(record):
        kind = "article" if venue.type == "journal" else "inproceedings"
        track = f" {TRACKS[venue.track]}" if venue.track in TRACKS else ""
        year = str(venue_year(record))
        name = escape(venue.name) if kind == "article" else escape(f"{venue.name} {year}{track}")
        fields["journal" if kind == "article" else "booktitle"] = f"{{{name}}}"
        fields["year"] = year
    elif record.year is not None:
        fields["year"] = str(record.year)
        if record.published is not None and record.published.precision != "year":
            fields["month"] = _MONTHS[int(record.published.value[5:7]) - 1]
    if record.ids.arxiv:
        fields["eprint"] = record.ids.arxiv
        fields["archiveprefix"] = "arXiv"
        if record.primary_category:
            fields["primaryclass"] = record.primary_category
    if record.ids.doi:
        fields["doi"] = _address(record.ids.doi)
    elif record.ids.arxiv and kind == "misc":
        fields["doi"] = f"10.48550/arXiv.{record.ids.arxiv}"
    if record.url:
        fields["url"] = _address(record.url)
    if record.status == "withdrawn":
        fields["note"] = "Withdrawn"
    lines = [f"  {name} = {value if name == 'month' else '{' + value + '}'},\n" for name, value in fields.items()]
    return f"@{kind}{{{record.citekey},\n{''.join(lines)}}}\n"


def _address(text: str) -> str:
    """An address or DOI as it is; only braces, which would unbalance the entry, are percent-encoded."""
    return text.replace("{", "%7B").replace("}", "%7D")


def export(records: Iterable[Record]) -> str:
    """BibTeX of several records, sorted by citation key."""
    return "\n".join(entry(record) for record in sorted(records, key=lambda record: record.citekey.lower()))
