from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedcore
from edge_client.delivery.store import read_record
from edge_client.live import LiveModel
from fedcore.files import write_json

X = np.eye(3, dtype=np.float32)
WEIGHT = np.arange(1, 7, dtype=np.float32).reshape(3, 2)


@pytest.fixture
def store(publisher: Any, tmp_path: Path) -> Path:
    """Versions 1 and 2 of the model, of factors 1 and 2; the second is active."""
    for factor in (1.0, 2.0):
        publisher.publish(factor)
        fedcore.update_model(
            tmp_path / "store",
            "digits",
            repository=publisher.repository,
            root=publisher.keys / "root.json",
        )
    return tmp_path / "store"


def activator(store: Path) -> Callable[[int], None]:
    """What activates a version that the store holds, as an update does at its end."""
    records = {
        2: read_record(store, "digits", "active"),
        1: read_record(store, "digits", "previous"),
    }

    def activate(version: int) -> None:
        record = records[version].model_dump(exclude_defaults=True)
        write_json(store / "models/digits/active", record)

    return activate


def wait_until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_it_moves_to_the_version_that_becomes_active(store: Path) -> None:
    activate = activator(store)
    live = fedcore.follow_model(store, "digits")
    assert (live.current.version, live.fault) == (2, "")
    assert not live.refresh()
    before = live.current
    activate(1)
    assert live.current.version == 2  # not before it is loaded
    assert live.refresh()
    answer = live.run({"x": X})
    assert answer.version == live.current.version == 1
    np.testing.assert_array_equal(answer.outputs["y"], WEIGHT)
    np.testing.assert_array_equal(before.predict(X), 2 * WEIGHT)  # it stays with its version
    live.close()


def test_a_version_that_cannot_be_loaded_leaves_the_one_before(store: Path) -> None:
    activate = activator(store)
    live = fedcore.follow_model(store, "digits")
    activate(1)
    model = store / "models/digits/1/model.onnx"
    good = model.read_bytes()
    model.write_bytes(b"x")
    assert not live.refresh()
    assert "it has changed since it was installed" in live.fault
    np.testing.assert_array_equal(live.current.predict(X), 2 * WEIGHT)
    (store / "models/digits/active").write_text("half a rec")
    assert not live.refresh()
    assert "not the version and digest that were written" in live.fault
    np.testing.assert_array_equal(live.current.predict(X), 2 * WEIGHT)
    activate(2)
    assert not live.refresh()
    assert live.fault == ""
    model.write_bytes(good)
    activate(1)
    assert live.refresh()
    live.close()


def test_no_call_is_lost_or_answered_by_a_mixture_while_versions_change(store: Path) -> None:
    activate = activator(store)
    answered = {1: 0, 2: 0}
    wrong: list[Any] = []
    stop = threading.Event()

    def ask(live: LiveModel, rows: int) -> None:
        batch = np.tile(X[1], (rows, 1))
        while not stop.is_set():
            try:
                answer = live.run({"x": batch})
                expected = answer.version * np.tile(WEIGHT[1], (rows, 1))
                if not np.array_equal(answer.outputs["y"], expected):
                    wrong.append(answer)
                answered[answer.version] += 1
            except Exception as error:  # the test's finding
                wrong.append(error)

    with fedcore.follow_model(store, "digits") as live:
        asking = [threading.Thread(target=ask, args=(live, rows)) for rows in (1, 1, 7)]
        for thread in asking:
            thread.start()
        for version in (1, 2, 1, 2):
            before = answered[version]
            activate(version)
            wait_until(lambda v=version: live.current.version == v)  # type: ignore[misc]
            wait_until(lambda v=version, n=before: answered[v] > n + 100)  # type: ignore[misc]
        stop.set()
        for thread in asking:
            thread.join()
    assert not wrong
