"""Text of titles and names: normal forms for comparing, Latin letters for keys, slugs."""

import re
import unicodedata

# Letters that have no decomposition: NFKD followed by "drop what is not ASCII" would lose them.
_LATIN = str.maketrans(
    {
        "ß": "ss", "ẞ": "Ss", "Ø": "O", "ø": "o", "Ł": "L", "ł": "l", "Đ": "D", "đ": "d", "Ð": "D", "ð": "d",
        "Þ": "Th", "þ": "th", "Æ": "Ae", "æ": "ae", "Œ": "Oe", "œ": "oe", "ı": "i", "ȷ": "j", "Ħ": "H", "ħ": "h",
        "Ŋ": "N", "ŋ": "n", "Ŧ": "T", "ŧ": "t", "Ɓ": "B", "ɓ": "b", "Ɗ": "D", "ɗ": "d", "Ə": "A", "ə": "a",
        "Ƙ": "K", "ƙ": "k", "Ɛ": "E", "ɛ": "e", "Ɔ": "O", "ɔ": "o", "ĸ": "k", "ſ": "s", "Ɖ": "D", "ɖ": "d",
    }
)  # fmt: skip

_LIGATURES = re.compile("[ﬀ-ﬆ]")
_TEX_COMMAND = re.compile(r"\\(?:[A-Za-z]+\*?|.)")
_PREFIX = re.compile(r"^\s*(?P<name>[^\s:]+(?:\s[^\s:]+){0,2}):\s+(?P<rest>.+)$")


def collapse(text: str) -> str:
    """White space collapsed, ligatures written out ("diﬀusion"), plain hyphens; TeX and everything else kept."""
    text = text.replace("\u2010", "-").replace("\u2011", "-")
    text = _LIGATURES.sub(lambda match: unicodedata.normalize("NFKC", match.group()), text)
    return " ".join(text.split())


def to_latin(text: str) -> str:
    """Latin letters of ``text`` without marks; letters of other scripts stay as they are."""
    if text.isascii():
        return text
    decomposed = unicodedata.normalize("NFKD", text.translate(_LATIN))
    return "".join(char for char in decomposed if not unicodedata.combining(char)).translate(_LATIN)


def normal_title(title: str) -> str:
    """The form in which two titles are the same: NFKD, no case, no punctuation, no TeX, single blanks."""
    text = _TEX_COMMAND.sub(" ", title)
    text = to_latin(text).casefold()
    return " ".join(re.findall(r"[^\W_]+", text))


def bare_title(title: str) -> str:
    """The normal form of :func:`without_name`."""
    return normal_title(without_name(title))


def without_name(title: str) -> str:
    """``title`` without a leading ``Name:`` of at most three words, if three or more words remain."""
    match = _PREFIX.match(title)
    if match and len(normal_title(match["rest"]).split()) >= 3:
        return match["rest"]
    return title


def title_tokens(title: str) -> frozenset[str]:
    return frozenset(normal_title(title).split())


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """|A and B| / |A or B|, 0 for two empty sets."""
    union = len(left | right)
    return len(left & right) / union if union else 0.0


def slug(title: str, *, words: int = 8) -> str:
    """The first words of a title as a file name part: Latin letters, digits and hyphens."""
    parts = re.findall(r"[a-z0-9]+", to_latin(title).lower())
    return "-".join(parts[:words])


def looks_like_slug(title: str) -> bool:
    """Whether a "title" is a file name or address fragment: several words joined by hyphens, no blank at all."""
    return " " not in title.strip() and title.count("-") >= 3
