from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fedcore import from_frames
from fedcore.errors import DataError
from fedcore.task.definition import size_of
from fedcore.training.batches import gather_all


def frame(rows: int = 10, **columns: Any) -> pd.DataFrame:
    made = {
        "age": np.arange(rows) + 20,
        "dose": np.linspace(0.5, 2.5, rows),
        "group": ["a", "b"] * (rows // 2),
        "smoker": [True, False] * (rows // 2),
        "y": ["ill", "well"] * (rows // 2),
    }
    return pd.DataFrame(made | columns)


def test_columns_of_all_kinds_become_one_number_each() -> None:
    data = from_frames({"anna": frame(), "ben": frame(group="c")}, target="y", test_share=0)
    assert data.clients == ("anna", "ben")
    assert (data.kind, data.labels, data.outputs) == ("classification", ("ill", "well"), 2)
    assert data.columns == ("age", "dose", "group", "smoker")
    inputs, targets = gather_all(data.train["ben"])
    assert inputs[3].tolist() == pytest.approx([23, 0.5 + 3 * 2 / 9, 2, 0])
    assert targets.tolist() == [0, 1] * 5
    assert data.preprocess is not None
    assert data.preprocess()(inputs[3:4])[0, -3:].tolist() == [0, 0, 1]  # category c
    assert data.features == 3 + 3
    assert "group: category (0 a, 1 b, 2 c)" in " ".join(data.notes)


def test_missing_numbers_are_marked_and_missing_categories_are_none() -> None:
    holes = frame(dose=[np.nan] + [1.5] * 9, group=[None] + ["a"] * 9)
    data = from_frames({"anna": frame(), "ben": holes}, target="y", test_share=0)
    inputs, _ = gather_all(data.train["ben"])
    assert torch.isnan(inputs[0, [1, 2]]).all()
    assert data.preprocess is not None
    encoded = data.preprocess()(inputs[:2])
    # age, smoker; dose; whether dose is missing; groups a and b
    assert encoded.tolist() == [[20, 1, 0, 1, 0, 0], [21, 0, 1.5, 0, 1, 0]]
    assert "dose: number; missing ones are 0" in " ".join(data.notes)


@pytest.mark.parametrize("kind", ["Int64", "Float64", "boolean", "object"])
def test_nullable_types_hold_missing_numbers(kind: str) -> None:
    column = pd.array([1, 0, None, 1, 1, 0, 0, 1, 1, 0], dtype=kind)  # type: ignore[call-overload]
    data = from_frames({"anna": frame(dose=column)}, target="y", test_share=0)
    inputs, _ = gather_all(data.train["anna"])
    assert torch.isnan(inputs[:, 1]).tolist() == [n == 2 for n in range(10)]


def test_categorical_columns_and_numbers_that_are_categories() -> None:
    one = frame(group=pd.Categorical(["x", "y"] * 5), age=[1, 2] * 5)
    data = from_frames({"anna": one}, target="y", categories=["age"], test_share=0)
    assert data.preprocess is not None
    assert data.features == 2 + 2 + 2  # dose and smoker, age, group


@pytest.mark.parametrize(
    ("values", "kind", "labels"),
    [
        ([0.5, 1.5] * 5, "regression", ()),
        ([3, 1] * 5, "classification", ("1", "3")),
        ([1.0, 0.0] * 5, "classification", ("0", "1")),
        ([True, False] * 5, "classification", ("False", "True")),
        (pd.array([3, 1] * 5, dtype="Int64"), "classification", ("1", "3")),
        (pd.Categorical(["b", "a"] * 5), "classification", ("a", "b")),
        (range(0, 100, 10), "classification", tuple(map(str, range(0, 100, 10)))),
    ],
)
def test_the_target_decides_the_kind(values: Any, kind: str, labels: tuple[str, ...]) -> None:
    data = from_frames({"anna": frame(y=values)}, target="y", test_share=0)
    assert (data.kind, data.labels) == (kind, labels)


def test_many_whole_numbers_are_no_classes_and_the_kind_can_be_stated() -> None:
    data = from_frames({"anna": frame(rows=40, y=range(40))}, target="y")
    assert data.kind == "regression"
    data = from_frames({"anna": frame(y=[3, 1] * 5)}, target="y", kind="regression", test_share=0)
    assert gather_all(data.train["anna"])[1].tolist() == [3.0, 1.0] * 5


def test_each_client_keeps_a_share_for_tests_that_the_seed_decides() -> None:
    frames = {"anna": frame(), "ben": frame(20)}
    data = from_frames(frames, target="y", test_share=0.3, seed=4)
    assert {name: size_of(each) for name, each in data.test.items()} == {"anna": 3, "ben": 6}
    again = from_frames(frames, target="y", test_share=0.3, seed=4)
    assert torch.equal(gather_all(data.test["ben"])[0], gather_all(again.test["ben"])[0])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (frame().drop(columns="dose"), r"client 'ben': its columns differ .* missing \['dose'\]"),
        (frame().drop(columns="y"), "client 'ben': it has no column 'y', the target"),
        (
            frame(y=["ill", None] * 5),
            "client 'ben': 5 rows have no target in 'y', the first is",
        ),
        (
            frame(age=["old"] * 10),
            "column 'age': it is text for client 'ben' and numbers for",
        ),
        (frame(age=pd.Timestamp("2026-01-01")), "client 'ben': column 'age' is of type datetime64"),
        (frame(dose=[1.0, np.inf] * 5), "client 'ben', row 1: column 'dose' is inf"),
        (frame(y=[1, 2] * 5), "target 'y': its values are of different types"),
        (frame().iloc[:0], "client 'ben': it has no examples"),
        (np.zeros((3, 2)), "client 'ben': got a ndarray, expected a pandas DataFrame"),
    ],
)
def test_what_cannot_be_read_is_refused_with_client_and_column(changed: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        from_frames({"anna": frame(), "ben": changed}, target="y")


def test_a_column_of_names_is_refused() -> None:
    names = [f"patient-{number}" for number in range(1200)]
    with pytest.raises(DataError, match="column 'group': it has 1200 different texts"):
        from_frames({"anna": frame(1200, group=names)}, target="y")


def test_a_client_may_be_the_clouds(tmp_path: Path) -> None:
    data = from_frames({"anna": frame(), "ben": frame(), "lab": frame(20)}, target="y")
    task = data.task("ages", cloud_data="lab")
    assert list(task.clients(None)) == ["anna", "ben"]
    assert task.cloud_data is not None
    assert size_of(task.cloud_data(None)) == 16
    with pytest.raises(Exception, match="which is none of the 3 clients"):
        data.task("ages", cloud_data="carl")


def test_one_frame_for_all_clients_is_refused_with_the_remedy() -> None:
    frame = pd.DataFrame({"site": ["a", "b"], "x": [1.0, 2.0], "y": [0, 1]})
    with pytest.raises(DataError, match="groupby"):
        from_frames(frame, target="y")  # type: ignore[arg-type]
