"""Method settings as plain JSON values: unknown keys and unknown names raise, with the close ones named.

A setting that stands for a value object is written as its first field alone (``"kl"``) or as a dict of its fields
(``{"kind": "kl", "threshold": 1e-3}``).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Any, TypeVar

Value = TypeVar("Value")


def check_choice(argument: str, given: Any, known: Iterable[str]) -> None:
    """Raise ``ValueError`` naming close names unless ``given`` is one of ``known``."""
    known = tuple(known)
    if given not in known:
        close = get_close_matches(str(given), known, 2)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"{argument}: {given!r} given, expected one of {', '.join(map(repr, known))}{hint}")


def check_keys(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ``ValueError`` for the first key that is not known."""
    for key in given:
        check_choice(f"{owner}: key", key, known)


def check_count(argument: str, given: Any, least: int = 0) -> int:
    """``given`` as an int that is at least ``least``; ``ValueError`` otherwise (True and 2.0 are no counts)."""
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise ValueError(f"{argument}: {given!r} given, expected an integer of at least {least}")
    return given


def check_flag(argument: str, given: Any) -> bool:
    """``given`` when it is True or False; ``ValueError`` otherwise."""
    if not isinstance(given, bool):
        raise ValueError(f"{argument}: {given!r} given, expected True or False")
    return given


def merge(owner: str, defaults: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """``defaults`` overridden by ``given``; a key without a default raises."""
    given = dict(given or {})
    check_keys(owner, given, defaults)
    return {**defaults, **given}


def read_value(argument: str, kind: type[Value], given: Any) -> Value:
    """An instance of the frozen dataclass ``kind`` out of a setting: an instance, its first field alone, or a dict of
    its fields."""
    if isinstance(given, kind):
        return given
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(given, Mapping):
        given = {names[0]: given}
    check_keys(argument, given, names)
    return kind(**given)


def write_value(value: Any) -> dict[str, Any]:
    """The dict that :func:`read_value` turns back into ``value``."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(value).items()}
