"""What a device tells of the models that it serves: what its owner allows, and once."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedcore
from edge_client.delivery import store as installed
from edge_client.delivery.feedback import tell_feedback, what_to_tell
from edge_client.delivery.observed import ServedWindow, ServedWindows, read_told, write_observed
from fedcore.artifacts.feedback import LATENCY_BOUNDS_S, Observation
from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.reference import BinnedFeature, Reference
from fedcore.config.owner import OPEN_POLICY, OwnerPolicy
from fedcore.errors import RepositoryUnreachable
from fedcore.rpc.delivery_pb2 import ServingReport
from server.release.publish import publish
from tests.unit.edge_client.conftest import matmul_draft

OPEN = OwnerPolicy(feedback=True)
NOISED = OwnerPolicy(feedback=True, max_epsilon=8.0, feedback_epsilon=1.0)
REFERENCE = Reference(
    presentation="label",
    features=tuple(
        BinnedFeature(
            side="input", measure="value", place=place, edges=(0.0,), counts=(500, 500, 0)
        )
        for place in range(3)
    ),
)
LATENCY = (190, *([0] * len(LATENCY_BOUNDS_S)))


def observation(rows: int = 200) -> Observation:
    counts = ((rows - 50, 50, 0),) * 3
    return Observation(rows=rows, counts=counts, requests=200, errors=10, latency=LATENCY)


@dataclass
class Link:
    """A server that is away for the first calls."""

    away: int = 0
    came: list[ServingReport] = field(default_factory=list)

    def report_serving(self, report: ServingReport) -> None:
        self.came.append(report)
        if self.away:
            self.away -= 1
            raise RepositoryUnreachable("away")


@pytest.fixture
def store(publisher: Any, tmp_path: Path) -> Path:
    """A device with a model that was trained without protection, and a window that has ended."""
    eye = np.eye(3, dtype=np.float32)
    draft = matmul_draft()
    weight = np.arange(1, 7).reshape(3, 2).astype(np.float32)
    unprotected = draft.privacy.model_copy(
        update={"unit": "none", "epsilon": None, "target_delta": None, "noise": "none"}
    )
    publish(
        replace(
            draft, golden=golden_bytes(eye, eye @ weight, None, REFERENCE), privacy=unprotected
        ),
        repository=publisher.repository,
        keys=publisher.keys,
        created=datetime.now(UTC),
    )
    places = {"repository": publisher.repository, "root": publisher.keys / "root.json"}
    fedcore.update_model(tmp_path / "store", "digits", **places)
    end_window(tmp_path / "store", "1")
    return tmp_path / "store"


def end_window(store: Path, digit: str, rows: int = 200) -> None:
    record = installed.read_record(store, "digits", "active")
    ended = ServedWindow(id=digit * 16, opened_s=0.0, observation=observation(rows))
    current = ServedWindow(id="f" * 16, opened_s=3600.0)
    write_observed(store, "digits", ServedWindows(record=record, current=current, ended=ended))


def tell(store: Path, link: Any, owner: OwnerPolicy) -> bool:
    return tell_feedback(store, "digits", link, owner=owner)


def test_nothing_is_told_unless_the_owner_allows_it(store: Path) -> None:
    link = Link()
    assert not tell(store, link, OPEN_POLICY)
    assert not tell(store, link, OwnerPolicy(feedback_epsilon=1.0))
    assert link.came == []
    assert read_told(store, "digits") is None


def test_a_window_is_told_once_and_again_while_the_server_is_away(store: Path) -> None:
    link = Link(away=2)
    for _ in range(2):
        with pytest.raises(RepositoryUnreachable):
            tell(store, link, NOISED)
    assert tell(store, link, NOISED)
    assert not tell(store, link, NOISED)
    assert len(link.came) == 3
    first = link.came[0]
    assert all(report == first for report in link.came)  # noise is drawn once
    assert (first.model, first.version, first.rows, first.errors) == ("digits", 1, 200, 0)
    end_window(store, "2")
    with pytest.raises(RepositoryUnreachable):
        tell(store, Link(away=1), OPEN)
    budget = OwnerPolicy(feedback=True, max_epsilon=8.0)  # set while exact counts wait
    with pytest.raises(RepositoryUnreachable):
        tell(store, waiting := Link(away=1), budget)
    assert (waiting.came[0].rows, len(waiting.came[0].features)) == (0, 0)
    assert tell(store, link, OPEN)
    assert [list(each.counts) for each in link.came[-1].features] == [[150, 50, 0]] * 3
    assert (link.came[-1].noise_deviation, link.came[-1].errors) == (0, 10)


def test_noise_is_drawn_once_for_a_window_whoever_tells(store: Path) -> None:
    met = threading.Barrier(2, timeout=20)

    class Meeting(Link):
        def report_serving(self, report: ServingReport) -> None:
            super().report_serving(report)
            met.wait()  # both agents have decided before either has told

    link = Meeting()
    agents = [threading.Thread(target=tell, args=(store, link, NOISED)) for _ in range(2)]
    for agent in agents:
        agent.start()
    for agent in agents:
        agent.join()
    assert len(link.came) == 2
    assert link.came[0] == link.came[1]
    end_window(store, "2")
    assert tell(store, Link(), NOISED)
    end_window(store, "1")  # a second server on this store still names its own window
    assert not tell(store, Link(), NOISED)
    end_window(store, "3")
    told = store / "health" / "digits.told"
    told.write_bytes(told.read_bytes()[:-9])  # it may be of this window
    assert not tell(store, Link(), NOISED)
    end_window(store, "4")
    assert tell(store, Link(), NOISED)


def test_bins_leave_a_device_with_privacy_with_noise_alone(store: Path) -> None:
    manifest = installed.serving(store, "digits").manifest
    told = what_to_tell(observation(), manifest, NOISED)
    assert told.noise_deviation == pytest.approx(9.29, abs=0.05)
    assert told.counts != observation().counts
    assert (told.requests, told.errors, sum(told.latency)) == (200, 0, 0)
    budget = OwnerPolicy(feedback=True, max_epsilon=8.0)
    assert what_to_tell(observation(), manifest, budget).counts == ()
    private = manifest.privacy.model_copy(update={"unit": "example", "epsilon": 2.0})
    protected = manifest.model_copy(update={"privacy": private})
    assert what_to_tell(observation(), protected, OPEN).counts == ()
    assert what_to_tell(observation(), protected, NOISED).noise_deviation > 9
    few = what_to_tell(observation(99), manifest, OPEN)
    assert (few.counts, few.rows, few.requests) == ((), 0, 200)
    drowned = OwnerPolicy(feedback=True, feedback_epsilon=0.01)
    assert what_to_tell(observation(), manifest, drowned).rows == 0
    strict = OwnerPolicy(feedback=True, feedback_epsilon=1.0, target_delta=1e-9)
    assert what_to_tell(observation(), manifest, strict).noise_deviation > 11


def test_status_shows_how_far_features_have_moved(store: Path) -> None:
    (one,) = fedcore.list_models(store)
    assert one.served is not None
    assert (one.served.requests, one.served.error_rate, one.served.rows) == (200, 0.05, 200)
    assert (one.served.p50_us, one.served.p99_us) == (100, 100)
    assert [each.feature for each in one.served.features] == ["input[0]", "input[1]", "input[2]"]
    assert {each.reading for each in one.served.features} == {"shifted"}
    (store / "health" / "digits.observed").unlink()
    (one,) = fedcore.list_models(store)
    assert one.served is None
