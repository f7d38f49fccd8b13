"""Devices and servers that are killed, stopped or start again, in processes of their own."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import INTERRUPTED

NAMES = ("edge-0", "edge-1")
pytestmark = pytest.mark.slow


def rounds(log: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "round_finished"]


def slow(project: Any, seconds: float) -> None:
    """Has every device take so long to read its data, once a round."""
    text = project.task.read_text()
    line = f"    import time\n    time.sleep({seconds})\n"
    project.task.write_text(
        text.replace("    return TensorDataset", f"{line}    return TensorDataset")
    )


def test_a_run_goes_its_way_and_leaves_its_model(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    devices = [launch_device(name) for name in NAMES]
    server = launch_server("federation.cohort=2")
    assert server.end() == 0, server.log.read_text()
    assert [record["updates"] for record in rounds(server.log)] == [2, 2]
    assert (project.root / "runs/trial/global.safetensors").stat().st_size > 100
    for device in devices:
        device.send(signal.SIGTERM)
    assert [device.end() for device in devices] == [0, 0]
    assert "Traceback" not in "".join(one.log.read_text() for one in (server, *devices))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_device_that_is_gone_holds_up_its_round_for_ten_seconds_at_most(
    project: Any, launch_server: Any, launch_device: Any, number: signal.Signals
) -> None:
    slow(project, 4.0)
    devices = [launch_device(name) for name in NAMES]
    server = launch_server("federation.cohort=2", "federation.quorum=0.5", "federation.rounds=2")
    server.wait_for("round_finished")
    time.sleep(1.0)  # both train in the second round now
    started = time.monotonic()
    devices[0].send(number)
    server.wait_for("round_finished", times=2)
    assert time.monotonic() - started < 10.0
    assert server.end() == 0, server.log.read_text()
    assert [record["updates"] for record in rounds(server.log)] == [2, 1]


def test_a_device_that_was_restarted_takes_up_its_round_again(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    slow(project, 8.0)
    devices = [launch_device(name) for name in NAMES]
    server = launch_server("federation.cohort=2", "federation.rounds=1")
    for device in devices:
        device.wait_for("stream open")
    time.sleep(0.5)
    devices[0].send(signal.SIGKILL)
    devices[0].end()
    again = launch_device("edge-0")
    again.wait_for("authenticated as node", seconds=5.0)
    assert server.end(40) == 0, server.log.read_text()
    assert [record["updates"] for record in rounds(server.log)] == [2]


def test_a_device_that_dies_while_it_starts_is_missed_at_once(
    project: Any, launch_server: Any, launch_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = project.task.read_text()
    project.task.write_text(f"{_SLOW_TO_LOAD}{text}")
    server = launch_server("federation.cohort=1")
    monkeypatch.setenv("SLOW_TO_LOAD", "30")
    device = launch_device("edge-0")
    server.wait_for("device edge-0: stream open")
    assert "activated as node" not in device.log.read_text(), "its task is not loaded yet"
    device.send(signal.SIGKILL)
    assert server.wait_for("device edge-0: stream closed without a sign-off") < 2.0


_SLOW_TO_LOAD = """import os
import time

time.sleep(float(os.environ.get("SLOW_TO_LOAD", "0")))
"""


def test_without_a_cohort_every_device_takes_part(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    names = (*NAMES, "edge-2")
    for name in names:
        project.device(name)
    server = launch_server()
    for name in names:
        launch_device(name)
    assert server.end(90) == 0, server.log.read_text()
    assert [(record["cohort"], record["updates"]) for record in rounds(server.log)] == [(3, 3)] * 2
    assert "federation.cohort is unset: waiting for all 3 devices" in server.log.read_text()


def test_without_a_cohort_those_who_came_by_the_deadline_take_part(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    for name in (*NAMES, "edge-2"):
        project.device(name)
    server = launch_server("federation.deadline_s=12")
    for name in NAMES:
        launch_device(name)
    assert server.end(90) == 0, server.log.read_text()
    assert [(record["cohort"], record["updates"]) for record in rounds(server.log)] == [(2, 2)] * 2
    assert "2 of 3 devices connected within federation.deadline_s = 12" in server.log.read_text()


def test_an_evaluation_that_finds_nobody_waits(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    slow(project, 6.0)
    text = project.task.read_text()  # edge-0 is quick
    project.task.write_text(
        text.replace("time.sleep(6.0)", "time.sleep(6.0 * (client > 'edge-0'))")
    )
    devices = [launch_device(name) for name in NAMES]
    server = launch_server(
        *("federation.cohort=2", "federation.quorum=0.5", "federation.rounds=1"),
        *("federation.evaluate_cohort=1", "federation.holdout=0.3"),
    )
    devices[0].wait_for("trial train")
    for device in devices:
        device.send(signal.SIGKILL)
        device.end()
    time.sleep(8.0)  # those who are gone are waited for by training for 3 s
    assert server.process.poll() is None, server.log.read_text()
    launch_device("edge-0")
    assert server.end(60) == 0, server.log.read_text()
    (record,) = rounds(server.log)
    assert (record["updates"], record["judged_on"]) == (1, "clients")


def test_a_server_that_is_told_to_stop_stops_at_once(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    slow(project, 5.0)
    device = launch_device("edge-0")
    server = launch_server("federation.cohort=1")
    device.wait_for("stream open")
    time.sleep(0.5)
    started = time.monotonic()
    server.send(signal.SIGTERM)
    assert server.end() == INTERRUPTED
    assert time.monotonic() - started < 5.0
    assert "Traceback" not in server.log.read_text()
    assert device.process.poll() is None, "a device outlives its server, and waits for the next"
