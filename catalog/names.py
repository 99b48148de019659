"""Names of people: the split into family and given name, and citation keys.

A name is split only where there is one reading: ``Last, First``; two parts; parts between first and last that are
initials; a family name that begins with a particle (``van``, ``de``, ``von der`` ...). ``María Emilia Granda`` could
have one or two family names, so it stays whole. A single word is a family name or an organisation and stays whole too.
"""

import re
from collections.abc import Container
from dataclasses import dataclass

from latentcot.catalog.text import to_latin

_PARTICLES = """
af al bin da das de del della den der di do dos du el ibn la las le los san st ter ten van vande vander von zu zur
"""
PARTICLES = frozenset(_PARTICLES.split())
SUFFIXES = frozenset({"jr", "jr.", "sr", "sr.", "ii", "iii", "iv"})
CITEKEY = re.compile(r"^[A-Za-z][A-Za-z0-9_:-]*$")
_ARTICLES = frozenset({"a", "an", "the"})
_INITIALS = re.compile(r"^(?:[^\W\d_]\.)(?:-?[^\W\d_]\.)*$")


@dataclass(frozen=True)
class Name:
    """A name and its parts; ``certain`` says whether there was only one way to split it."""

    full: str
    given: str
    family: str
    suffix: str = ""
    certain: bool = True


def split_name(full: str) -> Name:
    """Split ``full``; where the split is not certain, ``family`` is the likeliest guess and serves for keys only."""
    full = " ".join(full.split())
    if not full:
        raise ValueError("full is an empty name, expected at least one word")
    if "," in full:
        family, *rest = [part.strip() for part in full.split(",")]
        suffix = rest.pop(0) if len(rest) == 2 and rest[0].lower() in SUFFIXES else ""
        return Name(full, " ".join(rest), family, suffix, certain=bool(family) and len(rest) == 1)
    parts = full.split()
    suffix = parts.pop() if len(parts) > 2 and parts[-1].lower() in SUFFIXES else ""
    if len(parts) == 1:
        return Name(full, "", full, certain=False)
    start = next((i for i in range(1, len(parts) - 1) if parts[i].lower() in PARTICLES), len(parts) - 1)
    given, family = " ".join(parts[:start]), " ".join(parts[start:])
    inner = parts[1:start]
    certain = all(_INITIALS.match(part) for part in inner)
    return Name(full, given, family, suffix, certain=certain)


def key_stem(surname: str) -> str:
    """The Latin letters of a surname, each hyphenated or separate part capitalised; empty where there are none."""
    parts = re.findall(r"[A-Za-z0-9]+", re.sub(r"['’‘`ʼ]", "", to_latin(surname)))
    stem = "".join(part[0].upper() + part[1:] for part in parts)
    return stem if stem[:1].isalpha() else ""


def base_citekey(key: str, title: str, authors: list[str] | None, year: int | None) -> str:
    """The citation key before collisions: surname, year and first title word, else the paper's own id.

    The first title word skips a leading article. Without authors, or where the first surname has no Latin letter, the
    key is made from the record key: ``arxiv_2402_07754``.
    """
    stem = key_stem(split_name(authors[0]).family) if authors else ""
    if not stem or year is None:
        own = re.sub(r"[^A-Za-z0-9]+", "_", key).strip("_")
        return own if own[:1].isalpha() else f"arxiv_{own}"
    words = [word for word in re.findall(r"[A-Za-z0-9]+", re.sub(r"['’]", "", to_latin(title)))]
    if len(words) > 1 and words[0].lower() in _ARTICLES:
        words = words[1:]
    word = words[0] if words else ""
    return f"{stem}{year}{word[:1].upper()}{word[1:]}"


def unique_citekey(base: str, taken: Container[str]) -> str:
    """``base``, or the first free of ``basea``, ``baseb``, ...; the comparison ignores case, as BibTeX does.

    ``taken`` holds lower-case keys. A key that was given once never changes, so the first paper keeps the bare form.
    """
    if base.lower() not in taken:
        return base
    for letter in "abcdefghijklmnopqrstuvwxyz":
        if f"{base}{letter}".lower() not in taken:
            return f"{base}{letter}"
    raise ValueError(f"all 26 variants of the citation key {base!r} are taken")
