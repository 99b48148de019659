"""Atom 1.0 and RSS 2.0 feeds of the papers that came into the catalog last.

Identifiers are permanent (``urn:latentcot:catalog:…``) and an entry is *updated* on the day on which it came into the
catalog, so building a feed again changes nothing. Addresses are absolute: of the paper itself, or of its page where the
address of the site is given. Atom demands an author; where a paper's authors are not known, the feed's stands in, which
is the catalog itself.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from email.utils import format_datetime

from latentcot.catalog.export.plain import date_parts, names, newest_first, one_line
from latentcot.catalog.leaves import load_taxonomy
from latentcot.catalog.record import Record

_ATOM = "http://www.w3.org/2005/Atom"
_NAMESPACE = "urn:latentcot:catalog"
NAME = "latentcot: papers on latent reasoning"


def latest(records: Iterable[Record], limit: int | None) -> list[Record]:
    """The records that came last: by the day they were added, then by date of publication, newest first."""
    found = sorted(newest_first(list(records)), key=lambda record: record.added, reverse=True)
    return found if limit is None else found[:limit]


def atom(
    records: Iterable[Record],
    *,
    title: str = NAME,
    slug: str = "all",
    site: str | None = None,
    limit: int | None = None,
) -> str:
    """An Atom feed.

    Args:
        records: the papers, in any order.
        title: title of the feed.
        slug: names the feed in its identifier: ``all`` or the slug of a leaf.
        site: absolute address of the site; without it entries link to the papers themselves.
        limit: the most entries; ``None`` for all.
    """
    _check(limit)
    shown = latest(records, limit)
    feed = ET.Element("feed", {"xmlns": _ATOM, "xml:lang": "en"})
    _add(feed, "id", f"{_NAMESPACE}:feed:{slug}")
    _add(feed, "title", title)
    _add(feed, "updated", _moment(max((record.added for record in shown), default="1970-01-01")))
    _add(_add(feed, "author"), "name", "The latentcot catalog")
    if site:
        _add(feed, "link", rel="alternate", type="text/html", href=f"{site.rstrip('/')}/papers/index.html")
    for record in shown:
        entry = _add(feed, "entry")
        _add(entry, "id", f"{_NAMESPACE}:paper:{record.key}")
        _add(entry, "title", record.title)
        _add(entry, "updated", _moment(record.added))
        if len(date_parts(record)) == 3 and record.published:
            _add(entry, "published", _moment(record.published.value))
        for name in names(record):
            _add(_add(entry, "author"), "name", name)
        if address := _address(record, site):
            _add(entry, "link", rel="alternate", href=address)
        for leaf in record.leaves:
            _add(entry, "category", term=leaf)
        _add(entry, "summary", _summary(record))
    return _text(feed)


def rss(
    records: Iterable[Record],
    *,
    title: str = NAME,
    slug: str = "all",
    site: str | None = None,
    limit: int | None = None,
) -> str:
    """An RSS 2.0 feed; arguments as for :func:`atom`."""
    _check(limit)
    shown = latest(records, limit)
    feed = ET.Element("rss", {"version": "2.0"})
    channel = _add(feed, "channel")
    _add(channel, "title", title)
    _add(channel, "link", f"{site.rstrip('/')}/papers/index.html" if site else f"{_NAMESPACE}:feed:{slug}")
    _add(channel, "description", "Papers that came into the catalog last")
    _add(channel, "language", "en")
    if shown:
        _add(channel, "lastBuildDate", _mail_date(max(record.added for record in shown)))
    for record in shown:
        item = _add(channel, "item")
        _add(item, "title", record.title)
        if address := _address(record, site):
            _add(item, "link", address)
        _add(item, "description", _summary(record))
        for leaf in record.leaves:
            _add(item, "category", leaf)
        _add(item, "guid", f"{_NAMESPACE}:paper:{record.key}", isPermaLink="false")
        _add(item, "pubDate", _mail_date(record.added))
    return _text(feed)


def _check(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, given {limit}")


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    child = ET.SubElement(parent, tag, {name: one_line(value) for name, value in attributes.items()})
    if text is not None:
        child.text = one_line(text)
    return child


def _text(root: ET.Element) -> str:
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _address(record: Record, site: str | None) -> str | None:
    return f"{site.rstrip('/')}/paper/{record.key}.html" if site else record.url


def _summary(record: Record) -> str:
    leaf = load_taxonomy().leaves.get(record.taxonomy.primary)
    parts: Sequence[str | None] = (
        ", ".join(names(record)) or None,
        record.published.value if record.published else None,
        record.venue.name if record.venue else None,
        f"filed under {leaf.name}" if leaf else None,
        record.note,
        record.status if record.status != "active" else None,
    )
    return " · ".join(part for part in parts if part)


def _moment(day: str) -> str:
    return f"{day}T00:00:00Z"


def _mail_date(day: str) -> str:
    return format_datetime(datetime.fromisoformat(day).replace(tzinfo=UTC))
