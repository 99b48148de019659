"""Text of records for formats that have no escapes for control characters."""

import re

from latentcot.catalog.record import Record

# What XML 1.0 forbids, line and paragraph separators, and marks that turn the direction of text around them.
_FORBIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]+"
)


def one_line(text: str) -> str:
    """``text`` on one line, without control characters."""
    return " ".join(_FORBIDDEN.sub(" ", text).split())


def names(record: Record) -> list[str]:
    """The names of the authors on one line each; a name of nothing but control characters is none."""
    return [name for author in record.author_names if (name := one_line(author))]


def date_parts(record: Record) -> tuple[int, ...]:
    """Year, month and day of first publication, as far as they are known."""
    if record.published is not None:
        return tuple(int(part) for part in record.published.value.split("-"))
    return (record.year,) if record.year else ()


def newest_first(records: list[Record]) -> list[Record]:
    """Newest first by date of publication, then by key."""
    by_key = sorted(records, key=lambda record: record.key)
    return sorted(by_key, key=lambda record: "-".join(f"{part:04d}" for part in date_parts(record)), reverse=True)
