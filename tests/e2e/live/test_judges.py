"""Processes: a server whose devices train, or hold back all of their data and judge."""

from __future__ import annotations

from typing import Any

import pytest

from fedcore.task.definition import load_task
from fedcore.task.model import build_model, checkpoint_bytes
from server.live.operators.client import ask_local
from tests.e2e.live.asking import status, wait_for

pytestmark = pytest.mark.slow

APART = (
    "federation.holdout=0.5",
    "federation.holdout_by=clients",
    "federation.evaluate_cohort=4",
)


def test_a_server_trains_some_devices_and_evaluates_on_the_others(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    """By their names edge-0 and edge-1 judge. Neither a judge that is away nor their number, less
    than ``evaluate_cohort``, makes a round wait."""
    names = [f"edge-{number}" for number in range(4)]
    for name in names:
        project.device(name)
    rounds = ("federation.rounds=100000", "federation.deadline_s=60")
    server = launch_server(*rounds, "federation.cohort=2", *APART)
    devices = [launch_device(name) for name in names]
    wait_for(lambda: status(project)["round"] >= 2, 60)
    ask_local(project.root / "server", {"verb": "pause"})
    wait_for(lambda: status(project)["state"] == "paused")
    last = status(project)["last"]
    assert (last["cohort"], last["updates"], last["failed"]) == (2, 2, 0)
    model = project.root / "model.safetensors"
    model.write_bytes(checkpoint_bytes(build_model(load_task(project.task), project.run())))
    found = ask_local(project.root / "server", {"verb": "evaluate", "file": str(model)})
    shown = found["evaluation"]
    assert [one["client"] for one in shown["by_client"]] == ["edge-0", "edge-1"]
    assert (shown["clients_known"], shown["examples"]) == (2, 40)
    devices[0].process.kill()
    wait_for(lambda: status(project)["devices"]["there"] == 3, 60)
    number = status(project)["round"]
    ask_local(project.root / "server", {"verb": "resume"})
    wait_for(lambda: status(project)["round"] >= number + 3, 60)
    ask_local(project.root / "server", {"verb": "stop"})
    server.end(60)
    assert "holds back all of its data" not in server.log.read_text()
