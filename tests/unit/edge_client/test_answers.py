from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_client.answers import answers, labels
from fedcore.artifacts.manifest import Manifest
from fedcore.errors import DeviceError


def test_labels_name_the_most_likely_class(manifest: Manifest) -> None:
    outputs = np.array([[1, 0], [0, 1]], np.float32)
    assert labels(manifest, outputs) == ["no", "yes"]
    bare = manifest.model_copy(update={"labels": ()})
    assert labels(bare, outputs) == ["0", "1"]


def test_kinds_have_their_own_lines(manifest: Any) -> None:
    values = np.array([[1.5, 2], [3, 4]], np.float32)
    regression = manifest.model_copy(update={"kind": "regression"})
    assert answers(regression, values) == ["1.5 2", "3 4"]
    tokens = manifest.model_copy(update={"kind": "next_token"})
    assert answers(tokens, values.reshape(1, 2, 2)) == ["1 1"]


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
