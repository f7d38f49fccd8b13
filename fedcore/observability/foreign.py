"""Text that somebody else may have written, in a form that a log and a terminal can take.

A name, a reason, a header, a label: whatever a peer, a file or a task sends may hold characters
that a terminal acts on, or be as long as one likes. All that is printed or logged passes here.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

MOST_CHARACTERS = 400
"""Of one text of a peer's."""
MOST_LINE_BYTES = 1900
"""Of a line in a log."""
MOST_PARAGRAPH = 1800
"""Characters of an error's text."""
_HEAD, _TAIL = 1100, 600
_LINE_ENDS = re.compile(r"\s*[\r\n]\s*")
_UNPRINTABLE = re.compile(r"[^ -~]")


def foreign(text: object, most: int = MOST_CHARACTERS) -> str:
    r"""``text`` on one line of at most ``most`` characters, and a few that say how many there were.

    Whatever is not printable (control and escape characters, those that turn the direction of
    writing, halves of surrogate pairs) is written as Python writes it in a string. Never raises.

    >>> foreign("two" + chr(10) + "lines" + chr(27) + "[31m" + chr(0x202E))
    'two lines\\x1b[31m\\u202e'
    >>> foreign("x" * 50, 10)
    'xxxxxxxxxx... (50 characters)'
    """
    whole = _text(text)
    # No more is looked at than can be shown.
    shown = escaped(" ".join(whole[: 4 * most].split()))
    if len(shown) <= most and len(whole) <= 4 * most:
        return shown
    return f"{shown[:most]}... ({len(whole)} characters)"


def escaped(text: str) -> str:
    """``text`` with everything that is not printable escaped, line ends too."""
    return _UNPRINTABLE.sub(_escape, text)


def printable(text: str) -> str:
    """Lines of text as they may be shown on a terminal: their ends and tabs stay."""
    return re.sub(r"[^ -~\n\t]", _escape, text)


def _escape(found: re.Match[str]) -> str:
    character = found.group()
    if character.isprintable():
        return character
    code = ord(character)
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )


def bounded_line(text: str, most_bytes: int = MOST_LINE_BYTES) -> str:
    r"""``text`` on one line of at most ``most_bytes`` in UTF-8, escaped."""
    line = escaped(" ".join(text[: 2 * most_bytes].split()))
    raw = line.encode()  # what is escaped holds no surrogates
    if len(raw) <= most_bytes and len(text) <= 2 * most_bytes:
        return line
    more = f"... ({len(text)} characters)"
    return raw[: most_bytes - len(more)].decode(errors="ignore") + more


def paragraph(text: str) -> str:
    r"""``text`` on one line, escaped, of at most `MOST_PARAGRAPH` characters.

    What is longer loses its middle: an error begins with what happened, and ends with what to do.

    >>> paragraph("it says 'a" + chr(27) + "[2J'." + chr(10) + "Nothing was done.")
    "it says 'a\\x1b[2J'. Nothing was done."
    """
    line = escaped(_LINE_ENDS.sub(" ", text))
    if len(line) <= MOST_PARAGRAPH:
        return line
    return f"{line[:_HEAD]}... ({len(text)} characters) ...{line[-_TAIL:]}"


def say(text: object = "", *, to: TextIO | None = None, flush: bool = False) -> None:
    """Prints lines of text for a person or a machine: the only way to a terminal.

    Args:
        text: Its line ends stay; whatever else a terminal would act on is escaped.
        to: Standard output when None.
        flush: Whether a reader gets it at once.
    """
    print(printable(_text(text)), file=sys.stdout if to is None else to, flush=flush)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return str(value)
    except Exception:  # what somebody's object makes of itself
        return f"a {type(value).__name__}"
