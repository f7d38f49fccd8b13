"""An owner's budget on a real device, against a server that names its run anew."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_client.node.ledger import LEDGER
from fedcore.config import Privacy
from fedcore.privacy.accounting import Charge, epsilon_of

PRIVATE = (
    "privacy.unit=example",
    "privacy.noise_multiplier=1.0",
    "privacy.max_epsilon=1000.0",
    "federation.cohort=1",
)
DELTA = Privacy().target_delta


def rounds(project: Any, name: str) -> list[dict[str, Any]]:
    lines = (project.root / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [told for line in lines if (told := json.loads(line))["event"] == "round_finished"]


@pytest.mark.slow
def test_a_run_with_another_name_goes_on_with_the_same_budget(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    round_of = Charge(1, 1.0, 1 / 3, 3)  # 20 examples in batches of 8
    three, four = (
        epsilon_of([round_of] * count, target_delta=DELTA, accountant="rdp") for count in (3, 4)
    )
    owner = project.root / "owner.toml"
    owner.write_text(f"max_epsilon = {(three + four) / 2}\n")
    device = launch_device("edge-0", "--owner", str(owner))

    assert launch_server(*PRIVATE, name="first").end(90) == 0
    assert len(rounds(project, "first")) == 2
    assert launch_server(*PRIVATE, name="renamed").end(90) == 0
    assert len(rounds(project, "renamed")) == 1, "the budget allows three rounds, not four"
    device.wait_for("over all runs client 'edge-0' has spent epsilon", 5)

    # A server that asks at a larger delta, and a device whose ledger was wiped, gain nothing.
    more = launch_server(*PRIVATE, "privacy.target_delta=0.04", name="lax")
    assert more.end(90) == 5
    assert "over all runs client 'edge-0' has spent epsilon" in more.log.read_text()
    assert f"at delta {DELTA:g}" in more.log.read_text()
    device.process.terminate()
    assert device.end(20) == 0
    shutil.rmtree(project.root / "edge-0" / "device")
    device = launch_device("edge-0", "--owner", str(owner))
    wiped = launch_server(*PRIVATE, name="wiped")
    assert wiped.end(90) == 6
    assert "it was removed, or put back as it was before" in wiped.log.read_text()
    assert "ledger.mark" in device.log.read_text()


@pytest.mark.slow
def test_training_that_fails_after_it_was_charged_stays_charged(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    device = launch_device("edge-0")
    server = launch_server(*PRIVATE, "client.learning_rate=1e38", name="diverges")
    assert server.end(90) == 6
    assert "not finite" in server.log.read_text()
    device.process.kill()
    device.end()
    (charge,) = json.loads((project.root / "edge-0" / "device" / LEDGER).read_text())["runs"][
        "diverges"
    ]
    given = os.environ.get("FEDCORE_DATA")
    data = str(Path(given).resolve()) if given else ""
    assert (charge["round"], charge["steps"], charge["data"]) == (1, 3, data)
