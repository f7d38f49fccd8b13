"""Releases from a web server: what a device takes, and how it treats one that misbehaves."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_client.delivery import https, resuming
from edge_client.delivery.https import https_source
from fedcore.errors import ConfigError, DataError, RepositoryUnreachable, TrustError
from tests.unit.fedcore.rpc.serving import answering, contexts

Files = Callable[[str, int], bytes | None]


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    folder = tmp_path / "tls"
    folder.mkdir()
    serving, client = contexts(folder)
    monkeypatch.setattr(https.ssl, "create_default_context", lambda: client)
    monkeypatch.setattr(resuming, "PAUSE_S", 0.001)
    monkeypatch.setattr(https, "_REQUEST_S", 2.0)
    return serving


def asked(request: bytes) -> tuple[str, int]:
    """Path and offset of a request."""
    lines = request.decode().split("\r\n")
    ranges = [line for line in lines if line.lower().startswith("range:")]
    offset = int(ranges[0].partition("=")[2].rstrip("-")) if ranges else 0
    return lines[0].split(" ")[1], offset


def static(root: Path, *, cut: int = 1 << 60, ranges: bool = True) -> Callable[[Any, bytes], None]:
    """A web server for a folder, which ends each connection after ``cut`` bytes of a body."""

    def behave(connection: Any, request: bytes) -> None:
        name, offset = asked(request)
        path = root / name.removeprefix("/releases/")
        if not path.is_file():
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        raw = path.read_bytes()
        head = b"HTTP/1.1 200 OK\r\n"
        if offset and ranges:
            head = b"HTTP/1.1 206 Partial Content\r\n"
            head += f"Content-Range: bytes {offset}-{len(raw) - 1}/{len(raw)}\r\n".encode()
            raw = raw[offset:]
        connection.sendall(head + f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw[:cut])
        if len(raw) > cut:
            connection.close()

    return behave


@pytest.mark.parametrize("ranges", [True, False])
def test_a_release_comes_over_https_and_goes_on_after_each_cut(
    world: Any, trusted: ssl.SSLContext, ranges: bool
) -> None:
    world.publish(2.0, padding=400_000)
    cut = 100_000 if ranges else 1 << 60
    with answering(static(world.repository, cut=cut, ranges=ranges), trusted) as port:
        source = https_source(f"https://127.0.0.1:{port}/releases")
        assert world.update(source).version == 2
        (path,) = (world.repository / "targets").rglob("2/*.model.onnx")
        name = str(path.relative_to(world.repository))
        assert b"".join(source(name, 77)) == path.read_bytes()[77:]
    assert world.answers() == 2.0


BAD: dict[str, tuple[bytes, type[Exception]]] = {
    "redirect": (
        b"HTTP/1.1 302 Found\r\nLocation: https://169.254.169.254/\r\nContent-Length: 0\r\n\r\n",
        TrustError,
    ),
    "teapot": (b"HTTP/1.1 418 Teapot\r\nContent-Length: 0\r\n\r\n", DataError),
    "busy": (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", RepositoryUnreachable),
    "no http": (b"SSH-2.0-OpenSSH\r\n", RepositoryUnreachable),
    "endless header": (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200, RepositoryUnreachable),
    "endless line": (b"HTTP/1.1 200 " + b"O" * 100_000, RepositoryUnreachable),
    "another range": (
        b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 5-9/10\r\nContent-Length: 5\r\n\r\nabcde",
        RepositoryUnreachable,
    ),
    "endless body": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"5\r\nabcde\r\n" * 10_000,
        Exception,
    ),
}


@pytest.mark.parametrize("how", BAD)
def test_a_server_that_misbehaves_changes_nothing(
    world: Any, trusted: ssl.SSLContext, how: str
) -> None:
    answer, error = BAD[how]

    def behave(connection: Any, request: bytes) -> None:
        connection.sendall(answer)
        connection.close()

    with answering(behave, trusted) as port, pytest.raises(error):
        world.update(https_source(f"https://127.0.0.1:{port}/releases"))
    assert world.answers() == 1.0


WADED: dict[str, Callable[[bytes], bytes]] = {
    "interim responses": lambda raw: (
        b"HTTP/1.1 100 Continue\r\n\r\n" * 40_000
        + b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(raw)
        + raw
    ),
    "trailers": lambda raw: (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(raw)
        + raw
        + b"\r\n0\r\n"
        + b"a: b\r\n" * 170_000
        + b"\r\n"
    ),
    "chunk extensions": lambda raw: (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"1;%s\r\n%c\r\n" % (b"x" * 1000, byte) for byte in raw)
        + b"0\r\n\r\n"
    ),
}


@pytest.mark.parametrize("how", WADED)
def test_a_device_does_not_wade_through_a_megabyte_beside_the_content(
    world: Any, trusted: ssl.SSLContext, how: str
) -> None:
    def behave(connection: Any, request: bytes) -> None:
        path = world.repository / asked(request)[0].removeprefix("/releases/")
        raw = path.read_bytes() if path.is_file() else b""
        connection.sendall(
            WADED[how](raw) if raw else b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"
        )

    world.publish(2.0)
    with answering(behave, trusted) as port, pytest.raises(RepositoryUnreachable):
        world.update(https_source(f"https://127.0.0.1:{port}/releases"))
    assert world.answers() == 1.0


def test_a_slow_server_is_given_up(
    world: Any, trusted: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setattr(https, "_REQUEST_S", 0.2)
    monkeypatch.setattr(resuming, "ATTEMPTS", 2)

    def behave(connection: Any, request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        for _ in range(1000):
            connection.sendall(b"X")
            time.sleep(0.02)

    with answering(behave, trusted) as port, pytest.raises(RepositoryUnreachable):
        world.update(https_source(f"https://127.0.0.1:{port}/releases"))
    assert world.answers() == 1.0


def test_a_certificate_of_an_unknown_authority_is_refused(world: Any, tmp_path: Path) -> None:
    serving, _ = contexts(tmp_path)
    with answering(static(world.repository), serving) as port, pytest.raises(TrustError):
        world.update(https_source(f"https://127.0.0.1:{port}/releases"))
    assert world.answers() == 1.0


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.org/r", "ftp://example.org", "https://", "https://a b/", "https://h:0x/"),
        *("https://me:secret@example.org/r", "https://example.org/r?x=1", "https://h\n/"),
    ],
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected a folder, or an address"):
        https_source(url)
