"""Accepting, rejecting and undoing, without any terminal: what the interface and the flags call.

Every action is one write that counts (the decision file, or its removal) and steps that follow from it, so that it can be
interrupted anywhere; see :mod:`latentcot.catalog.acceptance`.
"""

import os
import subprocess
from collections.abc import Sequence

from latentcot.catalog.acceptance import build_record, carry_out, writing
from latentcot.catalog.export.plain import one_line
from latentcot.catalog.leaves import load_taxonomy
from latentcot.catalog.queue_store import (
    REASONS,
    Candidate,
    Decision,
    Folders,
    dump,
    read_candidate,
    read_decision,
    read_queue,
    write_candidate,
    write_decision,
)
from latentcot.catalog.record import Record
from latentcot.catalog.store import CatalogError, build_lookup, lookup, write_atomic


def curator(given: str | None = None) -> str:
    """Who decides: ``--by``, else ``LATENTCOT_CURATOR``, else git's ``user.name``."""
    name = given or os.environ.get("LATENTCOT_CURATOR")
    if not name:
        try:
            done = subprocess.run(
                ["git", "config", "user.name"], capture_output=True, text=True, timeout=10, check=False
            )
            name = done.stdout
        except OSError:
            name = ""
    name = " ".join(name.split())
    if not name or len(name) > 100:
        raise CatalogError("who decides? give --by NAME, or set LATENTCOT_CURATOR or git's user.name")
    return name


def find_candidate(folders: Folders, text: str) -> Candidate:
    """The candidate with this key or arXiv id (any version, any address)."""
    from latentcot.catalog.identifiers import Identifier, IdentifierError, parse_arxiv, record_key

    try:
        key = record_key(Identifier("arxiv", parse_arxiv(text.replace("_", "/")).base))
    except IdentifierError:
        key = ""
    found = read_candidate(folders, key) if key else None
    if found is None:
        shown = text if len(text) <= 60 else text[:57] + "..."
        if key and (decision := read_decision(folders, key)):
            raise CatalogError(f"{shown!r} was {decision.verdict} on {decision.date} by {decision.by}; undo that first")
        raise CatalogError(f"no candidate is called {shown!r}; `latentcot papers review list` shows the queue")
    return found


def ordered_queue(folders: Folders) -> list[Candidate]:
    """All candidates, likeliest first, then by key."""
    return sorted(read_queue(folders).values(), key=lambda item: (-item.score.probability, item.key))


def accept(
    folders: Folders,
    candidate: Candidate,
    *,
    leaf: str,
    also: Sequence[str] = (),
    by: str,
    date: str,
    note: str | None = None,
    into: str | None = None,
) -> Decision:
    """Make a record of ``candidate``, or merge it into the record ``into``. Returns the decision."""
    for slug in (leaf, *also):
        check_leaf(slug)
    also = [slug for slug in dict.fromkeys(also) if slug != leaf]
    with writing(folders):
        earlier = _earlier(folders, candidate)
        record = candidate.key
        if into is not None:
            record = _record_called(folders, into).key
        elif folders.record_file(candidate.key) is not None:
            raise CatalogError(
                f"{candidate.key} is a record already; reject the candidate as duplicate, or accept it --into {candidate.key}"
            )
        decision = _decision(
            candidate,
            "accepted",
            by,
            date,
            note,
            earlier,
            leaf=leaf,
            also=list(also),
            record=record,
            reason=None,
            duplicate_of=None,
        )
        if into is None:  # whatever makes the record invalid shows before anything is written
            build_record(decision, set())
        _keep_abstract(folders, candidate)
        write_decision(folders, decision)
        carry_out(folders, decision)
    return decision


def reject(
    folders: Folders,
    candidate: Candidate,
    *,
    reason: str,
    by: str,
    date: str,
    note: str | None = None,
    duplicate_of: str | None = None,
) -> Decision:
    """Decide that ``candidate`` does not belong here. It is not proposed again unless its title or primary category changes."""
    if reason not in REASONS:
        raise CatalogError(f"--reason expects one of {', '.join(REASONS)}, given {reason!r}")
    if reason == "other" and not (note or "").strip():
        raise CatalogError("the reason 'other' says nothing by itself: say why in a note (--note)")
    with writing(folders):
        if duplicate_of is not None:
            if reason != "duplicate":
                raise CatalogError(
                    f"--of names the record that the paper repeats, so the reason is duplicate, given {reason!r}"
                )
            duplicate_of = _record_called(folders, duplicate_of).key
        decision = _decision(
            candidate, "rejected", by, date, note, _earlier(folders, candidate),
            leaf=None, also=[], record=None, reason=reason, duplicate_of=duplicate_of,
        )  # fmt: skip
        _keep_abstract(folders, candidate)
        write_decision(folders, decision)
        carry_out(folders, decision)
    return decision


def undo(folders: Folders, key: str) -> Decision:
    """Take a decision back: the paper stands in the queue again. A record that somebody has changed since is not removed."""
    with writing(folders):
        decision = read_decision(folders, key)
        if decision is None:
            raise CatalogError(f"{key!r} has no decision to undo")
        place = folders.record_file(decision.record) if decision.record else None
        if decision.record and decision.record != decision.key:
            raise CatalogError(
                f"{key} was merged into {decision.record}; take that back by hand (the record's history shows what came)"
            )
        if place is not None:
            others = {
                name.lower() for r in folders.records() if r.key != key for name in (r.citekey, *r.citekey_aliases)
            }
            if place.read_bytes() != _dump(build_record(decision, others)):
                raise CatalogError(
                    f"the record {key} has changed since it was accepted; remove it by hand if that is meant"
                )
        kept = folders.cache / "abstracts" / f"{key}.json"
        candidate = decision.candidate
        if kept.is_file():
            try:
                full = Candidate.model_validate_json(kept.read_bytes())
            except ValueError:  # the cache may be lost or damaged at any time; the next update brings the abstract back
                full = candidate
            candidate = full if full.model_copy(update={"abstract": None}) == candidate else candidate
        write_candidate(folders, candidate)
        if place is not None:
            place.unlink()
            if not any(place.parent.iterdir()):
                place.parent.rmdir()
        # The last step is the one that counts: until here the decision stands, and would be carried out again.
        folders.decision_file(key).unlink()
    return decision


def check_leaf(slug: str) -> str:
    """``slug`` if it is a leaf; the error names the leaves that are close."""
    tree = load_taxonomy()
    if slug in tree.leaves:
        return slug
    retired = next((item.replaced_by for item in tree.retired if item.slug == slug), None)
    from difflib import get_close_matches

    near = [retired] if retired else get_close_matches(slug, list(tree.leaves), n=3, cutoff=0.5)
    hint = f"; close: {', '.join(near)}" if near else f"; one of {', '.join(tree.leaves)}"
    raise CatalogError(f"no leaf has the slug {slug[:60]!r}{hint}")


def _dump(record: Record) -> bytes:
    from latentcot.catalog.record import dump_record

    return dump_record(record).encode("utf-8")


def _decision(
    paper: Candidate, verdict: str, by: str, date: str, note: str | None, earlier: list[str], **rest: object
) -> Decision:
    from pydantic import ValidationError

    from latentcot.catalog.store import explain

    bare = paper.model_copy(update={"abstract": None})
    try:
        return Decision.model_validate(
            {
                "key": paper.key,
                "verdict": verdict,
                "note": one_line(note) or None if note else None,
                "by": by,
                "date": date,
                "candidate": bare,
                "earlier": earlier,
                **rest,
            }
        )
    except ValidationError as error:
        raise CatalogError(explain(error)) from None


def _earlier(folders: Folders, candidate: Candidate) -> list[str]:
    old = read_decision(folders, candidate.key)
    return [*old.earlier, f"{old.date} {old.verdict}: {old.reason or old.leaf} ({old.by})"] if old else []


def _keep_abstract(folders: Folders, candidate: Candidate) -> None:
    """For :func:`undo`: decisions hold no abstract, so the whole candidate waits in the cache."""
    write_atomic(folders.cache / "abstracts" / f"{candidate.key}.json", dump(candidate))


def _record_called(folders: Folders, text: str) -> Record:
    record = lookup(build_lookup(folders.records()), text)
    if record is None:
        raise CatalogError(f"no paper is called {text[:60]!r} (key, arXiv id, DOI or citation key)")
    return record
