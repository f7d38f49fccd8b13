from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from edge_client.runtime import load
from fedcore.artifacts.manifest import Manifest
from fedcore.errors import DataError, DeviceError


def test_it_answers_as_the_model_computes(manifest: Manifest, matmul: Any) -> None:
    runtime = load(manifest, matmul.onnx(1.0), threads=1)
    inputs = np.array([[1, 0, 0], [1, 1, 1]], np.float32)
    outputs = runtime.predict(inputs)
    np.testing.assert_array_equal(outputs, [[1, 2], [9, 12]])
    assert outputs.dtype == np.float32


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_answer(manifest: Manifest, matmul: Any, threads: int) -> None:
    runtime = load(manifest, matmul.onnx(2.0), threads=threads)
    options = runtime.session.get_session_options()
    assert options.intra_op_num_threads == threads
    np.testing.assert_array_equal(runtime.predict(np.eye(3, dtype=np.float32))[0], [2, 4])
    if threads > 1:
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_a_batch_of_any_size_and_layout_is_taken(manifest: Manifest, matmul: Any) -> None:
    runtime = load(manifest, matmul.onnx(1.0), threads=1)
    wide = np.arange(24, dtype=np.float32).reshape(3, 8).T  # not contiguous
    np.testing.assert_allclose(runtime.predict(wide), runtime.predict(wide.copy()))
    assert runtime.predict(wide).shape == (8, 2)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2), (1, 4), (0, 3), (1, 3, 1)])
def test_another_shape_is_refused(manifest: Manifest, matmul: Any, shape: tuple[int, ...]) -> None:
    runtime = load(manifest, matmul.onnx(1.0), threads=1)
    with pytest.raises(DataError, match=r"expected shape \(batch, 3\)"):
        runtime.predict(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint8, object])
def test_another_type_is_refused(manifest: Manifest, matmul: Any, dtype: Any) -> None:
    runtime = load(manifest, matmul.onnx(1.0), threads=1)
    with pytest.raises(DataError, match="expected type float32"):
        runtime.predict(np.zeros((1, 3), dtype))


@pytest.mark.parametrize("onnx", [b"garbage", b"", b"\x08\x07"])
def test_what_is_no_model_is_refused(
    manifest: Manifest, onnx: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DeviceError, match="cannot run it"):
        load(manifest, onnx, threads=1)
    assert capfd.readouterr().err == ""  # onnxruntime keeps quiet: the error says it


def test_a_manifest_that_does_not_fit_the_model_is_noticed(manifest: Manifest, matmul: Any) -> None:
    wrong = manifest.model_copy(update={"input_shape": (5,)})
    with pytest.raises(DeviceError, match="onnxruntime failed"):
        load(wrong, matmul.onnx(1.0), threads=1).predict(np.zeros((1, 5), np.float32))
    unknown = manifest.model_copy(update={"input_dtype": "float33"})
    with pytest.raises(DeviceError, match="float33"):
        load(unknown, matmul.onnx(1.0), threads=1)


def test_several_threads_may_ask_at_once(manifest: Manifest, matmul: Any) -> None:
    runtime = load(manifest, matmul.onnx(1.0), threads=1)
    inputs = [np.full((1, 3), n, np.float32) for n in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for n, outputs in enumerate(pool.map(runtime.predict, inputs)):
            np.testing.assert_array_equal(outputs, [[9 * n, 12 * n]])
