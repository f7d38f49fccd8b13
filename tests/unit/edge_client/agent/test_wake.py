"""What a server may make a device do by its stream, whatever it sends."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from edge_client.agent import wake
from edge_client.agent.wake import CALL_BURST, CALL_S, Signals, TokenBucket
from fedcore.flower.fleet_errors import NotActivated
from fedcore.rpc.relay import relayed
from fedcore.rpc.wake_pb2 import Call
from fedcore.rpc.wake_pb2_grpc import WakeServicer, add_WakeServicer_to_server

Watch = Callable[[Any], Iterator[Call]]


@contextmanager
def serving(behave: Watch) -> Iterator[int]:
    """A server whose stream does as ``behave`` says; gives its port."""

    class Servicer(WakeServicer):
        def Watch(self, request: Any, context: Any) -> Iterator[Call]:
            return behave(context)

    server = grpc.server(ThreadPoolExecutor(4))
    add_WakeServicer_to_server(Servicer(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@contextmanager
def channel_to(
    port: int, count: Callable[[int], None] = lambda count: None
) -> Iterator[tuple[grpc.Channel, threading.Event]]:
    """As a device's own, without TLS."""
    with (
        relayed("127.0.0.1", port, proxy=None, timeout_s=2.0, took=count) as way,
        grpc.insecure_channel(way.target, options=wake._OPTIONS) as channel,
    ):
        yield channel, way.over


def floods(context: Any) -> Iterator[Call]:
    while context.is_active():
        yield Call(kind=Call.WORK)


class Counting(TokenBucket):
    """A ceiling that says how much was taken until a device is to stop; then nothing waits."""

    taken = 0
    until = threading.Event()

    def wait_s(self, count: int = 1) -> float:
        self.taken += 0 if self.until.is_set() else count
        return super().wait_s(count)


def stopped_after(seconds: float) -> Signals:
    signals = Signals()
    threading.Timer(seconds, signals.stop.set).start()
    return signals


def test_a_ceiling_grants_a_burst_and_then_one_at_a_time() -> None:
    now = [0.0]
    ceiling = TokenBucket(2.0, 3, clock=lambda: now[0])
    assert [ceiling.wait_s() for _ in range(5)] == [0, 0, 0, 2, 4]
    now[0] += 1000.0  # a pause saves up no more than the burst
    assert [ceiling.wait_s() for _ in range(4)] == [0, 0, 0, 2]


def test_a_server_that_calls_without_end_is_read_at_a_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wake, "_CANCEL_S", 0.1)
    signals, started, ceiling = stopped_after(2.0), time.monotonic(), Counting(CALL_S, CALL_BURST)
    ceiling.until = signals.stop
    with serving(floods) as port, channel_to(port) as (channel, gone):
        assert wake._listen(channel, "a", signals, ceiling, gone)
    took_s = time.monotonic() - started
    assert CALL_BURST < ceiling.taken <= CALL_BURST + took_s / CALL_S + 2


@pytest.mark.parametrize("owner", [True, False])
def test_what_comes_by_the_stream_waits_for_the_owners_bandwidth(
    monkeypatch: pytest.MonkeyPatch, owner: bool
) -> None:
    """And for the device's own where there is none: it holds for bytes, whatever they are."""
    monkeypatch.setattr(wake, "_CANCEL_S", 0.1)
    if not owner:
        monkeypatch.setattr(wake, "BURST_BYTES", 10_000)
    signals, began, counted = stopped_after(2.0), time.monotonic(), list[int]()

    def passed(count: int) -> None:
        if not signals.stop.is_set():  # then nothing waits any more, so that it ends at once
            counted.append(count)
        time.sleep(count / 20_000 if owner else 0.0)

    count = wake._counting(signals, passed)
    with serving(floods) as port, channel_to(port, count) as (channel, gone):
        wake._listen(channel, "a", signals, TokenBucket(0.0, 1), gone)
    took_s = time.monotonic() - began
    rate, burst = (20_000, 0) if owner else (wake.BYTES_PER_S, 10_000)
    assert 10_000 < sum(counted) < burst + 1.1 * rate * took_s + 20_000


def test_a_device_without_a_port_for_streams_asks_at_its_own_pace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wake, "_SLOW_S", 0.4)
    asked: list[float] = []
    link = SimpleNamespace(wake_port=0, node_id=1, heartbeat=asked.append)
    wake.keep_stream_open("a", link, stopped_after(2.0), None)  # type: ignore[arg-type]
    assert 4 <= len(asked) <= 2.0 / 0.2 + 1
    assert all(0.2 <= again_s <= 0.4 for again_s in asked)


def test_the_first_stream_is_over_in_time_whatever_the_server_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wake, "EARLY_S", 1.0)
    monkeypatch.setattr(wake, "_CANCEL_S", 0.1)
    opened, over = threading.Event(), threading.Event()

    def stays(context: Any) -> Iterator[Call]:
        context.add_callback(over.set)
        yield Call(kind=Call.OPEN)
        opened.set()
        over.wait(30.0)

    with serving(stays) as port:
        monkeypatch.setattr(wake, "_channel", lambda *_: channel_to(port))
        started = time.monotonic()
        link = SimpleNamespace(wake_port=port, kit=None, address=lambda tries: "")
        wake.open_stream(link, "a")  # type: ignore[arg-type]
        assert opened.wait(10.0)
        assert not over.is_set()
        assert over.wait(10.0)
        assert time.monotonic() - started >= 1.0


def test_a_call_that_is_larger_than_any_ends_the_stream() -> None:
    def large(context: Any) -> Iterator[Call]:
        call = Call(kind=Call.OPEN)
        call.MergeFromString(b"\x7a\xff\x01" + bytes(255))  # a field that nobody knows
        while context.is_active():
            yield call

    ceiling = Counting(CALL_S, CALL_BURST)
    with serving(large) as port, channel_to(port) as (channel, gone):
        assert not wake._listen(channel, "a", Signals(), ceiling, gone)
    assert ceiling.taken == 0


@pytest.mark.parametrize("code", [None, grpc.StatusCode.UNAUTHENTICATED])
def test_a_server_that_ends_each_stream_gets_few_of_them(
    monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode | None
) -> None:
    """Also where the device is let in again each time, which would open the next one at once."""
    monkeypatch.setattr(wake, "STREAM_BURST", 3)
    monkeypatch.setattr(wake, "_SLOW_S", 0.01)
    tried: list[float] = []
    counted: list[int] = []

    def ends(context: Any) -> Iterator[Call]:
        tried.append(time.monotonic())
        if code is not None:
            context.abort(code, "no")
        yield Call(kind=Call.OPEN)

    with serving(ends) as port:
        monkeypatch.setattr(wake, "_channel", lambda *given: channel_to(port, given[-1]))
        signals = stopped_after(4.0)

        def let_in() -> None:
            while not signals.stop.wait(0.01):
                signals.reconnect.set()

        threading.Thread(target=let_in).start()
        link = SimpleNamespace(
            wake_port=port,
            kit=None,
            node_id=1,
            renew=lambda: None,
            address=lambda tries: "",
            heartbeat=lambda again_s: None,
        )
        wake.keep_stream_open("a", link, signals, counted.append)  # type: ignore[arg-type]
    assert 3 <= len(tried) <= 3 + 4.0 / wake.STREAM_S + 1
    assert sum(counted) > 100 * len(tried)


def test_a_server_that_says_it_goes_away_holds_no_thread() -> None:
    """gRPC begins such a stream again by itself, on a connection that there is none of."""

    def serve(listener: socket.socket) -> None:
        one, _ = listener.accept()
        with one:
            one.sendall(bytes.fromhex("000000040000000000"))  # SETTINGS
            came = b""
            while b"\x01\x04\x00\x00\x00\x01" not in came:  # HEADERS of the first stream
                came += one.recv(4096)
            one.sendall(bytes.fromhex("000008070000000000") + bytes(8))  # GOAWAY: it was not begun

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        with channel_to(listener.getsockname()[1]) as (channel, gone):
            began = time.monotonic()
            assert not wake._listen(channel, "a", Signals(), TokenBucket(CALL_S, CALL_BURST), gone)
            assert time.monotonic() - began < 8.0
        thread.join()


def test_a_server_that_knows_nobody_and_lets_all_in_is_asked_at_a_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wake, "ASK_BURST", 5)
    asked: list[float] = []
    signals = stopped_after(2.0)

    def heartbeat(again_s: float) -> None:
        asked.append(again_s)
        signals.reconnect.set()  # the main thread was let in again at once
        raise NotActivated("who?")

    link = SimpleNamespace(wake_port=0, node_id=1, heartbeat=heartbeat)
    wake.keep_stream_open("a", link, signals, None)  # type: ignore[arg-type]
    assert 5 <= len(asked) <= 5 + 2.0 / wake.ASK_S + 2


def test_pieces_cost_more_than_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake, "BURST_BYTES", 640)
    waits: list[float] = []
    signals = SimpleNamespace(stop=SimpleNamespace(wait=waits.append))
    counted: list[int] = []
    hear = wake._counting(signals, counted.append)  # type: ignore[arg-type]
    for _ in range(30):
        hear(1)
    assert counted == [1] * 30, "what the owner allows is bytes"
    assert waits[:10] == [0.0] * 10
    assert waits[-1] == pytest.approx(20 * 64 / wake.BYTES_PER_S, abs=0.05)
