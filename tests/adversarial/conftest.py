"""A publisher and a device, in a folder of their own, for a test to do harm to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_client.delivery import store as installed
from edge_client.delivery.source import Source, folder_source
from edge_client.delivery.update import UpdateResult, update
from edge_client.inference.confined import predict
from edge_client.inference.process import ModelLimits
from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.manifest import Manifest
from fedcore.errors import FedcoreError
from server.release.draft import Draft
from server.release.publish import initialise, publish
from server.release.registry import repository as registry
from server.release.registry.keys import ONLINE, read_keys, read_trusted_root
from server.release.registry.rotation import Rotation, rotate
from tests.origin import LINEAGE, NO_PRIVACY, PARITY

INPUTS = np.eye(3, dtype=np.float32)


def weight(factor: float) -> Any:
    return (factor * np.arange(1, 7)).reshape(3, 2).astype(np.float32)


def matmul_draft(factor: float, *, model: str = "digits", padding: int = 0) -> Draft:
    """The model ``y = x @ (factor * W)``, with ``padding`` bytes that compute nothing."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(weight(factor), "w")],
        doc_string="." * padding,
    )
    onnx = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Draft(
        model=model,
        kind="regression",
        labels=(),
        input_shape=(3,),
        input_dtype="float32",
        golden_tolerance=1e-3,
        lineage=LINEAGE,
        privacy=NO_PRIVACY,
        parity=PARITY,
        onnx=onnx.SerializeToString(),
        golden=golden_bytes(INPUTS, INPUTS @ weight(factor)),
    )


@dataclass(frozen=True)
class World:
    """A publisher, and a device that follows it."""

    folder: Path

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def publish(self, factor: float, *, created: datetime | None = None, **more: Any) -> Manifest:
        return publish(
            matmul_draft(factor, **more),
            repository=self.repository,
            keys=self.keys,
            created=created or datetime.now(UTC),
        )

    def sign(self, files: dict[str, bytes], *, now: datetime | None = None) -> None:
        """Publishes any files at all, as whoever holds the online keys could."""
        with registry.locked(self.repository):
            state = registry.read_state(self.repository, read_trusted_root(self.keys))
            keys = read_keys(self.keys, ONLINE)
            registry.add(self.repository, state, keys, files, now=now or datetime.now(UTC))

    def rotate(
        self,
        *roles: str,
        created: datetime | None = None,
        repository: Path | None = None,
        **more: Any,
    ) -> Rotation:
        return rotate(
            self.repository,
            self.keys,
            roles=roles,
            now=(created or datetime.now(UTC)).replace(microsecond=0),
            **more,
        )

    def update(self, source: Source | None = None, *, now: datetime | None = None) -> UpdateResult:
        return update(
            source or folder_source(self.repository),
            store=self.store,
            model="digits",
            root=(self.keys / "root.json").read_bytes(),
            threads=1,
            now=now,
        )

    def answers(self) -> float:
        """The factor of the model that serves."""
        version = installed.serving(self.store, "digits")
        outputs = predict(version.manifest, version.path, INPUTS, threads=1, limits=ModelLimits())
        factor = float(outputs[0, 0])
        np.testing.assert_allclose(outputs, weight(factor))
        return factor

    def target(self, end: str) -> Path:
        (path,) = (self.repository / "targets").rglob(f"2/*.{end}")
        return path

    def check_refused(self, error: type[FedcoreError], match: str) -> None:
        """The update fails with just this error, in one line, and version 1 still serves."""
        with pytest.raises(error, match=match) as caught:
            self.update()
        assert type(caught.value) is error
        assert "\n" not in str(caught.value)
        assert self.answers() == 1.0


def initialised(
    folder: Path, *, models: Sequence[str] = (), now: datetime | None = None, **more: Any
) -> World:
    """A publisher that has released nothing, and a device that has fetched nothing."""
    world = World(folder)
    initialise(world.repository, world.keys, models=models, now=now or datetime.now(UTC), **more)
    return world


@pytest.fixture
def new_world() -> Callable[..., World]:
    return initialised


@pytest.fixture(scope="session")
def first_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = initialised(tmp_path_factory.mktemp("first"))
    world.publish(1.0)
    assert world.update().version == 1
    assert world.answers() == 1.0
    return world


@pytest.fixture
def world(first_world: World, tmp_path: Path) -> World:
    """A device that has version 1, of factor 1. A copy: a new one costs some sixty fsyncs."""
    shutil.copytree(first_world.folder, tmp_path, dirs_exist_ok=True, symlinks=True)
    return World(tmp_path)


@pytest.fixture
def draft() -> Callable[..., Draft]:
    return matmul_draft


def flip_bit(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def flip() -> Callable[[Path, int], None]:
    return flip_bit
