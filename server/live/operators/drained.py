"""The list of drained devices: names that rounds do not select, in the server's folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from pathlib import Path

from fedcore.config.run import RunConfig
from fedcore.crypto.roster import Roster
from fedcore.errors import ConfigError, DataError
from fedcore.files import read_bytes, write_json
from fedcore.observability.words import counted
from fedcore.training.roles import is_judge
from server.rounds.roles import MIN_JUDGES

log = logging.getLogger("fedcore.server")

DRAINED = "drained.json"
_MAX_DRAINED_BYTES = 4 << 20


def read_drained(folder: Path) -> frozenset[str]:
    """Reads the list of drained devices from a server's ``folder``; empty if there is no list.

    Raises:
        DataError: the file cannot be read, or is not a list of names.
    """
    path = folder / DRAINED
    if not os.path.lexists(path):
        return frozenset()
    raw = read_bytes(
        path,
        max_bytes=_MAX_DRAINED_BYTES,
        what="the list of drained devices",
        otherwise="Nothing was started; remove it, and drain the devices again that should be.",
    )
    try:
        names = json.loads(raw)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("expected a list of names")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: {error}. Nothing was started; remove the file, and drain the devices "
            "again that should be."
        ) from None
    return frozenset(names)


def unknown(drained: Collection[str], roster: Roster) -> list[str]:
    """Returns the drained names that no current device has: misspelt, revoked or expired."""
    known = {member.name for member in roster.members() if member.role == "device"}
    return sorted(set(drained) - known)


def warn_of_unknown(drained: Collection[str], roster: Roster) -> None:
    """Logs a warning if a drained name belongs to no current device."""
    if names := unknown(drained, roster):
        log.warning(
            "%s: drained, but no device in force has this name; rounds will exclude any device "
            "that gets it. `fedcore server drain NAME --undo` removes a name from the list",
            ", ".join(names),
        )


def write_drained(folder: Path, names: Collection[str]) -> None:
    """Replaces the list of drained devices in a server's ``folder``, atomically.

    Raises:
        DiskFull: the disk is full. The list is unchanged.
    """
    write_json(folder / DRAINED, sorted(names))


def check_drain(
    run: RunConfig, name: str, connected: Collection[str], drained: Collection[str], *, cohort: int
) -> None:
    """Checks that without a further device enough are left that do the same in rounds.

    Args:
        run: The run.
        name: Name of the device to drain.
        connected: Names of the connected devices.
        drained: Names of devices that are drained already.
        cohort: Number of devices that a round trains.

    Raises:
        ConfigError: fewer than a round needs would be left.
    """
    federation = run.federation
    judging = is_judge(federation, name)
    alike = [one for one in connected if is_judge(federation, one) is judging]
    needed = min(MIN_JUDGES, len(alike)) if judging else cohort  # a round needs one
    check_enough(run.name, alike, {*drained, name}, needed=needed)


def check_enough(
    name: str, connected: Collection[str], drained: Collection[str], *, needed: int
) -> None:
    """Checks that enough devices stay available for a round's cohort once ``drained`` are left out.

    A cohort that even the connected devices do not fill is no reason to reject.

    Args:
        name: The run's name, for the error message.
        connected: Names of the connected devices.
        drained: Names of all drained devices, including the one to drain now.
        needed: Size of a round's cohort.

    Raises:
        ConfigError: fewer than ``needed`` devices would be left.
    """
    left = len(set(connected) - set(drained))
    if left < needed <= len(connected):
        raise ConfigError(
            f"drain: {counted(left, 'device')} would be left, and each round of {name!r} needs "
            f"{needed}. Nothing was done; stop the run, and start it with a lower "
            "federation.cohort, or wait for more devices."
        )
