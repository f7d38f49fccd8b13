"""The devices that wait for releases, and the loop that tells them of a change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from fedcore.crypto.roster import Roster
from server.delivery.files import PublishedFiles

_LOOK_S = 0.5
"""Seconds between two looks at the repository, one ``stat`` each."""
_EXPIRY_S = 60.0
"""Seconds between two checks for members whose certificates have expired."""
_PER_S = 50
"""Devices that are to ask per second after a change, on average."""
_MAX_SPREAD_S = 600.0


class ReleaseStream:
    """One device's stream: an event for changes, and whether it must end."""

    def __init__(self) -> None:
        """Starts open, with nothing to tell."""
        self.ended = False
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Waits for the next change, or for the end."""
        await self._changed.wait()
        self._changed.clear()

    def tell(self) -> None:
        """Ends the wait for a change."""
        self._changed.set()

    def end(self) -> None:
        """Ends the stream."""
        self.ended = True
        self._changed.set()


class Watchers:
    """All open streams, one a device: a later one replaces an earlier one.

    Use it from one event loop only.
    """

    def __init__(
        self, files: PublishedFiles, roster: Roster, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Starts without streams."""
        self._files = files
        self._roster = roster
        self._clock = clock
        self._streams: dict[bytes, ReleaseStream] = {}
        self.change = files.change()
        """The repository's state as of the last look."""

    def __len__(self) -> int:
        """The number of open streams."""
        return len(self._streams)

    @property
    def spread_s(self) -> float:
        """Seconds over which the devices are to spread their requests after a change."""
        return min(len(self._streams) / _PER_S, _MAX_SPREAD_S)

    def open(self, public: bytes) -> ReleaseStream:
        """Opens a device's stream, and ends the one that it had."""
        if (before := self._streams.get(public)) is not None:
            before.end()
        stream = self._streams[public] = ReleaseStream()
        return stream

    def close(self, public: bytes, stream: ReleaseStream) -> None:
        """Forgets a stream that has ended."""
        if self._streams.get(public) is stream:
            del self._streams[public]

    def end_all(self) -> None:
        """Ends all streams: the server stops."""
        for stream in self._streams.values():
            stream.end()

    async def follow(self) -> None:
        """Tells all streams of each change, and ends those of former members, forever."""
        version, expiry_s = self._roster.version, self._clock()
        while True:
            await asyncio.sleep(_LOOK_S)
            if (change := self._files.change()) != self.change and change:
                self.change = change
                for stream in self._streams.values():
                    stream.tell()
            self._roster.refresh()
            if self._roster.version != version or self._clock() - expiry_s > _EXPIRY_S:
                version, expiry_s = self._roster.version, self._clock()
                for public, stream in list(self._streams.items()):
                    if self._roster.member(public) is None:
                        stream.end()
