"""The queue of one model: what runs together, what is refused, and who gets which answer."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from edge_client.serving import messages, rest
from edge_client.serving.batching import Batcher, QueuedRequest, QueueLimits
from edge_client.serving.metrics import ModelMetrics
from edge_client.serving.models import Models
from edge_client.serving.service import Service
from fedcore.errors import DeviceError, FedcoreError, LimitExceeded, RequestRefused
from tests.serving import WIDTH, Product, local, open_product, store_of


def rows(count: int, first: float = 1.0) -> np.ndarray:
    return (first + np.arange(count * WIDTH, dtype=np.float32)).reshape(count, WIDTH)


def job(x: np.ndarray, box: list[Any], **more: Any) -> QueuedRequest:
    return QueuedRequest({"input": x}, len(x), box.append, **more)


def batcher(version: Product, clock: Any = lambda: 0.0, **limits: Any) -> Batcher:
    return Batcher(lambda: version, QueueLimits(**limits), ModelMetrics(), clock=clock)


def reasons(box: list[Any]) -> list[str]:
    return [one.reason if isinstance(one, RequestRefused) else "answered" for one in box]


def test_what_waits_runs_together_and_each_gets_its_own_rows() -> None:
    version, boxes = Product(3), [[] for _ in range(3)]
    queue = batcher(version)
    inputs = [rows(2), rows(1, 50.0), rows(3, -9.0)]
    for x, box in zip(inputs, boxes, strict=True):
        queue.submit(job(x, box))
    queue.run_waiting()
    assert version.batches == [6]
    for x, (answer,) in zip(inputs, boxes, strict=True):
        assert answer[0] == "3"
        np.testing.assert_array_equal(answer[1]["output"], local(x, 3))


def test_a_batch_is_no_larger_than_allowed_and_keeps_the_order() -> None:
    version, box = Product(), []
    queue = batcher(version, max_batch=4)
    for count in (3, 2, 2, 9, 1):
        queue.submit(job(rows(count), box))
    queue.run_waiting()
    assert version.batches == [3, 4, 9, 1]
    assert [len(outputs["output"]) for _, outputs in box] == [3, 2, 2, 9, 1]


def test_a_model_whose_rows_depend_on_each_other_gets_each_request_alone() -> None:
    version, box = Product(rows_together=1), []
    queue = batcher(version)
    for _ in range(3):
        queue.submit(job(rows(1), box))
    queue.run_waiting()
    assert version.batches == [1, 1, 1]


def test_requests_of_other_shapes_do_not_run_together() -> None:
    version, box = Product(), []
    version.run = lambda inputs: {"output": inputs["input"][:, :1]}  # type: ignore[method-assign]
    queue = batcher(version)
    queue.submit(job(rows(1), box))
    queue.submit(QueuedRequest({"input": np.ones((1, 2), np.float32)}, 1, box.append))
    queue.run_waiting()
    assert [outputs["output"].tolist() for _, outputs in box] == [[[1.0]], [[1.0]]]


def test_a_full_queue_refuses() -> None:
    box: list[Any] = []
    queue = batcher(Product(), max_queue=2)
    queue.submit(job(rows(1), box))
    queue.submit(job(rows(1), box))
    with pytest.raises(RequestRefused, match="the queue is full") as caught:
        queue.submit(job(rows(1), box))
    assert caught.value.reason == "overloaded"
    queue.run_waiting()
    queue.submit(job(rows(1), box))
    queue.run_waiting()
    assert reasons(box) == ["answered"] * 3


def test_the_queue_is_bounded_in_bytes_and_takes_one_request_of_any_size() -> None:
    box: list[Any] = []
    queue = batcher(Product(), max_queue_bytes=100)
    queue.submit(job(rows(50), box))
    with pytest.raises(RequestRefused, match="the queue is full"):
        queue.submit(job(rows(1), box))
    queue.run_waiting()
    queue.submit(job(rows(1), box))
    queue.submit(job(rows(2), box))
    queue.run_waiting()
    assert len(box) == 3


@pytest.mark.parametrize("transport", ["gRPC", "HTTP"])
def test_what_a_message_holds_beside_its_inputs_counts_in_the_queue(
    tmp_path: Path, transport: str
) -> None:
    grpc = pb.ModelInferRequest(model_name="product", raw_input_contents=[rows(1).tobytes()])
    grpc.inputs.add(name="input", datatype="FP32", shape=[1, WIDTH])
    one = {"name": "input", "datatype": "FP32", "shape": [1, WIDTH], "data": [1.0] * WIDTH}
    padding = {"gRPC": b"\x7a\x64" + bytes(100), "HTTP": b" " * 100}[transport]
    message, read = {
        "gRPC": (grpc.SerializeToString() + padding, messages.read_infer_request),
        "HTTP": (
            json.dumps({"inputs": [one]}).encode() + padding,
            lambda body: rest.read_infer_request("product", "", body, None)[0],
        ),
    }[transport]
    limits = QueueLimits(max_queue_bytes=2 * len(message) - 1)
    models = Models(store_of(tmp_path, {"product": 1}), None, open_product, limits)
    models.open()
    service = Service(models)
    service.infer(read(message), lambda _: None)
    with pytest.raises(RequestRefused, match=f"1 requests of {len(message)} bytes wait"):
        service.infer(read(message), lambda _: None)


def test_a_request_whose_deadline_has_passed_is_not_run() -> None:
    now, version, box = [0.0], Product(), []
    queue = batcher(version, clock=lambda: now[0])
    queue.submit(job(rows(1), box, deadline_s=1.0))
    queue.submit(job(rows(1), box, deadline_s=3.0))
    now[0] = 2.0
    queue.run_waiting()
    assert reasons(box) == ["late", "answered"]
    assert version.batches == [1]


def test_a_request_for_another_version_is_refused_beside_others() -> None:
    box: list[Any] = []
    queue = batcher(Product(4))
    queue.submit(job(rows(1), box, version="3"))
    queue.submit(job(rows(1), box, version="4"))
    queue.submit(job(rows(1), box))
    queue.run_waiting()
    assert reasons(box) == ["unknown", "answered", "answered"]


def test_one_request_with_nan_does_not_fail_the_others() -> None:
    boxes: list[list[Any]] = [[], [], []]
    queue = batcher(Product())
    for x, box in zip((rows(1), rows(1) * np.nan, rows(2)), boxes, strict=True):
        queue.submit(job(x, box))
    queue.run_waiting()
    assert [reasons(box) for box in boxes] == [["answered"], ["invalid"], ["answered"]]
    np.testing.assert_array_equal(boxes[2][0][1]["output"], local(rows(2)))


@pytest.mark.parametrize(
    ("error", "reason"),
    [(DeviceError("broken"), "failed"), (LimitExceeded("too much"), "too_large")],
)
def test_a_failure_of_the_model_reaches_every_request(error: FedcoreError, reason: str) -> None:
    def fail(inputs: Any) -> Any:
        raise error

    version, box = Product(), []
    version.run = fail  # type: ignore[method-assign]
    queue = batcher(version)
    queue.submit(job(rows(1), box))
    queue.submit(job(rows(1), box))
    queue.run_waiting()
    assert reasons(box) == [reason, reason]


def test_a_request_that_the_model_fails_on_takes_no_other_with_it() -> None:
    def run(inputs: Any) -> Any:
        if (inputs["input"] < 0).any():
            raise DeviceError("index out of range")
        return Product().run(inputs)

    version, boxes = Product(), [[] for _ in range(3)]
    seen: list[Any] = []
    version.run = run  # type: ignore[method-assign]
    metrics = ModelMetrics(
        lambda version, inputs, outputs: seen.append((len(inputs["input"]), len(outputs)))
    )
    queue = Batcher(lambda: version, QueueLimits(), metrics)
    for x, box in zip([rows(1), rows(1, -50.0), rows(2)], boxes, strict=True):
        queue.submit(job(x, box))
    queue.run_waiting()
    assert [reasons(box) for box in boxes] == [["answered"], ["failed"], ["answered"]]
    assert seen == [(1, 1), (1, 0), (2, 1)]  # who counts rows sees all of them


def test_a_fault_of_ours_is_an_answer_too(caplog: pytest.LogCaptureFixture) -> None:
    def fail(inputs: Any) -> Any:
        raise ZeroDivisionError("not expected " + "x" * 5000)

    version, box = Product(), []
    version.run = fail  # type: ignore[method-assign]
    queue = batcher(version)
    queue.submit(job(rows(1), box))
    queue.run_waiting()
    assert reasons(box) == ["failed"]
    assert "not expected" not in str(box[0])
    assert "ZeroDivisionError" in caplog.text
    assert len(caplog.text) < 2000
    queue.submit(job(rows(1), box))
    queue.run_waiting()
    assert len(box) == 2


def test_a_version_that_is_slower_than_the_one_before_gets_a_thread() -> None:
    versions, box = [Product(1)], []
    queue = Batcher(lambda: versions[-1], QueueLimits(), ModelMetrics())
    queue.start()
    assert queue.inline
    versions.append(Product(2, quick=False))
    queue.start()
    queue.start()
    assert not queue.inline
    queue.submit(job(rows(1), box))
    assert versions[-1].entered.acquire(timeout=30)
    queue.stop()
    assert [answer[0] for answer in box] == ["2"]


def test_outputs_without_a_row_for_each_input_are_an_error() -> None:
    version, box = Product(), []
    version.run = lambda inputs: {"output": np.zeros((1, 2), np.float32)}  # type: ignore
    queue = batcher(version)
    queue.submit(job(rows(2), box))
    queue.run_waiting()
    assert reasons(box) == ["failed"]


def test_a_slow_model_has_a_thread_that_gathers_what_comes_while_it_runs() -> None:
    version, box = Product(quick=False, gate=threading.Event()), []
    queue = batcher(version)
    queue.start()
    assert not queue.inline
    queue.submit(job(rows(1), box))
    assert version.entered.acquire(timeout=30)
    for _ in range(5):
        queue.submit(job(rows(1), box))
    version.gate.set()
    queue.stop()
    assert version.batches == [1, 5]
    assert reasons(box) == ["answered"] * 6


def test_with_a_delay_a_request_waits_for_company_until_the_batch_is_full() -> None:
    version, box = Product(), []
    queue = Batcher(lambda: version, QueueLimits(max_batch=3, max_delay_s=60.0), ModelMetrics())
    queue.start()
    for _ in range(3):
        queue.submit(job(rows(1), box))
    assert version.entered.acquire(timeout=30)  # long before a minute has passed
    queue.stop()
    assert version.batches == [3]


def test_a_stopped_queue_answers_what_waits_and_refuses_more() -> None:
    version, box = Product(), []
    queue = batcher(version)
    queue.submit(job(rows(1), box))
    queue.stop()
    assert reasons(box) == ["answered"]
    with pytest.raises(RequestRefused) as caught:
        queue.submit(job(rows(1), box))
    assert caught.value.reason == "unavailable"


def test_no_request_is_lost_between_threads() -> None:
    """Two threads submit and run at once, as the two transports do."""
    version, box = Product(), []
    queue = batcher(version, max_queue=10_000)

    def work() -> None:
        for _ in range(500):
            queue.submit(job(rows(1), box))
            queue.run_waiting()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons(box) == ["answered"] * 1000
    assert len(queue) == 0
