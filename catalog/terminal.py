"""Single keys and lines from a terminal; whole lines from a pipe, so that a session can be scripted."""

import os
import select
import sys
from types import TracebackType
from typing import Any

_ARROWS = {"[A": "up", "[B": "down", "[C": "right", "[D": "left"}
_WINDOWS_ARROWS = {"H": "up", "P": "down", "M": "right", "K": "left"}


class Keyboard:
    """``with Keyboard() as keyboard``: single keys without Enter and without an echo until the end of the block.

    The terminal is left as it was found, whatever happens inside. What was typed ahead is not lost.
    """

    def __init__(self) -> None:
        self._terminal = sys.stdin.isatty()
        self._before: list[Any] | None = None

    def __enter__(self) -> "Keyboard":
        self._single()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _single(self) -> None:
        if self._terminal and os.name != "nt":
            import termios
            import tty

            self._before = termios.tcgetattr(sys.stdin.fileno())
            tty.setcbreak(sys.stdin.fileno(), termios.TCSADRAIN)  # the default would throw away what was typed ahead

    def _restore(self) -> None:
        if self._before is not None:
            import termios

            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._before)
            self._before = None

    def key(self) -> str:
        """The next key: a character, ``enter``, ``left`` and the other arrows, ``escape``; ``end`` where there is no more input."""
        if not self._terminal:
            line = sys.stdin.readline()
            if not line:
                return "end"
            return line.strip()[:1] or "enter"
        if os.name == "nt":
            return self._windows_key()
        handle = sys.stdin.fileno()
        data = os.read(handle, 1)
        # The rest of a letter of several bytes, or of an arrow, is there already.
        while (
            data and (data[0] == 0x1B or data[0] > 0x7F) and len(data) < 4 and select.select([handle], [], [], 0.02)[0]
        ):
            data += os.read(handle, 1)
            if data[0] == 0x1B and data[-1:].isalpha() and len(data) == 3:
                break
        return _named(data.decode("utf-8", errors="ignore"))

    def _windows_key(self) -> str:
        import msvcrt

        text = msvcrt.getwch()  # type: ignore[attr-defined]
        if text in ("\x00", "\xe0"):
            return _WINDOWS_ARROWS.get(msvcrt.getwch(), "")  # type: ignore[attr-defined]
        return _named(text)

    def line(self, prompt: str) -> str:
        """A whole line; empty where there is no more input."""
        self._restore()
        try:
            return input(prompt)
        except EOFError:
            return ""
        finally:
            self._single()


def _named(text: str) -> str:
    if text in ("", "\x04"):
        return "end"
    if text == "\x03":
        raise KeyboardInterrupt
    if text in ("\r", "\n"):
        return "enter"
    if text.startswith("\x1b"):
        return _ARROWS.get(text[1:], "escape")
    return text
