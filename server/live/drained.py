"""The devices that operators leave out of rounds, by name, in the server's folder."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from fedcore.errors import ConfigError, DataError
from fedcore.files import read_bytes, write_json

_DRAINED = "drained.json"
_MAX_DRAINED_BYTES = 4 << 20


def read_drained(folder: Path) -> frozenset[str]:
    """The names that were written to a server's ``folder``; none where there is no list.

    Raises:
        DataError: the list is none.
    """
    path = folder / _DRAINED
    if not path.exists():
        return frozenset()
    raw = read_bytes(path, max_bytes=_MAX_DRAINED_BYTES, what="the list of drained devices")
    try:
        names = json.loads(raw)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("expected a list of names")
    except ValueError as error:
        raise DataError(
            f"{path}: {error}. Nothing was started; remove the file, and drain anew who should be."
        ) from None
    return frozenset(names)


def write_drained(folder: Path, names: Collection[str]) -> None:
    """Replaces the list.

    Raises:
        DiskFull: there is no room; the list is as it was.
    """
    write_json(folder / _DRAINED, sorted(names))


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
            f"drain: {left} devices would be left, and each round of {name!r} asks {needed}. "
            "Nothing was done; stop the run, and start it with a lower federation.cohort, or wait "
            "for more devices."
        )
