"""What comes at a device's socket is counted and ends in time, whatever it is."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedcore.flower.fleet_errors import is_certificate_error
from fedcore.rpc.metered import Meter, TooLarge, Traffic, metered
from tests.unit.fedcore.rpc.serving import Behave, answer_of, answering, contexts, endless

MAX_BYTES = 1 << 20
KEEP = ("content-length", "transfer-encoding")


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return contexts(tmp_path_factory.mktemp("tls"))


Ask = Callable[[Traffic, bytes], bytes]


@contextmanager
def asking(
    behave: Behave, secured: tuple[ssl.SSLContext, ssl.SSLContext], **more: Any
) -> Iterator[Ask]:
    meter = Meter()
    with answering(behave, secured[0]) as port, httpx.Client(verify=secured[1], **more) as client:
        metered(client, meter, keep=KEEP)

        def ask(traffic: Traffic, body: bytes) -> bytes:
            with meter.counted(traffic):
                return client.post(f"https://127.0.0.1:{port}/", content=body).content

        yield ask


def traffic(**more: Any) -> Traffic:
    return Traffic(MAX_BYTES, time.monotonic() + 20.0, **more)


def test_both_ways_are_counted_from_the_handshake_on(secured: Any) -> None:
    body = bytes(600_000)

    def behave(connection: Any, request: bytes) -> None:
        connection.sendall(answer_of(body))

    with asking(behave, secured) as ask:
        first, second = traffic(), traffic()
        assert ask(first, bytes(300_000)) == body
        assert ask(second, b"") == body
    assert len(body) + 500 < first.received_bytes < 1.01 * len(body) + 8000
    assert 300_500 < first.sent_bytes < 1.01 * 300_000 + 4000
    assert len(body) < second.received_bytes < first.received_bytes  # by the same connection
    assert second.sent_bytes < 1000


def interim(connection: Any, request: bytes) -> None:
    endless(connection, b"", b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 100)


def headers(connection: Any, request: bytes) -> None:
    endless(connection, b"HTTP/1.1 200 OK\r\n", b"x: " + b"y" * 900 + b"\r\n")


def extensions(connection: Any, request: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    endless(connection, head, (b"1;" + b"e" * 900 + b"\r\nz\r\n") * 50)


def body(connection: Any, request: bytes) -> None:
    endless(connection, b"HTTP/1.1 200 OK\r\n\r\n", bytes(1 << 16))


def small_records(connection: Any, request: bytes) -> None:
    endless(connection, b"HTTP/1.1 200 OK\r\n\r\n", b"z")


@pytest.mark.parametrize("behave", [interim, headers, extensions, body, small_records])
def test_no_more_comes_in_than_may(secured: Any, behave: Behave) -> None:
    call = traffic()
    with asking(behave, secured) as ask, pytest.raises((TooLarge, httpx.RemoteProtocolError)):
        ask(call, b"")
    assert call.received_bytes <= MAX_BYTES + (1 << 16)


def drips(connection: Any, request: bytes, over: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while not over.wait(0.05):
        connection.sendall(b"z")


def test_what_comes_drop_by_drop_is_over_in_time(secured: Any) -> None:
    over = threading.Event()
    with asking(partial(drips, over=over), secured, timeout=10.0) as ask:
        began = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):
            ask(Traffic(MAX_BYTES, began + 1.0), b"")
        assert 0.9 < time.monotonic() - began < 3.0
        over.set()


@pytest.mark.parametrize("ending_s", [0.0, 1.0])
@pytest.mark.parametrize("silent", [False, True])
def test_who_stops_waits_for_nobody(secured: Any, silent: bool, ending_s: float) -> None:
    over, stop = threading.Event(), threading.Event()

    def behave(connection: Any, request: bytes) -> None:
        threading.Timer(0.5, stop.set).start()
        if silent:
            over.wait(20.0)
        else:
            drips(connection, request, over)

    with asking(behave, secured, timeout=10.0) as ask:
        began = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):
            ask(traffic(stopped=stop.is_set, ending_s=ending_s), b"")
        assert 0.4 + ending_s < time.monotonic() - began < 3.0 + ending_s
        over.set()


def test_who_reads_nothing_holds_nobody(secured: Any) -> None:
    over = threading.Event()

    class Deaf:
        """The server's side of TLS, which reads the handshake alone."""

        def wrap_socket(self, *arguments: Any, **more: Any) -> Any:
            found = secured[0].wrap_socket(*arguments, **more)
            over.wait(20.0)
            return found

    with asking(interim, (Deaf(), secured[1]), timeout=10.0) as ask:  # type: ignore[arg-type]
        began = time.monotonic()
        with pytest.raises(httpx.WriteTimeout):
            ask(Traffic(MAX_BYTES, began + 1.0), bytes(50_000_000))
        assert 0.9 < time.monotonic() - began < 3.0
        over.set()


def test_a_certificate_of_another_authority_is_refused(secured: Any, tmp_path: Path) -> None:
    _, others = contexts(tmp_path)
    with (
        asking(interim, (secured[0], others)) as ask,
        pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED") as caught,
    ):
        ask(traffic(), b"")
    assert is_certificate_error(caught.value)
