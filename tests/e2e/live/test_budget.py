"""An owner's budget on a real device, against a server that renames its run."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from edge_client.ledger.book import LEDGER, MARK
from fedcore.config.run import Privacy
from fedcore.privacy.accounting import Charge, epsilon_of

PRIVATE = (
    "privacy.unit=example",
    "privacy.noise_multiplier=1.0",
    "privacy.max_epsilon=1000.0",
    "privacy.accountant=rdp",
    "federation.cohort=1",
)
DELTA = Privacy().target_delta


def rounds(project: Any, name: str) -> list[dict[str, Any]]:
    lines = (project.root / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [told for line in lines if (told := json.loads(line))["event"] == "round_finished"]


@pytest.mark.slow
def test_another_name_and_a_copy_of_the_data_go_on_with_the_same_budget(
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
    device.wait_for("the budget allows 1 more round like the latest", 10)
    device.process.terminate()
    assert device.end(20) == 0
    (project.root / "copied").mkdir()
    owner.write_text(f'{owner.read_text()}data = "{project.root / "copied"}"\n')
    device = launch_device("edge-0", "--owner", str(owner))
    assert launch_server(*PRIVATE, name="renamed").end(90) == 0
    assert len(rounds(project, "renamed")) == 1, "the budget allows three rounds, not four"
    device.wait_for("over all runs, client 'edge-0' has spent epsilon", 5)

    # A server that asks at a larger delta, and a device whose ledger was wiped, gain nothing.
    more = launch_server(*PRIVATE, "privacy.target_delta=0.004", name="lax")
    assert more.end(90) == 5
    assert (
        "client 'edge-0': OwnersBudgetExhausted; the client's log has the details"
        in more.log.read_text()
    )
    assert "has spent epsilon" not in more.log.read_text(), "what was spent stays on the device"
    assert f"at delta {DELTA:g}" in device.log.read_text()
    device.process.terminate()
    assert device.end(20) == 0
    shutil.rmtree(project.root / "edge-0" / "device")
    (project.root / "edge-0" / MARK).unlink()
    device = launch_device("edge-0", "--owner", str(owner))
    wiped = launch_server(*PRIVATE, name="wiped")
    assert wiped.end(90) in (5, 6)
    device.wait_for("removed, replaced by an earlier copy", 5)
    assert "ledger.count says that 3 were made" in device.log.read_text()


FAILS_LATER = """
CALLS = []


def later(client):
    CALLS.append(client)
    if client == "edge-2" and len(CALLS) > 2:
        raise RuntimeError("it broke")
    return data(client)
"""


@pytest.mark.slow
def test_a_quorum_that_is_gone_with_the_budgets_ends_a_run_with_what_it_has_learnt(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    """Two of three devices may take part in two rounds; the third one breaks in the next."""
    text = project.task.read_text().replace("\n\ntask = Task(", f"\n{FAILS_LATER}\n\ntask = Task(")
    project.task.write_text(text.replace("folder: data(client)", "folder: later(client)"))
    two, three = (
        epsilon_of([Charge(1, 1.0, 1 / 3, 3)] * count, target_delta=DELTA, accountant="rdp")
        for count in (2, 3)
    )
    owner = project.root / "owner.toml"
    owner.write_text(f"max_epsilon = {(two + three) / 2}\n")
    names = ("edge-0", "edge-1", "edge-2")
    for name in names:
        project.device(name)
    server = launch_server(
        *PRIVATE[:-1],
        "federation.cohort=3",
        "federation.rounds=5",
        "federation.deadline_s=250",
        name="spent",
    )
    for name in names:
        launch_device(name, *(["--owner", str(owner)] if name != "edge-2" else []))
    assert server.end(280) == 0, server.log.read_text()
    assert [one["updates"] for one in rounds(project, "spent")] == [3, 3]
    said = (
        "Ended before round 3: the privacy budget of 2 of 3 clients asked is spent (2 of them: "
        "the owner's budget)."
    )
    assert said in server.log.read_text()
    assert (project.root / "runs" / "spent" / "global.safetensors").is_file()


@pytest.mark.slow
def test_training_that_leads_nowhere_is_charged_and_answered_like_any_other(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    """Were divergence an error, one example could decide whether the server sees it."""
    device = launch_device("edge-0")
    server = launch_server(*PRIVATE, "client.learning_rate=1e6", name="diverges")
    assert server.end(90) == 0, server.log.read_text()
    assert [one["updates"] for one in rounds(project, "diverges")] == [1, 1]
    device.process.kill()
    device.end()
    ledger = json.loads((project.root / "edge-0" / "device" / LEDGER).read_text())
    charges = [(one["round"], one["steps"]) for one in ledger["runs"]["diverges"]]
    assert charges == [(1, 3), (2, 3)]
