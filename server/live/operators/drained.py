"""The devices that operators leave out of rounds, by name, in the server's folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from pathlib import Path

from fedcore.crypto.roster import Roster
from fedcore.errors import ConfigError, DataError
from fedcore.files import read_bytes, write_json
from fedcore.observability.words import counted

log = logging.getLogger("fedcore.server")

DRAINED = "drained.json"
_MAX_DRAINED_BYTES = 4 << 20


def read_drained(folder: Path) -> frozenset[str]:
    """The names that were written to a server's ``folder``; none where there is no list.

    Raises:
        DataError: the list is none, or cannot be read.
    """
    path = folder / DRAINED
    if not os.path.lexists(path):
        return frozenset()
    raw = read_bytes(
        path,
        max_bytes=_MAX_DRAINED_BYTES,
        what="the list of drained devices",
        otherwise="Nothing was started; remove it, and drain again who should be.",
    )
    try:
        names = json.loads(raw)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("expected a list of names")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: {error}. Nothing was started; remove the file, and drain again who should be."
        ) from None
    return frozenset(names)


def unknown(drained: Collection[str], roster: Roster) -> list[str]:
    """The drained names that no device in force has: misspelt, revoked or expired."""
    known = {member.name for member in roster.members() if member.role == "device"}
    return sorted(set(drained) - known)


def warn_of_unknown(drained: Collection[str], roster: Roster) -> None:
    """Says so in the log where a name is drained that no device in force has."""
    if names := unknown(drained, roster):
        log.warning(
            "%s: drained, and no device in force has the name; rounds leave out whoever gets it. "
            "`fedcore server drain NAME --undo` takes a name off the list",
            ", ".join(names),
        )


def write_drained(folder: Path, names: Collection[str]) -> None:
    """Replaces the list.

    Raises:
        DiskFull: there is no room; the list is as it was.
    """
    write_json(folder / DRAINED, sorted(names))


def check_enough(
    name: str, there: Collection[str], drained: Collection[str], *, needed: int
) -> None:
    """Refuses to leave the run ``name`` fewer devices than each of its rounds asks for.

    Raises:
        ConfigError: of ``needed`` devices that are ``there``, fewer would be left.
    """
    left = len(set(there) - set(drained))
    if left < needed <= len(there):
        raise ConfigError(
            f"drain: {counted(left, 'device')} would be left, and each round of {name!r} asks "
            f"{needed}. "
            "Nothing was done; stop the run, and start it with a lower federation.cohort, or wait "
            "for more devices."
        )
