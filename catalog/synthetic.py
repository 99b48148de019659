"""Synthetic records for benchmarks: as many as wanted, valid for ``papers check``, the same for the same seed.

Titles are joined from the beginning of one real title and the end of another, so that the lengths of titles and the
frequencies of words are those of the field; names, venues and topics are drawn from the records as well. They are for
measuring only and are never written into the catalog.
"""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from latentcot.catalog.names import base_citekey, unique_citekey
from latentcot.catalog.record import Author, Ids, Link, PartialDate, Record, Source, dump_fast
from latentcot.catalog.store import CatalogError, load_records
from latentcot.catalog.text import normal_title, without_name

MOST = 1_000_000
_PER_MONTH = 9_000
_FIRST_YEAR, _LAST_YEAR = 15, 26


def synthetic_records(count: int, seed: int = 0, base: Sequence[Record] | None = None) -> Iterator[Record]:
    """``count`` records made from ``base`` (default: the shipped records).

    Raises ``ValueError`` for a count outside 1 ... :data:`MOST`, :class:`CatalogError` where too few titles can be made
    from ``base``.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"count must be between 1 and {MOST}, given {count}")
    real = list(base) if base is not None else load_records()
    draw = random.Random(seed)
    titles = [record.title.split() for record in real]
    names = sorted({name for record in real for name in record.author_names})
    seen: set[str] = set()
    keys: set[str] = set()
    for number in range(count):
        title = _title(draw, titles, seen)
        like = draw.choice(real)
        authors = draw.sample(names, min(len(names), draw.randint(1, 6))) if draw.random() < 0.8 else None
        year, month, serial = _place(number)
        arxiv = f"{year:02d}{month:02d}.{serial:05d}"
        citekey = _citekey(arxiv, title, authors, 2000 + year, keys)
        values = {
            "key": arxiv,
            "ids": Ids(arxiv=arxiv, doi=None, openreview=None, acl=None, dblp=None, s2=None),
            "title": title,
            "other_titles": [],
            "authors": [Author(name=name, orcid=None) for name in authors] if authors else None,
            "published": PartialDate(value=f"{2000 + year}-{month:02d}", precision="month"),
            "status": "active",
            "superseded_by": None,
            "links": [_link("abs", f"https://arxiv.org/abs/{arxiv}", True)]
            + [_link("code", f"https://example.org/code/{number}", None)] * (draw.random() < 0.3),
            "runnable": [],
            "citekey": citekey,
            "citekey_aliases": [],
            "sources": [Source(source="synthetic", ref=str(number), section=None)],
            "provenance": {},
        }
        yield like.model_copy(update=values)


def write_synthetic(folder: Path, count: int, seed: int = 0) -> None:
    """Write synthetic records as the catalog keeps them: ``folder/<yymm>/<key>.json``.

    The folder must not be there; it is written under another name and renamed when it is whole.
    """
    if folder.exists():
        raise CatalogError(f"{folder} is there already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for record in synthetic_records(count, seed):
            place = new / record.key[:4]
            place.mkdir(exist_ok=True)
            (place / f"{record.key}.json").write_bytes(dump_fast(record))
        os.replace(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _place(number: int) -> tuple[int, int, int]:
    """Year, month and serial number of a paper, spread evenly over the months."""
    months = (_LAST_YEAR - _FIRST_YEAR + 1) * 12
    month, serial = number % months, number // months
    if serial >= _PER_MONTH:
        raise ValueError(f"no arXiv number is left for paper {number}")
    return _FIRST_YEAR + month // 12, month % 12 + 1, serial + 1


def _title(draw: random.Random, titles: list[list[str]], seen: set[str]) -> str:
    for _ in range(200):
        first, second = draw.choice(titles), draw.choice(titles)
        words = [*first[: (len(first) + 1) // 2], *second[len(second) // 2 :]]
        for _ in range(draw.randint(1, 3)):  # a word from elsewhere, so that there are enough different titles
            other = draw.choice(titles)
            words.insert(draw.randrange(len(words) + 1), draw.choice(other))
        title = " ".join(words)
        forms = {normal_title(title), normal_title(without_name(title))}
        if seen.isdisjoint(forms) and "" not in forms:
            seen |= forms
            return title
    raise CatalogError("too few titles to make synthetic records from")


def _citekey(arxiv: str, title: str, authors: list[str] | None, year: int, taken: set[str]) -> str:
    base = base_citekey(arxiv, title, authors, year)
    try:
        key = unique_citekey(base, taken)
    except ValueError:  # more than 26 of one kind, which real records do not reach
        key = f"{base}x{arxiv.replace('.', '')}"
    taken.add(key.lower())
    return key


def _link(kind: str, url: str, official: bool | None) -> Link:
    return Link.model_validate({"kind": kind, "url": url, "official": official, "source": "synthetic", "checked": None})
