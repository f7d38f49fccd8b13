"""How much one device, and all of them together, may ask of a server at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from fedcore.flower.fleet_api import Upload
from fedcore.observability.foreign import foreign
from fedcore.observability.throttle import TOLD_S, Throttle, left_out, take_token

log = logging.getLogger("fedcore.server")

STREAM_S, STREAM_BURST = 1.0, 20
"""How often a device may open its stream in the long run, and how often at once."""
_MOST_TOLD = 10_000


@dataclass(frozen=True)
class Limits:
    """What a server grants."""

    uploads_bytes: int = 16 * 2**30
    """Updates that are held at a time, on disk, from the first object to aggregation."""
    bodies: int = 1
    """Objects that are taken in from the disk at a time, of up to 5 MiB each."""
    calls_per_s: float = 50.0
    """Calls that one identity may make a second beside its work, in the long run."""
    burst: int = 400
    """Calls that it may have saved up."""
    calls_per_object: int = 4
    """Calls that it may make for each object of a message that it was sent. A message to train has
    6 objects or more, and takes 16 calls: to pull it, to push the reply, and to ask for the next.
    """
    call_bytes: int = 1 << 13
    """What is read before anybody may wait for it counts as one more call for each so many bytes: a
    reply's tree of 512 KiB, which takes 10 ms, as 64."""
    body_s: float = 60.0
    """Seconds within which a request's body must have come, or an object must have been taken."""
    upload_wait_s: float = 20.0
    """Seconds that an upload waits for room before it is told to come again."""
    stall_s: float = 15.0
    """Seconds without progress after which an upload gives its room to one that waits."""
    connections: int = 16_384
    """Connections that are open at a time, on each of the two ports; fewer where the system grants
    few open files."""
    connections_each: int = 16
    """Of these, on the first port, one identity's; a device uses one or two."""
    half_open: int = 512
    """Of these, such as are still shaking hands; each takes 0.1 MiB."""
    handshake_s: float = 15.0
    """Seconds within which a peer must have shaken hands."""
    headers_s: float = 15.0
    """Seconds within which the headers of a request must have come, from their first byte; those
    of the first request, from the handshake."""


@dataclass(frozen=True)
class _Bucket:
    tokens: float
    filled: float
    """When it was, by the clock."""
    sent: int
    """Objects that its owner had been sent by then."""


class Rates:
    """A token bucket for each identity, which fills with time and with work.

    However short rounds are, a device that does what it is asked is not held up; one that calls
    without being asked gets no more than the limits say.
    """

    def __init__(
        self,
        limits: Limits,
        sent: Callable[[int], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins with full buckets; ``sent`` counts the objects that a node was ever sent."""
        self._limits = limits
        self._sent = sent
        self._clock = clock
        self._buckets: dict[int, _Bucket] = {}

    def wait_s(self, node_id: int, calls: int = 1) -> float:
        """Counts so many calls; 0 when they are granted, else the seconds until they would be."""
        now, sent, limits = self._clock(), self._sent(node_id), self._limits
        last = self._buckets.get(node_id, _Bucket(limits.burst, now, 0))
        earned = (sent - last.sent) * limits.calls_per_object
        tokens = last.tokens + (now - last.filled) * limits.calls_per_s + earned
        # What is saved up ends at the burst; one message may need more than that.
        tokens = min(tokens, max(limits.burst, earned, last.tokens))
        granted = tokens >= calls
        self._buckets[node_id] = _Bucket(tokens - calls if granted else tokens, now, sent)
        return 0.0 if granted else (calls - tokens) / limits.calls_per_s


class Refusals:
    """The log of what was refused: one line for each peer and kind in a while, with a count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[tuple[str, int], tuple[float, int]] = {}

    def note(self, peer: str, status: int, text: str) -> None:
        """Logs a refusal, unless one like it was logged less than `TOLD_S` ago."""
        now, key = self._clock(), (peer, status)
        last, silent = self._told.get(key, (-TOLD_S, 0))
        if now - last < TOLD_S:
            self._told[key] = (last, silent + 1)
            return
        if len(self._told) >= _MOST_TOLD:
            self._told.clear()
        self._told[key] = (now, 0)
        shown = foreign(peer, 100), status, foreign(text, 1000), left_out(silent)
        log.warning("refused %s: %d: %s%s", *shown)


class PeerLines:
    """The log of what peers do: so many lines of a kind for each, then one in a while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._told: Throttle[tuple[str, str]] = Throttle(clock=clock)

    def tell(self, peer: str, what: str, more: str = "") -> None:
        """Logs that ``peer`` did ``what``, unless it has done so too often."""
        silent = self._told.admit((peer, what))
        if silent is not None:
            shown = f" ({foreign(more, 100)})" if more else ""
            log.info("device %s: %s%s%s", foreign(peer, 100), what, shown, left_out(silent))


class Streams:
    """How often each device may open its stream."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[bytes, tuple[float, float]] = {}

    def admit(self, public: bytes) -> bool:
        """Counts one; False when there were too many."""
        return take_token(self._left, public, self._clock(), every_s=STREAM_S, burst=STREAM_BURST)


@dataclass
class _Held:
    node_id: int
    room_bytes: int
    progress: float


class Uploads:
    """Room for updates that are on their way or wait to be aggregated.

    Belongs to the event loop that it is used in; `released` alone may be called from any thread.
    One upload is always let in, however large. Those that wait are let in in turn.
    """

    def __init__(
        self,
        limits: Limits,
        abandon: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins empty.

        ``abandon`` drops what has come of an upload, and says whether it did: one that has come in
        full stays until it is aggregated, and keeps its room.
        """
        self._limits = limits
        self._abandon = abandon
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._of: defaultdict[int, set[str]] = defaultdict(set)
        """Of each node, what is held for it."""
        self._held_bytes = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def enter(self, node_id: int, upload: Upload) -> bool:
        """Waits for room; False when there was none within the time that the limits grant."""
        if upload.message_id in self._held:
            self.progress(upload.message_id)
            return True
        try:
            async with asyncio.timeout(self._limits.upload_wait_s), self._turn:
                while not self._fits(upload.most_bytes):
                    self._freed.clear()
                    self._evict()
                    if not self._freed.is_set():
                        await self._wait()
                self._held[upload.message_id] = _Held(node_id, upload.most_bytes, self._clock())
                self._of[node_id].add(upload.message_id)
                self._held_bytes += upload.most_bytes
                return True
        except TimeoutError:
            return False

    def progress(self, message_id: str) -> None:
        """Notes that an upload goes on."""
        held = self._held.get(message_id)
        if held is not None:
            held.progress = self._clock()

    def progress_of(self, node_id: int) -> None:
        """Notes that the uploads of a node go on."""
        for message_id in self._of.get(node_id, ()):
            self.progress(message_id)

    def leave(self, message_id: str) -> None:
        """Gives an upload's room back."""
        held = self._held.pop(message_id, None)
        if held is not None:
            self._held_bytes -= held.room_bytes
            self._of[held.node_id].discard(message_id)
            if not self._of[held.node_id]:
                del self._of[held.node_id]
            self._freed.set()

    def released(self, message_id: str) -> None:
        """As `leave`, from any thread."""
        self._loop.call_soon_threadsafe(self.leave, message_id)

    def gone(self, node_id: int) -> None:
        """Gives back the room of a device that is gone."""
        for message_id in list(self._of.get(node_id, ())):
            if self._abandon(message_id):
                self.leave(message_id)

    def _fits(self, most_bytes: int) -> bool:
        return not self._held or self._held_bytes + most_bytes <= self._limits.uploads_bytes

    def _evict(self) -> None:
        before = self._clock() - self._limits.stall_s
        for message_id in [key for key, held in self._held.items() if held.progress < before]:
            if self._abandon(message_id):
                self.leave(message_id)

    async def _wait(self) -> None:
        """Until room is freed, or it is time to look again for uploads that stall."""
        try:
            async with asyncio.timeout(1.0):
                await self._freed.wait()
        except TimeoutError:
            return
