"""Wake-up calls: a gRPC stream from the server, or polling where no stream can be opened.

`keep_stream_open` runs in a thread of its own, and sets the events of `Signals` for the training
session. All rates are limited here, so that a server cannot occupy the device or its connection.
"""

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
"""Longest time to connect a stream."""
_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # 60 s by default, despite keepalive_timeout_ms
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", int(_CONNECT_S * 1000)),  # also bounds an attempt: 20 s else
    ("grpc.max_receive_message_length", 64),  # a call has 2 bytes
    ("grpc.max_metadata_size", 8192),
    ("grpc.enable_retries", 0),  # a retry would need a new connection, and the relay has only one
)
_FAST_S, _BUSY_S, _SLOW_S = 0.5, 1.0, 12.0
"""Polling intervals without a stream: during a round, while a message is answered, when idle."""
_ROUND_S = 30.0
"""Time after the last message for which a device assumes that the round still runs."""
_AGAIN_S = 30.0
"""Longest pause between two attempts to open a stream."""
_CANCEL_S = 2.0
"""How long a stream stays open after its connection has ended, to read what came before."""
_LOOK_S = 0.5
"""Interval between two checks whether a stream's connection has ended."""
CALL_S, CALL_BURST = 0.05, 200
"""Rate limit on wake-up calls: seconds per call in the long run, and burst size. Further calls stay
unread until the flow-control window is full; then the server waits."""
STREAM_S, STREAM_BURST = 2.0, 20
"""Rate limit on attempts to open a stream: seconds per attempt in the long run, and burst size."""
BYTES_PER_S, BURST_BYTES = 8192, 1 << 18
"""Rate limit on bytes of streams (handshakes, calls of some 60 bytes, pings): bytes per second in
the long run, and burst size. Further bytes are read later, and the server waits."""
_PIECE_BYTES = 64
"""Least that one read counts toward `BYTES_PER_S`: each read costs a few thread switches."""
ASK_S, ASK_BURST = 0.25, 40
"""Rate limit on polls in place of a stream: seconds per poll in the long run, and burst size."""
EARLY_S = 300.0
"""Longest life of the stream that a process opens before it has loaded torch and the task."""
_STEADY_S = 10.0
"""A stream that ends sooner counts as a failure: the pause before the next attempt grows."""


@dataclass
class Signals:
    """Events and state that the threads of a training session share."""

    stop: threading.Event = field(default_factory=threading.Event)
    work: threading.Event = field(default_factory=threading.Event)
    """Set when messages should be pulled."""
    activate: threading.Event = field(default_factory=threading.Event)
    """Set when the server does not recognize this process, which then has to activate again."""
    reconnect: threading.Event = field(default_factory=threading.Event)
    """Set when the server has activated this process: a stream may open at once."""
    last_message: float = float("-inf")
    """When the last message was received or answered, on the monotonic clock."""
    busy: bool = False
    """Whether a message is being answered."""
    lost: float | None = None
    """When the server became unreachable, on the monotonic clock; None while it is reachable."""

    def pause_s(self) -> float:
        """Returns the jittered pause before the next poll, where no stream is open."""
        on = time.monotonic() - self.last_message < _ROUND_S
        return spread_s(_FAST_S if on else _BUSY_S if self.busy else _SLOW_S, 0.5, 1.0)


@dataclass
class TokenBucket:
    """Token bucket: grants ``burst`` units at once, and one per ``every_s`` seconds on average."""

    every_s: float
    burst: int
    clock: Callable[[], float] = time.monotonic
    _free_s: float = field(default=float("-inf"), init=False)
    """When the units granted so far are used up at one per ``every_s``, on ``clock``."""

    def wait_s(self, count: int = 1) -> float:
        """Takes ``count`` units, and returns the seconds to wait before using them."""
        now, saved_s = self.clock(), self.burst * self.every_s
        self._free_s = max(self._free_s, now - saved_s) + count * self.every_s
        return max(self._free_s - now, 0.0)

    def try_acquire(self) -> bool:
        """Takes a unit if one is available now; returns whether it did."""
        before_s = self._free_s
        granted = self.wait_s() == 0.0
        if not granted:
            self._free_s = before_s
        return granted


def keep_stream_open(
    instance: str, link: FleetLink, signals: Signals, passed: Callable[[int], None] | None = None
) -> None:
    """Keeps a stream open until ``signals.stop`` is set, and polls while none can be opened.

    Runs in a thread of its own, so that the server sees a training device as online.

    Guarantee:
        Whatever the server sends, the device reads at most one call per `CALL_S` seconds, opens at
        most one stream per `STREAM_S` and transfers at most `BYTES_PER_S`, plus the bursts.
        ``passed`` counts every byte.

    Args:
        instance: Name of this session, as it was activated.
        link: Connection to the server.
        signals: Shared with the thread that answers messages.
        passed: Callback with the bytes transferred; may block to limit bandwidth.
    """
    failures, next_try = 0, 0.0
    streams, calls = TokenBucket(STREAM_S, STREAM_BURST), TokenBucket(CALL_S, CALL_BURST)
    asks = TokenBucket(ASK_S, ASK_BURST)
    count = _counting(signals, passed)
    while not signals.stop.is_set():
        if signals.reconnect.is_set():
            signals.reconnect.clear()
            failures, next_try = 0, 0.0
        if link.wake_port and time.monotonic() >= next_try:
            if signals.stop.wait(streams.wait_s()):
                return
            with suppress(TrustError):  # expired: the main thread gets the same error and raises it
                link.renew()
            began, opened = time.monotonic(), False
            with (
                suppress(OSError, FedcoreError),  # unreachable, or its key cannot be read now
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


def open_stream(
    link: FleetLink, instance: str, passed: Callable[[int], None] | None = None
) -> None:
    """Opens a stream in a background thread, until `keep_stream_open` takes over.

    The stream shows the server that the process is online, and breaks at once if it dies. The
    server closes it when the process opens its next stream; it lasts `EARLY_S` at most.

    Args:
        link: An activated connection to the server.
        instance: Name of this session, as it was activated.
        passed: Callback with the bytes transferred; may block to limit bandwidth.
    """
    signals = Signals()
    # Limits a server that leaves it open after the next stream, and keeps sending.
    ending = threading.Timer(EARLY_S, signals.stop.set)
    ending.daemon = True
    ending.start()

    def hold() -> None:
        count = _counting(signals, passed)
        with (
            suppress(OSError, FedcoreError),
            _channel(link.kit, link.address(0), link.wake_port, count) as (channel, gone),
        ):
            _listen(channel, instance, signals, TokenBucket(CALL_S, CALL_BURST), gone)

    threading.Thread(target=hold, name="early wake", daemon=True).start()


def _counting(signals: Signals, passed: Callable[[int], None] | None) -> Callable[[int], None]:
    """Returns a callback for bytes on streams, which blocks to stay within `BYTES_PER_S`."""
    ceiling = TokenBucket(1 / BYTES_PER_S, BURST_BYTES)

    def hear(count: int) -> None:
        if passed is not None:
            passed(count)
        signals.stop.wait(ceiling.wait_s(max(count, _PIECE_BYTES)))

    return hear


@contextmanager
def _channel(
    kit: Kit, server: str, wake_port: int, count: Callable[[int], None]
) -> Iterator[tuple[grpc.Channel, threading.Event]]:
    """Yields a channel, and an event that is set once its connection has ended.

    All bytes of the channel pass through a local relay, which calls ``count`` with their number.

    Raises:
        OSError: the server cannot be reached.
    """
    credentials = grpc.ssl_channel_credentials(
        kit.authority_pem, kit.key_pem(), kit.certificate_pem
    )
    host = urlsplit(server).hostname or ""
    there = f"[{host}]:{wake_port}" if ":" in host else f"{host}:{wake_port}"
    # gRPC's core would read other environment variables than HTTP clients do.
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
    ceiling: TokenBucket,
    gone: threading.Event,
) -> bool:
    """Reads a stream to its end, no faster than ``ceiling``; returns whether it was open.

    Cancels the stream after ``gone`` is set: gRPC would wait for another connection, and the relay
    offers only one.
    """
    opened, over = False, threading.Event()
    calls = WakeStub(channel).Watch(WatchRequest(instance=instance))  # type: ignore[no-untyped-call]

    def cancel() -> None:
        ended_s = 0.0
        while not signals.stop.wait(_LOOK_S) and not over.is_set() and ended_s < _CANCEL_S:
            ended_s += _LOOK_S * gone.is_set()  # calls received before the end are read first
        channel.close()  # cancelling a call that gRPC is about to begin again does not end it

    threading.Thread(target=cancel, daemon=True).start()
    try:
        for _ in calls:
            if not opened:
                log.info("stream open")
            opened = True
            signals.lost = None
            signals.work.set()
            signals.stop.wait(ceiling.wait_s())  # unread calls fill the window: the server waits
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
    """Sends one heartbeat in place of a stream, and has messages pulled.

    Args:
        link: Connection to the server; does nothing before it is activated.
        signals: Shared with the thread that answers messages.
        again_s: Seconds within which the next heartbeat follows, or a stream opens.
    """
    if not link.node_id or signals.stop.is_set():
        return
    try:
        link.heartbeat(again_s)
        signals.lost = None
    except NotActivated:
        signals.lost = None
        signals.activate.set()
    except (FedcoreError, Unreachable) as error:  # the main thread gets it too, and handles it
        log.debug("polling instead: %s", error)
        if signals.lost is None:
            signals.lost = time.monotonic()
    signals.work.set()
