"""A newly activated version answers from then on; no answer is lost or mixed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from edge_client.delivery.health import read_served
from edge_client.delivery.store import read_record
from edge_client.serving.batching import QueueLimits
from edge_client.serving.models import Models
from fedcore.errors import DeviceError, DiskFull, RequestRefused
from tests.serving import WIDTH, Product, activate, active, local, open_product, running, store_of


def models(store: Path, **more: object) -> Models:
    return Models(store, **{"names": None, "opener": open_product, "limits": QueueLimits(), **more})  # type: ignore[arg-type]


def test_what_is_activated_takes_over_and_a_new_model_appears(tmp_path: Path) -> None:
    served = models(store_of(tmp_path, {"product": 1}))
    served.open()
    assert served.refresh() == []
    activate(tmp_path, "product", 2)
    activate(tmp_path, "other", 5)
    assert served.refresh() == [
        "other: version 5 answers",
        "product: version 2 answers in place of 1",
    ]
    assert served.get("product").version().version == 2
    with pytest.raises(RequestRefused, match="version 1 is not served, version 2 is"):
        served.get("product", "1")


def test_a_version_that_cannot_be_opened_leaves_the_one_before_in_place(tmp_path: Path) -> None:
    def opener(store: Path, name: str) -> Product:
        if active(store, name) == 2:
            raise DeviceError("version 2 is broken")
        return open_product(store, name)

    served = models(store_of(tmp_path, {"product": 1}), opener=opener)
    served.open()
    activate(tmp_path, "product", 2)
    assert served.refresh() == ["product: version 2 is broken"]
    assert served.refresh() == []
    assert served.get("product").version().version == 1
    assert [(row.state, row.reason) for row in served.index()] == [("READY", "version 2 is broken")]
    activate(tmp_path, "product", 3)
    assert served.refresh() == ["product: version 3 answers in place of 1"]


@pytest.mark.parametrize("fault", [DeviceError("no memory"), OSError("no memory")])
def test_a_version_that_could_not_be_opened_is_tried_again(
    tmp_path: Path, fault: Exception
) -> None:
    now_s, tries = [0.0], [0]

    def opener(store: Path, name: str) -> Product:
        if active(store, name) == 2:
            tries[0] += 1
            if tries[0] <= 3:
                raise fault
        return open_product(store, name)

    served = models(store_of(tmp_path, {"product": 1}), opener=opener, clock=lambda: now_s[0])
    served.open()
    activate(tmp_path, "product", 2)
    assert len(served.refresh()) == 1
    looks = [(1.9, 1), (2.1, 2), (6.0, 2), (6.2, 3), (14.0, 3)]
    for now_s[0], expected in looks:
        assert served.refresh() == []
        assert tries[0] == expected
    now_s[0] = 14.4
    assert served.refresh() == ["product: version 2 answers in place of 1"]
    assert served.index()[0].reason == ""


def test_what_a_version_answered_is_told_of_no_other(tmp_path: Path) -> None:
    def opener(store: Path, name: str) -> Product:
        if active(store, name) == 2:
            raise DeviceError("version 2 is broken")
        return open_product(store, name)

    served = models(store_of(tmp_path, {"product": 1}), opener=opener)
    served.open()

    def told() -> dict[int, tuple[int, int]]:
        served.tell()
        records = (read_record(tmp_path, "product", "active"), one)
        return {each.version: read_served(tmp_path, "product", each) for each in records}

    one = read_record(tmp_path, "product", "active")
    metrics = served.get("product").metrics
    metrics.failed(RequestRefused("the model failed", "failed"))
    activate(tmp_path, "product", 2)
    served.refresh()
    assert told() == {2: (0, 0), 1: (1, 1)}
    activate(tmp_path, "product", 3)
    served.refresh()
    for _ in range(2):
        metrics.failed(RequestRefused("the model failed", "failed"))
    assert told()[3] == (2, 2)


def test_what_could_not_be_told_is_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise DiskFull("the disk has no room.")

    served = models(store_of(tmp_path, {"product": 1}))
    served.open()
    served.get("product").metrics.failed(RequestRefused("the model failed", "failed"))
    with monkeypatch.context() as patch:
        patch.setattr("edge_client.serving.models.write_served", full)
        served.tell()
    served.tell()
    record = read_record(tmp_path, "product", "active")
    assert read_served(tmp_path, "product", record) == (1, 1)


def test_an_empty_store_and_a_named_model_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no model is installed"):
        models(tmp_path).open()
    with pytest.raises(RequestRefused, match="'absent' is not served now"):
        models(store_of(tmp_path, {"product": 1}), names=("absent",)).open()


def test_swaps_under_load_lose_and_mix_nothing(tmp_path: Path) -> None:
    versions, store = 12, store_of(tmp_path, {"product": 1})
    faults: list[object] = []
    seen: set[int] = set()
    over = threading.Event()

    def load(address: str, first: float) -> None:
        x = np.linspace(first, first + 1, WIDTH, dtype=np.float32)[None]
        tensor = triton.InferInput("input", [1, WIDTH], "FP32")
        tensor.set_data_from_numpy(x)
        with triton.InferenceServerClient(address) as client:
            while not over.is_set():
                try:
                    result = client.infer("product", [tensor])
                    version = int(result.get_response().model_version)
                    np.testing.assert_array_equal(result.as_numpy("output"), local(x, version))
                    seen.add(version)
                except Exception as error:  # kept for the test's thread
                    faults.append(error)
                    return

    with running(store) as server:
        threads = [threading.Thread(target=load, args=(server.grpc, at)) for at in (0.1, 0.5, 0.9)]
        for thread in threads:
            thread.start()
        with triton.InferenceServerClient(server.grpc) as client:
            for version in range(2, versions + 1):
                activate(store, "product", version)
                while not client.is_model_ready("product", str(version)):
                    over.wait(0.01)
        over.set()
        for thread in threads:
            thread.join()
    assert faults == []
    assert versions in seen | {versions}
    assert len(seen) > versions // 2
