"""Single keys from a terminal, whole lines from a pipe."""

import os
import sys

ARROWS = {"[A": "up", "[B": "down", "[C": "right", "[D": "left"}


def read_key() -> str:
    """The next key: a character, ``enter``, an arrow (``left`` ...), ``escape``, or ``end`` where there is no more input.

    In a pipe the first character of the next line counts, so that a session can be scripted.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            return "end"
        return line.strip()[:1] or "enter"
    if os.name == "nt":
        import msvcrt

        text = msvcrt.getwch()  # type: ignore[attr-defined]
        if text in ("\x00", "\xe0"):
            return {"H": "up", "P": "down", "M": "right", "K": "left"}.get(msvcrt.getwch(), "")  # type: ignore[attr-defined]
        return _named(text)
    return _named(_posix_key())


def _posix_key() -> str:
    import select
    import termios
    import tty

    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    try:
        tty.setcbreak(handle)
        data = os.read(handle, 1)
        # The rest of a letter of several bytes, or of an arrow, is there already.
        while select.select([handle], [], [], 0.01)[0] and len(data) < 8 and (data[0] == 0x1B or data[0] > 0x7F):
            data += os.read(handle, 1)
        return data.decode("utf-8", errors="ignore")
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)


def _named(text: str) -> str:
    if text in ("", "\x04"):
        return "end"
    if text == "\x03":
        raise KeyboardInterrupt
    if text in ("\r", "\n"):
        return "enter"
    if text.startswith("\x1b"):
        return ARROWS.get(text[1:], "escape")
    return text
