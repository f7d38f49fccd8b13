"""Rows that are served fall into bins, in windows that survive a restart and end with a version."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.delivery.observed import WINDOW_S, read_observed
from edge_client.delivery.store import Record
from edge_client.serving.batching import QueuedRequest, QueueLimits
from edge_client.serving.models import Models
from edge_client.serving.observing import MAX_BYTES, MAX_WAITING_ROWS, Observer, Sampler
from fedcore.artifacts.feedback import LATENCY_BOUNDS_S, Observation
from fedcore.artifacts.reference import BinnedFeature, Reference
from tests.serving import WIDTH, Product, activate, active, running, store_of

RECORD = Record(version=1, manifest_sha256="a" * 64)
NOTHING = Observation(latency=(0,) * (len(LATENCY_BOUNDS_S) + 1))


def reference(place: int = 0) -> Reference:
    value = BinnedFeature(
        side="input", measure="value", place=place, edges=(0.0, 1.0), counts=(50, 40, 30, 0)
    )
    decided = BinnedFeature(
        side="output", measure="class", edges=(0.5, 1.5), counts=(40, 40, 40, 0)
    )
    return Reference(presentation="label", features=(value, decided))


def answered(requests: int) -> Observation:
    latency = (requests, *NOTHING.latency[1:])
    return Observation(requests=requests, latency=latency)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def observer(store: Path, clock: Clock | None = None, **more: Any) -> Observer:
    arguments = {"record": RECORD, "reference": reference(), "totals": NOTHING} | more
    return Observer(store, "product", clock=clock or Clock(), **arguments)


def samples(*firsts: float) -> list[Any]:
    sampler, version = Sampler(), Product()
    for first in firsts:
        inputs = {"input": np.full((1, WIDTH), first, np.float32)}
        sampler.add(version, inputs, version.run(inputs))
    return sampler.take()


def test_rows_fall_into_the_bins_of_the_reference(tmp_path: Path) -> None:
    one = observer(tmp_path)
    one.count(samples(-1.0, 0.5, 0.5, 2.0), answered(4))
    one.count(samples(3.0), answered(5))
    found = one.observed.current.observation
    assert (found.rows, found.requests, found.errors) == (5, 5, 0)
    assert found.counts == ((1, 2, 2, 0), (1, 0, 4, 0))
    assert one.psi() is None
    for _ in range(20):
        one.count(samples(*[9.0] * 5), answered(105))
    index = one.psi()
    assert index is not None
    assert index > 0.25


def test_a_window_goes_on_after_a_restart_and_ends_with_the_version(tmp_path: Path) -> None:
    one = observer(tmp_path)
    one.count(samples(0.5), answered(1))
    one.save()
    again = observer(tmp_path)
    again.count(samples(0.5), answered(1))
    assert again.observed.current.observation.rows == 2
    assert again.observed.current.id == one.observed.current.id
    newer = Record(version=2, manifest_sha256="b" * 64)
    assert observer(tmp_path, record=newer).observed.current.observation.rows == 0
    assert observer(tmp_path, reference=None).observed.current.observation.rows == 0
    (tmp_path / "health" / "product.observed").write_bytes(b"{")
    assert observer(tmp_path).observed.current.observation.rows == 0


def test_a_window_ends_after_its_time_with_rows_enough(tmp_path: Path) -> None:
    clock = Clock()
    one = observer(tmp_path, clock)
    one.count(samples(*[0.5] * 99), answered(99))
    clock.now_s += 2 * WINDOW_S
    one.count([], answered(99))
    assert one.observed.ended is None
    one.count(samples(0.5), answered(100))
    assert one.observed.ended is not None
    assert one.observed.ended.observation.rows == 100
    assert one.observed.current.observation == Observation()
    one.count(samples(*[0.5] * 150), answered(250))
    assert one.observed.latest == one.observed.current
    clock.now_s -= 10 * WINDOW_S  # set back: the window must not stay open for as long
    one.count([], answered(250))
    assert one.observed.ended.observation.rows == 150


def test_what_waits_to_be_counted_is_bounded() -> None:
    sampler, version = Sampler(), Product()
    inputs = {"input": np.zeros((MAX_WAITING_ROWS // 4, WIDTH), np.float32)}
    for _ in range(10):
        sampler.add(version, inputs, {"output": inputs["input"]})
    assert len(sampler.take()) == 4
    large = {"input": np.zeros((1, MAX_BYTES // 4), np.float32)}
    for _ in range(3):
        sampler.add(version, large, large)
    assert len(sampler.take()) == 1
    assert sampler.take() == []


def test_no_more_rows_are_counted_than_a_look_allows(tmp_path: Path) -> None:
    sampler, version, one = Sampler(), Product(), observer(tmp_path)
    inputs = {"input": np.full((4096, WIDTH), 0.5, np.float32)}
    sampler.add(version, inputs, version.run(inputs))
    one.count(sampler.take(), answered(1))
    assert one.observed.current.observation.rows == MAX_WAITING_ROWS


def test_rows_are_counted_whatever_is_in_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = observer(tmp_path, reference=reference(place=WIDTH))
    one.count(samples(0.5), answered(1))
    one.count(samples(0.5), answered(2))
    found = one.observed.current.observation
    assert (found.rows, found.requests) == (2, 2)
    assert caplog.text.count("does not fit it") == 1  # the bin of missing values has them
    assert any(row[-1] == 2 for row in found.counts)
    failed = observer(tmp_path / "failed", reference=reference())
    (sample,) = samples(0.5)
    failed.count([sample._replace(outputs={})], answered(1))
    assert failed.observed.current.observation.rows == 1


def test_what_a_version_before_answered_is_not_counted(tmp_path: Path) -> None:
    def opener(store: Path, name: str) -> Product:
        return Product(active(store, name), reference=reference())

    store = store_of(tmp_path, {"product": 1})
    models = Models(store, None, opener, QueueLimits())
    models.open()

    def ask() -> None:
        batcher = models.get("product").batcher
        assert batcher is not None
        batcher.submit(QueuedRequest({"input": np.ones((1, WIDTH), np.float32)}, 1, lambda _: None))
        batcher.run_waiting()

    ask()
    activate(store, "product", 2)
    assert models.refresh() == ["product: version 2 answers in place of 1"]
    ask()
    models.tell()
    record = Record(version=2, manifest_sha256=f"{2:064x}")
    found = read_observed(store, "product", record)
    assert found is not None
    assert (found.current.observation.rows, found.current.observation.requests) == (1, 1)
    models.load("product")
    ask()
    models.tell()
    found = read_observed(store, "product", record)
    assert found is not None
    assert found.current.observation.rows == 2


def test_a_server_shows_the_index(tmp_path: Path) -> None:
    def opener(store: Path, name: str) -> Product:
        return Product(active(store, name), reference=reference())

    with running(store_of(tmp_path, {"product": 1}), opener=opener) as server:
        body = (
            b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": [128, 6], "data": ['
            + b", ".join([b"9"] * 768)
            + b"]}]}"
        )
        with urllib.request.urlopen(
            f"http://{server.http}/v2/models/product/infer", body
        ) as answer:
            assert answer.status == 200

        deadline_s = time.monotonic() + 30
        while True:
            with urllib.request.urlopen(f"http://{server.http}/metrics") as answer:
                if b'fedcore_drift_psi{model="product"} ' in answer.read():
                    break
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
