"""Which devices are there, and how they are told that work awaits them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fedcore.errors import TrustError

BEATS_S = 30.0
"""How long at most a device without a stream counts as there after a call, whenever it says that
the next one follows."""
FIRST_S = 5.0
"""How long a device counts as there after a call, until its first stream opens or it says when it
calls again: one that dies in between must not hold a round up."""
LATE_S = 3.0
"""How much later than it has said it may call."""

_REPLACED = 64
"""How many processes of a device that were there before are known again."""


@dataclass
class _Session:
    """One process on a device, from its first call on."""

    instance: str
    name: str
    public_key: bytes
    seen: float
    stream: asyncio.Event | None = None
    """Set when there is work; None while no stream is open."""
    left: float | None = None
    """When its stream ended, or it said goodbye."""
    silent_s: float = FIRST_S
    """How long it counts as there after its last call, without a stream."""
    replaced: tuple[str, ...] = ()
    """Processes of this device that were there before."""


@dataclass(frozen=True)
class DeviceStatus:
    """A device that has called since the server started."""

    node_id: int
    name: str
    there: bool
    awake: bool
    """Whether its stream is open; one that is there without it polls."""


class Presence:
    """Who is there. Every method may be called from any thread but ``watch`` and ``unwatch``.

    One key is one identity, and one identity one process. A process that comes later takes the
    place of the one before, which may not come back: that is how a device that was restarted gets
    in at once, and how two devices with one key are found out.
    """

    def __init__(
        self,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins with nobody; ``on_change`` is called when somebody comes or goes."""
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.RLock()
        self._sessions: dict[int, _Session] = {}
        self._drained: frozenset[str] = frozenset()
        self._loop = asyncio.get_running_loop()

    def arrive(self, node_id: int, instance: str, name: str, public_key: bytes) -> bool:
        """Lets a process in; True when it is another one than was there last.

        Raises:
            TrustError: another process of this identity has taken its place.
        """
        with self._lock:
            now, old = self._clock(), self._sessions.get(node_id)
            if old is not None and old.instance == instance:
                old.seen, old.left = now, None
                return False
            if old is not None and instance in old.replaced:
                raise TrustError(
                    f"client {name!r}: another process with this identity has taken its place. It "
                    "was refused; an identity belongs to one device: stop one of the two, and "
                    "enrol that device under a name of its own."
                )
            session = _Session(instance, name, public_key, now)
            if old is not None:
                session.replaced = (*old.replaced, old.instance)[-_REPLACED:]
                _ring(self._loop, old.stream)
            self._sessions[node_id] = session
        self._on_change()
        return True

    def call(self, node_id: int, instance: str, again_s: float | None = None) -> bool:
        """Notes a call; False when it is not from the process that was let in last.

        ``again_s`` is within how many seconds it calls again, where it says so.
        """
        with self._lock:
            session = self._sessions.get(node_id)
            if session is None or session.instance != instance:
                return False
            session.seen = self._clock()
            if again_s is not None:
                session.silent_s = min(again_s + LATE_S, BEATS_S)
            if session.stream is None:
                session.left = None
            return True

    def watch(self, node_id: int, instance: str) -> asyncio.Event | None:
        """Opens a device's stream: an event that is set when there is work for it.

        None when the process was not let in. A stream that was open before ends.
        """
        with self._lock:
            session = self._sessions.get(node_id)
            if session is None or session.instance != instance:
                return None
            _ring(self._loop, session.stream)
            session.stream, session.left = asyncio.Event(), None
            stream = session.stream
        self._on_change()
        return stream

    def watched_by(self, node_id: int, stream: asyncio.Event) -> bool:
        """Whether ``stream`` is the one that belongs to the device now."""
        session = self._sessions.get(node_id)
        return session is not None and session.stream is stream

    def unwatch(self, node_id: int, stream: asyncio.Event) -> None:
        """A stream has ended: its device is gone, unless another has opened meanwhile."""
        with self._lock:
            session = self._sessions.get(node_id)
            if session is None or session.stream is not stream:
                return
            session.stream, session.left = None, self._clock()
            session.silent_s = LATE_S  # if it is there after all, it says so, and opens another
        self._on_change()

    def leave(self, node_id: int) -> None:
        """A device says goodbye."""
        with self._lock:
            session = self._sessions.get(node_id)
            if session is not None:
                session.left = self._clock()
                _ring(self._loop, session.stream)
                session.stream = None
        self._on_change()

    def remove(self, node_id: int) -> None:
        """Puts a device out: it is no member any more."""
        with self._lock:
            session = self._sessions.pop(node_id, None)
            if session is not None:
                _ring(self._loop, session.stream)
        self._on_change()

    def close(self) -> None:
        """Ends every stream: the server stops."""
        for node_id in self.keys():
            self.remove(node_id)

    def drain(self, names: Iterable[str]) -> None:
        """From now on devices of these names, and no others, are left out of rounds.

        A name stays drained whatever key its device has: one that is enrolled again is, too.
        """
        self._drained = frozenset(names)
        self._on_change()

    def nodes(self) -> list[int]:
        """The nodes that are there now and may be asked."""
        with self._lock:
            return [
                key
                for key, one in self._sessions.items()
                if one.name not in self._drained and self._left(one) is None
            ]

    def devices(self) -> list[DeviceStatus]:
        """Everyone who has called, by name."""
        with self._lock:
            found = [
                DeviceStatus(node_id, one.name, self._left(one) is None, one.stream is not None)
                for node_id, one in self._sessions.items()
            ]
        return sorted(found, key=lambda device: device.name)

    def keys(self) -> dict[int, bytes]:
        """The key of each node that has called."""
        with self._lock:
            return {node_id: one.public_key for node_id, one in self._sessions.items()}

    def wake(self, node_ids: Iterable[int]) -> None:
        """Tells nodes that work awaits them."""
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

    def absent_s(self, node_id: int) -> float:
        """Seconds since a node was last there; 0 while it is, infinity when it never was."""
        with self._lock:
            session = self._sessions.get(node_id)
            if session is None:
                return float("inf")
            left = self._left(session)
            return 0.0 if left is None else self._clock() - left

    def _left(self, session: _Session) -> float | None:
        """When a session ended; None while it goes on."""
        if session.stream is not None:
            return None
        if session.left is not None:
            return session.left
        until = session.seen + session.silent_s
        return until if self._clock() > until else None


def _ring(loop: asyncio.AbstractEventLoop, stream: asyncio.Event | None) -> None:
    if stream is not None:
        loop.call_soon_threadsafe(stream.set)
