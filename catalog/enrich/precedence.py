"""Who may overwrite whom: a person, then arXiv's metadata, then publishers, then lists, then trackers."""

import re

from latentcot.catalog.record import Provenance

PERSON, ARXIV, PUBLISHER, TRACKER = "person", "arXiv API", "publisher", "Hugging Face papers"
_CONFIDENCE = {"low": 0, "medium": 1, "high": 2}


def strength(source: str) -> int:
    """Rank of a source; a name that is no other kind is one of the imported lists."""
    if source == PERSON or source.startswith("person:"):
        return 4
    if source == ARXIV:
        return 3
    if source == PUBLISHER or re.match(r"(?:doi|https?)[:.]", source):
        return 2
    return 0 if source == TRACKER else 1


def may_replace(old: Provenance | None, new: Provenance, *, known: bool) -> bool:
    """Whether a value of ``new`` may take the place of one of ``old``; ``known``: there is an old value at all.

    A person's value, ``null`` included, is replaced by nothing but another person's. A value that is not known is filled in by
    anybody. Equal sources replace their own values (arXiv's newer version), others need to be stronger, or as strong and surer.
    """
    if old is not None and strength(old.source) == 4:
        return strength(new.source) == 4
    if not known:
        return True
    if old is None:  # a value without provenance was written by hand
        return strength(new.source) == 4
    if old.source == new.source:
        return _CONFIDENCE[new.confidence] >= _CONFIDENCE[old.confidence] or new.date > old.date
    one, other = strength(new.source), strength(old.source)
    return one > other or (one == other and _CONFIDENCE[new.confidence] > _CONFIDENCE[old.confidence])
