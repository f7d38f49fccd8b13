"""A short fault campaign, and what a server says of a run that was interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import INTERRUPTED, ConfigError, TaskError
from tests.campaign.run import earlier, totals

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


@pytest.mark.timeout(280)
@pytest.mark.parametrize(("servers", "devices"), [(6, 0), (0, 2)])
def test_whoever_is_killed_the_run_ends_as_if_nobody_was(
    tmp_path: Path, servers: int, devices: int
) -> None:
    kills = ["--server-kills", str(servers), "--device-kills", str(devices)]
    rest = ["--buried", "0", "--others", "0", "--hostile", "0", "--files", "0"]
    rest += ["--fuzz", "0", "--prefork", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaign.run", *kills, *rest],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=270,
    )
    result = json.loads((tmp_path / "campaign.json").read_text())
    (scenario,) = result["results"]
    # How long it took depends on who else uses the machine: the campaign's totals judge that.
    assert scenario["wrong"] == [], done.stdout
    assert scenario["same_bits"]
    assert sum(scenario["counts"].values()) == servers + devices
    # A device that dies while it trains has spent the round, and spends it again.
    assert scenario["charges_beyond_one_a_round"] <= devices


def test_results_of_the_same_code_add_up(tmp_path: Path) -> None:
    one = {"name": "server killed", "counts": {"at any time": 2}, "wrong": [], "same_bits": True}
    one |= {"resumed_s": [1.0, 2.0], "held_up_s": {"killed": [3.0]}, "back_s": []}
    found = totals([one, one | {"resumed_s": [9.0], "wrong": ["a round was lost"]}])
    both = found["server killed"]
    assert (both["faults"], both["runs"], both["counts"]) == (4, 2, {"at any time": 4})
    assert both["resumed_s"]["n"] == 3
    assert both["held_up_s, killed"]["max"] == 3.0
    assert both["wrong"] == ["a round was lost", "resumed_s: 8.30 s (p95), bound 5 s"]
    path = tmp_path / "campaign.json"
    path.write_text(json.dumps({"code": "a", "results": [one]}))
    assert earlier(path, "a") == [one]
    assert earlier(path, "b") == []


def test_a_task_that_loads_no_more_stops_the_server_before_devices_are_asked(
    project: Any, launch_server: Any, launch_device: Any, launch: Any
) -> None:
    (project.root / "helper.py").write_text("")
    project.task.write_text(f"import helper\n{project.task.read_text()}")
    device = launch_device("edge-0")
    server = launch_server("federation.cohort=1", "federation.rounds=100000")
    server.wait_for("round_finished", times=3)
    server.send(signal.SIGKILL)
    server.end()
    (project.root / "helper.py").write_text("raise ValueError('changed since')")
    again = start(launch, project, "--resume")
    assert again.end() == TaskError.exit_code
    text = again.log.read_text()
    assert "importing this task failed: ValueError: changed since" in text
    assert "listening on" in text
    assert "round_finished" not in text
    assert "Traceback" not in text
    (project.root / "helper.py").write_text("")
    start(launch, project, "--resume").wait_for("round_finished")
    assert device.process.poll() is None


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
    assert "continue with --resume, or start over with --fresh" in again.log.read_text()

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
