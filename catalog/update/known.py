"""What the catalog knows already: records, compared by the rules of :mod:`latentcot.catalog.dedupe`."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from latentcot.catalog import dedupe
from latentcot.catalog.record import Record
from latentcot.catalog.text import title_tokens
from latentcot.catalog.update.atom import Entry


@dataclass(frozen=True)
class Match:
    """A record that may be the paper: ``same`` for certain, ``review`` for a person to decide."""

    key: str
    outcome: str
    rule: str


class Known:
    """An index over records. Titles meet through their rarest words, so a look-up does not read the whole catalog."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = {record.key: record for record in records}
        self._arxiv = {record.ids.arxiv: record.key for record in self._records.values() if record.ids.arxiv}
        self._doi = {record.ids.doi.lower(): record.key for record in self._records.values() if record.ids.doi}
        self._holders: dict[str, set[str]] = defaultdict(set)
        for record in self._records.values():
            for title in (record.title, *record.other_titles):
                for word in title_tokens(title):
                    self._holders[word].add(record.key)

    def match(self, entry: Entry) -> list[Match]:
        """Records that are or may be ``entry``: one that is the same, else all to be reviewed, by key."""
        if key := self._arxiv.get(entry.base):
            return [Match(key, "same", "arxiv id")]
        if entry.doi and (key := self._doi.get(entry.doi.lower())):
            return [Match(key, "same", "doi")]
        own = evidence(entry)
        words = sorted(title_tokens(entry.title), key=lambda word: (len(self._holders.get(word, ())), word))
        # A near title shares most words, a contained one all of the shorter title's; see dedupe.near_pairs.
        rare = [word for word in words if word in self._holders][:6]
        found = []
        for key in sorted({key for word in rare for key in self._holders[word]}):
            record = self._records[key]
            for title in (record.title, *record.other_titles):
                verdict = dedupe.compare(own, record_evidence(record, title))
                if verdict.outcome == "same":
                    return [Match(key, "same", verdict.rule)]
                if verdict.outcome == "review":
                    found.append(Match(key, "review", verdict.rule))
                    break
        return found


def evidence(entry: Entry) -> dedupe.Evidence:
    return dedupe.Evidence(
        title=entry.title,
        arxiv=entry.base,
        doi=entry.doi.lower() if entry.doi else None,
        first_author=entry.authors[0] if entry.authors else None,
        year=entry.published.year,
    )


def record_evidence(record: Record, title: str) -> dedupe.Evidence:
    return dedupe.Evidence(
        title=title,
        arxiv=record.ids.arxiv,
        doi=record.ids.doi.lower() if record.ids.doi else None,
        first_author=record.author_names[0] if record.author_names else None,
        year=record.year,
        venues=frozenset([record.venue.name]) if record.venue else frozenset(),
        lists=frozenset(source.source for source in record.sources),
    )
