"""The agent that keeps a device's models current, and what it does when a version turns bad."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_client.delivery import follow as agent
from edge_client.delivery import held
from edge_client.delivery import store as installed
from edge_client.delivery.clock import stale_since
from edge_client.delivery.follow import AgentState, Following, check_all, follow, look
from edge_client.delivery.health import (
    HealthBaseline,
    HealthCheck,
    ServedCounts,
    reason_to_return,
    write_served,
)
from edge_client.delivery.network import DeliveryEndpoint, DeliveryLink
from edge_client.delivery.observed import ServedWindow, ServedWindows, write_observed
from edge_client.delivery.outbox import PendingReport, put_report, send_reports
from edge_client.delivery.places import ReleasePlace
from edge_client.inference.process import ModelLimits
from fedcore.artifacts.feedback import LATENCY_BOUNDS_S, Observation
from fedcore.config.owner import OwnerPolicy
from fedcore.errors import RepositoryUnreachable
from fedcore.rpc.delivery_pb2 import DeviceReport, ServingReport
from tests.delivering import HOST, Delivering


def following(world: Any, place: ReleasePlace | None = None) -> Following:
    return Following(
        place=place or ReleasePlace(repository=str(world.repository)),
        store=world.store,
        models=("digits",),
        root=(world.keys / "root.json").read_bytes(),
        threads=1,
        limits=ModelLimits(),
        look_s=3600.0,
        health_s=3600.0,
    )


@pytest.fixture
def _linked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' process imports gRPC before anything: its TLS is that of all tests."""
    monkeypatch.setattr("edge_client.delivery.places.require_tls_1_3", lambda: None)
    monkeypatch.setattr(agent, "_LEAST_S", 0.05)
    monkeypatch.setattr(agent, "_FIRST_S", 0.2)


@contextmanager
def running(what: Following) -> Iterator[AgentState]:
    state = AgentState()
    thread = threading.Thread(target=follow, args=(what, state))
    thread.start()
    try:
        yield state
    finally:
        state.stop.set()
        state.changed.set()
        thread.join(60)
        assert not thread.is_alive()


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def active(world: Any) -> int:
    return installed.read_record(world.store, "digits", "active").version


@pytest.mark.usefixtures("_linked")
def test_a_running_agent_installs_what_is_published_and_reports_it(
    world: Any, tmp_path: Path
) -> None:
    project, came = Delivering(tmp_path / "project"), list[Any]()
    kit = project.device("edge-1")

    def on_report(member: Any, report: DeviceReport) -> None:
        came.append((member.name, report.version, report.outcome))

    with project.served(world.repository, on_report) as port:
        place = ReleasePlace(server=f"{HOST}:{port}", kit=kit)
        with running(following(world, place)):
            world.publish(2.0)
            until(lambda: active(world) == 2, "the release never came")
            until(lambda: bool(came), "the report never came")
    assert came == [("edge-1", 2, DeviceReport.ACTIVATED)]
    assert world.answers() == 2.0


@pytest.mark.usefixtures("_linked")
def test_an_agent_whose_server_is_away_keeps_serving_and_goes_on_when_it_is_back(
    world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = Delivering(tmp_path / "project")
    kit = project.device("edge-1")
    with project.served(world.repository) as port:
        pass
    what = following(world, ReleasePlace(server=f"{HOST}:{port}", kit=kit))
    assert not look(what, AgentState())
    assert "offline" in caplog.text
    assert world.answers() == 1.0
    world.publish(2.0)
    put_report(world.store, PendingReport(model="digits", version=1, outcome="activated"))
    came: list[Any] = []
    with project.served(world.repository, lambda *told: came.append(told)) as port:
        what = replace(what, place=ReleasePlace(server=f"{HOST}:{port}", kit=kit))
        assert look(what, AgentState())
        with DeliveryLink(kit, DeliveryEndpoint(HOST, port)) as link:
            send_reports(world.store, link)
            send_reports(world.store, link)  # nothing is left
    assert [report.version for _, report in came] == [1, 2]
    assert world.answers() == 2.0


def test_pending_reports_survive_a_server_that_is_away(world: Any) -> None:
    class Away:
        def report(self, report: DeviceReport) -> None:
            raise RepositoryUnreachable("away")

    for version in range(1, 41):
        put_report(world.store, PendingReport(model="digits", version=version, outcome="refused"))
    with pytest.raises(RepositoryUnreachable):
        send_reports(world.store, Away())  # type: ignore[arg-type]
    got: list[int] = []

    class Back:
        def report(self, report: DeviceReport) -> None:
            got.append(report.version)

    send_reports(world.store, Back())  # type: ignore[arg-type]
    assert got == list(range(9, 41))  # the latest 32


def test_a_version_whose_health_falls_is_left_for_good(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish(2.0)
    what, state = following(world), AgentState()
    assert look(what, state)
    assert world.answers() == 2.0
    record = installed.read_record(world.store, "digits", "active")
    fine = HealthCheck(golden_error=0.0, p50_us=10.0)
    monkeypatch.setattr(agent, "check_health", lambda version, **more: fine)
    errors = 0
    check_all(what, state)
    for check in range(3):
        assert world.answers() == 2.0, f"returned after {check} checks"
        errors += 10
        write_served(
            world.store, "digits", ServedCounts(record=record, requests=10 * errors, errors=errors)
        )
        check_all(what, state)
    assert world.answers() == 1.0
    for _ in range(3):  # it stays there, whatever the agent or a person's cron job does
        assert look(what, state)
        assert world.update().held == (
            "version 2 was returned: 10 of 100 requests failed in the model"
        )
        check_all(what, state)
        assert world.answers() == 1.0
    world.publish(3.0)
    assert look(what, state)
    assert world.answers() == 3.0
    assert held.read_held(world.store, "digits") is None


def test_a_return_that_is_interrupted_is_finished(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish(2.0)
    world.update()

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(installed, "write_slot", killed)
        with pytest.raises(KeyboardInterrupt):
            held.return_to_previous(world.store, "digits", "slow")
    assert world.answers() == 2.0
    assert look(following(world), AgentState())
    assert world.answers() == 1.0


def test_a_version_that_fails_its_self_test_is_fetched_once(
    world: Any, draft: Callable[..., Any]
) -> None:
    from datetime import UTC, datetime

    from server.release.publish import publish

    bad = replace(draft(2.0), golden=draft(3.0).golden)
    publish(bad, repository=world.repository, keys=world.keys, created=datetime.now(UTC))
    what, state = following(world), AgentState()
    assert look(what, state)
    found = held.read_held(world.store, "digits")
    assert found is not None
    assert (found.outcome, found.record.version) == ("refused", 2)
    files = world.target("model.onnx")
    files.unlink()  # it would be missed
    assert look(what, state)
    assert world.answers() == 1.0


BASELINE = HealthBaseline(
    record=installed.Record(version=1, manifest_sha256="0" * 64), golden_error=0.0, p50_us=10.0
)


@pytest.mark.parametrize(
    ("found", "before", "served", "returns"),
    [
        (HealthCheck(0.0, 10.0), None, (0, 0), False),
        (HealthCheck(0.0, 29.0), None, (0, 0), False),
        (HealthCheck(0.0, 31.0), None, (0, 0), True),
        (HealthCheck(0.0, 31.0), HealthCheck(0.0, 20.0), (0, 0), False),  # the device is busy
        (HealthCheck(0.0, 31.0), HealthCheck(0.0, 10.0), (0, 0), True),
        (HealthCheck(0.0, 10.0), None, (19, 19), False),  # too few to say
        (HealthCheck(0.0, 10.0), None, (100, 5), False),
        (HealthCheck(0.0, 10.0), None, (100, 6), True),
        (HealthCheck(None, None, "differs"), None, (0, 0), True),
    ],
)
def test_what_a_device_returns_for(
    found: HealthCheck, before: HealthCheck | None, served: tuple[int, int], returns: bool
) -> None:
    assert (reason_to_return(BASELINE, found, before, served) is not None) == returns


def test_a_device_whose_release_ran_out_says_so(world: Any) -> None:
    from datetime import UTC, datetime, timedelta

    trust = world.store / "trust"
    assert stale_since(trust) is None
    assert stale_since(trust, datetime.now(UTC) + timedelta(days=8)) is not None


@pytest.mark.usefixtures("_linked")
def test_counts_of_what_is_served_arrive_if_the_owner_allows_it(world: Any, tmp_path: Path) -> None:
    project, came = Delivering(tmp_path / "project"), list[Any]()
    kit = project.device("edge-1")
    record = installed.read_record(world.store, "digits", "active")
    latency = (150, *([0] * len(LATENCY_BOUNDS_S)))
    counts = ((100, 50, 0), (150, 0, 0))
    window = ServedWindow(
        id="a" * 16,
        opened_s=0.0,
        observation=Observation(rows=150, counts=counts, requests=150, latency=latency),
    )
    write_observed(
        world.store, "digits", ServedWindows(record=record, current=window, ended=window)
    )
    with project.served(world.repository, lambda _, report: came.append(report)) as port:
        what = following(world, ReleasePlace(server=f"{HOST}:{port}", kit=kit))
        with running(replace(what, owner=OwnerPolicy(feedback=True))):
            until(lambda: bool(came), "the counts never came")
    assert [type(each) for each in came] == [ServingReport]
    assert (came[0].rows, came[0].requests) == (150, 150)
    assert tuple(tuple(each.counts) for each in came[0].features) == counts
