from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.inference.engine import Engine
from edge_client.inference.process import ModelLimits
from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.manifest import Manifest
from fedcore.errors import DataError, DeviceError, LimitExceeded
from fedcore.files import sha256_hex
from tests import hostile_models as hostile

EYE = np.eye(3, dtype=np.float32)
WEIGHT = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
Make = Callable[..., Engine]


@pytest.fixture
def make(manifest: Manifest, tmp_path: Path) -> Iterator[Make]:
    made: list[Engine] = []

    def make(raw: bytes, golden: bytes, **limits: Any) -> Engine:
        path = tmp_path / "model.onnx"
        path.write_bytes(raw)
        entry = manifest.onnx.model_copy(update={"sha256": sha256_hex(raw), "length": len(raw)})
        engine = Engine(
            manifest.model_copy(update={"onnx": entry}), path, golden, limits=ModelLimits(**limits)
        )
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def golden_of(outputs: Any) -> bytes:
    return golden_bytes(EYE, np.asarray(outputs, np.float32))


def test_a_model_of_fixed_work_runs_here_and_says_what_it_takes(make: Make, matmul: Any) -> None:
    engine = make(matmul.onnx(1.0), matmul.golden(1.0))
    assert engine.row is None  # nothing is loaded yet
    engine.warm_up()
    assert engine.why_confined == ""
    (one,), (out,) = engine.inputs, engine.outputs
    assert (one.name, one.dtype, one.shape) == ("x", "float32", (-1, 3))
    assert (out.name, out.dtype, out.shape) == ("y", "float32", (-1, 2))
    for rows in (EYE, EYE[:1], np.tile(EYE, (5, 1))):
        answer = engine.run({"x": rows})
        assert list(answer) == ["y"]
        np.testing.assert_array_equal(answer["y"], rows @ WEIGHT)
    assert engine.version == 1


def test_an_answer_is_its_callers_alone(make: Make, matmul: Any) -> None:
    engine = make(matmul.onnx(1.0), matmul.golden(1.0))
    first = engine.run({"x": EYE[:1]})["y"]
    kept = first.copy()
    engine.run({"x": EYE[1:2]})
    np.testing.assert_array_equal(first, kept)
    given = EYE[0].copy()
    assert engine.row is not None
    engine.row(given)[:] = 9  # type: ignore[index]
    np.testing.assert_array_equal(engine.row(given), kept[0])


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (hostile.endless_loop(3), "an attribute of a node is a graph"),
        (hostile.shaped_by_numbers(), "Expand takes a shape from the numbers of an input"),
    ],
)
def test_a_model_whose_work_is_not_known_stays_in_its_process(
    make: Make, raw: bytes, why: str
) -> None:
    engine = make(raw, golden_of(hostile.FIRST_ANSWERS[why[:6]]))
    engine.warm_up(rows=8)
    assert engine.why_confined == why
    assert (engine.row, engine.rows_together) == (None, 1)
    for _ in range(3):  # one process, many calls
        engine.run({"x": EYE})


def test_a_call_that_breaches_a_limit_is_an_error_and_the_next_is_answered(make: Make) -> None:
    raw = hostile.shaped_by_numbers()
    engine = make(raw, golden_of(hostile.FIRST_ANSWERS["Expand"]), memory_bytes=1 << 30)
    np.testing.assert_array_equal(engine.run({"x": EYE})["y"], [[1], [1], [1]])
    many = np.array([[1e9, 0, 0]], np.float32)
    with pytest.raises(LimitExceeded, match="memory limit"):
        engine.run({"x": many})
    np.testing.assert_array_equal(engine.run({"x": EYE})["y"], [[1], [1], [1]])


def test_a_model_without_end_has_a_limit_of_time_for_each_call(make: Make) -> None:
    engine = make(hostile.endless_loop(), b"", seconds=1.0)
    for _ in range(2):
        with pytest.raises(LimitExceeded, match=r"ModelLimits\.seconds"):
            engine.run({"x": EYE})


@pytest.mark.parametrize("golden", ["none", "other"])
def test_a_model_that_does_not_answer_as_it_should_stays_confined(
    make: Make, matmul: Any, golden: str
) -> None:
    engine = make(matmul.onnx(1.0), b"" if golden == "none" else matmul.golden(1.1))
    expected = "no golden inputs" if golden == "none" else "differs by"
    assert expected in engine.why_confined
    np.testing.assert_array_equal(engine.run({"x": EYE})["y"], WEIGHT)


def test_a_file_that_changed_is_not_run(make: Make, matmul: Any, tmp_path: Path) -> None:
    engine = make(matmul.onnx(1.0), matmul.golden(1.0))
    (tmp_path / "model.onnx").write_bytes(matmul.onnx(2.0))
    with pytest.raises(DeviceError, match="its file has just changed"):
        engine.warm_up()


def test_rows_run_together_where_they_stay_apart(make: Make, matmul: Any) -> None:
    engine = make(matmul.onnx(1.0), matmul.golden(1.0))
    engine.warm_up(rows=40)
    assert engine.rows_together == 32
    rows = np.arange(141, dtype=np.float32).reshape(47, 3)
    np.testing.assert_allclose(engine.run({"x": rows})["y"], rows @ WEIGHT)
    engine.warm_up(rows=2)  # what was tried stays known
    assert engine.rows_together == 32


def test_rows_that_would_see_each_other_run_alone(make: Make) -> None:
    engine = make(hostile.many_outputs(5), golden_of(np.ones((3, 5))))
    engine.warm_up(rows=8)
    assert (engine.why_confined, engine.rows_together) == ("", 1)
    np.testing.assert_array_equal(engine.run({"x": EYE})["y"], np.ones((3, 5)))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "expected the inputs x, got"),
        ({"z": EYE}, "expected the inputs x, got z"),
        ({"x": EYE, "\x1b[31m": EYE}, "expected the inputs x, got"),
        ({"x": EYE[0]}, r"expected shape \[-1, 3\] with at least 1 row, got \[3\]"),
        ({"x": EYE[:, :2]}, r"got \[3, 2\]"),
        ({"x": EYE[:0]}, r"got \[0, 3\]"),
        ({"x": np.float32(1)}, r"got \[\]"),
        ({"x": EYE.astype(np.float64)}, "expected type float32, got float64"),
        ({"x": EYE.astype(">f4")}, "expected type float32, got >f4"),
        ({"x": np.full((1, 3), np.nan, np.float32)}, "finite"),
        ({"x": np.full((2, 3), -np.inf, np.float32)}, "finite"),
    ],
)
def test_other_inputs_are_refused(make: Make, matmul: Any, inputs: Any, said: str) -> None:
    engine = make(matmul.onnx(1.0), matmul.golden(1.0))
    with pytest.raises(DataError, match=said) as caught:
        engine.run(inputs)
    assert str(caught.value).isprintable()


def test_a_size_that_a_file_leaves_free_is_the_manifests(make: Make) -> None:
    # The file takes rows of any length, and its work grows with the square of that.
    engine = make(hostile.outer_product(), golden_of(EYE.reshape(3, 3)))
    engine.warm_up(rows=4)
    assert engine.why_confined == ""
    assert engine.inputs[0].shape == (-1, 3)
    np.testing.assert_array_equal(engine.run({"x": EYE})["y"], EYE)
    with pytest.raises(DataError, match=r"expected shape \[-1, 3\] with at least 1 row"):
        engine.run({"x": np.zeros((1, 100_000), np.float32)})


def test_many_threads_get_their_own_answers(make: Make, matmul: Any) -> None:
    engine = make(matmul.onnx(1.0), matmul.golden(1.0))
    wrong: list[Any] = []

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            row = rng.integers(0, 9, (1, 3)).astype(np.float32)
            if not np.array_equal(engine.run({"x": row})["y"], row @ WEIGHT):
                wrong.append(row)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_process_outlives_the_thread_that_started_it(make: Make) -> None:
    engine = make(hostile.endless_loop(3), golden_of(EYE))
    thread = threading.Thread(target=engine.warm_up)
    thread.start()
    thread.join()
    np.testing.assert_array_equal(engine.run({"x": EYE})["y"], EYE)
