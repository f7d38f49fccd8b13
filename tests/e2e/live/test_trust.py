"""What keeps a device in the project: other servers in the server's place, and renewed kits."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import edge_client.agent.loop as loop
import fedcore.flower.fleet_client as fleet_client
from fedcore.crypto.certificates import pem
from fedcore.crypto.issue import issue_member
from fedcore.crypto.keys import load_key
from fedcore.crypto.kit import Kit, load_kit, parse_kit_file, write_kit
from fedcore.errors import CertificateRefused, ConfigError, DeviceError, TrustError
from fedcore.flower.fleet_client import FleetLink
from fedcore.flower.fleet_errors import NotActivated
from fedcore.rpc.hello import hello_of
from server.live.network.limits import Limits, Refusals, Uploads
from server.live.network.presence import Presence
from server.live.network.wake import Wakeups, serve_wakeups
from server.live.operators.client import ask_remote
from tests.e2e.live.stranger import stranger


def wait_for(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def awake(served: Any) -> bool:
    return [device.awake for device in served.listening.presence.devices()] == [True]


def reissue(project: Any, name: str, *, ends_in: timedelta, issued: timedelta) -> None:
    """A certificate over the same key, issued so long ago, which ends in so long from now."""
    folder = project.root / name
    certificate = issue_member(
        load_key(folder / "key.pem").public_key(),
        name=name,
        role="device",
        authority=project.authority,
        authority_key=project.key,
        now=project.now - issued,
        validity=issued + ends_in,
    )
    file = parse_kit_file((folder / "kit.json").read_bytes(), where="kit")
    write_kit(folder, file.model_copy(update={"certificate": pem(certificate).decode()}))


@pytest.fixture(autouse=True)
def _tries_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_LAST_PAUSE_S", 0.5)


def test_a_stranger_on_the_servers_port_does_not_put_a_device_out(
    project: Any, serve: Any, start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve() as served:
        device = start("edge-0")
        wait_for(lambda: awake(served))
    with caplog.at_level(logging.WARNING, "fedcore.device"), stranger(project, tmp_path) as seen:
        wait_for(lambda: seen.count("refused") >= 5)
    assert "trusted" not in seen
    told = [record.getMessage() for record in caplog.records]
    assert sum("did not authenticate as this project's server" in line for line in told) == 1
    with serve() as served:
        wait_for(lambda: awake(served))
    assert device.errors == []


def test_a_device_that_was_let_in_once_starts_beside_a_stranger(
    project: Any, serve: Any, start: Any, tmp_path: Path
) -> None:
    with serve() as served:
        first = start("edge-0")
        wait_for(lambda: awake(served))
        first.stop()
    with stranger(project, tmp_path) as seen:
        again, new = start("edge-0"), start("edge-1")
        new.thread.join(15)
        wait_for(lambda: seen.count("refused") >= 5)
        assert again.thread.is_alive()
    (error,) = new.errors  # nobody can tell it from one whose kit is of another project
    assert isinstance(error, TrustError)
    assert "do not trust" in str(error)
    with serve() as served:
        wait_for(lambda: awake(served))


@pytest.mark.slow
def test_a_renewed_kit_is_used_without_a_restart(
    project: Any, serve: Any, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    project.device("edge-0")
    # TLS knows no allowance for clocks, and kits do.
    reissue(project, "edge-0", issued=timedelta(days=2), ends_in=timedelta(seconds=12))
    with serve() as served:
        device = start("edge-0")
        wait_for(lambda: awake(served))
    wait_for(lambda: load_kit(project.root / "edge-0").not_after.timestamp() < time.time())
    with caplog.at_level(logging.INFO, "fedcore.device"):
        with serve():  # which hangs up on it, and cannot say why
            wait_for(lambda: "this device's own certificate expired on" in caplog.text)
        reissue(project, "edge-0", issued=timedelta(0), ends_in=timedelta(days=1))
        with serve() as served:
            wait_for(lambda: awake(served))
    assert device.errors == []
    assert "certificate renewed: valid until" in caplog.text


def test_a_device_whose_certificate_runs_out_ends_and_says_so(
    project: Any, serve: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as served:
        device = start("edge-0")
        wait_for(lambda: awake(served))
    # As the clock would have it: what is on disk expired an hour ago, and what is in use, too.
    reissue(project, "edge-0", issued=timedelta(days=2), ends_in=timedelta(hours=-1))
    time.sleep(1.0)
    assert device.thread.is_alive(), "the one in use is in force, whatever lies on disk"
    monkeypatch.setattr(fleet_client, "SKEW", timedelta(days=-2))
    device.thread.join(15)
    (error,) = device.errors
    assert isinstance(error, CertificateRefused)
    assert "expired" in str(error)
    assert "fedcore client install" in str(error)


def test_another_identitys_kit_is_not_taken_up(project: Any, caplog: Any) -> None:
    kit: Kit = project.device("edge-0")
    project.device("edge-1")
    headers = hello_of("tiny", project.task).headers("one")
    link = FleetLink(kit, headers=headers, stop=threading.Event())
    try:
        for name in ("key.pem", "kit.json"):
            shutil.copy(project.root / "edge-1" / name, project.root / "edge-0" / name)
        for _ in range(3):
            assert not link.renew()
    finally:
        link.close()
    assert link.kit == kit
    assert caplog.text.count("now belongs to another identity, the device 'edge-1'") == 1


def test_a_folder_of_another_identity_is_not_used(project: Any, serve: Any, start: Any) -> None:
    with serve() as served:
        first = start("edge-0", folder="disk")
        wait_for(lambda: awake(served))
        first.stop()
        shutil.copytree(project.root / "disk", project.root / "copied")
        second = start("edge-1", folder="copied")
        second.thread.join(15)
        assert served.listening.presence.nodes() == []
    (error,) = second.errors
    assert isinstance(error, DeviceError)
    assert "pass this device's own folder with --state" in str(error)


def test_a_revoked_device_cannot_flood_the_log_through_the_stream(
    project: Any, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import grpc

    from fedcore.rpc import wake_pb2 as wake
    from fedcore.rpc.wake_pb2_grpc import WakeStub

    kit = project.device("edge-0")
    with serve() as served, caplog.at_level(logging.WARNING, "fedcore.server"):
        project.revoke("edge-0")
        target = f"127.0.0.1:{served.listening.address.wake_port}"
        credentials = grpc.ssl_channel_credentials(
            kit.authority_pem, kit.key_path.read_bytes(), kit.certificate_pem
        )
        for _ in range(5):  # a connection each: its port is another every time
            with grpc.secure_channel(target, credentials) as channel:
                for _ in range(10):
                    with pytest.raises(grpc.RpcError) as caught:
                        next(WakeStub(channel).Watch(wake.WatchRequest(instance="x")))
                    if caught.value.code() != grpc.StatusCode.UNAVAILABLE:
                        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    lines = [one.getMessage() for one in caplog.records if "refused" in one.getMessage()]
    assert len(lines) == 1
    assert "the certificate is not that of a device in force" in lines[0]


def test_a_process_that_is_not_known_is_told_so_and_the_kit_stays(project: Any, serve: Any) -> None:
    kit = project.device("edge-0")
    headers = hello_of("tiny", project.task).headers("one")
    with serve():
        link = FleetLink(kit, headers=headers, stop=threading.Event())
        try:
            with pytest.raises(NotActivated):
                link.announced()
        finally:
            link.close()
    assert link.kit is kit


def test_the_stream_listens_on_an_address_of_ipv6(project: Any) -> None:
    roster = project.server().roster()

    async def ports() -> list[int]:
        presence = Presence(lambda: None)
        uploads = Uploads(Limits(), lambda message_id: True)
        wakeups = Wakeups(presence, roster, uploads, Refusals())
        granted = {"connections": 8, "handshake_s": 5.0}
        server, port = await serve_wakeups(wakeups, project.server(), host="::1", port=0, **granted)
        with socket.create_connection(("::1", port), timeout=5):
            pass
        await server.stop(grace=None)
        again, same = await serve_wakeups(
            wakeups, project.server(), host="::1", port=port, **granted
        )
        await again.stop(grace=None)
        return [port, same]

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    first, second = asyncio.run(ports())
    assert first == second > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks5://u:secret@p:1"), ("HTTPS_PROXY", "http://p:x"), ("http_proxy", "[b")],
)
def test_a_proxy_that_cannot_be_used_is_no_traceback(
    project: Any, name: str, value: str, monkeypatch: pytest.MonkeyPatch, fedcore: Any
) -> None:
    for one in [one for one in os.environ if one.lower().endswith("_proxy")]:
        monkeypatch.delenv(one)
    monkeypatch.setenv(name, value)
    project.device("edge-0")
    anna = project.device("anna", role="operator")
    with pytest.raises(ConfigError, match=name) as caught:
        ask_remote(anna, {"verb": "status"})
    assert "secret" not in str(caught.value)
    device = ("client", "start", "--kit", "edge-0", "--task", "task.py")
    done = fedcore(*device, cwd=project.root)
    assert done.returncode == 2
    assert f"environment: {name} = " in done.stderr
    assert "Traceback" not in done.stderr
