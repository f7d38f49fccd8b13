"""A kit with several addresses of its server, of which some lead nowhere or to somebody else."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import edge_client.agent.loop as loop
import edge_client.doctor
from fedcore.crypto.kit import Kit, load_kit, parse_kit_file, write_kit
from fedcore.doctor import Checkup
from fedcore.flower.fleet_client import FleetLink
from fedcore.rpc.hello import hello_of
from tests.e2e.live.asking import status, wait_for
from tests.e2e.live.stranger import stranger

ELSEWHERE = "127.0.0.3"
"""An address for which the server has a certificate, and where it does not listen."""


@pytest.fixture(autouse=True)
def _tries_often_and_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_LAST_PAUSE_S", 0.5)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def several(project: Any, name: str, *hosts: str) -> Kit:
    """A device whose kit holds the server's port at all of these."""
    project.device(name)
    folder = project.root / name
    file = parse_kit_file((folder / "kit.json").read_bytes(), where="kit")
    servers = tuple(f"https://{host}:{project.port}" for host in hosts)
    write_kit(folder, file.model_copy(update={"servers": servers}))
    return load_kit(folder)


def awake(served: Any) -> bool:
    return [device.awake for device in served.listening.presence.devices()] == [True]


def test_an_address_that_leads_nowhere_is_passed_over(project: Any, serve: Any, start: Any) -> None:
    several(project, "edge-0", ELSEWHERE, "127.0.0.1")
    with serve() as served:
        device = start("edge-0")
        wait_for(lambda: awake(served))
    with serve() as served:  # its stream finds the way, too
        wait_for(lambda: awake(served))
    assert device.errors == []


def test_a_stranger_at_one_address_is_told_of_and_another_one_is_taken(
    project: Any, serve: Any, start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    several(project, "edge-0", ELSEWHERE, "127.0.0.1")
    with (
        caplog.at_level(logging.WARNING, "fedcore.device"),
        stranger(project, tmp_path, host=ELSEWHERE) as seen,
    ):
        device = start("edge-0")  # at first contact: its server may come yet
        wait_for(lambda: seen.count("refused") >= 3)
        assert device.thread.is_alive()
        with serve() as served:
            wait_for(lambda: awake(served))
    assert "trusted" not in seen
    told = [record.getMessage() for record in caplog.records]
    passed = [line for line in told if "Trying the kit's other addresses" in line]
    assert len(passed) == 1
    assert f"https://{ELSEWHERE}:{project.port} (" in passed[0]
    assert device.errors == []


def test_a_kit_of_which_every_address_leads_to_strangers_is_refused(
    project: Any, start: Any, tmp_path: Path
) -> None:
    several(project, "edge-0", ELSEWHERE, "127.0.0.1")
    with (
        stranger(project, tmp_path / "one", host=ELSEWHERE),
        stranger(project, tmp_path / "two"),
    ):
        device = start("edge-0")
        device.thread.join(15)
    (error,) = device.errors
    assert ELSEWHERE in str(error)
    assert "127.0.0.1" in str(error)
    assert "do not trust" in str(error)


def test_the_address_that_led_to_the_server_stays_the_first_one(
    project: Any, serve: Any, tmp_path: Path
) -> None:
    kit = several(project, "edge-0", ELSEWHERE, "localhost", "127.0.0.1")
    headers = hello_of("tiny", project.task).headers("one")
    with serve():
        link = FleetLink(kit, headers=headers, stop=threading.Event())
        try:
            assert link.address(0) == kit.servers[0]
            link.activate()
            assert [link.address(turn) for turn in range(4)] == [
                *kit.servers[1:],
                *kit.servers[:2],
            ]
            with stranger(project, tmp_path, host=ELSEWHERE) as seen:
                link.heartbeat(1.0)
            assert seen == []
        finally:
            link.close()


def test_the_doctor_looks_at_each_address(
    project: Any, launch_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = several(project, "edge-0", ELSEWHERE, "127.0.0.1")

    def servers() -> list[tuple[str, str]]:
        found = edge_client.doctor.examine(Checkup(kit=kit.folder))
        return [(one.verdict, one.detail) for one in found if one.check in ("server", "proxy")]

    _, *nobody = servers()
    assert [verdict for verdict, _ in nobody] == ["fail", "fail"]
    launch_server()
    _, first, second = servers()
    assert first[0] == "warn"
    assert f"{ELSEWHERE}:{project.port}: " in first[1]
    assert second == (
        "ok",
        f"127.0.0.1:{project.port} answers over TLS 1.3, both sides authenticated",
    )
    monkeypatch.setenv("ALL_PROXY", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    proxies, first, second = servers()
    assert proxies[1] == (
        f"127.0.0.1:9 to https://{ELSEWHERE}:{project.port}, "
        f"none to https://127.0.0.1:{project.port}"
    )
    assert "through 127.0.0.1:9" in first[1]
    assert second[0] == "ok"


def test_what_grpc_itself_would_say_of_a_stranger_is_not_printed(
    project: Any, launch_server: Any, launch_device: Any, tmp_path: Path
) -> None:
    server, device = launch_server(), launch_device("edge-0")
    device.wait_for("stream open", times=2)  # the second one is opened again where it ends
    wakes = status(project)["wakes"]
    server.send(signal.SIGKILL)
    server.end()
    with stranger(project, tmp_path, port=wakes) as seen:
        wait_for(lambda: "refused" in seen)
        device.wait_for("the server cannot be reached")
    lines = device.log.read_text().splitlines()
    assert [line for line in lines if ".cc:" in line] == []
    assert len(lines) < 10
