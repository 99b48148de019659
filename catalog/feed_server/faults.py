"""How the server misbehaves: one value a kind of trouble, played at chosen requests."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "status", "hang", "drip", "close", "empty", "short", "total", "error", "damaged", "cut", "redirect", "body"
]
KINDS: dict[str, str] = {
    "status": "answer `status`, with Retry-After where `retry_after` is given",
    "hang": "send nothing for `seconds`",
    "drip": "send the answer a byte at a time, `seconds` apart",
    "close": "close the connection without an answer",
    "empty": "200 and a feed without entries, the right total in it",
    "short": "only `count` entries, though more were asked for",
    "total": "claim a total that is wrong by `count`",
    "error": "an error entry, with `status` (200 or 400)",
    "damaged": "a feed that ends in the middle",
    "cut": "promise the whole length, send half of it",
    "redirect": "301 to another address",
    "body": "send `body` as it is",
}


@dataclass(frozen=True)
class Fault:
    """Trouble of one ``kind``.

    It is played at the requests whose running numbers (from 0) are in ``at``, or at any; of these only where the parameters ``start``
    and ``max_results`` are ``start`` and ``size``, where given; and ``times`` times, or for ever with ``None``.
    """

    kind: Kind
    at: tuple[int, ...] | None = None
    start: int | None = None
    size: int | None = None
    times: int | None = 1
    status: int = 503
    retry_after: str | None = None
    count: int = 1
    seconds: float = 5.0
    body: bytes = b""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind expects one of {', '.join(KINDS)}, given {self.kind!r}")

    def meets(self, number: int, start: int, size: int) -> bool:
        """Whether the fault is for this request."""
        return (
            (self.at is None or number in self.at)
            and (self.start is None or self.start == start)
            and (self.size is None or self.size == size)
        )


def parse_fault(text: str) -> Fault:
    """A fault from the command line: ``kind`` and ``name=value`` parts joined by commas, such as ``status,status=429,at=2``."""
    kind, *parts = text.split(",")
    values: dict[str, object] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or name not in ("at", "start", "size", "times", "status", "retry_after", "count", "seconds"):
            raise ValueError(f"a fault expects parts such as at=3, status=429 or times=2, given {part!r}")
        if name == "at":
            values["at"] = tuple(int(number) for number in value.split("+"))
        elif name == "retry_after":
            values[name] = value
        elif name == "seconds":
            values[name] = float(value)
        else:
            values[name] = None if (name, value) == ("times", "always") else int(value)
    return Fault(kind, **values)  # type: ignore[arg-type]
