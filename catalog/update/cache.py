"""Pages that were read today, the time of the last request, and the lock that keeps two runs apart.

The cache is the progress of a run: every good page is kept under its address as soon as it arrives, so a run that was killed asks
again for nothing. arXiv's results change once a day, about midnight US Eastern, so a page is good for one *arXiv day*, which begins
at 05:00 UTC; older pages are removed.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from latentcot.catalog.store import CatalogError, write_bytes_atomic
from latentcot.catalog.update.clock import Clock

DAY_BEGINS = timedelta(hours=5)


def arxiv_day(now: datetime) -> str:
    """The day whose results the API shows at ``now``."""
    return (now - DAY_BEGINS).strftime("%Y-%m-%d")


class PageCache:
    """Answers by address below ``folder``. ``fresh`` writes them but reads none."""

    def __init__(self, folder: Path, clock: Clock, *, fresh: bool = False) -> None:
        self.folder, self._clock, self._fresh = folder, clock, fresh
        self._kept: set[Path] = set()

    def _path(self, url: str) -> Path:
        return (
            self.folder
            / "pages"
            / arxiv_day(self._clock.now())
            / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.xml"
        )

    def get(self, url: str) -> bytes | None:
        path = self._path(url)
        if self._fresh and path not in self._kept:
            return None
        return path.read_bytes() if path.is_file() else None

    def put(self, url: str, body: bytes) -> None:
        path = self._path(url)
        write_bytes_atomic(path, body, sync=False)
        self._kept.add(path)

    def drop(self, url: str) -> None:
        """Forget a page that turned out to be damaged."""
        self._path(url).unlink(missing_ok=True)

    def remove_old(self) -> None:
        """Remove the pages of other days."""
        today = arxiv_day(self._clock.now())
        for day in sorted((self.folder / "pages").glob("????-??-??")):
            if day.name != today:  # with all that is in it: a cache is nobody's place to keep things
                shutil.rmtree(day) if day.is_dir() and not day.is_symlink() else day.unlink()

    def last_request(self) -> datetime | None:
        """When this machine last asked arXiv anything, by any earlier run too."""
        path = self.folder / "last_request"
        try:
            value = datetime.fromisoformat(path.read_text(encoding="ascii").strip())
        except (OSError, ValueError):
            return None
        return value if value.tzinfo else None

    def note_request(self) -> None:
        text = self._clock.now().astimezone(UTC).isoformat()
        write_bytes_atomic(self.folder / "last_request", text.encode("ascii"), sync=False)


@contextmanager
def one_run(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``; a second run at the same time is refused. The system frees it when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: a byte of the file is locked instead
            import msvcrt

            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            except OSError:
                raise _busy(folder) from None
        except BlockingIOError:
            raise _busy(folder) from None
        yield
    finally:
        os.close(handle)


def _busy(folder: Path) -> CatalogError:
    return CatalogError(
        f"another run is reading the feed now (lock in {folder}): arXiv asks for one connection at a time"
    )
