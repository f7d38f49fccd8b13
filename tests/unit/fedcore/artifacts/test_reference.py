"""Features of inputs and outputs, and their bins."""

from __future__ import annotations

import numpy as np
import pytest

from fedcore.artifacts.golden import golden_bytes, parse_golden
from fedcore.artifacts.reference import (
    MAX_FEATURES,
    BinnedFeature,
    Feature,
    Reference,
    binned,
    edges_for,
    features_of,
    measured,
    parse_reference,
    reference_bytes,
)
from fedcore.errors import TrustError

RNG = np.random.default_rng(0)


def of_inputs(*inputs: tuple[str, tuple[int, ...], type]) -> tuple[Feature, ...]:
    return tuple(each for each in features_of(inputs, (), "values") if each.side == "input")


def labels(features: tuple[Feature, ...]) -> list[str]:
    return [each.label for each in features]


def reference(**more: object) -> Reference:
    one = {"side": "input", "measure": "value", "edges": (0.0, 1.0), "counts": (1, 2, 3, 0)} | more
    return Reference(presentation="values", features=(BinnedFeature.model_validate(one),))


def test_small_inputs_are_followed_by_number_and_large_ones_by_summaries() -> None:
    small = features_of([("", (2, 2), np.float32)], (3,), "label")
    assert labels(small) == ["input[0]", "input[1]", "input[2]", "input[3]", "output class"]
    picture = features_of([("", (28, 28), np.float32)], (), "binary")
    assert labels(picture)[:5] == [
        *("input mean", "input deviation", "input least", "input largest", "input zeros")
    ]
    assert labels(features_of([("", (80,), np.int64)], (80, 65), "tokens")) == [
        *("input token", "output class")
    ]
    assert labels(features_of([("a", (), np.float32), ("b", (2,), np.int8)], (2,), "values")) == [
        *("a[0]", "b[0]", "b[1]", "output[0]", "output[1]")
    ]
    many = [(f"x{n}", (3,), np.float32) for n in range(64)]
    assert len(features_of(many, (100,), "values")) <= MAX_FEATURES


def test_each_row_has_a_number_for_each_feature() -> None:
    picture = np.zeros((4, 10, 10), np.uint8)
    picture[1, 0] = 50
    features = of_inputs(("", (10, 10), np.uint8))
    np.testing.assert_allclose(
        measured(features, {"x": picture}, "values", RNG)[:2],
        [[0, 0, 0, 0, 1], [5, 15, 0, 50, 0.9]],
    )
    tokens = of_inputs(("", (100,), np.int64))
    rows = np.arange(300).reshape(3, 100)
    drawn = measured(tokens, {"x": rows}, "values", RNG)[:, 0]
    assert [int(one) // 100 for one in drawn] == [0, 1, 2]
    classes = (Feature(side="output", measure="class"),)
    label = measured(classes, {"y": np.array([[0.0, 2.0, 1.0], [9.0, 0.0, 0.0]])}, "label", RNG)
    assert label.tolist() == [[1.0], [0.0]]
    maps = np.zeros((2, 3, 4, 4), np.float32)
    maps[0, 2], maps[1, 1] = 1, 1
    assert measured(classes, {"y": maps}, "dense", RNG).tolist() == [[2.0], [1.0]]
    assert measured(classes, {"y": maps[:, :, 0].swapaxes(1, 2)}, "tokens", RNG).tolist() == [
        *([2.0], [1.0])
    ]
    assert measured(classes, {"y": np.array([[-1.0], [3.0]])}, "binary", RNG).tolist() == [
        *([0.0], [1.0])
    ]


def test_bins_hold_every_row_once_and_missing_values_by_themselves() -> None:
    edges = [(0.0, 1.0, 2.0), (5.0,)]
    values = np.array([[-1.0, 5.0], [0.0, 4.9], [1.5, np.nan], [np.inf, -np.inf], [np.nan, 7.0]])
    assert binned(values, edges).tolist() == [[1, 1, 1, 1, 1], [2, 2, 1, 0, 0]]
    assert binned(np.empty((0, 2)), edges).sum() == 0
    many = np.random.default_rng(1).normal(size=(5000, 2))
    assert binned(many, edges).sum(axis=1).tolist() == [5000, 5000]


@pytest.mark.parametrize(
    ("values", "edges"),
    [
        ([0.0, 1.0] * 50, (-0.001, 0.5, 1.001)),
        ([3.0] * 100, (2.997, 3.003)),
        ([np.nan] * 9, ()),
        ([], ()),
    ],
)
def test_common_values_have_bins_of_their_own(
    values: list[float], edges: tuple[float, ...]
) -> None:
    assert edges_for(np.array(values)) == pytest.approx(edges)


def test_edges_are_rounded_quantiles_beside_common_values() -> None:
    values = np.random.default_rng(0).normal(1e6, 1, 5000)
    edges = edges_for(values)
    assert len(edges) == 9
    counts = binned(values[:, None], [edges])[0]
    assert counts[:10].min() > 400
    assert not set(edges) & set(values)
    mixed = np.where(np.arange(1000) % 5 < 3, 0.0, np.random.default_rng(1).random(1000))
    kept = edges_for(mixed)
    assert sum(edge < 0.01 for edge in kept) == 2
    assert len(kept) >= 5


def test_a_reference_travels_in_the_golden_file_and_a_bad_one_is_refused() -> None:
    eye, one = np.eye(2, dtype=np.float32), reference()
    assert parse_golden(golden_bytes(eye, eye, None, one)).reference == one
    assert parse_golden(golden_bytes(eye, eye)).reference is None
    raw = reference_bytes(one)
    for bad in (
        b"",
        raw.replace(b"[0.0,1.0]", b"[1.0,0.0]"),
        raw.replace(b"[1,2,3,0]", b"[1,2,3]"),
        raw.replace(b"[1,2,3,0]", b"[0,0,0,0]"),
        raw.replace(b"[1,2,3,0]", b"[1,2,-3,0]"),
        raw.replace(b"0.0,", b"NaN,"),
        raw + b" " * (1 << 16),
    ):
        with pytest.raises(TrustError, match="the reference of inputs and outputs is not valid"):
            parse_reference(bad)
