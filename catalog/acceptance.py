"""From a decision to what follows from it: the record, and the end of the queue file.

:func:`writing` is the one door to a catalog's files: it holds the lock, removes what a killed write left behind, and carries out
decisions that were taken but not carried out.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from latentcot.catalog.classify import facets
from latentcot.catalog.enrich.comments import is_withdrawn, venue_in_comment, venue_in_reference
from latentcot.catalog.enrich.precedence import ARXIV
from latentcot.catalog.leaves import load_table
from latentcot.catalog.names import base_citekey, unique_citekey
from latentcot.catalog.queue_store import Decision, Folders, is_decided, read_candidate, read_decisions
from latentcot.catalog.record import Author, Ids, Link, PartialDate, Provenance, Record, Source, Taxonomy
from latentcot.catalog.store import CatalogError, write_record
from latentcot.catalog.text import normal_title


@contextmanager
def writing(folders: Folders) -> Iterator[None]:
    """Hold the catalog's lock for a change; unfinished changes of a run that was killed are carried out first."""
    folders.cache.mkdir(parents=True, exist_ok=True)
    handle = os.open(folders.cache / "write.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        except ImportError:  # Windows waits for ten seconds and then says that the file is locked
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
        if not folders.settled:
            _sweep(folders)
            settle(folders)
            folders.settled = True
        yield
    except BaseException:
        folders.settled = False
        raise
    finally:
        os.close(handle)


def _sweep(folders: Folders) -> None:
    """Remove temporary names that a killed write left behind; nobody else writes while the lock is held."""
    for folder in (
        folders.root,
        folders.queue,
        folders.decisions,
        *(p for p in folders.papers.glob("*") if p.is_dir()),
    ):
        for left in folder.glob(".*.json.*"):
            left.unlink(missing_ok=True)


def settle(folders: Folders) -> list[str]:
    """Carry out decisions that are not carried out; returns their keys."""
    done = []
    for key, decision in read_decisions(folders).items():
        if is_decided(read_candidate(folders, key), decision) or not _carried_out(folders, decision):
            carry_out(folders, decision)
            done.append(key)
    return done


def _carried_out(folders: Folders, decision: Decision) -> bool:
    return decision.record is None or folders.record_file(decision.record) is not None


def carry_out(folders: Folders, decision: Decision) -> None:
    """What follows from a decision: the record, then the end of the queue file. Repeating it changes nothing."""
    if decision.record is not None:
        records = folders.records()
        if decision.record != decision.key:
            old = next((record for record in records if record.key == decision.record), None)
            if old is None:
                raise CatalogError(
                    f"decisions/{decision.key}.json: there is no record {decision.record!r} to merge into"
                )
            write_record(merged(old, decision), folders.papers)
        elif folders.record_file(decision.record) is None:
            taken = {name.lower() for record in records for name in (record.citekey, *record.citekey_aliases)}
            write_record(build_record(decision, taken), folders.papers)
    folders.queue_file(decision.key).unlink(missing_ok=True)


def build_record(decision: Decision, taken: set[str]) -> Record:
    """The record that an accepted candidate becomes. ``taken``: citation keys in use, in lower case."""
    paper = decision.candidate
    assert decision.leaf is not None
    taxonomy = Taxonomy(primary=decision.leaf, also=decision.also, status="reviewed")
    day = paper.updated[:10]
    links = [Link(kind="abs", url=f"https://arxiv.org/abs/{paper.arxiv}", official=True, source=ARXIV, checked=None)]
    links += [Link(kind="code", url=url, official=None, source=ARXIV, checked=None) for url in paper.code]
    venue = venue_in_reference(paper.journal_ref, ARXIV) or venue_in_comment(paper.comment, ARXIV)
    known = ["ids", "title", "published", "updated", "version", "status", "categories", "primary_category"]
    provenance = {name: Provenance(source=ARXIV, date=day, confidence="high") for name in known}
    if paper.authors:
        provenance["authors"] = provenance["title"]
    if venue:
        provenance["venue"] = Provenance.model_validate({"source": ARXIV, "date": day, "confidence": venue.confidence})
    provenance["taxonomy"] = Provenance(source=f"person:{decision.by}", date=decision.date, confidence="high")
    order = list(Record.model_fields)
    base = base_citekey(paper.key, paper.title, paper.authors or None, int(paper.published[:4]))
    return Record(
        key=paper.key,
        ids=Ids(arxiv=paper.arxiv, doi=paper.doi, openreview=None, acl=None, dblp=None, s2=None),
        title=paper.title,
        other_titles=[],
        authors=[Author(name=name, orcid=None) for name in paper.authors] or None,
        published=PartialDate(value=paper.published[:10], precision="day"),
        updated=PartialDate(value=day, precision="day"),
        version=paper.version,
        status="withdrawn" if is_withdrawn(paper.comment) else "active",
        superseded_by=None,
        categories=paper.categories,
        primary_category=paper.primary_category,
        venue=venue.venue if venue else None,
        links=links,
        taxonomy=taxonomy,
        facets=facets(paper.title, taxonomy, [], (), links, load_table("import_rules.json")),
        runnable=[],
        note=decision.note,
        citekey=unique_citekey(base, taken),
        citekey_aliases=[],
        sources=[
            Source(source=ARXIV, ref=f"{paper.arxiv}v{paper.version}", section=f"queries: {', '.join(paper.queries)}")
        ],
        provenance=dict(sorted(provenance.items(), key=lambda item: order.index(item[0]))),
        added=decision.date,
        decision=f"decisions/{paper.key}.json",
    )


def merged(record: Record, decision: Decision) -> Record:
    """``record`` with what the candidate adds; nothing that is there is lost or replaced."""
    paper = decision.candidate
    ids = record.ids.model_dump()
    ids["arxiv"] = ids["arxiv"] or paper.arxiv
    ids["doi"] = ids["doi"] or paper.doi
    titles = {normal_title(title) for title in (record.title, *record.other_titles)}
    source = Source(source=ARXIV, ref=f"{paper.arxiv}v{paper.version}", section=f"queries: {', '.join(paper.queries)}")
    address = f"https://arxiv.org/abs/{ids['arxiv']}"
    links = list(record.links)
    if address not in {link.url for link in links}:
        links.insert(0, Link(kind="abs", url=address, official=True, source=ARXIV, checked=None))
    return record.model_copy(
        update={
            "ids": Ids(**ids),
            "other_titles": record.other_titles + ([paper.title] if normal_title(paper.title) not in titles else []),
            "links": links,
            "sources": record.sources + ([source] if source not in record.sources else []),
        }
    )
