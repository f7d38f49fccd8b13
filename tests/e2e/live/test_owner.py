"""What an owner decides, on a device that runs."""

from __future__ import annotations

import signal
import time
from datetime import datetime, timedelta
from typing import Any

import pytest
import torch

from fedcore.errors import RoundFailed
from fedcore.files import sha256_hex
from server.live.operators.client import ask_local


def there(project: Any) -> int:
    devices = ask_local(project.root / "server", {"verb": "status"})["devices"]
    return int(devices["there"])


def test_outside_its_hours_a_device_does_not_come(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    now = datetime.now()
    begins, ends = (now + timedelta(hours=hours) for hours in (2, 3))
    owner = project.root / "owner.toml"
    owner.write_text(f'hours = ["{begins:%H:%M}-{ends:%H:%M}"]\n')
    project.device("edge-0")
    launch_server("federation.cohort=1")
    device = launch_device("edge-0", "--owner", str(owner))
    device.wait_for("paused by owner policy: the time is", 60)
    time.sleep(0.5)
    assert there(project) == 0
    assert "authenticated" not in device.log.read_text()


def test_a_task_that_the_owner_does_not_know_is_not_run(project: Any, launch_device: Any) -> None:
    owner = project.root / "owner.toml"
    owner.write_text(f'tasks = ["{"0" * 64}"]\n')
    project.task.write_text("open('it was run', 'w').close()\n")
    device = launch_device("edge-0", "--owner", str(owner))
    assert device.end(60) == 2
    assert sha256_hex(project.task.read_bytes()) in device.log.read_text()
    assert not (project.root / "it was run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_lacks_what_its_owner_names_does_not_start(
    project: Any, launch_device: Any
) -> None:
    owner = project.root / "owner.toml"
    for line, told in (
        ('data = "nosuch"', "there is no accessible folder"),
        ('device = "cuda"', "torch finds no such device"),
    ):
        owner.write_text(line + "\n")
        device = launch_device("edge-0", "--owner", str(owner))
        assert device.end(60) == 2
        assert told in device.log.read_text()
        assert "Traceback" not in device.log.read_text()


def test_bandwidth_is_kept_to_and_memory_is_given_back(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    project.task.write_text(project.task.read_text().replace("WEIGHTS = 0", "WEIGHTS = 10_000"))
    owner = project.root / "owner.toml"
    owner.write_text("max_bandwidth_bytes_per_s = 80_000\nfree_gpu_between_rounds = true\n")
    server = launch_server("federation.rounds=3", "federation.cohort=1")
    device = launch_device("edge-0", "--owner", str(owner))
    device.wait_for("trial train: done", 60)
    started = time.monotonic()
    assert server.end(60) == 0
    # Two further rounds of 40 kB each way, and the reply of the first.
    assert time.monotonic() - started > 2.0
    end = time.monotonic() + 30  # a device says so after the reply, with which the server ends
    while device.log.read_text().count("trial train: done") < 3 and time.monotonic() < end:
        time.sleep(0.05)
    assert device.log.read_text().count("trial train: done") == 3


def test_what_a_device_lacks_is_not_what_the_server_lacks(
    project: Any, launch: Any, launch_server: Any, launch_device: Any
) -> None:
    owner = project.root / "owner.toml"
    owner.write_text("max_memory_bytes = 1\n")
    server = launch_server("federation.rounds=1", "federation.cohort=1")
    lacking = launch_device("edge-0", "--owner", str(owner))
    assert server.end(60) == RoundFailed.exit_code
    assert "RoundFailed: round 1: 0 of 1 client sent an update" in server.log.read_text()
    lacking.send(signal.SIGKILL)
    lacking.end()
    launch_device("edge-1")
    again = launch(*server.words, "--resume")
    assert again.end(60) == 0, "it asks who is there, and not whom the round asked that failed"
    over = launch(*server.words, "--resume")
    assert over.end(60) == 0, "and there is nothing left to do"
    assert "this run is complete: its model is in global.safetensors" in over.log.read_text()
    assert (project.root / "runs" / "trial" / "global.safetensors").is_file()
