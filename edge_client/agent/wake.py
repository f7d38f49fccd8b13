"""How a device learns that work awaits it: the server's stream, or asking, where there is none."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import grpc

from fedcore.crypto.kit import Kit
from fedcore.errors import FedcoreError, TrustError
from fedcore.flower.fleet_client import FleetLink
from fedcore.flower.fleet_errors import NotActivated, Unreachable
from fedcore.rpc.jitter import spread_s
from fedcore.rpc.proxy import proxy_for
from fedcore.rpc.relay import relayed
from fedcore.rpc.wake_pb2 import WatchRequest
from fedcore.rpc.wake_pb2_grpc import WakeStub

log = logging.getLogger("fedcore.device")

_CONNECT_S = 2.5
"""How long an attempt at a stream may take."""
_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # 60 s unless set, whatever the one above says
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", int(_CONNECT_S * 1000)),  # also bounds an attempt: 20 s else
    ("grpc.max_receive_message_length", 64),  # a call has 2 bytes
    ("grpc.max_metadata_size", 8192),
    ("grpc.enable_retries", 0),  # of a stream that a server had not begun: there is no second way
)
_FAST_S, _BUSY_S, _SLOW_S = 0.5, 1.0, 12.0
"""How often a device without a stream asks: while a round is on, while it trains, when it idles."""
_ROUND_S = 30.0
"""How long after its last message a device takes a round to be on."""
_AGAIN_S = 30.0
"""Longest pause between two attempts at a stream."""
_CANCEL_S = 2.0
"""How long after its connection's end a stream may last."""
_LOOK_S = 0.5
"""How often that is looked for."""
CALL_S, CALL_BURST = 0.05, 200
"""How often a server may call in the long run, and how often at once: the rest is read later, and
where that is full, the server waits."""
STREAM_S, STREAM_BURST = 2.0, 20
"""How often a stream is tried in the long run, and how often at once, whatever the server does."""
BYTES_PER_S, BURST_BYTES = 8192, 1 << 18
"""What passes on streams in the long run, and at once: handshakes, calls of some 60 bytes, pings.
The rest is read later, and the server waits."""
_PIECE_BYTES = 64
"""What a shorter piece counts there: each costs a few switches between threads."""
ASK_S, ASK_BURST = 0.25, 40
"""How often the server is asked in place of a stream in the long run, and how often at once,
whatever it answers."""
EARLY_S = 300.0
"""How long the stream may last that a process opens before it has loaded what it works with."""
_STEADY_S = 10.0
"""A stream that ends sooner did not last: the next one is tried later each time."""


@dataclass
class Signals:
    """What the threads of a device tell each other."""

    stop: threading.Event = field(default_factory=threading.Event)
    work: threading.Event = field(default_factory=threading.Event)
    """Set when messages should be pulled."""
    activate: threading.Event = field(default_factory=threading.Event)
    """Set when the server does not know this process."""
    reconnect: threading.Event = field(default_factory=threading.Event)
    """Set when the server has let this process in: a stream may open at once."""
    last_message: float = float("-inf")
    """When the last message came, on the monotonic clock."""
    busy: bool = False
    """Whether a message is being answered."""
    lost: float | None = None
    """Since when the server has not been heard of, on the monotonic clock; None while it is."""

    def pause_s(self) -> float:
        """How long to wait before asking again, where no stream is open."""
        on = time.monotonic() - self.last_message < _ROUND_S
        return spread_s(_FAST_S if on else _BUSY_S if self.busy else _SLOW_S, 0.5, 1.0)


@dataclass
class Ceiling:
    """Grants ``burst`` at once, and one in ``every_s`` seconds in the long run."""

    every_s: float
    burst: int
    clock: Callable[[], float] = time.monotonic
    _free_s: float = field(default=float("-inf"), init=False)
    """When what was granted is paid for, at one in ``every_s``."""

    def wait_s(self, count: int = 1) -> float:
        """Takes so many; returns the seconds until they may be used."""
        now, saved_s = self.clock(), self.burst * self.every_s
        self._free_s = max(self._free_s, now - saved_s) + count * self.every_s
        return max(self._free_s - now, 0.0)

    def take(self) -> bool:
        """Takes one if it is granted now; False, and nothing is taken, if it is not."""
        before_s = self._free_s
        granted = self.wait_s() == 0.0
        if not granted:
            self._free_s = before_s
        return granted


def watch(
    instance: str, link: FleetLink, signals: Signals, passed: Callable[[int], None] | None = None
) -> None:
    """Keeps a stream open until ``signals.stop``, and asks where there is none.

    Runs in a thread of its own, so that a device that trains is still seen to be there.

    Guarantee:
        Whatever the server sends, no more than one call in `CALL_S` seconds, one stream in
        `STREAM_S` and `BYTES_PER_S` of anything are taken, beside what may be saved up; every byte
        counts in ``passed``.

    Args:
        instance: Names this process to the server.
        link: To the server.
        signals: What the threads of this device tell each other.
        passed: Hears how many bytes have passed, and may wait.
    """
    failures, next_try = 0, 0.0
    streams, calls = Ceiling(STREAM_S, STREAM_BURST), Ceiling(CALL_S, CALL_BURST)
    asks = Ceiling(ASK_S, ASK_BURST)
    count = _counting(signals, passed)
    while not signals.stop.is_set():
        if signals.reconnect.is_set():
            signals.reconnect.clear()
            failures, next_try = 0, 0.0
        if link.wake_port and time.monotonic() >= next_try:
            if signals.stop.wait(streams.wait_s()):
                return
            with suppress(TrustError):  # it has expired: the main thread meets that, and ends
                link.renew()
            began, opened = time.monotonic(), False
            with (
                suppress(OSError),  # nobody is there
                _channel(link.kit, link.address(failures), link.wake_port, count) as (
                    channel,
                    gone,
                ),
            ):
                opened = _listen(channel, instance, signals, calls, gone)
            lasted = opened and time.monotonic() - began >= _STEADY_S
            failures = 0 if lasted else failures + 1
            pause_s = spread_s(min(_AGAIN_S, 0.5 * 2.0**failures), 0.5, 1.0)
            next_try = time.monotonic() + pause_s
        soon_s = max(next_try - time.monotonic(), 0.05) if link.wake_port else math.inf
        pause_s = min(signals.pause_s(), soon_s)
        if signals.stop.wait(asks.wait_s()):
            return
        _ask(link, signals, pause_s + (_CONNECT_S if link.wake_port and pause_s == soon_s else 0.0))
        signals.reconnect.wait(pause_s)


def hold_stream(
    link: FleetLink, instance: str, passed: Callable[[int], None] | None = None
) -> None:
    """Keeps a stream open, in a thread of its own, until this process opens its next one.

    It is over after `EARLY_S` at the latest.

    So a server sees at once when a process dies that has not got as far as `watch`.
    """
    signals = Signals()
    # A server that does not end it when the next one opens could send on it forever.
    ending = threading.Timer(EARLY_S, signals.stop.set)
    ending.daemon = True
    ending.start()

    def hold() -> None:
        count = _counting(signals, passed)
        with (
            suppress(OSError),
            _channel(link.kit, link.address(0), link.wake_port, count) as (channel, gone),
        ):
            _listen(channel, instance, signals, Ceiling(CALL_S, CALL_BURST), gone)

    threading.Thread(target=hold, name="early wake", daemon=True).start()


def _counting(signals: Signals, passed: Callable[[int], None] | None) -> Callable[[int], None]:
    """A function that is told of bytes on streams, and waits until more may come."""
    ceiling = Ceiling(1 / BYTES_PER_S, BURST_BYTES)

    def hear(count: int) -> None:
        if passed is not None:
            passed(count)
        signals.stop.wait(ceiling.wait_s(max(count, _PIECE_BYTES)))

    return hear


@contextmanager
def _channel(
    kit: Kit, server: str, wake_port: int, count: Callable[[int], None]
) -> Iterator[tuple[grpc.Channel, threading.Event]]:
    """A channel whose every byte is counted, and an event that is set once it leads nowhere.

    Raises:
        OSError: the server cannot be reached.
    """
    credentials = grpc.ssl_channel_credentials(
        kit.authority_pem, kit.key_pem(), kit.certificate_pem
    )
    host = urlsplit(server).hostname or ""
    there = f"[{host}]:{wake_port}" if ":" in host else f"{host}:{wake_port}"
    # Its core would read other variables than HTTP clients do.
    proxy = proxy_for(f"https://{there}", os.environ)
    options = (
        ("grpc.enable_http_proxy", 0),
        ("grpc.ssl_target_name_override", host),  # the certificate's name, not the socket's
        ("grpc.default_authority", there),
    )
    with (
        relayed(host, wake_port, proxy=proxy, timeout_s=_CONNECT_S, took=count) as way,
        grpc.secure_channel(way.target, credentials, options=(*_OPTIONS, *options)) as channel,
    ):
        yield channel, way.over


def _listen(
    channel: grpc.Channel,
    instance: str,
    signals: Signals,
    ceiling: Ceiling,
    gone: threading.Event,
) -> bool:
    """Reads the stream to its end, no faster than ``ceiling``; True when it was open.

    It ends with ``gone``, too: gRPC may wait for another connection, which there is none of.
    """
    opened, over = False, threading.Event()
    calls = WakeStub(channel).Watch(WatchRequest(instance=instance))  # type: ignore[no-untyped-call]

    def cancel() -> None:
        ended_s = 0.0
        while not signals.stop.wait(_LOOK_S) and not over.is_set() and ended_s < _CANCEL_S:
            ended_s += _LOOK_S * gone.is_set()  # what came before its end is read first
        channel.close()  # cancelling a call that gRPC is about to begin again does not end it

    threading.Thread(target=cancel, daemon=True).start()
    try:
        for _ in calls:
            if not opened:
                log.info("stream open")
            opened = True
            signals.lost = None
            signals.work.set()
            signals.stop.wait(ceiling.wait_s())  # unread, it fills a window, and the server waits
    except grpc.RpcError as error:
        code = error.code()
        if code == grpc.StatusCode.UNAUTHENTICATED:
            signals.activate.set()
        if opened or code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            log.info("stream closed: %s", code.name.lower())
    finally:
        over.set()
    return opened


def _ask(link: FleetLink, signals: Signals, again_s: float) -> None:
    """One call in place of the stream, and a look for messages.

    ``again_s`` is the seconds within which the next one follows, or a stream opens.
    """
    if not link.node_id or signals.stop.is_set():
        return
    try:
        link.beat(again_s)
        signals.lost = None
    except NotActivated:
        signals.lost = None
        signals.activate.set()
    except (FedcoreError, Unreachable) as error:  # the main thread meets it, too, and decides
        log.debug("asking: %s", error)
        if signals.lost is None:
            signals.lost = time.monotonic()
    signals.work.set()
