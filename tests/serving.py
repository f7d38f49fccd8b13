"""What tests of serving share: a store without releases, a model of one matrix, and a server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edge_client.serving.access import Access
from edge_client.serving.models import Opener
from edge_client.serving.protocol import TensorSpec
from edge_client.serving.run import Addresses, ServeSettings, serve
from fedcore.artifacts.reference import Reference
from fedcore.errors import DataError

WIDTH, CLASSES = 6, 3


def weight(version: int) -> np.ndarray:
    """A version's matrix: no two versions agree on any input but zero."""
    return np.arange(1, WIDTH * CLASSES + 1, dtype=np.float32).reshape(WIDTH, CLASSES) * version


@cache
def session(version: int) -> onnxruntime.InferenceSession:
    """The model in onnxruntime: what a server's answers are compared with."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weight"], ["output"])],
        "product",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(weight(version), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString())


def local(x: np.ndarray, version: int = 1) -> np.ndarray:
    """What onnxruntime answers here."""
    return session(version).run(None, {"input": x})[0]


@dataclass
class Product:
    """A version that is served: inputs times a matrix that depends on the version."""

    version: int = 1
    rows_together: int = 64
    quick: bool = True
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released by each run that begins."""
    gate: threading.Event | None = None
    """Runs wait for it."""
    batches: list[int] = field(default_factory=list)
    """Rows of each run."""
    inputs: tuple[TensorSpec, ...] = (TensorSpec("input", "FP32", (-1, WIDTH)),)
    reference: Reference | None = None
    outputs: tuple[TensorSpec, ...] = (TensorSpec("output", "FP32", (-1, CLASSES)),)

    def card(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "kind": "classification",
            "presents": "label",
            "outputs": [],
            "labels": ["low", "middle", "<b>high</b>"],
            "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, WIDTH]}],
            "input_max": 1.0,
            "example": {"input": [0.1] * WIDTH},
        }

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not np.isfinite(inputs["input"]).all():
            raise DataError("input: a number is not finite. Nothing was answered.")
        self.batches.append(len(inputs["input"]))
        self.entered.release()
        if self.gate is not None:
            assert self.gate.wait(30)
        return {"output": local(inputs["input"], self.version)}


def store_of(folder: Path, models: Mapping[str, int]) -> Path:
    """A store that says which version of each model is active, without the versions' files."""
    for name, version in models.items():
        activate(folder, name, version)
    return folder


def activate(store: Path, name: str, version: int) -> None:
    place = store / "models" / name
    place.mkdir(parents=True, exist_ok=True)
    record = {"version": version, "manifest_sha256": f"{version:064x}"}
    (place / ".new").write_text(json.dumps(record))
    (place / ".new").rename(place / "active")


def active(store: Path, name: str) -> int:
    return int(json.loads((store / "models" / name / "active").read_text())["version"])


def open_product(store: Path, name: str) -> Product:
    return Product(active(store, name))


@dataclass
class Running:
    """A server that listens."""

    store: Path
    grpc: str
    http: str
    """Host and port, without a scheme."""


@contextmanager
def running(
    store: Path, *, opener: Opener = open_product, access: Access | None = None, **settings: Any
) -> Iterator[Running]:
    """Serves a store from a thread of this process."""
    begun = threading.Event()
    box: list[Any] = []

    async def main() -> None:
        stop = asyncio.Event()
        box.append((asyncio.get_running_loop(), stop))

        def started(addresses: Addresses) -> None:
            box.append(addresses)
            begun.set()

        chosen = ServeSettings(
            store=store, grpc_port=0, http_port=0, **{"drain_s": 5.0, **settings}
        )
        await serve(chosen, access or Access(), opener, started=started, stop=stop)

    def target() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # handed to the test
            box.append(error)
            begun.set()

    thread = threading.Thread(target=target)
    thread.start()
    assert begun.wait(60)
    if isinstance(box[-1], BaseException):
        thread.join()
        raise box[-1]
    addresses: Addresses = box[-1]
    try:
        yield Running(store, addresses.grpc, addresses.http.partition("://")[2])
    finally:
        loop, stop = box[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()
