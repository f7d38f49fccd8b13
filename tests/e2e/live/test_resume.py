"""A short fault campaign, and what a server says of a run that was interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import INTERRUPTED, ConfigError

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


@pytest.mark.timeout(280)
@pytest.mark.parametrize(("servers", "devices"), [(6, 0), (0, 2)])
def test_whoever_is_killed_the_run_ends_as_if_nobody_was(
    tmp_path: Path, servers: int, devices: int
) -> None:
    kills = ["--server-kills", str(servers), "--device-kills", str(devices), "--others", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaign.run", *kills, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=270,
    )
    result = json.loads((tmp_path / "campaign.json").read_text())
    (scenario,) = result["scenarios"]
    # How long it took depends on who else uses the machine: the campaign judges that.
    assert [text for text in scenario["wrong"] if "(p95)" not in text] == [], done.stdout
    assert sum(scenario["counts"].values()) == servers + devices
    assert scenario["charges_beyond_one_a_round"] == 0


def test_an_interrupted_run_is_neither_dropped_nor_repeated_by_accident(
    project: Any, launch_server: Any, launch_device: Any, launch: Any
) -> None:
    device = launch_device("edge-0")
    server = launch_server("federation.cohort=1", "federation.rounds=100000")
    server.wait_for("round_finished", times=3)
    server.send(signal.SIGTERM)
    assert server.end() == INTERRUPTED
    before = server.log.read_text().count("round_finished")

    again = start(launch, project)
    assert again.end() == ConfigError.exit_code
    assert "go on with --resume, or begin anew with --fresh" in again.log.read_text()

    other = start(launch, project, "--resume", "--set", "client.batch_size=4")
    assert other.end() == ConfigError.exit_code
    assert "client.batch_size" in other.log.read_text()

    resumed = start(launch, project, "--resume")
    resumed.wait_for("round_finished")
    text = resumed.log.read_text()
    assert f"Resumed after round {before}." in text
    first = next(json.loads(line) for line in text.splitlines() if '"round_finished"' in line)
    assert first["round"] == before + 1
    resumed.send(signal.SIGTERM)
    assert resumed.end() == INTERRUPTED
    device.send(signal.SIGTERM)
    assert device.end() == 0


def start(launch: Any, project: Any, *arguments: str) -> Any:
    return launch(
        "server.live.commands:server",
        *("server", "start", str(project.root / "run.toml")),
        *("--identity", str(project.root / "server")),
        *("--listen", f"127.0.0.1:{project.port}", "--wake-port", "0"),
        *("--runs", str(project.root / "runs"), "--json"),
        *("--set", "federation.cohort=1", "--set", "federation.rounds=100000"),
        *arguments,
    )
