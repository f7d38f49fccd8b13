"""Resource limits of the server, per device and in total: rates, uploads, streams and log lines."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fedcore.flower.fleet_api import Upload
from fedcore.observability.foreign import foreign
from fedcore.observability.throttle import PeerLines, take_token

log = logging.getLogger("fedcore.server")

STREAM_S, STREAM_BURST = 1.0, 20
"""Token bucket of a device's stream openings: seconds per token, and capacity."""


@dataclass(frozen=True)
class Limits:
    """Limits that the server enforces."""

    uploads_bytes: int = 16 * 2**30
    """Maximum size of all updates on disk, from their first object until aggregation."""
    bodies: int = 1
    """Maximum number of objects, of up to 5 MiB each, that are parsed at a time."""
    calls_per_s: float = 50.0
    """Calls per second that one identity may make on average, in addition to those of its work."""
    burst: int = 400
    """Capacity of an identity's token bucket, in calls."""
    calls_per_object: int = 4
    """Calls granted for each object that the server has sent to the identity. A message to train
    has at least 6 objects and takes 16 calls: to pull it, to push the reply, and to poll again."""
    call_bytes: int = 1 << 13
    """Bytes of a request that cost one call more, if the server must read it before it can queue
    the upload. A reply's object tree of 512 KiB, which takes 10 ms, costs 64 calls."""
    body_s: float = 60.0
    """Timeout in seconds for receiving a request's body, and for sending an object."""
    upload_wait_s: float = 20.0
    """Seconds that an upload waits for room before the server asks the device to retry."""
    stall_s: float = 15.0
    """Seconds without progress after which an upload loses its room to a waiting one."""
    connections: int = 16_384
    """Maximum number of open connections on each of the two ports; lower if the system's limit on
    open files requires it."""
    connections_each: int = 16
    """Maximum number of connections per identity on the first port; a device uses one or two."""
    half_open: int = 512
    """Maximum number of connections in the TLS handshake; each takes 0.1 MiB."""
    handshake_s: float = 15.0
    """Timeout of the TLS handshake, in seconds."""
    headers_s: float = 15.0
    """Timeout in seconds for a request's headers, from their first byte; for the first request,
    from the end of the handshake."""


@dataclass(frozen=True)
class _Bucket:
    tokens: float
    filled: float
    """Time of the last refill, by the clock."""
    sent: int
    """Number of objects that the server had sent to the identity by then."""


class Rates:
    """Token bucket for each identity, refilled by time and by the work that the server sends.

    A device that only does its work is never throttled, however short the rounds are; further calls
    are limited to the configured rate.
    """

    def __init__(
        self,
        limits: Limits,
        sent: Callable[[int], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts with full buckets; ``sent`` returns the number of objects ever sent to a node."""
        self._limits = limits
        self._sent = sent
        self._clock = clock
        self._buckets: dict[int, _Bucket] = {}

    def wait_s(self, node_id: int, calls: int = 1) -> float:
        """Takes ``calls`` tokens and returns 0, or returns the seconds until there are enough."""
        now, sent, limits = self._clock(), self._sent(node_id), self._limits
        last = self._buckets.get(node_id, _Bucket(limits.burst, now, 0))
        earned = (sent - last.sent) * limits.calls_per_object
        tokens = last.tokens + (now - last.filled) * limits.calls_per_s + earned
        # The bucket is capped at the burst, except that one message may earn more than that.
        tokens = min(tokens, max(limits.burst, earned, last.tokens))
        granted = tokens >= calls
        self._buckets[node_id] = _Bucket(tokens - calls if granted else tokens, now, sent)
        return 0.0 if granted else (calls - tokens) / limits.calls_per_s


class Refusals:
    """Log of rejected requests, see `PeerLines`: one line at once per peer and status."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines = PeerLines(partial(log.warning, "%s"), "refused", burst=1, clock=clock)

    def note(self, peer: str, status: int, text: str, *, member: bool = True) -> None:
        """Logs a rejection of a member's request, or of a stranger's, unless throttled."""
        line = f"refused {foreign(peer, 100)}: {status}: {foreign(text, 1000)}"
        self._lines.tell(peer, status, line, member=member)

    def summarise(self) -> None:
        """Logs how many were not logged, once an hour."""
        self._lines.summarise()


class PeerLog:
    """Log of devices' actions, see `PeerLines`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines = PeerLines(partial(log.info, "%s"), "actions of devices", clock=clock)

    def tell(self, peer: str, what: str, more: str = "") -> None:
        """Logs that the device ``peer`` did ``what``, with details ``more``, unless throttled."""
        shown = f" ({foreign(more, 300)})" if more else ""
        self._lines.tell(peer, what, f"device {foreign(peer, 100)}: {what}{shown}", member=True)

    def summarise(self) -> None:
        """Logs how many were not logged, once an hour."""
        self._lines.summarise()


class Streams:
    """Token bucket for each device's stream openings."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[bytes, tuple[float, float]] = {}

    def admit(self, public: bytes) -> bool:
        """Takes a token for the device with key ``public``; returns False if it has none left."""
        return take_token(self._left, public, self._clock(), every_s=STREAM_S, burst=STREAM_BURST)


@dataclass
class _PendingUpload:
    node_id: int
    room_bytes: int
    progress: float


class Uploads:
    """Admission control for uploads: limits the disk space of all that are not yet aggregated.

    Use it from one event loop only, except `released`, which any thread may call. An upload is
    always admitted if there is no other, however large. Waiting uploads are admitted in order.
    """

    def __init__(
        self,
        limits: Limits,
        abandon: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts without uploads.

        Args:
            limits: Limits of the server.
            abandon: Drops an incomplete upload by its message's id, and returns True; returns
                False for a complete one, which keeps its room until it is aggregated.
            clock: Returns monotonic seconds.
        """
        self._limits = limits
        self._abandon = abandon
        self._clock = clock
        self._held: dict[str, _PendingUpload] = {}
        self._of: defaultdict[int, set[str]] = defaultdict(set)
        """Message ids of each node's uploads."""
        self._held_bytes = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def enter(self, node_id: int, upload: Upload) -> bool:
        """Waits for room and reserves it; returns False if there is none within the timeout."""
        if upload.message_id in self._held:
            self.progress(upload.message_id)
            return True
        try:
            async with asyncio.timeout(self._limits.upload_wait_s), self._turn:
                while not self._fits(upload.max_bytes):
                    self._freed.clear()
                    self._evict()
                    if not self._freed.is_set():
                        await self._wait()
                self._held[upload.message_id] = _PendingUpload(
                    node_id, upload.max_bytes, self._clock()
                )
                self._of[node_id].add(upload.message_id)
                self._held_bytes += upload.max_bytes
                return True
        except TimeoutError:
            return False

    def progress(self, message_id: str) -> None:
        """Records progress of an upload, which resets its stall timer."""
        held = self._held.get(message_id)
        if held is not None:
            held.progress = self._clock()

    def progress_of(self, node_id: int) -> None:
        """Records progress of all uploads of a node."""
        for message_id in self._of.get(node_id, ()):
            self.progress(message_id)

    def leave(self, message_id: str) -> None:
        """Releases an upload's room; does nothing if it has none."""
        held = self._held.pop(message_id, None)
        if held is not None:
            self._held_bytes -= held.room_bytes
            self._of[held.node_id].discard(message_id)
            if not self._of[held.node_id]:
                del self._of[held.node_id]
            self._freed.set()

    def released(self, message_id: str) -> None:
        """Releases an upload's room; may be called from any thread."""
        self._loop.call_soon_threadsafe(self.leave, message_id)

    def disconnected(self, node_id: int) -> None:
        """Drops the incomplete uploads of a device that disconnected, and releases their room."""
        for message_id in list(self._of.get(node_id, ())):
            if self._abandon(message_id):
                self.leave(message_id)

    def _fits(self, max_bytes: int) -> bool:
        return not self._held or self._held_bytes + max_bytes <= self._limits.uploads_bytes

    def _evict(self) -> None:
        before = self._clock() - self._limits.stall_s
        for message_id in [key for key, held in self._held.items() if held.progress < before]:
            if self._abandon(message_id):
                self.leave(message_id)

    async def _wait(self) -> None:
        """Waits until room is released, for at most 1 s: then stalled uploads are checked again."""
        try:
            async with asyncio.timeout(1.0):
                await self._freed.wait()
        except TimeoutError:
            return
