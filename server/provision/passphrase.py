"""Sources of a passphrase: a file, the environment, or the terminal; never an argument."""

from __future__ import annotations

import getpass
import os
import stat
import sys
from pathlib import Path

from fedcore.errors import ConfigError
from fedcore.files import read_bytes

VARIABLE = "FEDCORE_PASSPHRASE"
_MAX_BYTES = 4096  # size limit of a passphrase file
_PROMPT = "-"


def configured(file: str | None, *, twice: bool = False) -> str | None:
    """Returns the passphrase from its configured source, or None.

    Args:
        file: A file with the passphrase in its first line; ``-`` asks on the terminal; None reads
            the environment variable `VARIABLE`.
        twice: Whether the terminal asks twice, to detect typing errors in a new passphrase.

    Raises:
        ConfigError: there is no terminal, the two answers differ, others may read the file, or its
            first line isn't text.
        DataError: the file is missing or unreadable.
    """
    if file is None:
        return os.environ.get(VARIABLE) or None
    if file == _PROMPT:
        return ask(twice=twice)
    _check_private(Path(file))
    try:
        text = read_bytes(Path(file), max_bytes=_MAX_BYTES, what="a passphrase").decode()
    except UnicodeDecodeError:
        text = ""
    first = text.partition("\n")[0].rstrip("\r")
    if not first:
        raise ConfigError(
            f"{file}: expected a passphrase in the first line, as UTF-8. Nothing was written."
        )
    return first


def _check_private(path: Path) -> None:
    """Rejects a file that users other than its owner may read."""
    if os.name != "posix" or not path.is_file():  # a pipe has no lasting mode
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"{path}: this passphrase file has mode {mode:04o}, expected 0600: others may have "
            "read it. Nothing was done; if you are sure that nobody has, run `chmod 600` on it, "
            "otherwise choose another passphrase."
        )


def ask(*, twice: bool) -> str:
    """Asks for a passphrase on the terminal, without echo.

    Raises:
        ConfigError: there is no terminal, or the two answers differ.
    """
    if not sys.stdin.isatty():
        raise ConfigError(
            "a passphrase is needed, but there is no terminal to ask for it. Nothing was "
            f"written; pass a file with --passphrase-file, or set {VARIABLE}."
        )
    first = getpass.getpass("Passphrase: ")
    if twice and getpass.getpass("Again: ") != first:
        raise ConfigError("the two passphrases differ. Nothing was written; try again.")
    return first
