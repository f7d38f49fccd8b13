"""More devices are asked than a round needs, and the slow one is told that it is late."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_client.ledger.ledger import LEDGER
from server.live.operators.client import ask_local

SLOW = """    if client == "edge-2":
        import time
        time.sleep(6)
    return TensorDataset"""


@pytest.mark.slow
def test_the_first_updates_make_a_round_and_the_late_one_is_charged_all_the_same(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    task = project.task.read_text().replace("    return TensorDataset", SLOW)
    project.task.write_text(task)
    names = ("edge-0", "edge-1", "edge-2")
    for name in names:
        project.device(name)
    devices = {name: launch_device(name) for name in names}
    server = launch_server(
        *("federation.cohort=2", "federation.over_selection=1.5", "federation.rounds=100000"),
        *("federation.quorum=1.0", "privacy.unit=example", "privacy.noise_multiplier=1.0"),
        "privacy.max_epsilon=1000.0",
    )
    devices["edge-2"].wait_for("update rejected by server", 120)
    ask_local(project.root / "server", {"verb": "stop"})
    assert server.end(60) == 130, server.log.read_text()
    lines = (project.root / "runs" / "trial" / "metrics.jsonl").read_text().splitlines()
    told = [one for line in lines if (one := json.loads(line))["event"] == "round_finished"]
    assert {one["updates"] for one in told} == {2}
    asked = [one["cohort"] for one in told]
    assert set(asked) <= {2, 3}
    assert 3 in asked, "the first rounds may begin before all three are there, and not the others"
    # Loading its data takes the slow one six seconds, of which no round has to wait for one.
    assert sorted(one["seconds"] for one in told)[-2] < 5.0
    slow = json.loads((project.root / "edge-2" / "device" / LEDGER).read_text())
    assert len(slow["runs"]["trial"]) >= 1
