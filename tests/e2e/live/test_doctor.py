"""The doctor at both sides of a server that is or is not there."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import edge_client.doctor
import server.doctor
from fedcore.doctor import Checkup, Finding


def device(folder: Path) -> dict[str, Finding]:
    options = Checkup(kit=folder)
    return {one.check: one for one in edge_client.doctor.examine(options)}


def server_side(project: Any) -> dict[str, Finding]:
    options = Checkup(identity=project.root / "server", runs=project.root / "runs")
    return {one.check: one for one in server.doctor.examine(options)}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def test_all_is_well_on_both_sides(project: Any, launch_server: Any) -> None:
    project.device("edge-0")
    server_of = launch_server()
    found = device(project.root / "edge-0")
    assert "refused" not in server_of.log.read_text()
    assert (found["server"].verdict, found["clock"].verdict) == ("ok", "ok")
    assert found["certificate"].verdict == "warn"  # one day is left
    found = server_side(project)
    assert "a server is running: trial" in found["ports"].detail
    assert found["roster"].verdict == "warn"
    assert "edge-0" in found["roster"].detail
    assert found["audit"].detail.startswith("1 line,")
    assert {found[name].verdict for name in ("clock", "ports", "audit", "disk")} == {"ok"}


def test_a_proxy_that_cannot_be_used_is_a_finding(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.device("edge-0")
    monkeypatch.setenv("ALL_PROXY", "socks5://user:secret@proxy:1")
    found = device(project.root / "edge-0")["proxy"]
    assert found.verdict == "fail"
    assert "ALL_PROXY = 'socks5://***@proxy:1'" in found.detail
    assert "unset" in found.remedy


def test_the_last_port_has_none_after_it(project: Any) -> None:
    project.port = 65535
    project.device("edge-0")
    assert "wake-up" not in device(project.root / "edge-0")


def test_each_finding_says_what_to_do(
    project: Any, launch_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = project.root / "edge-0"
    project.device("edge-0")
    found = device(kit)  # no server
    assert found["server"].verdict == "fail"
    assert "firewalls" in found["server"].remedy
    launch_server()
    project.revoke("edge-0")
    assert "refuses this device" in device(kit)["server"].detail

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(minutes=11)

    monkeypatch.setattr(edge_client.doctor, "datetime", Wrong)
    clock = device(kit)["clock"]
    assert clock.verdict == "fail"
    assert "ahead of the server's" in clock.detail
    assert "NTP" in clock.remedy
    monkeypatch.undo()
    (kit / "key.pem").chmod(0o644)
    assert device(kit)["kit"].verdict == "fail"
    assert "kit" in device(project.root / "none")["kit"].detail


def test_the_server_side_finds_a_taken_port_a_bad_roster_and_a_changed_log(project: Any) -> None:
    with socket.create_server(("127.0.0.1", project.port)):
        assert str(project.port) in server_side(project)["ports"].detail
        assert server_side(project)["ports"].verdict == "fail"
    assert server_side(project)["ports"].verdict == "ok"
    folder = project.root / "server"
    assert "no server has run" in server_side(project)["audit"].detail
    (folder / "roster.seen").write_text('{"format":"fedcore.seen/1","version":1}')
    assert server_side(project)["audit"].verdict == "fail"
    assert "is missing, but a server has run" in server_side(project)["audit"].detail
    (folder / "drained.json").write_text('["edge-9"]')
    assert server_side(project)["drained"].verdict == "warn"
    assert "edge-9" in server_side(project)["drained"].detail
    (folder / "drained.json").write_text("{")
    assert server_side(project)["drained"].verdict == "fail"
    lines = [{"before": "1" * 64, "at": f"{datetime.now(UTC)}"}]
    (folder / "audit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "line 1 does not follow" in server_side(project)["audit"].detail
    (folder / "roster.json").write_text("{")
    assert server_side(project)["roster"].verdict == "fail"
    (folder / "kit.json").unlink()
    assert "provision server" in server_side(project)["identity"].remedy
