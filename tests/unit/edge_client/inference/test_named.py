from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from edge_client.delivery.store import Installed, Record
from edge_client.inference.engine import Engine
from edge_client.inference.named import packed, parse_any, unpacked
from edge_client.model import EdgeModel
from fedcore.artifacts.manifest import Manifest, NamedTensor, manifest_bytes, parse_manifest
from fedcore.errors import DataError, DeviceError, TrustError

WEIGHT = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
INPUTS = (
    NamedTensor(name="pair", dtype="float32", shape=(1, 2)),
    NamedTensor(name="age", dtype="int64", shape=()),
)


@pytest.fixture
def named(manifest: Manifest) -> Manifest:
    """The model of 3 numbers, as one that takes a pair of numbers and an age."""
    return Manifest(**{**manifest.model_dump(), "inputs": INPUTS})


@pytest.fixture
def place(tmp_path: Path, matmul: Any) -> Path:
    (tmp_path / "m").write_bytes(matmul.onnx(1.0))
    return tmp_path / "m"


RECORD = Record(version=1, manifest_sha256="0" * 64)
OUTPUTS = (
    {"name": "a", "shape": [], "presentation": "values", "tolerance": 1.0},
    {"name": "b", "shape": [1], "presentation": "values", "tolerance": 1.0},
)


def test_outputs_have_the_names_that_the_manifest_gives(
    manifest: Manifest, place: Path, matmul: Any
) -> None:
    described = Manifest.model_validate({**manifest.model_dump(), "outputs": OUTPUTS})
    assert parse_manifest(manifest_bytes(described)) == described
    model = EdgeModel(Installed(described, RECORD, place, matmul.golden(1.0)))
    vectors = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    found = model.predict_named(vectors)
    assert {name: each.shape for name, each in found.items()} == {"a": (2,), "b": (2, 1)}
    np.testing.assert_array_equal(np.c_[found["a"], found["b"][:, 0]], vectors @ WEIGHT)
    engine = Engine(described, place, matmul.golden(1.0))
    assert [(each.name, each.shape) for each in engine.outputs] == [("a", (-1,)), ("b", (-1, 1))]
    assert set(engine.run({engine.inputs[0].name: vectors})) == {"a", "b"}
    alone = EdgeModel(Installed(manifest, RECORD, place, matmul.golden(1.0)))
    assert list(alone.predict_named(vectors[0])) == ["output"]
    wrong = described.model_copy(update={"outputs": described.outputs[:1]})  # type: ignore[index]
    with pytest.raises(DeviceError, match="its manifest describes 1 numbers"):
        EdgeModel(Installed(wrong, RECORD, place, matmul.golden(1.0))).predict_named(vectors)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "\x1b[31m"},
        {"name": "a"},
        {"shape": [0]},
        {"shape": [2**40]},
        {"presentation": "picture"},
        {"tolerance": 0},
    ],
)
def test_a_manifest_with_outputs_that_cannot_be_is_refused(
    manifest: Manifest, changes: dict[str, Any]
) -> None:
    outputs = [OUTPUTS[0], {**OUTPUTS[1], **changes}]
    values = {**manifest.model_dump(mode="json"), "outputs": outputs}
    with pytest.raises(TrustError):
        parse_manifest(json.dumps(values).encode())


def test_a_manifest_without_names_is_what_it_was(manifest: Manifest, named: Manifest) -> None:
    assert b'"inputs"' not in manifest_bytes(manifest)  # devices of earlier versions refuse it
    assert parse_manifest(manifest_bytes(manifest)) == manifest
    assert parse_manifest(manifest_bytes(named)).inputs == INPUTS


@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [{"name": "a", "dtype": "float32", "shape": [2]}],  # 2 numbers of 3
        [{"name": "a", "dtype": "float32", "shape": [1]}] * 3,
        [{"name": "a", "dtype": "object", "shape": [3]}],
        [{"name": "\x1b[31m", "dtype": "float32", "shape": [3]}],
        [{"name": "a", "dtype": "float32", "shape": [-3]}],
    ],
)
def test_a_manifest_whose_names_do_not_fill_the_input_is_refused(
    manifest: Manifest, inputs: Any
) -> None:
    values = {**manifest.model_dump(mode="json"), "inputs": inputs}
    with pytest.raises(ValidationError):
        Manifest.model_validate(values)
    with pytest.raises(TrustError):
        parse_manifest(json.dumps(values).encode())


def test_named_inputs_are_answered_alone_and_in_batches(
    named: Manifest, place: Path, matmul: Any
) -> None:
    record = Record(version=1, manifest_sha256="a" * 64)
    model = EdgeModel(Installed(named, record, place, matmul.golden(1.0)))
    one = {"pair": [[1.0, 2.0]], "age": 3}
    expected = np.array([1, 2, 3], np.float32) @ WEIGHT
    np.testing.assert_array_equal(model.predict(one), expected)
    batch = {"pair": np.array([[[1, 2]], [[0, 1]]]), "age": np.array([3, 0])}
    np.testing.assert_array_equal(model.predict(batch), [expected, WEIGHT[1]])
    assert model.predict_labels(one) == "yes"
    np.testing.assert_array_equal(model.predict([1, 2, 3]), expected)  # the vector itself


def test_an_engine_names_them(named: Manifest, place: Path, matmul: Any) -> None:
    engine = Engine(named, place, matmul.golden(1.0))
    assert [(each.name, each.dtype, each.shape) for each in engine.inputs] == [
        ("pair", "float32", (-1, 1, 2)),
        ("age", "int64", (-1,)),
    ]
    vectors = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    parts = unpacked(named, vectors)
    assert {name: (part.dtype.name, part.shape) for name, part in parts.items()} == {
        "pair": ("float32", (2, 1, 2)),
        "age": ("int64", (2,)),
    }
    np.testing.assert_array_equal(engine.run(parts)["y"], vectors @ WEIGHT)
    np.testing.assert_array_equal(packed(named, parts, where="x")[0], vectors)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "expected the inputs pair, age, got"),
        ({"pair": [[1, 2]]}, "got pair"),
        ({"pair": [[1, 2]], "age": 3, "more": 1}, "got pair, age, more"),
        ({"pair": [1, 2], "age": 3}, "'pair': expected shape"),
        ({"pair": [[[1, 2]]] * 2, "age": [3]}, r"'age': expected shape \[2\]"),
        ({"pair": [[[1, 2]]], "age": 3}, r"'age': expected shape \[1\]"),
        ({"pair": np.zeros((0, 1, 2)), "age": np.zeros(0)}, "'pair': expected shape"),
        ({"pair": [[1, 2], [3]], "age": 3}, "'pair'"),
        ({"pair": [[1, 2]], "age": 3.5}, "'age'.*cannot represent"),
        ({"pair": [["1", "2"]], "age": 3}, "'pair': text among the numbers"),
        ({"pair": [[10**400, 2]], "age": 3}, "'pair': a whole number that float64 cannot hold"),
        ({"pair": [[1, float("nan")]], "age": 3}, "finite"),
        ({"pair": [[1e39, 0]], "age": 3}, "finite"),
    ],
)
def test_other_inputs_are_refused(named: Manifest, inputs: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        packed(named, inputs, where="x")
    assert str(caught.value).isprintable()


def test_json_names_inputs_where_the_model_does(named: Manifest, manifest: Manifest) -> None:
    rows = [[1, 2, 3], [4, 5, 6]]
    for text in (
        b'[{"pair": [[1, 2]], "age": 3}, {"pair": [[4, 5]], "age": 6}]',
        b'{"pair": [[[1, 2]], [[4, 5]]], "age": [3, 6]}',
    ):
        np.testing.assert_array_equal(parse_any(text, named, where="x"), rows)
    np.testing.assert_array_equal(parse_any(b"[[1, 2, 3], [4, 5, 6]]", manifest, where="x"), rows)
    for text in (b"", b"[]", b"3", b"[1]", b'[{"pair": [[[1, 2]]], "age": [3]}]', b"[" * 9999):
        with pytest.raises(DataError, match=r"^x"):
            parse_any(text, named, where="x")


def test_a_dictionary_for_a_model_without_names_is_refused(
    manifest: Manifest, place: Path, matmul: Any
) -> None:
    record = Record(version=1, manifest_sha256="a" * 64)
    model = EdgeModel(Installed(manifest, record, place, matmul.golden(1.0)))
    with pytest.raises(DataError, match="one input without a name"):
        model.predict({"x": [1, 2, 3]})
