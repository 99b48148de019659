"""The named queries: categories times phrases, in a versioned file (``queries.json`` beside this module)."""

import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError, model_validator

from latentcot.catalog.queue_store import Moment
from latentcot.catalog.record import Day, _Strict
from latentcot.catalog.store import CatalogError, explain
from latentcot.catalog.update.atom import ARCHIVES

DEFAULT = Path(__file__).resolve().parent / "queries.json"
Phrase = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 .+-]{1,60}$")]
Category = Annotated[str, StringConstraints(pattern=r"^[a-z-]+(?:\.[A-Za-z-]+)?$")]


class Query(_Strict):
    """Papers of any of ``categories`` (cross-lists count) whose title or abstract holds any of ``phrases``."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(?:-[a-z0-9]+)*$")]
    categories: Annotated[list[Category], Field(min_length=1)]
    phrases: Annotated[list[Phrase], Field(min_length=1)]

    @property
    def text(self) -> str:
        """The query in arXiv's syntax, without the window."""
        categories = " OR ".join(f"cat:{category}" for category in self.categories)
        phrases = " OR ".join(f'ti:"{phrase}" OR abs:"{phrase}"' for phrase in self.phrases)
        return f"({categories}) AND ({phrases})"

    @property
    def digest(self) -> str:
        """Changes when the query does: a new phrase has older papers too."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


class QueryFile(_Strict):
    """All queries and how they are read.

    ``control`` is a busy query that tells "nothing new" from "a bad hour". A query without watermark begins at ``first_day``.
    ``overlap_days``: moderation takes days to weeks, so that much is read again. ``page_size`` entries are asked for at a time (arXiv
    allows 2000), and a window with more than ``largest_window`` results is cut in two. Papers below ``queue_threshold`` are left out;
    from ``prefill_threshold`` on (``null``: never) the review offers the first leaf as the answer.
    """

    version: Annotated[int, Field(ge=1)]
    control: str
    first_day: Day
    overlap_days: Annotated[int, Field(ge=14, le=400)]
    slice_days: Annotated[int, Field(ge=15, le=400)]
    page_size: Annotated[int, Field(ge=1, le=2000)]
    largest_window: Annotated[int, Field(ge=1, le=30000)]
    queue_threshold: Annotated[float, Field(ge=0, le=1)]
    prefill_threshold: Annotated[float, Field(ge=0, le=1)] | None
    queries: Annotated[list[Query], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> "QueryFile":
        names = [query.name for query in self.queries]
        if len(set(names)) < len(names):
            raise ValueError(
                f"two queries have one name: {sorted(name for name in set(names) if names.count(name) > 1)}"
            )
        for query in self.queries:
            if unknown := [c for c in query.categories if c.partition(".")[0] not in ARCHIVES]:
                raise ValueError(f"query {query.name!r}: arXiv has no category {unknown[0]!r}")
        if self.slice_days <= self.overlap_days:
            raise ValueError(
                f"slice_days ({self.slice_days}) must be longer than overlap_days ({self.overlap_days}), or reading never advances"
            )
        datetime.fromisoformat(self.first_day)
        return self

    def chosen(self, only: list[str] | None) -> list[Query]:
        """The queries named in ``only``, in the order of the file; all where it is ``None``."""
        names = [query.name for query in self.queries]
        for name in only or []:
            if name not in names:
                raise CatalogError(f"no query is called {name[:60]!r}; there are {', '.join(names)}")
        return [query for query in self.queries if only is None or query.name in only]

    @property
    def start(self) -> datetime:
        return datetime.fromisoformat(self.first_day).replace(tzinfo=UTC)

    @property
    def phrases(self) -> list[str]:
        return list(dict.fromkeys(phrase for query in self.queries for phrase in query.phrases))


def load_queries(path: Path | None = None) -> QueryFile:
    """Read and check the file of queries."""
    path = path or DEFAULT
    try:
        return QueryFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CatalogError(f"the file of queries cannot be read: {error}") from None
    except ValidationError as error:
        raise CatalogError(f"{path.name}: {explain(error)}") from None


class Watermark(_Strict):
    """How far a query has been read: everything submitted until then has been seen once. ``query`` is its digest."""

    query: str
    until: Moment


def read_watermarks(path: Path) -> dict[str, Watermark]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {name: Watermark.model_validate(value) for name, value in data.items()}
    except ValidationError as error:
        raise CatalogError(f"{path.name}: {explain(error)}") from None
    except (ValueError, AttributeError) as error:
        raise CatalogError(f"{path.name}: is no table of watermarks: {error}") from None


def moment(value: datetime) -> str:
    """The one way a time is written: UTC, to the second, with a Z."""
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_moment(text: str) -> datetime:
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", text):
        raise CatalogError(f"{text!r} is no time of the form 2026-01-31T00:00:00Z")
    return datetime.fromisoformat(text)
