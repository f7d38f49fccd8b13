from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.inference.process import ModelLimits
from edge_client.inference.selftest import self_test
from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.manifest import Manifest, NamedOutput
from fedcore.errors import LimitExceeded, SelfTestFailed, TrustError
from fedcore.files import sha256_hex
from tests.hostile_models import endless_loop, many_outputs

EYE = np.eye(3, dtype=np.float32)
Test = Callable[[bytes], float]


@pytest.fixture
def tested(manifest: Manifest, matmul: Any, tmp_path: Path) -> Test:
    """The self-test of the model with factor 1, with golden bytes of the test's choice."""
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(matmul.onnx(1.0))
    return lambda golden: self_test(manifest, onnx, golden, threads=1, limits=ModelLimits())


def test_a_model_that_answers_as_in_the_cloud_passes(tested: Test, matmul: Any) -> None:
    assert tested(matmul.golden(1.0)) == 0


def test_the_tolerance_is_the_bound(tested: Test, matmul: Any) -> None:
    exact = (np.arange(1, 7).reshape(3, 2)).astype(np.float32)
    near = golden_bytes(EYE, exact + np.float32(0.9e-3))
    assert tested(near) == pytest.approx(0.9e-3, rel=0.01)
    off = exact.copy()
    off[1, 1] += 2e-3
    with pytest.raises(SelfTestFailed, match=r"differs by 0\.002, more than the 0\.001"):
        tested(golden_bytes(EYE, off))


def test_each_named_output_has_a_tolerance_of_its_own(
    manifest: Manifest, matmul: Any, tmp_path: Path
) -> None:
    """What the larger output may differ by would let the smaller one be anything."""
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(matmul.onnx(1.0))
    parts = [("one", 1e-3), ("two", 0.5)]
    outputs = tuple(
        NamedOutput(name=name, shape=(), presentation="values", tolerance=most)
        for name, most in parts
    )
    several = manifest.model_copy(update={"outputs": outputs, "golden_tolerance": 0.5})
    exact = np.arange(1, 7).reshape(3, 2).astype(np.float32)

    def tested(off: int, by: float, of: Manifest = several) -> float:
        golden = exact.copy()
        golden[1, off] += by
        return self_test(of, onnx, golden_bytes(EYE, golden), threads=1, limits=ModelLimits())

    assert tested(1, 0.4) == pytest.approx(0.4, rel=1e-3)
    with pytest.raises(SelfTestFailed, match=r"differs by 0\.1, more than the 0\.001"):
        tested(0, 0.1)
    with pytest.raises(SelfTestFailed, match="its manifest describes 1 numbers"):
        tested(0, 0.0, several.model_copy(update={"outputs": outputs[:1]}))


@pytest.mark.parametrize(("allowed", "places"), [(0.61, None), (1e300, None), (6.1, [1])])
def test_a_manifest_may_not_allow_what_proves_nothing(
    manifest: Manifest, matmul: Any, tmp_path: Path, allowed: float, places: list[int] | None
) -> None:
    """The largest golden output is 6: a tenth of it, or all of it where only places are kept."""
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(matmul.onnx(1.0))
    exact = np.arange(1, 7).reshape(3, 2).astype(np.float32)
    golden = golden_bytes(EYE, exact)
    if places is not None:
        golden = golden_bytes(EYE, exact[:, places], np.array(places, np.int64))
    wide = manifest.model_copy(update={"golden_tolerance": allowed})
    with pytest.raises(SelfTestFailed, match="its manifest allows a difference"):
        self_test(wide, onnx, golden, threads=1, limits=ModelLimits())
    least = manifest.model_copy(update={"golden_tolerance": 0.6})
    assert self_test(least, onnx, golden, threads=1, limits=ModelLimits()) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_not_finite_fails(tested: Test, value: float) -> None:
    with pytest.raises(SelfTestFailed, match="differs by inf"):
        tested(golden_bytes(EYE, np.full((3, 2), value, np.float32)))


@pytest.mark.parametrize(
    "golden",
    [
        golden_bytes(EYE, np.zeros((3, 3), np.float32)),
        golden_bytes(EYE, np.zeros((3, 1), np.float32)),  # would broadcast
        golden_bytes(EYE[:0], np.zeros((0, 2), np.float32)),  # would prove nothing
        golden_bytes(EYE[:, :2], np.zeros((3, 2), np.float32)),
        golden_bytes(EYE.astype(np.float64), np.zeros((3, 2), np.float32)),
        golden_bytes(np.array(1, np.float32), np.zeros((3, 2), np.float32)),
    ],
)
def test_golden_files_that_do_not_fit_fail(tested: Test, golden: bytes) -> None:
    with pytest.raises(SelfTestFailed, match="does not reproduce"):
        tested(golden)


def test_some_places_of_large_outputs_are_enough(tested: Test) -> None:
    exact = np.arange(1, 7).reshape(3, 2).astype(np.float32)
    second = np.array([1], np.int64)
    assert tested(golden_bytes(EYE, exact[:, 1:], second)) == 0
    with pytest.raises(SelfTestFailed, match="differs by 1,"):
        tested(golden_bytes(EYE, exact[:, :1], second))
    with pytest.raises(SelfTestFailed, match=r"places up to 2\), got \(3, 2\)"):
        tested(golden_bytes(EYE, exact[:, 1:], second + 1))
    for places in (second - 2, second.astype(np.int32), np.zeros((1, 1), np.int64), second[:0]):
        with pytest.raises(TrustError, match="`places`"):
            tested(golden_bytes(EYE, exact[:, 1:], places))


def test_answers_without_a_number_prove_nothing(manifest: Manifest, tmp_path: Path) -> None:
    raw = many_outputs(0)
    (tmp_path / "model.onnx").write_bytes(raw)
    entry = manifest.onnx.model_copy(update={"sha256": sha256_hex(raw), "length": len(raw)})
    with pytest.raises(SelfTestFailed, match="differs by inf"):
        self_test(
            manifest.model_copy(update={"onnx": entry}),
            tmp_path / "model.onnx",
            golden_bytes(EYE, np.zeros((3, 0), np.float32)),
            threads=1,
            limits=ModelLimits(),
        )


def test_what_is_no_golden_file_is_not_trusted(tested: Test) -> None:
    with pytest.raises(TrustError, match="golden"):
        tested(b"garbage")


def test_the_limit_that_was_passed_is_named(manifest: Manifest, tmp_path: Path) -> None:
    raw = endless_loop()
    (tmp_path / "model.onnx").write_bytes(raw)
    entry = manifest.onnx.model_copy(update={"sha256": sha256_hex(raw), "length": len(raw)})
    with pytest.raises(
        SelfTestFailed, match="no answer within 1 s, this device's time limit"
    ) as caught:
        self_test(
            manifest.model_copy(update={"onnx": entry}),
            tmp_path / "model.onnx",
            golden_bytes(EYE, np.zeros((3, 2), np.float32)),
            threads=1,
            limits=ModelLimits(seconds=1),
        )
    assert isinstance(caught.value.__cause__, LimitExceeded)
