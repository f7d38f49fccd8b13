"""Devices that work as fast as they can, and one that calls without being asked."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest

from fedcore.errors import DeviceError
from fedcore.flower.fleet_client import FleetLink
from fedcore.flower.fleet_errors import Unreachable
from fedcore.rpc.hello import hello_of
from server.live.network.gate import Gate
from server.live.network.limits import Limits
from tests.e2e.live.federation import federate

NAMES = ("edge-0", "edge-1")


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls that came in, and those that were refused by their rate."""
    seen: Counter[str] = Counter()
    answer, keep = Gate._answer, Gate._check_rate

    async def answering(self: Gate, scope: Any, *rest: Any) -> Any:
        seen["calls"] += 1
        return await answer(self, scope, *rest)

    def keeping(self: Gate, node_id: int, *calls: int, **paid: int) -> None:
        try:
            keep(self, node_id, *calls, **paid)
        except Exception:
            seen["refused"] += 1
            raise

    monkeypatch.setattr(Gate, "_answer", answering)
    monkeypatch.setattr(Gate, "_check_rate", keeping)
    return seen


def test_rounds_without_a_pause_are_held_up_by_no_rate(
    project: Any, serve: Any, start: Any, answered: Counter[str]
) -> None:
    rounds = 40
    run = project.run(rounds=rounds, cohort=2, evaluate_cohort=2, holdout=0.3)
    # Time alone grants next to nothing: what devices need, their work grants.
    with serve(run, limits=Limits(calls_per_s=0.5, burst=60)) as served:
        for name in NAMES:
            start(name)
        records = federate(project, served, run)
    assert [record.updates for record in records] == [2] * rounds
    assert answered["refused"] == 0
    calls = answered["calls"] / (rounds * len(NAMES))
    assert 4 <= calls < 12, "small objects travel together, in training and in evaluation"


def test_a_device_that_calls_without_being_asked_is_held_to_the_rate(
    project: Any, serve: Any, answered: Counter[str]
) -> None:
    kit = project.device("edge-0")
    stop = threading.Event()
    with serve(limits=Limits(calls_per_s=20.0, burst=30)) as served:
        del served
        link = FleetLink(
            kit,
            headers=hello_of("tiny", project.task).headers("abuser"),
            stop=stop,
        )
        try:
            link.activate()
            began = time.monotonic()
            while time.monotonic() - began < 2.0:
                assert link.announced() is None
            took_s = time.monotonic() - began
        except (DeviceError, Unreachable) as error:
            pytest.fail(str(error))
        finally:
            stop.set()
            link.close()
    granted = answered["calls"] - answered["refused"]
    assert answered["refused"] > 0
    assert granted <= 30 + 20.0 * took_s + 3
