"""A repository, and drafts whose model is any bytes: publishing does not look into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.manifest import Lineage, Manifest, Parity, PrivacyStatement
from server.release.draft import Draft
from server.release.publish import initialise, publish

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def make_draft(onnx: bytes = b"model", *, model: str = "digits") -> Draft:
    return Draft(
        model=model,
        kind="classification",
        labels=("no", "yes"),
        input_shape=(2,),
        input_dtype="float32",
        golden_tolerance=1e-3,
        lineage=Lineage(
            run="demo",
            round=3,
            parent_sha256="a" * 64,
            finetuned=True,
            candidate="int8_static",
            config_sha256="b" * 64,
            seed=1,
            calibration="cloud train",
        ),
        privacy=PrivacyStatement(unit="example", epsilon=7.5, target_delta=1e-3, noise="simulated"),
        parity=Parity(
            max_abs_error=0.1, agreement=1.0, metric="accuracy", metric_before=1, metric_after=1
        ),
        onnx=onnx,
        golden=golden_bytes(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)),
    )


@dataclass(frozen=True)
class Publisher:
    repository: Path
    keys: Path

    def publish(self, onnx: bytes = b"model", *, model: str = "digits") -> Manifest:
        draft = make_draft(onnx, model=model)
        return publish(draft, repository=self.repository, keys=self.keys, created=NOW)

    def metadata(self, name: str) -> bytes:
        return (self.repository / "metadata" / name).read_bytes()


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path / "repository", tmp_path / "keys")
    initialise(made.repository, made.keys, now=NOW)
    return made


@pytest.fixture
def draft() -> Callable[..., Draft]:
    return make_draft


@pytest.fixture
def now() -> datetime:
    return NOW
