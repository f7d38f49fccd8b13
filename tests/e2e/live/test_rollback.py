"""A list of members as it was before somebody was revoked, put back under a server."""

from __future__ import annotations

import signal
import time
from typing import Any

import server.doctor
from fedcore.crypto.roster_seen import SEEN, seen_version
from fedcore.doctor import Checkup


def test_a_server_does_not_start_with_an_older_roster(
    project: Any, launch: Any, launch_server: Any
) -> None:
    folder = project.root / "server"
    project.device("edge-0")
    before = (folder / "roster.json").read_bytes()
    first = launch_server()
    project.revoke("edge-0")
    end = time.monotonic() + 20
    while seen_version(folder / SEEN) < project.version:
        assert time.monotonic() < end
        time.sleep(0.05)
    first.send(signal.SIGTERM)
    assert first.end() == 130
    (folder / "roster.json").write_bytes(before)
    again = launch(
        "server.live.commands:server",
        *("server", "start", "run.toml", "--identity", "server", "--resume"),
        *("--listen", f"127.0.0.1:{project.port}", "--wake-port", "0"),
    )
    assert again.end(60) == 10, again.log.read_text()
    said = f"version {project.version - 1}, but version {project.version} was in force"
    assert said in again.log.read_text()
    assert "listening on" not in again.log.read_text()
    options = Checkup(identity=folder, runs=project.root / "runs")
    found = {one.check: one for one in server.doctor.examine(options)}
    assert found["roster"].verdict == "fail"
    assert said in found["roster"].detail
