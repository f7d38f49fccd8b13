"""A device that is told to stop: soon, with one exit code, whenever the signal comes."""

from __future__ import annotations

import signal
import socket
import time
from typing import Any

import pytest

from fedcore.errors import INTERRUPTED
from tests.e2e.live.asking import status, wait_for

SOON_S = 6.0


def stopped(device: Any, number: signal.Signals = signal.SIGTERM) -> int:
    """The exit code of a device that is told to stop now."""
    device.send(number)
    began = time.monotonic()
    code = int(device.end(SOON_S + 10))
    assert time.monotonic() - began < SOON_S
    assert "Traceback" not in device.log.read_text()
    return code


def with_data(project: Any, body: str) -> None:
    """Has the task ``body`` done where it reads its data."""
    changed = project.task.read_text().replace(
        "def data(client):\n", f"def data(client):\n    {body}\n"
    )
    assert changed != project.task.read_text()
    project.task.write_text(changed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_device_of_a_server_that_is_frozen_stops_soon(
    project: Any, launch_server: Any, launch_device: Any, number: signal.Signals
) -> None:
    server, device = launch_server(), launch_device("edge-0")
    device.wait_for("stream open")
    server.send(signal.SIGSTOP)
    time.sleep(0.5)
    assert stopped(device, number) == 0


def test_a_device_says_goodbye_to_a_server_that_hears_it(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    launch_server("federation.cohort=2")
    device = launch_device("edge-0")
    device.wait_for("stream open")
    wait_for(lambda: status(project)["devices"]["there"] == 1)
    assert stopped(device) == 0
    wait_for(lambda: status(project)["devices"]["there"] == 0, 1.0)


def test_a_device_that_connects_to_somebody_silent_stops_soon(
    project: Any, launch_device: Any
) -> None:
    with socket.create_server(("127.0.0.1", project.port)) as silent:
        device = launch_device("edge-0")
        connection, _ = silent.accept()
        with connection:
            assert stopped(device) == 0


@pytest.mark.parametrize("after_s", [0.0, 0.4, 0.8])
def test_a_device_that_starts_up_stops_soon(
    project: Any, launch_server: Any, launch_device: Any, after_s: float
) -> None:
    launch_server()
    device = launch_device("edge-0")
    device.wait_for("authenticated as node")
    time.sleep(after_s)  # torch is being imported
    assert stopped(device) == 0


def test_a_device_without_a_server_stops_soon(project: Any, launch_device: Any) -> None:
    device = launch_device("edge-0")
    device.wait_for("the server cannot be reached")
    assert stopped(device) == 0


def test_a_device_that_trains_stops_soon(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    with_data(project, "print('reads its data', flush=True); import time; time.sleep(60)")
    launch_server("federation.cohort=1")
    device = launch_device("edge-0")
    device.wait_for("reads its data")
    assert stopped(device) == 0


def test_a_task_that_swallows_an_interrupt_is_ended_and_the_second_one_ends_it_at_once(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    with_data(
        project,
        "print('reads its data', flush=True)\n"
        "    import time\n"
        "    while True:\n"
        "        try:\n"
        "            time.sleep(60)\n"
        "        except KeyboardInterrupt:\n"
        "            print('goes on', flush=True)",
    )
    launch_server("federation.cohort=2")
    devices = [launch_device(name) for name in ("edge-0", "edge-1")]
    for device in devices:
        device.wait_for("reads its data")
    assert stopped(devices[0]) == 0
    assert "the work in progress did not end" in devices[0].log.read_text()
    devices[1].send(signal.SIGTERM)
    devices[1].wait_for("goes on")
    began = time.monotonic()
    assert stopped(devices[1], signal.SIGINT) == INTERRUPTED
    assert time.monotonic() - began < 2.0
