"""A tiny model and a signed repository that releases it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.manifest import FileEntry, Manifest, Parity, PrivacyStatement, manifest_bytes
from fedcore.files import sha256_hex
from server.release.draft import Draft
from server.release.publish import initialise, publish
from tests.origin import LINEAGE

IN, OUT = 3, 2


def matmul_onnx(factor: float) -> bytes:
    """``y = x @ (factor * W)`` with a batch dimension of any size."""
    weight = (factor * np.arange(1, IN * OUT + 1)).reshape(IN, OUT).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", OUT])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def matmul_golden(factor: float) -> bytes:
    inputs = np.eye(IN, dtype=np.float32)
    weight = (factor * np.arange(1, IN * OUT + 1)).reshape(IN, OUT).astype(np.float32)
    return golden_bytes(inputs, inputs @ weight)


PRIVACY = PrivacyStatement(unit="example", epsilon=7.5, target_delta=1e-3, noise="simulated")
PARITY = Parity(
    max_abs_error=1e-6, agreement=1.0, metric="accuracy", metric_before=0.9, metric_after=0.9
)


def matmul_draft(factor: float = 1.0, *, model: str = "digits") -> Draft:
    return Draft(
        model=model,
        kind="classification",
        labels=("no", "yes"),
        input_shape=(IN,),
        input_dtype="float32",
        golden_tolerance=1e-3,
        lineage=LINEAGE,
        privacy=PRIVACY,
        parity=PARITY,
        onnx=matmul_onnx(factor),
        golden=matmul_golden(factor),
    )


@dataclass(frozen=True)
class Publisher:
    """A repository with its keys."""

    repository: Path
    keys: Path

    @property
    def root(self) -> bytes:
        return (self.keys / "root.json").read_bytes()

    def publish(self, factor: float = 1.0, *, model: str = "digits") -> Manifest:
        return publish(
            matmul_draft(factor, model=model),
            repository=self.repository,
            keys=self.keys,
            created=datetime.now(UTC),
        )


@pytest.fixture(scope="module")
def first_publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    folder = tmp_path_factory.mktemp("first")
    initialise(folder / "repository", folder / "keys", now=datetime.now(UTC))
    return Publisher(folder / "repository", folder / "keys")


@pytest.fixture
def publisher(first_publisher: Publisher, tmp_path: Path) -> Publisher:
    """A copy: making one again costs many fsyncs."""
    shutil.copytree(first_publisher.repository, tmp_path / "repository")
    shutil.copytree(first_publisher.keys, tmp_path / "keys")
    return Publisher(tmp_path / "repository", tmp_path / "keys")


@pytest.fixture
def manifest() -> Manifest:
    """Of the model with factor 1, as version 1."""
    raw, golden = matmul_onnx(1.0), matmul_golden(1.0)
    return Manifest(
        model="digits",
        version=1,
        created="2026-01-01T00:00:00Z",
        kind="classification",
        labels=("no", "yes"),
        input_shape=(IN,),
        input_dtype="float32",
        onnx=FileEntry(path="models/digits/1/model.onnx", sha256=sha256_hex(raw), length=len(raw)),
        golden=FileEntry(
            path="models/digits/1/golden.safetensors",
            sha256=sha256_hex(golden),
            length=len(golden),
        ),
        golden_tolerance=1e-3,
        lineage=LINEAGE,
        privacy=PRIVACY,
        parity=PARITY,
    )


@dataclass(frozen=True)
class Model:
    """The bytes of a tiny model."""

    onnx: Callable[[float], bytes] = matmul_onnx
    golden: Callable[[float], bytes] = matmul_golden
    manifest_bytes: Callable[[Manifest], bytes] = manifest_bytes


@pytest.fixture
def matmul() -> Model:
    return Model()
