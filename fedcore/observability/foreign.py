"""Makes text from other parties safe and short enough for a log and a terminal.

A name, a reason, a header or a label from a peer, a file or a task may contain terminal control
characters, or be of any length. All printed and logged text passes through this module.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

MAX_CHARACTERS = 400
"""Most characters of one text from a peer."""
MAX_LINE_BYTES = 1900
"""Most bytes of a line in a log."""
MAX_PARAGRAPH = 1800
"""Most characters of an error's text."""
_HEAD, _TAIL = 1100, 600
_LINE_ENDS = re.compile(r"\s*[\r\n]\s*")
_UNPRINTABLE = re.compile(r"[^ -~]")
_WORD = re.compile(r"[^\s'\"<>]+")


def foreign(text: object, max_characters: int = MAX_CHARACTERS) -> str:
    r"""Returns ``text`` on one line of at most ``max_characters``, plus its length if cut.

    Unprintable characters (control and escape characters, marks of text direction, unpaired
    surrogates) are written as Python string escapes. Never raises.

    >>> foreign("two" + chr(10) + "lines" + chr(27) + "[31m" + chr(0x202E))
    'two lines\\x1b[31m\\u202e'
    >>> foreign("x" * 50, 10)
    'xxxxxxxxxx... (50 characters)'
    """
    whole = _text(text)
    # Processes no more of the text than can be shown.
    shown = escaped(" ".join(without_credentials(whole[: 4 * max_characters]).split()))
    if len(shown) <= max_characters and len(whole) <= 4 * max_characters:
        return shown
    return f"{shown[:max_characters]}... ({len(whole)} characters)"


def without_credentials(text: str) -> str:
    """Returns ``text`` with the credentials in its addresses masked: user, password, and query.

    >>> without_credentials("s3://me:pass/word@bucket/x?token=1, https://host/team@x")
    's3://***@bucket/x?*** https://host/team@x'
    """
    return _WORD.sub(_masked, text) if "://" in text else text


def _masked(found: re.Match[str]) -> str:
    scheme, separator, rest = found.group().partition("://")
    if not separator:
        return scheme
    rest, asked, query = rest.partition("?")
    secret, at, place = rest.rpartition("@")
    if at and (":" in secret or "/" not in secret):  # an @ in a path alone hides nothing
        rest = f"***@{place}"
    return f"{scheme}://{rest}{asked}{query and '***'}"


def escaped(text: str) -> str:
    """Returns ``text`` with all unprintable characters escaped, including line ends."""
    return _UNPRINTABLE.sub(_escape, text)


def printable(text: str) -> str:
    """Returns lines of text with unprintable characters escaped, except line ends and tabs."""
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


def bounded_line(text: str, max_bytes: int = MAX_LINE_BYTES) -> str:
    r"""Returns ``text`` on one line of at most ``max_bytes`` in UTF-8, escaped."""
    line = escaped(" ".join(without_credentials(text[: 2 * max_bytes]).split()))
    raw = line.encode()  # cannot fail: escaped text contains no surrogates
    if len(raw) <= max_bytes and len(text) <= 2 * max_bytes:
        return line
    more = f"... ({len(text)} characters)"
    return raw[: max_bytes - len(more)].decode(errors="ignore") + more


def paragraph(text: str) -> str:
    r"""Returns ``text`` on one line, escaped, of about `MAX_PARAGRAPH` characters at most.

    A longer text loses its middle: an error begins with what happened, and ends with what to do.

    >>> paragraph("it says 'a" + chr(27) + "[2J'." + chr(10) + "Nothing was done.")
    "it says 'a\\x1b[2J'. Nothing was done."
    """
    line = escaped(_LINE_ENDS.sub(" ", without_credentials(text)))
    if len(line) <= MAX_PARAGRAPH:
        return line
    return f"{line[:_HEAD]}... ({len(text)} characters) ...{line[-_TAIL:]}"


def say(
    text: object = "", *, to: TextIO | None = None, flush: bool = False, end: str = "\n"
) -> None:
    """Prints lines of text for a person or a program; all terminal output uses this function.

    Args:
        text: Keeps its line ends and tabs; other unprintable characters are escaped.
        to: Standard output when None.
        flush: Whether a reader receives it at once.
        end: What follows the text; empty to go on in the same line.
    """
    print(printable(_text(text)), file=sys.stdout if to is None else to, flush=flush, end=end)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return str(value)
    except Exception:  # an arbitrary object's conversion to text may fail
        return f"a {type(value).__name__}"
