"""Peers that hold connections and say little or nothing: each has its time, and its share."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedcore.crypto.certificates import pem
from fedcore.crypto.issue import issue_member
from fedcore.crypto.keys import load_key
from fedcore.crypto.kit import Kit, client_context, load_kit, parse_kit_file, write_kit
from fedcore.crypto.roster import RosterEntry
from fedcore.rpc import wake_pb2 as wake
from fedcore.rpc.wake_pb2_grpc import WakeStub
from server.live.network.limits import Limits
from tests.e2e.live.federation import federate

CALL = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\n"
NOW = Limits(handshake_s=2.0, headers_s=2.0, half_open=100, connections=150)
"""Limits that a test can wait for."""

Dial = Callable[..., ssl.SSLSocket]
Open = Callable[..., socket.socket]


@pytest.fixture
def open_socket() -> Iterator[Open]:
    """Opens plain connections; every one is closed at the end."""
    opened: list[socket.socket] = []

    def opening(port: int) -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", port), timeout=20))
        return opened[-1]

    yield opening
    for one in opened:
        one.close()


@pytest.fixture
def dial(project: Any, open_socket: Open) -> Iterator[Dial]:
    """Opens connections that have shaken hands, by name."""
    opened: list[ssl.SSLSocket] = []
    contexts: dict[str, ssl.SSLContext] = {}

    def dialling(name: str = "edge-0") -> ssl.SSLSocket:
        if name not in contexts:
            contexts[name] = client_context(project.device(name))
        plain = open_socket(project.port)
        opened.append(contexts[name].wrap_socket(plain, server_hostname="127.0.0.1"))
        return opened[-1]

    yield dialling
    for one in opened:
        one.close()


def answered(connection: ssl.SSLSocket) -> bytes:
    """The status of one call, after which the connection stays open."""
    connection.sendall(CALL + b"content-length: 0\r\n\r\n")
    raw = connection.recv(2**16)
    while not raw.endswith(b"}"):
        raw += connection.recv(2**16)
    return raw.split(b" ", 2)[1]


def hung_up(connection: socket.socket, seconds: float) -> bool:
    """Whether the server ends a connection, within so many seconds."""
    connection.settimeout(max(seconds, 0.01))
    try:
        while connection.recv(2**16):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def frame(payload: bytes = b"", *, kind: int, flags: int = 0) -> bytes:
    """A frame of HTTP/2 that belongs to no stream."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags, 0, 0, 0, 0)) + payload


def watched(kit: Kit, port: int) -> tuple[grpc.Channel, Any]:
    """A stream of the process that is in, which is open."""
    credentials = grpc.ssl_channel_credentials(
        kit.authority_pem, kit.key_path.read_bytes(), kit.certificate_pem
    )
    channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials)
    calls = WakeStub(channel).Watch(wake.WatchRequest(instance=f"instance-{kit.name}"), timeout=30)  # type: ignore[no-untyped-call]
    assert next(calls).kind == wake.Call.OPEN
    return channel, calls


def test_who_is_revoked_loses_what_it_has_open(
    project: Any, serve: Any, rogue: Any, dial: Dial
) -> None:
    """The idle connection, the one with a call going on, and the stream; nobody else's."""
    with serve() as served:
        one = rogue()
        one.activate()
        other, idle, calling = dial("edge-1"), dial(), dial()
        assert answered(other) == answered(idle) == b"401"
        headers = b"".join(b"%s: %s\r\n" % (k.encode(), v.encode()) for k, v in one.headers.items())
        calling.sendall(CALL + headers + b"content-length: 1000\r\n\r\nbegun")
        channel, calls = watched(one.kit, served.listening.address.wake_port)
        with channel:
            assert not hung_up(calling, 1.2), "its sweep has passed"
            began = time.monotonic()
            project.revoke("edge-0")
            assert hung_up(idle, 6)
            assert hung_up(calling, 6)
            with contextlib.suppress(grpc.RpcError):
                assert list(calls) == []
        assert time.monotonic() - began < 6
        other.settimeout(5)
        assert answered(other) == b"401"
        assert answered(dial()) == b"403", "and it is told why, when it comes again"


def test_a_connection_without_a_stream_does_not_stay_at_the_second_port(
    project: Any, serve: Any, open_socket: Open
) -> None:
    context = client_context(project.device("edge-0"))
    context.set_alpn_protocols(["h2"])
    with serve() as served:
        plain = open_socket(served.listening.address.wake_port)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as idle:
            idle.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(kind=4))
            idle.settimeout(15)
            began, pings = time.monotonic(), 0
            with contextlib.suppress(ConnectionError), idle.makefile("rb") as stream:
                while head := stream.read(9):
                    payload = stream.read(int.from_bytes(head[:3], "big"))
                    if head[3] == 6 and not head[4] & 1:
                        idle.sendall(frame(payload, kind=6, flags=1))
                        pings += 1
            assert pings, "it shows that it lives"
            assert 3 < time.monotonic() - began < 15


def test_who_expires_loses_what_it_has_open(
    project: Any, serve: Any, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcore.crypto.roster.SKEW", timedelta(0))
    project.device("edge-0")
    folder = project.root / "edge-0"
    certificate = issue_member(
        load_key(folder / "key.pem").public_key(),
        name="edge-0",
        role="device",
        authority=project.authority,
        authority_key=project.key,
        now=project.now,
        validity=timedelta(seconds=8),
    )
    file = parse_kit_file((folder / "kit.json").read_bytes(), where="kit")
    write_kit(folder, file.model_copy(update={"certificate": pem(certificate).decode()}))
    ends = load_kit(folder).not_after.timestamp()
    project.members["edge-0"] = RosterEntry(certificate=pem(certificate).decode())
    project.write_roster()
    with serve():
        idle, other = dial(), dial("edge-1")
        assert answered(idle) == answered(other) == b"401"
        assert not hung_up(idle, ends - time.time() - 0.5)
        assert hung_up(idle, 5)
        other.settimeout(5)
        assert answered(other) == b"401"


def test_whoever_says_nothing_or_little_is_hung_up_on(
    serve: Any, project: Any, dial: Dial, open_socket: Open, caplog: pytest.LogCaptureFixture
) -> None:
    limits = Limits(handshake_s=1.0, headers_s=1.0, body_s=1.0)
    with serve(limits=limits) as served, caplog.at_level(logging.WARNING, "fedcore.server"):
        mute = [open_socket(project.port), open_socket(served.listening.address.wake_port)]
        unasking, blank, unread = dial(), dial(), dial()
        trickling = dial("edge-1")
        assert answered(unread) == b"401"
        unread.sendall(CALL + b"content-length: 9\r\n\r\n")  # refused unread, and left there
        trickling.sendall(CALL)
        began = time.monotonic()
        while time.monotonic() - began < 5:
            try:
                for one, piece in ((trickling, b"a: b\r\n"), (blank, b"\r\n"), (unread, b"x")):
                    one.sendall(piece)
            except OSError:
                break
            time.sleep(0.3)
        for one in (*mute, unasking, blank, trickling, unread):
            assert hung_up(one, 4 - (time.monotonic() - began) + 1), one
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "refused 127.0.0.1: 408: connection: no handshake within 1 s" in told
    assert "refused edge-1: 408: connection: no complete request within 1 s" in told


def test_calls_are_not_piled_up(serve: Any, dial: Dial, caplog: pytest.LogCaptureFixture) -> None:
    """Requests sent before the answers, by the thousand: they would be kept, each as it came."""
    with serve(), caplog.at_level(logging.WARNING, "fedcore.server"):
        hasty, other = dial(), dial("edge-1")
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for _ in range(100):
                hasty.sendall((CALL + b"content-length: 0\r\n\r\n") * 1000)
        assert hung_up(hasty, 5)
        assert time.monotonic() - began < 5
        assert answered(other) == b"401"
    assert "edge-0: 400: connection: more than 8 calls before the first was answered" in caplog.text


def test_one_identity_has_so_many_connections_and_no_more(
    serve: Any, dial: Dial, caplog: pytest.LogCaptureFixture
) -> None:
    limits = Limits(connections_each=4)
    with serve(limits=limits), caplog.at_level(logging.WARNING, "fedcore.server"):
        other = dial("edge-1")
        assert answered(other) == b"401"
        held = [dial() for _ in range(20)]
        for one in held[-4:]:
            assert answered(one) == b"401"
        assert all(hung_up(one, 2) for one in held[:-4])
        assert answered(other) == b"401"
    lines = [one.getMessage() for one in caplog.records if "connections" in one.getMessage()]
    assert len(lines) == 1
    assert "refused edge-0: 429: connection: more than 4 connections" in lines[0]


def test_rounds_go_on_beside_strangers_members_and_garbage(
    project: Any, serve: Any, start: Any, dial: Dial, open_socket: Open
) -> None:
    """Hundreds half open, a member that trickles, and random bytes, at both ports throughout."""
    over = threading.Event()

    def spoil(port: int, seed: int) -> None:
        rng = random.Random(seed)
        while not over.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as one:
                # Now and then what begins as TLS does, so that its parser sees the rest.
                first = rng.choice([b"", b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\n"])
                one.sendall(first + rng.randbytes(rng.randrange(1, 2000)))
                over.wait(0.01)

    run = project.run(rounds=3, cohort=2)
    with serve(run, NOW) as served:
        ports = (project.port, served.listening.address.wake_port)
        devices = [start(f"edge-{number}") for number in range(2)]
        spoilers = [threading.Thread(target=spoil, args=(port, port)) for port in ports]
        for one in spoilers:
            one.start()
        try:
            mute = [open_socket(port) for port in ports for _ in range(300)]
            slow = [dial("edge-3") for _ in range(20)]
            for caller in slow:
                caller.sendall(CALL)
            records = federate(project, served, run)
            ended = time.monotonic()
            fresh = [open_socket(port) for port in ports for _ in range(50)]
            assert all(hung_up(one, 8 - (time.monotonic() - ended)) for one in mute + slow + fresh)
        finally:
            over.set()
            for one in spoilers:
                one.join(10)
    assert [record.round for record in records] == [1, 2, 3]
    assert [record.updates for record in records] == [2, 2, 2]
    assert [device.errors for device in devices] == [[], []]


@pytest.mark.slow
def test_open_files_that_run_short_stop_no_round(
    project: Any, launch_server: Any, launch_device: Any, dial: Dial, open_socket: Open
) -> None:
    """A server that is granted 200, and five times as many connections than that."""
    few = ("sh", "-c", 'ulimit -n 200; exec "$@"', "sh")
    server = launch_server("federation.rounds=3", "federation.cohort=2", under=few)
    (wake_port,) = map(int, re.findall(r"wakes on (\d+)", server.log.read_text()))
    most = 0

    def crowd() -> None:
        nonlocal most
        for port in (project.port, wake_port):
            for _ in range(300):
                open_socket(port)
            for _ in range(20):
                with contextlib.suppress(OSError):
                    open_socket(port).sendall(b"no TLS\r\n" * 99)
        for name in ("edge-2", "edge-3"):
            for _ in range(30):
                with contextlib.suppress(OSError):  # it makes room for others
                    dial(name).sendall(CALL)
        most = max(most, len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())))

    crowd()
    devices = [launch_device(f"edge-{number}") for number in range(2)]
    for device in devices:
        device.wait_for("activated")
    crowd()
    assert server.end(90) == 0, server.log.read_text()
    assert most <= 190
    told = server.log.read_text()
    assert "Too many open files" not in told
    assert "Traceback" not in told
    assert told.count("refused ") < 30, "told of once in a while, and not each time"
    assert "Handshake failed" not in told
