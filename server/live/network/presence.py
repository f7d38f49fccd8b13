"""Which devices are online, and how they are notified of work.

A device is online while its wake-up stream is open. Without a stream, it polls, and is online for
some seconds after each call.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from fedcore.errors import TrustError
from fedcore.observability.throttle import PeerLines

log = logging.getLogger("fedcore.server")

MAX_SILENCE_S = 30.0
"""Maximum seconds that a device without a stream counts as online after a call, even if it
announces a longer polling interval."""
INITIAL_SILENCE_S = 5.0
"""Seconds that a device counts as online after a call, before it has opened a stream or announced
a polling interval; short, so that a device that dies in between does not delay a round."""
POLL_GRACE_S = 3.0
"""Seconds by which a device may miss its announced polling time."""

LOST = "it did not sign off: its process was killed, or its network failed"
"""Reason of a device whose stream ended, and that has not called since."""
_REPLACED = 64
"""Number of earlier processes of a device that are remembered."""


@dataclass
class _Session:
    """The active process of a device, from its first call on."""

    instance: str
    """Random identifier of the process."""
    name: str
    public_key: bytes
    seen: float
    """Time of the last call."""
    stream: asyncio.Event | None = None
    """Event of the open stream, set when there is work; None if no stream is open."""
    left: float | None = None
    """Time at which its stream ended or it signed off; None if neither."""
    silent_s: float = INITIAL_SILENCE_S
    """Seconds that it counts as online after its last call, without a stream."""
    owes: bool = False
    """Whether it was online and did not reply in time to a round, and has not called since."""
    replaced: tuple[str, ...] = ()
    """Identifiers of earlier processes of this device."""
    reason: str = ""
    """Why it left, or why its process before ended; empty if nothing is known."""

    def is_back(self) -> None:
        """Records a call or a stream: only its network had failed."""
        if self.reason == LOST:
            self.reason = ""


@dataclass(frozen=True)
class DevicePresence:
    """State of a device that has called since the server started."""

    node_id: int
    name: str
    online: bool
    """Whether it is online."""
    awake: bool
    """Whether its stream is open; an online device without a stream polls."""
    owes: bool = False
    """Whether it has not replied in time to a round, and not called since; rounds leave it out."""
    reason: str = ""
    """Why it left, or why its process before ended; empty if nothing is known. Fit to print."""


class Presence:
    """Registry of online devices. All methods except ``watch`` and ``unwatch`` are thread-safe.

    Each key has one active process at a time. A new process replaces the active one, which may not
    return. A restarted device is thus admitted at once, and two devices with one key are detected.
    """

    def __init__(
        self,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts without devices; ``on_change`` is called whenever one connects or disconnects."""
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.RLock()
        self._sessions: dict[int, _Session] = {}
        self._drained: frozenset[str] = frozenset()
        self._lines = PeerLines(partial(log.warning, "%s"), "late replies", clock=clock)
        self._loop = asyncio.get_running_loop()

    def arrive(
        self, node_id: int, instance: str, name: str, public_key: bytes, ended: str = ""
    ) -> bool:
        """Makes a process a device's active one; returns False if it was already.

        ``ended`` is why the device's process before ended, if that said nothing itself.

        Raises:
            TrustError: a newer process of this device has replaced it.
        """
        with self._lock:
            now, old = self._clock(), self._sessions.get(node_id)
            if old is not None and old.instance == instance:
                old.seen, old.left, old.owes = now, None, False
                return False
            if old is not None and instance in old.replaced:
                raise TrustError(
                    f"client {name!r}: another process with this identity has replaced it. It "
                    "was refused; each device needs its own identity: stop one of the two, and "
                    "enrol that device under its own name."
                )
            session = _Session(instance, name, public_key, now, reason=ended)
            if old is not None:
                session.replaced = (*old.replaced, old.instance)[-_REPLACED:]
                _set_event(self._loop, old.stream)
            self._sessions[node_id] = session
        self._on_change()
        return True

    def call(self, node_id: int, instance: str, next_call_s: float | None = None) -> bool:
        """Records a call; returns False if it is not from the device's active process.

        ``next_call_s`` is the announced number of seconds until its next call, if any.
        """
        with self._lock:
            session = self._sessions.get(node_id)
            if session is None or session.instance != instance:
                return False
            session.seen = self._clock()
            session.owes = False
            if next_call_s is not None:
                session.silent_s = min(next_call_s + POLL_GRACE_S, MAX_SILENCE_S)
            if session.stream is None:
                session.left = None
            session.is_back()
            return True

    def watch(self, node_id: int, instance: str) -> asyncio.Event | None:
        """Opens a device's stream: returns an event that is set when there is work for it.

        Ends the device's previous stream. Returns None if the process is not the active one.
        """
        with self._lock:
            session = self._sessions.get(node_id)
            if session is None or session.instance != instance:
                return None
            _set_event(self._loop, session.stream)
            session.stream, session.left = asyncio.Event(), None
            session.is_back()
            stream = session.stream
        self._on_change()
        return stream

    def watched_by(self, node_id: int, stream: asyncio.Event) -> bool:
        """Returns whether ``stream`` is the device's current stream."""
        session = self._sessions.get(node_id)
        return session is not None and session.stream is stream

    def unwatch(self, node_id: int, stream: asyncio.Event) -> None:
        """Marks a device offline after ``stream`` has ended, unless it has opened another."""
        with self._lock:
            session = self._sessions.get(node_id)
            if session is None or session.stream is not stream:
                return
            session.stream, session.left, session.reason = None, self._clock(), LOST
            session.silent_s = (
                POLL_GRACE_S  # a device that is still online calls, and opens another
            )
        self._on_change()

    def leave(self, node_id: int, reason: str = "") -> None:
        """Marks a device offline that has signed off, and ends its stream.

        ``reason`` is why; empty if as usual.
        """
        with self._lock:
            session = self._sessions.get(node_id)
            if session is not None:
                session.left, session.reason = self._clock(), reason
                _set_event(self._loop, session.stream)
                session.stream = None
        self._on_change()

    def remove(self, node_id: int) -> None:
        """Forgets a device that is no longer a member, and ends its stream."""
        with self._lock:
            session = self._sessions.pop(node_id, None)
            if session is not None:
                _set_event(self._loop, session.stream)
        self._on_change()

    def owe(self, node_ids: Iterable[int]) -> None:
        """Leaves devices out of `nodes` that were online and did not reply in time.

        Training may never end, for example in a task that hangs. A device that calls has finished
        it, and is selected again.
        """
        with self._lock:
            found = [
                session
                for node_id in node_ids
                if (session := self._sessions.get(node_id)) is not None
                and self._left(session) is None
            ]
            for session in found:
                session.owes = True
        for name in sorted(session.name for session in found):
            line = (
                f"{name}: connected, but it did not reply by federation.deadline_s. Rounds leave "
                "it out until it calls again; look at its log, and restart it if its task hangs"
            )
            self._lines.tell(name, "owes", line, member=True)
        self._on_change()

    def close(self) -> None:
        """Forgets all devices and ends their streams, when the server stops."""
        for node_id in self.keys():
            self.remove(node_id)

    def drain(self, names: Iterable[str]) -> None:
        """Replaces the set of drained devices, by name; `nodes` leaves them out.

        A name stays drained even if its device enrols again with another key.
        """
        self._drained = frozenset(names)
        self._on_change()

    def nodes(self) -> list[int]:
        """Returns the nodes that are online, not drained, and owe no reply."""
        with self._lock:
            return [
                key
                for key, one in self._sessions.items()
                if one.name not in self._drained and self._left(one) is None and not one.owes
            ]

    def devices(self) -> list[DevicePresence]:
        """Returns the state of all devices that have called, sorted by name."""
        with self._lock:
            found = [
                DevicePresence(
                    node_id,
                    one.name,
                    self._left(one) is None,
                    one.stream is not None,
                    one.owes,
                    self._reason(one),
                )
                for node_id, one in self._sessions.items()
            ]
        return sorted(found, key=lambda device: device.name)

    def keys(self) -> dict[int, bytes]:
        """Returns the public key of each node that has called."""
        with self._lock:
            return {node_id: one.public_key for node_id, one in self._sessions.items()}

    def wake(self, node_ids: Iterable[int]) -> None:
        """Notifies nodes of work through their streams; nodes without a stream poll for it."""
        with self._lock:
            streams = [
                session.stream
                for node_id in node_ids
                if (session := self._sessions.get(node_id)) is not None and session.stream
            ]

        def ring() -> None:
            for stream in streams:
                stream.set()

        self._loop.call_soon_threadsafe(ring)

    def offline_s(self, node_id: int) -> float:
        """Returns the seconds since a node went offline; 0 if online, infinity if it never was."""
        with self._lock:
            session = self._sessions.get(node_id)
            if session is None:
                return float("inf")
            left = self._left(session)
            return 0.0 if left is None else self._clock() - left

    def _reason(self, session: _Session) -> str:
        """Returns why a session left; that it was lost if it fell silent."""
        silent = session.left is None and self._left(session) is not None
        return session.reason or (LOST if silent else "")

    def _left(self, session: _Session) -> float | None:
        """Returns when a session went offline, by the clock; None if it is online."""
        if session.stream is not None:
            return None
        if session.left is not None:
            return session.left
        until = session.seen + session.silent_s
        return until if self._clock() > until else None


def _set_event(loop: asyncio.AbstractEventLoop, stream: asyncio.Event | None) -> None:
    if stream is not None:
        loop.call_soon_threadsafe(stream.set)
