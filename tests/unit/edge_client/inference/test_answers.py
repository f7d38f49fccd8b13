from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest

from edge_client.inference.answers import MAX_PRINTED, answer_lines, answers, labels
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.presentation import probabilities
from fedcore.errors import DeviceError, LimitExceeded


def test_labels_name_the_most_likely_class(manifest: Manifest) -> None:
    outputs = np.array([[1, 0], [0, 1]], np.float32)
    assert labels(manifest, outputs) == ["no", "yes"]
    bare = manifest.model_copy(update={"labels": ()})
    assert labels(bare, outputs) == ["0", "1"]


def test_kinds_have_their_own_lines(manifest: Any) -> None:
    values = np.array([[1.5, 2], [3, 4]], np.float32)
    regression = manifest.model_copy(update={"kind": "regression"})
    assert [*answers(regression, values)] == ["1.5 2", "3 4"]
    tokens = manifest.model_copy(update={"kind": "next_token"})
    assert [*answers(tokens, values.reshape(1, 2, 2))] == ["1 1"]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("classification", (2,)),
        ("classification", (2, 0)),
        ("classification", (1, 2, 3)),
        ("next_token", (1, 2)),
        ("next_token", (1, 2, 0)),
    ],
)
def test_a_shape_that_is_no_answer_is_refused(
    manifest: Any, kind: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(DeviceError, match=r"its outputs have shape .* Nothing was answered"):
        answers(manifest.model_copy(update={"kind": kind}), np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 3, 4), (1, 200_000), (3, 70_000), (2, 2, 1)])
def test_lines_of_json_are_what_the_model_gave(manifest: Any, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    kind = "classification" if len(shape) == 2 else "regression"
    named = manifest.model_copy(update={"kind": kind})
    found = json.loads("\n".join(answer_lines(named, values)))
    assert found["outputs"] == values.tolist()
    assert (found["model"], found["version"]) == ("digits", 1)
    assert found.get("labels") == (labels(named, values) if len(shape) == 2 else None)


@pytest.mark.parametrize("kind", ["classification", "regression", "next_token"])
def test_more_numbers_than_can_be_printed_are_refused_before_any_is(
    manifest: Any, kind: str
) -> None:
    named = manifest.model_copy(update={"kind": kind})
    shape = (1, 1, MAX_PRINTED + 1) if kind == "next_token" else (1, MAX_PRINTED + 1)
    outputs = np.zeros(shape, np.int8)
    with pytest.raises(LimitExceeded, match="has 4000001 numbers, but at most 4000000"):
        next(answer_lines(named, outputs))
    many = np.zeros((MAX_PRINTED + 1, 1, 1) if kind == "next_token" else shape[::-1], np.int8)
    with pytest.raises(LimitExceeded, match="can be printed"):
        answers(named, many)


def test_the_most_that_is_printed_takes_little_memory(manifest: Any) -> None:
    outputs = np.full((2, MAX_PRINTED // 2), 7, np.int8)
    tracemalloc.start()
    try:
        size = sum(map(len, answer_lines(manifest.model_copy(update={"kind": "r"}), outputs)))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 3 * MAX_PRINTED
    assert most < 10 << 20


def presenting(manifest: Any, presentation: str, names: tuple[str, ...] = ()) -> Any:
    changed = {"kind": "own", "presentation": presentation, "labels": names}
    return manifest.model_copy(update=changed)


def test_a_binary_answer_is_one_of_two_names_with_its_probability(manifest: Any) -> None:
    binary = presenting(manifest, "binary", ("no", "yes"))
    for outputs in (np.array([[2.0], [-1.0]], np.float32), np.array([2.0, -1.0], np.float32)):
        assert [*answers(binary, outputs)] == ["yes", "no"]
        found = json.loads("".join(answer_lines(binary, outputs)))
        assert found["labels"] == ["yes", "no"]
        assert found["probabilities"] == pytest.approx([0.8808, 0.2689], abs=1e-4)
    assert [*answers(presenting(manifest, "binary"), outputs)] == ["1", "0"]
    with pytest.raises(DeviceError, match="expected 1 or 2 dimensions"):
        answers(binary, np.zeros((2, 1, 1), np.float32))


def test_a_multilabel_answer_has_any_number_of_names(manifest: Any) -> None:
    several = presenting(manifest, "labels", ("red", "hot"))
    outputs = np.array([[1, 2], [-1, 3], [-1, -2]], np.float32)
    assert [*answers(several, outputs)] == ["red hot", "hot", ""]
    found = json.loads("".join(answer_lines(several, outputs)))
    assert found["labels"] == [["red", "hot"], ["hot"], []]
    assert np.shape(found["probabilities"]) == (3, 2)


def test_a_dense_answer_is_a_class_at_each_position(manifest: Any) -> None:
    outputs = np.zeros((1, 3, 2, 2), np.float32)
    outputs[0, 2, 0, 1] = outputs[0, 1, 1, 1] = 1
    assert [*answers(presenting(manifest, "dense"), outputs)] == ["0 2 0 1"]


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_probabilities_stay_finite_and_sum_to_one(scale: float) -> None:
    outputs = (scale * np.random.default_rng(0).standard_normal((4, 3, 5))).astype(np.float32)
    for presentation, axis in (("label", -1), ("tokens", -1), ("dense", 1)):
        found = probabilities(outputs, presentation)  # type: ignore[arg-type]
        assert np.allclose(found.sum(axis=axis), 1, atol=1e-5)
    assert np.isfinite(probabilities(outputs[..., 0], "labels")).all()
    with pytest.raises(ValueError, match="no probabilities"):
        probabilities(outputs, "values")
