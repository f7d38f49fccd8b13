"""The choice of a training method is made once, and again where rounds show that it was wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import RecordDict

from fedcore.config.simulated import Simulation
from server.simulation.virtual.state import Choice, SimulationState
from server.simulation.workers import scheduler as scheduling
from server.simulation.workers.messages import ClientOutcome, ClientRef, RoundTask
from server.simulation.workers.scheduler import WorkerScheduler

ASKED = [ClientRef(node, f"client-{node}", None) for node in range(10)]
ORDER = RoundTask("train", RecordDict())
FAST = Choice("vectorised", 0.01, 0.001, "first")
SLOW = Choice("loop", 0.01, 0.5, "again")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """Collects choices; each measurement gives the next of two results."""
    measured = iter([FAST, SLOW])
    alone = [ClientOutcome(ASKED[0], content=RecordDict())]
    monkeypatch.setattr(scheduling, "attempts", lambda *_, **__: (alone, 0.01))
    monkeypatch.setattr(scheduling, "choose", lambda *_, **__: next(measured))
    monkeypatch.setattr(scheduling, "difference", lambda *_: None)
    return []


def make(told: list[Choice], state: SimulationState | None = None) -> WorkerScheduler:
    worker: Any = SimpleNamespace(clients_in_time=lambda order, clients: clients)
    return WorkerScheduler(
        lambda: worker,
        lambda: worker,
        Simulation(workers=1),
        state=state or SimulationState(),
        on_choice=lambda choice, workers: told.append(choice),
        rounds=3,
    )


def method(scheduler: WorkerScheduler) -> str:
    return scheduler.executor_for(ORDER, ASKED)[1].method


def test_a_round_that_takes_as_long_as_measured_changes_nothing(told: list[Choice]) -> None:
    scheduler = make(told)
    for _ in range(3):
        assert method(scheduler) == "vectorised"
        scheduler.took(ORDER, 10, 0.15)  # less than twice the loop's time
    assert told == [FAST]


def test_a_choice_that_was_wrong_is_measured_again_once(told: list[Choice]) -> None:
    scheduler = make(told)
    assert method(scheduler) == "vectorised"
    scheduler.took(ORDER, 10, 5.0)
    assert method(scheduler) == "loop"
    scheduler.took(ORDER, 10, 500.0)  # a third measurement would find nothing
    assert method(scheduler) == "loop"
    assert told == [FAST, SLOW]


def test_a_resumed_run_keeps_its_choice(told: list[Choice]) -> None:
    scheduler = make(told, SimulationState(choice=FAST))
    for _ in range(2):
        assert method(scheduler) == "vectorised"
        scheduler.took(ORDER, 10, 500.0)
