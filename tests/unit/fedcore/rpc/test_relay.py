"""The local way to a server that counts what passes on it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fedcore.rpc import relay
from fedcore.rpc.relay import RelayedRoute, relayed


@contextmanager
def serving(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError), listener.accept()[0] as one:
                one.settimeout(10.0)
                behave(one)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10.0)
        assert not thread.is_alive()


def opened(way: RelayedRoute) -> socket.socket:
    local = socket.socket(socket.AF_UNIX)
    local.connect(way.target.removeprefix("unix:"))
    local.settimeout(5.0)
    return local


def echo(one: socket.socket) -> None:
    while piece := one.recv(1 << 16):
        one.sendall(piece)


def received(local: socket.socket, count: int) -> bytes:
    came = b""
    while len(came) < count and (piece := local.recv(1 << 16)):
        came += piece
    return came


def test_what_passes_is_counted_in_both_directions() -> None:
    counted: list[int] = []
    sent = bytes(range(256)) * 100
    with (
        serving(echo) as port,
        relayed("127.0.0.1", port, proxy=None, timeout_s=2.0, took=counted.append) as way,
        opened(way) as local,
    ):
        local.sendall(sent)
        assert received(local, len(sent)) == sent
        # Nobody else gets in, and nobody can stand in its place.
        path = Path(way.target.removeprefix("unix:"))
        assert not path.exists()
        assert path.parent.stat().st_mode & 0o077 == 0
    end = time.monotonic() + 5.0  # a piece is counted after it was sent
    while sum(counted) < 2 * len(sent) and time.monotonic() < end:
        time.sleep(0.01)
    assert sum(counted) == 2 * len(sent)


def test_more_than_is_waited_for_stays_with_the_server() -> None:
    sent = [0]

    def floods(one: socket.socket) -> None:
        while True:
            sent[0] += one.send(bytes(4096))

    with (
        serving(floods) as port,
        relayed(
            "127.0.0.1", port, proxy=None, timeout_s=2.0, took=lambda _: time.sleep(0.1)
        ) as way,
        opened(way) as local,
    ):
        began, came = time.monotonic(), 0
        while time.monotonic() - began < 1.0:
            came += len(local.recv(1 << 16))
    assert 4 * 4096 < came < 20 * 4096


@pytest.mark.parametrize("side", ["server", "local"])
def test_the_end_of_one_side_is_that_of_the_other(side: str) -> None:
    closed = threading.Event()

    def behave(one: socket.socket) -> None:
        if side == "local":
            assert one.recv(1) == b""
            closed.set()

    with (
        serving(behave) as port,
        relayed("127.0.0.1", port, proxy=None, timeout_s=2.0, took=lambda _: None) as way,
    ):
        local = opened(way)
        if side == "server":
            assert local.recv(1) == b""
        local.close()
        assert side == "server" or closed.wait(5.0)
        assert way.over.wait(5.0)


def test_nobody_there_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        pytest.raises(OSError, match="refused"),
        relayed("127.0.0.1", port, proxy=None, timeout_s=2.0, took=lambda _: None),
    ):
        pass


def asked(one: socket.socket) -> bytes:
    came = b""
    while not came.endswith(b"\r\n\r\n"):
        came += one.recv(1)
    return came


def test_a_proxy_is_asked_for_the_way() -> None:
    came: list[bytes] = []

    def proxy(one: socket.socket) -> None:
        came.append(asked(one))
        one.sendall(b"HTTP/1.1 200 Connection established\r\nx: y\r\n\r\nhello")

    with (
        serving(proxy) as port,
        relayed(
            "2001:db8::1",
            9093,
            proxy=f"http://anna:p%40ss@127.0.0.1:{port}",
            timeout_s=2.0,
            took=lambda _: None,
        ) as way,
        opened(way) as local,
    ):
        assert received(local, 5) == b"hello"
    assert came == [
        b"CONNECT [2001:db8::1]:9093 HTTP/1.1\r\nHost: [2001:db8::1]:9093\r\n"
        b"Proxy-Authorization: Basic YW5uYTpwQHNz\r\n\r\n"
    ]


def says(what: bytes) -> Callable[[socket.socket], None]:
    def behave(one: socket.socket) -> None:
        asked(one)
        one.sendall(what)

    return behave


def drips(one: socket.socket) -> None:
    for _ in range(100):
        one.sendall(b"H")
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("behave", "why"),
    [
        (says(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"), "refused"),
        (says(b"\r\n\r\n"), "refused"),
        (says(b"HTTP/1.1"), "did not answer"),
        (says(b"x" * 100_000), "did not answer"),
        (drips, "timed out"),
    ],
)
def test_a_proxy_that_gives_no_way_is_told(
    behave: Callable[[socket.socket], None], why: str
) -> None:
    began = time.monotonic()
    with (
        serving(behave) as port,
        pytest.raises(OSError, match=why),
        relayed("h", 1, proxy=f"http://127.0.0.1:{port}", timeout_s=1.0, took=lambda _: None),
    ):
        pass
    assert time.monotonic() - began < 12.0


def test_a_proxy_of_another_kind_is_refused_before_anything_is_sent() -> None:
    with (
        pytest.raises(OSError, match="not supported"),
        relayed("h", 1, proxy="https://proxy", timeout_s=1.0, took=lambda _: None),
    ):
        pass


def test_a_folder_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(relay, "_LONGEST_ROOT", 200)
    first = relay._folder()
    assert (first.parent, relay._folder()) == (tmp_path, first)
    first.chmod(0o777)
    other = relay._folder()
    assert other != first
    assert other.stat().st_mode & 0o077 == 0
    other.rmdir()
    first.rmdir()
    first.symlink_to(tmp_path)
    assert relay._folder() != first
