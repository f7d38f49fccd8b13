"""Frozen parameters reach each device once, and its disk keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedcore.flower.fleet_client import FleetLink
from fedcore.task.definition import load_task
from fedcore.task.model import build_model
from fedcore.updates.frozen import frozen_state
from tests.e2e.live.federation import federate
from tests.e2e.live.test_live_rounds import all_awake, wait_for

NAMES = ("edge-0", "edge-1")
FROZEN = 3_000_000


def freeze(task: Path) -> None:
    """Has the task freeze 12 MB, which devices, in threads of their own, build otherwise."""
    text = task.read_text().replace("WEIGHTS = 0", f"import threading\n\nWEIGHTS = {FROZEN}")
    value = "1.0 if threading.current_thread().name.startswith('edge') else 2.0"
    text = text.replace(
        "nn.Parameter(torch.zeros(WEIGHTS))",
        f"nn.Parameter(torch.full((WEIGHTS,), {value}), requires_grad=False)",
    )
    task.write_text(text.replace("return self.net(x)", "return self.net(x * self.pad[:1])"))


@pytest.fixture
def pulled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each object that a device has pulled by itself."""
    sizes, pull = list[int](), FleetLink._pull

    def counted(self: Any, *arguments: Any) -> bytes:
        content = pull(self, *arguments)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(FleetLink, "_pull", counted)
    return sizes


def test_frozen_parameters_travel_once_and_outlive_a_device(
    project: Any, serve: Any, start: Any, pulled: list[int]
) -> None:
    freeze(project.task)
    run = project.run(rounds=3, cohort=2, evaluate_cohort=2, holdout=0.3)
    with serve(run) as served:
        devices = [start(name) for name in NAMES]
        wait_for(lambda: all_awake(served, 2), 15)
        records = federate(project, served, run)
        for device in devices:
            device.stop()
            assert device.errors == []
    assert [(record.updates, record.failed) for record in records] == [(2, 0)] * 3
    assert all(record.bytes_up == record.bytes_down < 2_000 for record in records)
    assert 2 * 4 * FROZEN < sum(pulled) < 2 * 4 * FROZEN + 60_000

    pulled.clear()
    kept = project.root / "edge-0-data" / "frozen" / "trial"
    whole = max(kept.iterdir(), key=lambda path: path.stat().st_size)
    raw = bytearray(whole.read_bytes())
    raw[-1] ^= 1
    whole.write_bytes(raw)  # one of the parts is damaged, and only that one comes again
    with serve(run) as served:
        for name in NAMES:
            start(name)
        wait_for(lambda: all_awake(served, 2), 15)
        again = federate(project, served, run)
    assert [record.updates for record in again] == [2] * 3
    assert [record.metrics for record in again] == [record.metrics for record in records]
    assert len(raw) <= sum(pulled) < 2 * 4 * FROZEN / 3


def test_the_state_of_the_server_counts(project: Any) -> None:
    """What the two tests compare: a device's own values would give another digest."""
    freeze(project.task)
    model = build_model(load_task(project.task), project.run())
    state = frozen_state(model.model)
    assert len(state.raw) > 4 * FROZEN
    assert state.sha256 != ""
