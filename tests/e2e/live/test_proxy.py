"""Devices and operators behind an HTTP proxy, which is their only way out."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from edge_client.doctor import examine
from fedcore.crypto.kit import load_kit
from fedcore.doctor import Checkup
from fedcore.errors import ResourceError
from server.live.operators.client import ask_remote
from tests.e2e.live.asking import status, wait_for


class ConnectProxy:
    """A proxy that knows CONNECT and nothing else, and counts what it was asked for."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.asked: list[str] = []
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.open.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(1)
            method, target, _ = head.decode().split(" ", 2)
            self.asked.append(f"{method} {target}")
            host, _, port = target.rpartition(":")
            try:
                server = socket.create_connection((host, int(port)))
            except OSError:
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
                client.close()
                return
            self.open.append(server)
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            threading.Thread(target=self._pipe, args=(server, client), daemon=True).start()
            self._pipe(client, server)

    def _pipe(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for one in (self.listener, *self.open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture
def proxy() -> Iterator[ConnectProxy]:
    made = ConnectProxy()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _nothing_is_exempt(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "ALL_PROXY"])  # gRPC itself reads neither
def test_a_device_trains_and_is_woken_through_a_proxy(
    project: Any,
    name: str,
    proxy: ConnectProxy,
    launch_server: Any,
    launch_device: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = launch_server("federation.rounds=3", "federation.cohort=1")
    wait_for(lambda: status(project))  # it answers here a moment after it listens
    wakes = status(project)["wakes"]
    monkeypatch.setenv(name, proxy.url)
    device = launch_device("edge-0")
    device.wait_for("stream open", 60)
    assert server.end(60) == 0
    assert f"CONNECT 127.0.0.1:{project.port}" in proxy.asked
    assert f"CONNECT 127.0.0.1:{wakes}" in proxy.asked
    assert device.log.read_text().count("trial train: done") == 3


def test_operators_and_the_doctor_go_through_it_too(
    project: Any, proxy: ConnectProxy, launch_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_server()
    anna, folder = project.device("anna", role="operator"), project.root / "edge-0"
    project.device("edge-0")
    monkeypatch.setenv("https_proxy", proxy.url)
    assert ask_remote(anna, {"verb": "status"})["run"] == "trial"
    findings = {one.check: one for one in examine(Checkup(kit=folder))}
    assert proxy.url.removeprefix("http://") in findings["proxy"].detail
    assert findings["server"].verdict == "ok"
    assert findings["clock"].verdict == "ok"
    assert proxy.asked.count(f"CONNECT 127.0.0.1:{project.port}") == 2
    proxy.close()
    with pytest.raises(ResourceError, match="cannot reach the server"):
        ask_remote(load_kit(project.root / "anna"), {"verb": "status"})
    findings = {one.check: one for one in examine(Checkup(kit=folder))}
    assert findings["server"].verdict == "fail"
    assert "through 127.0.0.1" in findings["server"].detail


def test_a_restarted_device_authenticates_within_seconds_of_its_launch(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    launch_server("federation.cohort=2")
    first = launch_device("edge-0")
    first.wait_for("stream open", 60)
    first.process.kill()
    first.end()
    started = time.monotonic()
    second = launch_device("edge-0")
    second.wait_for("authenticated as node", 30)
    assert time.monotonic() - started < 5.0
    second.wait_for("stream open", 60)
