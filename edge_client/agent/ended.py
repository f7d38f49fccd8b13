"""Why a device's process ended: told to the server as it leaves, or by the process after it.

A process that is killed, runs out of memory or calls ``os._exit`` says nothing. It leaves a note of
what it was doing in the device's folder, which the next process finds.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedcore.errors import DataError
from fedcore.files import read_if_exists
from fedcore.observability.foreign import foreign

LOADING, WAITING = "it loaded torch and the task", "it waited for work"
ACTIVITY = "activity"
"""The note's name in the device's folder."""
_MAX_BYTES = 1 << 10


@dataclass
class Activity:
    """The note of what this process is doing. Its methods never raise: it only informs."""

    folder: Path
    """The device's folder, which this process has locked when it calls `begin`."""
    _begun: bool = field(default=False, init=False)

    def interrupted(self) -> str:
        """Returns what the process before was doing when it ended without notice; empty if not."""
        try:
            raw = read_if_exists(self._path, max_bytes=_MAX_BYTES, what="the note of activity")
        except DataError:
            return ""
        return foreign((raw or b"").decode(errors="replace"), 100)

    def begin(self, what: str) -> None:
        """Notes what begins; not fsynced, as it outlives this process, which is all it has to."""
        self._begun = True
        with suppress(OSError):
            self._path.write_text(what)

    def end(self) -> None:
        """Removes the note, if this process wrote one: it ends as it should."""
        if self._begun:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self.folder / ACTIVITY


def ended_text(interrupted: str) -> str:
    """Returns what a server is told of a process that ended without notice; empty for none."""
    if not interrupted:
        return ""
    return f"ended without notice while {interrupted}: killed, out of memory, or os._exit"


def reason_of(error: BaseException) -> str:
    """Returns why this process leaves, for the server: kinds of errors alone.

    Their text, which may name files or people, goes to the device's own log.
    """
    if isinstance(error, KeyboardInterrupt):
        return "stopped by a signal"
    cause = error.__cause__
    why = f" ({type(cause).__name__})" if cause is not None else ""
    return f"{type(error).__name__}{why}; the device's log has the details"
