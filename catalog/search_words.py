"""Words of the search: how text becomes words, which words mean the same, and names that titles do not have.

Text is folded to Latin letters without marks and lower case, and cut at everything that is no letter or digit. A word
with hyphens counts in its parts and as a whole ("multi-hop": multi, hop, multihop). What means the same (``same``) or
something near (``near``, one way) is a reviewed table, ``taxonomy/search_terms.json``; names under which a paper is
known although its title lacks them (Coconut, Huginn) are in ``taxonomy/method_names.json``.
"""

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TypeAlias

from latentcot.catalog.store import CATALOG, CatalogError
from latentcot.catalog.text import to_latin

MAX_WORDS, MAX_WORD = 32, 100
_WORD = re.compile(r"[^\W_]+")
_HYPHENATED = re.compile(r"[^\W_]+(?:[-‐‑–][^\W_]+)+")
_HUMPS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_BRITISH = re.compile(r"(?<=[a-z]{3})isation(?=s?$)")


@lru_cache(maxsize=65_536)
def fold(word: str) -> str:
    """One word as it is compared: Latin letters, no marks, lower case, -ization for -isation."""
    folded = to_latin(word).casefold()
    return _BRITISH.sub("ization", folded) if "isation" in folded else folded


def words_of(text: str) -> list[str]:
    """The words of a text in order, without the joined forms."""
    return _WORD.findall(fold_text(text))


def fold_text(text: str) -> str:
    return to_latin(_CONTROL.sub(" ", text)).casefold()


def index_words(text: str) -> set[str]:
    """The words under which a text is found: its words and the joined forms of hyphenated ones."""
    folded = fold_text(text)
    found = {fold(word) for word in _WORD.findall(folded)}
    for match in _HYPHENATED.findall(folded) if len(found) > 1 else ():
        found.add("".join(_WORD.findall(match)))
    return found


def hump_words(text: str) -> set[str]:
    """The parts of words with capitals inside ("UniVLA": uni, vla; "d2Cache": cache), each of three letters or more."""
    parts: set[str] = set()
    for word in _WORD.findall(to_latin(text)):
        if not word.isascii() or word.islower() or word.istitle() or word.isupper():
            continue
        parts.update(part.lower() for part in _HUMPS.findall(word) if len(part) >= 3 and part.isalpha())
    return parts


def clean_query(text: str) -> str:
    """A query without control characters, white space collapsed."""
    return " ".join(_CONTROL.sub(" ", text).split())


def query_words(text: str) -> list[str]:
    """The distinct words of a query, none absurdly long and not too many."""
    folded = [fold(word[:MAX_WORD]) for word in words_of(text[: MAX_WORDS * MAX_WORD])]
    return list(dict.fromkeys(folded))[:MAX_WORDS]


# Start and end in the words of a query, and what else to look for: words and factor.
Phrase: TypeAlias = tuple[int, int, tuple[tuple[tuple[str, ...], float], ...]]


@dataclass(frozen=True)
class Terms:
    """The reviewed table.

    ``ignored`` words say nothing in a query, ``dull`` ones nothing about a paper; ``others`` gives for a phrase (tuple of
    words) what else to look for, with a factor.
    """

    ignored: frozenset[str]
    dull: frozenset[str]
    others: Mapping[tuple[str, ...], tuple[tuple[tuple[str, ...], float], ...]]
    longest: int

    def phrases(self, words: list[str]) -> Iterator[Phrase]:
        """(start, end, others) of every phrase of the table in ``words``."""
        for start in range(len(words)):
            for end in range(start + 1, min(start + self.longest, len(words)) + 1):
                if found := self.others.get(tuple(words[start:end])):
                    yield start, end, found


SAME_FACTOR, NEAR_FACTOR = 0.95, 0.45


def make_terms(table: Mapping[str, object]) -> Terms:
    """Terms from the contents of the table; raises :class:`CatalogError` where it is not of the expected form."""
    try:
        ignored = frozenset(str(word) for word in table["ignored"])  # type: ignore[attr-defined]
        dull = frozenset(str(word) for word in table["dull"])  # type: ignore[attr-defined]
        others: dict[tuple[str, ...], dict[tuple[str, ...], float]] = {}
        for group in table["same"]:  # type: ignore[attr-defined]
            forms = [tuple(words_of(text)) for text in group]
            for form in forms:
                entry = others.setdefault(form, {})
                entry.update({other: SAME_FACTOR for other in forms if other != form})
        for text, near in table["near"].items():  # type: ignore[attr-defined]
            entry = others.setdefault(tuple(words_of(text)), {})
            for other in near:
                entry.setdefault(tuple(words_of(other)), NEAR_FACTOR)
    except (KeyError, TypeError, AttributeError) as error:
        raise CatalogError(f"taxonomy/search_terms.json: {type(error).__name__}: {error}") from None
    if any(not form for entry in others.values() for form in entry) or () in others:
        raise CatalogError("taxonomy/search_terms.json: a phrase has no word")
    frozen = {form: tuple(entry.items()) for form, entry in others.items()}
    return Terms(ignored, dull, MappingProxyType(frozen), max(map(len, frozen), default=0))


@cache
def load_terms() -> Terms:
    """The table that ships with this package."""
    return make_terms(_read("search_terms.json"))


@cache
def method_names() -> Mapping[str, str]:
    """Names that papers are known by and that their titles lack: ``{name: key}``."""
    return MappingProxyType(_read("method_names.json"))


def _read(name: str) -> dict:
    path = CATALOG / "taxonomy" / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatalogError(f"taxonomy/{name}: {error}") from None


class Stemmer:
    """Stems of words by the Porter stemmer of SQLite FTS5, asked for many words at once and then kept."""

    def __init__(self) -> None:
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.executescript(
            "CREATE VIRTUAL TABLE words USING fts5(word, content='', tokenize='porter unicode61 remove_diacritics 0');"
            "CREATE VIRTUAL TABLE terms USING fts5vocab(words, 'instance');"
        )
        self._stems: dict[str, str] = {}

    def stem(self, words: Iterable[str]) -> dict[str, str]:
        """The stem of every word; a word that the tokeniser cuts or drops is its own stem."""
        wanted = list(dict.fromkeys(words))
        new = [word for word in wanted if word not in self._stems]
        if new:
            self._database.execute("INSERT INTO words(words) VALUES ('delete-all')")
            self._database.executemany("INSERT INTO words(rowid, word) VALUES (?, ?)", enumerate(new, 1))
            found: dict[int, list[str]] = {}
            for term, number in self._database.execute("SELECT term, doc FROM terms"):
                found.setdefault(number, []).append(term)
            for number, word in enumerate(new, 1):
                terms = found.get(number, [])
                self._stems[word] = terms[0] if len(terms) == 1 else word
        return {word: self._stems[word] for word in wanted}
