"""The record of one paper: its model, its canonical text and the JSON Schema made from the model.

The model is the one source of truth. ``schema/record.schema.json`` is generated from it
(the importer writes it) and a test keeps the two equal. Every field is always present; what is not
known is ``null``. Closed vocabularies (leaves, facet values) live in ``taxonomy/`` and are checked by ``check.py``.
"""

import json
import re
from datetime import date
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

SCHEMA_VERSION = 1

# One line without blanks at its ends and without control characters, which terminals obey.
LINE_PATTERN = r"^[^\s\x00-\x1f\x7f](?:[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f])?$"
Text = Annotated[str, StringConstraints(min_length=1, pattern=LINE_PATTERN)]
Note = Annotated[str, StringConstraints(min_length=1, max_length=280, pattern=LINE_PATTERN)]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(?:-[a-z0-9]+)*(?:/[a-z0-9]+(?:-[a-z0-9]+)*)?$")]
Url = Annotated[str, StringConstraints(pattern=r"^https?://[^\s<>\"]+$")]
Day = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")]
KEY_PATTERN = (
    r"^(?:\d{4}\.\d{4,5}|[a-z]+(?:-[a-z]+)?_\d{7}|(?:doi|openreview|acl)-[A-Za-z0-9._-]+|x-[a-z0-9]+(?:-[a-z0-9]+)*)$"
)
Key = Annotated[str, StringConstraints(pattern=KEY_PATTERN)]
Citekey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_:-]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def model_post_init(self, context: Any, /) -> None:
        # Pydantic gives every object a set of the fields that were given, which is half of a record's memory. Here all
        # are given, always, so that one set a class is enough.
        every = _all_fields(type(self))
        if len(self.__pydantic_fields_set__) == len(every):
            object.__setattr__(self, "__pydantic_fields_set__", every)


@cache
def _all_fields(model: type[BaseModel]) -> set[str]:
    return set(model.model_fields)


class Ids(_Strict):
    arxiv: Text | None
    doi: Text | None
    openreview: Text | None
    acl: Text | None
    dblp: Text | None
    s2: Text | None


class Author(_Strict):
    name: Text
    orcid: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{4}-\d{4}-\d{3}[\dX]$")] | None


class PartialDate(_Strict):
    """A date as precise as it is known: ``2024-02-12`` (day), ``2024-02`` (month) or ``2024`` (year)."""

    value: Annotated[str, StringConstraints(pattern=r"^\d{4}(?:-\d{2}(?:-\d{2})?)?$")]
    precision: Literal["day", "month", "year"]

    @model_validator(mode="after")
    def _consistent(self) -> "PartialDate":
        expected = {4: "year", 7: "month", 10: "day"}[len(self.value)]
        if self.precision != expected:
            raise ValueError(f"value {self.value!r} has precision {expected!r}, given {self.precision!r}")
        date.fromisoformat(self.value + "-01-01"[len(self.value) - 4 :] if len(self.value) < 10 else self.value)
        return self

    @property
    def year(self) -> int:
        return int(self.value[:4])


class Venue(_Strict):
    name: Text
    year: Annotated[int, Field(ge=1900, le=2100)] | None
    track: Literal["main", "findings", "workshop", "oral", "spotlight", "outstanding", "tiny-papers", "srw"] | None
    type: Literal["conference", "journal", "workshop"]
    status: Literal["accepted", "published"] | None
    source: Text


class Link(_Strict):
    kind: Literal["abs", "pdf", "code", "project", "weights", "data", "openreview", "video"]
    url: Url
    official: bool | None
    source: Text
    checked: Day | None


class Taxonomy(_Strict):
    primary: Slug
    also: list[Slug]
    status: Literal["listed", "proposed", "reviewed"]


class Facets(_Strict):
    mechanism: list[Slug]
    stage: list[Slug]
    modality: list[Slug]
    domain: list[Slug]
    artifacts: list[Slug]
    depth_region: list[Slug]


class Runnable(_Strict):
    """Where this project implements the paper. Paths are relative to the root of the repository and must exist."""

    module: Text
    notebook: Text | None
    test: Text | None


class Source(_Strict):
    source: Text
    ref: Text
    section: Text | None


class Provenance(_Strict):
    source: Text
    date: Day
    confidence: Literal["low", "medium", "high"]


class Record(_Strict):
    """One paper of the catalog. Field order is the order in the file."""

    key: Key
    ids: Ids
    title: Text
    other_titles: list[Text]
    authors: list[Author] | None
    published: PartialDate | None
    updated: PartialDate | None
    version: Annotated[int, Field(ge=1)] | None
    status: Literal["active", "withdrawn", "superseded"]
    superseded_by: Key | None
    categories: list[Text]
    primary_category: Text | None
    venue: Venue | None
    links: list[Link]
    taxonomy: Taxonomy
    facets: Facets
    runnable: list[Runnable]
    note: Note | None
    citekey: Citekey
    citekey_aliases: list[Citekey]
    sources: list[Source]
    provenance: dict[str, Provenance]
    added: Day
    decision: Text | None

    @model_validator(mode="after")
    def _consistent(self) -> "Record":
        if self.authors is not None and not self.authors:
            raise ValueError("authors is an empty list, expected null while they are not known")
        if (self.status == "superseded") != (self.superseded_by is not None):
            raise ValueError("superseded_by must be given exactly when status is 'superseded'")
        if self.taxonomy.primary in self.taxonomy.also:
            raise ValueError(f"taxonomy.also repeats the primary leaf {self.taxonomy.primary!r}")
        return self

    @property
    def year(self) -> int | None:
        """Year of first publication; of the venue where only that is known."""
        if self.published is not None:
            return self.published.year
        return self.venue.year if self.venue else None

    @property
    def leaves(self) -> list[str]:
        """Primary leaf first, then the others."""
        return [self.taxonomy.primary, *self.taxonomy.also]

    @property
    def author_names(self) -> list[str]:
        """Names in order; empty while the authors are not known."""
        return [author.name for author in self.authors or []]

    @property
    def has_code(self) -> bool:
        """Whether a code link is known that is not marked as somebody else's (``official: false``)."""
        return any(link.kind == "code" and link.official is not False for link in self.links)

    @property
    def url(self) -> str | None:
        """The page to read about the paper: the arXiv abstract, else the first link."""
        if self.ids.arxiv:
            return f"https://arxiv.org/abs/{self.ids.arxiv}"
        return self.links[0].url if self.links else None

    def link(self, kind: str) -> Link | None:
        """The first link of a kind, official ones first."""
        found = [link for link in self.links if link.kind == kind]
        return min(found, key=lambda link: link.official is not True, default=None)


def dump_json(value: Any) -> str:
    """The one way JSON is written here: UTF-8, two spaces, keys in the order given, final newline."""
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def dump_record(record: Record) -> str:
    """The canonical text of a record: what its file must hold byte for byte."""
    return dump_json(record.model_dump(mode="json"))


def dump_fast(record: Record) -> bytes:
    """The canonical text of a record as UTF-8, by pydantic's writer: some thirty times as fast as :func:`dump_record`.

    A test holds the two equal; where a file differs from this one, :func:`dump_record` decides.
    """
    return record.__pydantic_serializer__.to_json(record, indent=2) + b"\n"


def folder_of(record_key: str, record_published: PartialDate | None, venue: Venue | None) -> str:
    """The folder of a new record: ``yymm``.

    An arXiv paper takes the first four digits of its number. Others take the month of publication; where only a year
    is known (of publication, else of the venue) the month is ``00``; where nothing is known the folder is ``0000``.
    """
    if match := re.match(r"^(\d{4})\.\d|^[a-z-]+_(\d{4})\d{3}$", record_key):
        return match[1] or match[2]
    if record_published is not None:
        value = record_published.value
        return value[2:4] + (value[5:7] or "00")
    if venue is not None and venue.year is not None:
        return f"{venue.year % 100:02d}00"
    return "0000"


def record_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a record, from the model."""
    schema = Record.model_json_schema(mode="serialization")
    schema.pop("description", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:latentcot:catalog:record:{SCHEMA_VERSION}",
        **schema,
    }
