from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_client.runtime import load
from edge_client.selftest import self_test
from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.manifest import Manifest
from fedcore.errors import SelfTestFailed, TrustError

EYE = np.eye(3, dtype=np.float32)


def test_a_model_that_answers_as_in_the_cloud_passes(manifest: Manifest, matmul: Any) -> None:
    assert self_test(load(manifest, matmul.onnx(1.0), threads=1), matmul.golden(1.0)) == 0


def test_the_tolerance_is_the_bound(manifest: Manifest, matmul: Any) -> None:
    runtime = load(manifest, matmul.onnx(1.0), threads=1)
    exact = runtime.predict(EYE)
    near = golden_bytes(EYE, exact + np.float32(0.9e-3))
    assert self_test(runtime, near) == pytest.approx(0.9e-3, rel=0.01)
    off = exact.copy()
    off[1, 1] += 2e-3
    with pytest.raises(SelfTestFailed, match=r"differs by 0\.002, more than the 0\.001"):
        self_test(runtime, golden_bytes(EYE, off))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_not_finite_fails(manifest: Manifest, matmul: Any, value: float) -> None:
    expected = np.full((3, 2), value, np.float32)
    with pytest.raises(SelfTestFailed, match="differs by inf"):
        self_test(load(manifest, matmul.onnx(1.0), threads=1), golden_bytes(EYE, expected))


@pytest.mark.parametrize(
    "golden",
    [
        golden_bytes(EYE, np.zeros((3, 3), np.float32)),
        golden_bytes(EYE, np.zeros((3, 1), np.float32)),  # would broadcast
        golden_bytes(EYE[:0], np.zeros((0, 2), np.float32)),  # would prove nothing
        golden_bytes(EYE[:, :2], np.zeros((3, 2), np.float32)),
        golden_bytes(EYE.astype(np.float64), np.zeros((3, 2), np.float32)),
    ],
)
def test_golden_files_that_do_not_fit_fail(manifest: Manifest, matmul: Any, golden: bytes) -> None:
    with pytest.raises(SelfTestFailed, match="does not reproduce"):
        self_test(load(manifest, matmul.onnx(1.0), threads=1), golden)


def test_what_is_no_golden_file_is_not_trusted(manifest: Manifest, matmul: Any) -> None:
    with pytest.raises(TrustError, match="golden"):
        self_test(load(manifest, matmul.onnx(1.0), threads=1), b"garbage")
