"""Client-level privacy over real devices: drawn, bounded, noised, counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedcore.privacy.accounting import Charge, epsilon_of

CLIENT = (
    "privacy.unit=client",
    "privacy.client.target_delta=1e-3",
    "privacy.client.noise_multiplier=2.0",
    "privacy.client.accountant=rdp",
    "federation.rounds=3",
    "federation.cohort=2",
    "federation.deadline_s=200.0",
)


@pytest.mark.slow
def test_rounds_are_counted_over_all_devices_of_the_project(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    server = launch_server(*CLIENT, name="clients")
    for name in ("edge-0", "edge-1", "edge-2"):
        launch_device(name)
    assert server.end(240) == 0, server.log.read_text()
    lines = (project.root / "runs" / "clients" / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    rounds = [event for event in told if event["event"] == "round_finished"]
    expected = [  # the project has three devices, two are expected a round
        epsilon_of([Charge(n, 2.0, 2 / 3, n)], target_delta=1e-3, accountant="rdp")
        for n in (1, 2, 3)
    ]
    assert [event["client_epsilon"] for event in rounds] == pytest.approx(expected)
    assert all(event["train_loss"] is None for event in rounds)
    assert all(event["updates"] == event["cohort"] <= 3 for event in rounds)
