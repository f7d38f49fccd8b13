"""Starts a device that trains from Python: `start_client`, which returns a `LiveClient`.

The device runs in a process of its own, ``fedcore client start``. Imports neither torch nor Flower.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from fedcore.background import Background, RunningCommand
from fedcore.config.owner import load_owner
from fedcore.crypto.kit import Kit, load_kit
from fedcore.errors import CertificateRefused, TaskError

Place = str | PathLike[str]


@dataclass(frozen=True)
class LiveClient(RunningCommand):
    """A device that `fedcore.start_client` has started; used in a ``with`` block, it stops there.

    Example::

        with fedcore.start_client("kit", "churn/task.py", owner="owner.toml") as client:
            client.wait(timeout_s=3600)  # raises if it still runs then
    """

    kit: Kit
    """The device's identity."""


def start_client(
    kit: Place,
    task: Place,
    *,
    owner: Place | None = None,
    state: Place | None = None,
    log: Place | None = None,
) -> LiveClient:
    """Takes part in training with an installed task, until stopped; returns at once.

    It runs in a process of its own, so that several work beside each other in a notebook, and ends
    with this one.

    Example::

        client = fedcore.start_client("kit", "churn/task.py", owner="owner.toml")
        print(client.log)
        client.stop()

    Args:
        kit: Folder of the device's kit, see `fedcore.install_kit`.
        task: The task's file, the same as the server's.
        owner: File with the limits that the owner of this device sets.
        state: Folder for the device's ledger and finished updates; ``device`` in the folder of the
            kit when None.
        log: File for the log, rotated; a temporary one when None.

    Raises:
        DataError: the kit is missing.
        CertificateRefused: the kit is not in force, or is not a device's.
        ConfigError: the owner's file is not valid.
        TaskError: there is no such task file.
        ResourceError: no process can be started.
    """
    found = load_kit(Path(kit))
    if found.role != "device":
        raise CertificateRefused(
            f"{kit}: this is the identity of the {found.role} {found.name!r}, expected a "
            "device's. Nothing was started; enrol this machine as a device."
        )
    if owner is not None:
        load_owner(Path(owner))
    if not Path(task).is_file():
        raise TaskError(f"{task}: there is no such file. Nothing was started.")
    words: list[object] = ["--kit", kit, "--task", task]
    for option, value in (("--owner", owner), ("--state", state), ("--log", log)):
        words += [] if value is None else [option, value]
    return LiveClient(found, _process=Background("client", "start", *words))
