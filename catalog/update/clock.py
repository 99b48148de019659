"""Time as a value, so that tests decide what time it is and nobody waits."""

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """What the updater asks of time."""

    def now(self) -> datetime:
        """The time of day, UTC, with its zone."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that is never set back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class SystemClock:
    """The clock of the machine."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
