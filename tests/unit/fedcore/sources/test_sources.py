"""Arrays, data sets of dicts, and folders of images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedcore import from_arrays, from_datasets, from_folder
from fedcore.errors import DataError
from fedcore.task.definition import size_of
from fedcore.training.batches import gather_all


def rows(count: int = 12, dtype: str = "float64") -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(count, 3)).astype(dtype), np.arange(count) % 3


def test_arrays_become_float32_and_classes_are_numbered() -> None:
    inputs, targets = rows()
    data = from_arrays({"anna": (inputs, targets + 1), "ben": rows(6)}, test_share=0)
    assert (data.kind, data.labels) == ("classification", ("0", "1", "2", "3"))
    assert data.example_input.dtype == torch.float32
    assert gather_all(data.train["anna"])[1].tolist() == [1, 2, 3] * 4
    assert gather_all(data.train["ben"])[1].tolist() == [0, 1, 2] * 2


def test_targets_of_several_numbers_are_a_regression() -> None:
    inputs, _ = rows()
    data = from_arrays({"anna": (inputs, np.ones((12, 2)) / 2)})
    assert (data.kind, data.outputs) == ("regression", 2)


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ((np.zeros((4, 3)), np.zeros(5)), "client 'ben': 4 inputs and 5 targets"),
        ((np.zeros((4, 2)), np.zeros(4)), r"client 'ben': inputs are float32 \(2,\)"),
        ((np.zeros((4, 3), np.uint8), np.zeros(4)), "client 'ben': inputs are uint8"),
        ((np.array([["a"] * 3] * 4), np.zeros(4)), "client 'ben': inputs are <U1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(pair: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        from_arrays({"anna": rows(), "ben": pair})


class Rows:
    """As a Hugging Face data set behaves."""

    def __init__(self, columns: dict[str, list[Any]], names: list[str] | None = None) -> None:
        self._columns = columns
        self.column_names = list(columns)
        self.features = {"word": SimpleNamespace(names=names)} if names else {}

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._columns[key]
        return {name: values[key] for name, values in self._columns.items()}


def speech(count: int = 8) -> dict[str, list[Any]]:
    return {
        "sound": [[float(number), 0.5, 1.0] for number in range(count)],
        "word": [number % 2 for number in range(count)],
        "speaker": ["ben" if number < 3 else "anna" for number in range(count)],
    }


def test_a_column_names_the_clients_of_one_data_set() -> None:
    named = Rows(speech(), names=["yes", "no", "maybe"])
    data = from_datasets(named, inputs="sound", target="word", client="speaker", test_share=0)
    assert {name: size_of(each) for name, each in data.train.items()} == {"anna": 5, "ben": 3}
    assert data.labels == ("yes", "no", "maybe")
    inputs, targets = gather_all(data.train["anna"])
    assert inputs[0].tolist() == [3.0, 0.5, 1.0]
    assert targets.tolist() == [1, 0, 1, 0, 1]


def test_a_data_set_a_client_and_columns_that_form_one_input() -> None:
    parts = {"anna": Rows(speech(6)), "ben": Rows(speech(4))}
    data = from_datasets(parts, inputs=["sound", "word"], target="speaker", test_share=0)
    assert data.example_input.shape == (4,)
    assert data.labels == ("anna", "ben")


def test_images_of_a_data_set_become_bytes() -> None:
    image = Image.new("RGB", (4, 6), (255, 0, 10))
    parts = Rows({"image": [image] * 5, "word": [0, 1, 0, 1, 0]})
    data = from_datasets({"anna": parts}, inputs="image", target="word")
    assert (data.example_input.shape, data.example_input.dtype) == ((3, 6, 4), torch.uint8)
    assert data.preprocess is not None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"inputs": "picture"}, "it has no column 'picture'"),
        ({"client": None}, "expected a data set for each client"),
        ({"inputs": "speaker"}, "column 'speaker': got str, expected numbers or an image"),
    ],
)
def test_columns_that_do_not_fit_are_refused(asked: dict[str, Any], said: str) -> None:
    usual = {"inputs": "sound", "target": "word", "client": "speaker"}
    with pytest.raises(DataError, match=said):
        from_datasets(Rows(speech()), **{**usual, **asked})


def photos(root: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    for client, size in sizes.items():
        for label in ("cat", "dog"):
            folder = root / client / label
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("L", size, 40 * number).save(folder / f"{number}.png")
            (folder / "notes.txt").write_text("no image")
    return root


def test_folders_are_clients_and_classes(tmp_path: Path) -> None:
    data = from_folder(photos(tmp_path, {"anna": (8, 6), "ben": (8, 6)}), test_share=0.25)
    assert (data.clients, data.labels) == (("anna", "ben"), ("cat", "dog"))
    assert {name: size_of(each) for name, each in data.train.items()} == {"anna": 6, "ben": 6}
    assert (data.example_input.shape, data.example_input.dtype) == ((3, 6, 8), torch.uint8)
    grey = from_folder(tmp_path, mode="L", size=(5, 5))
    assert grey.example_input.shape == (1, 5, 5)


def test_images_of_two_sizes_are_refused_with_the_remedy(tmp_path: Path) -> None:
    root = photos(tmp_path, {"anna": (8, 8), "ben": (9, 8)})
    with pytest.raises(DataError, match=r"ben/cat/0\.png: this image is 8 x 9 .* size=\(8, 8\)"):
        from_folder(root)
    assert from_folder(root, size=(8, 8)).example_input.shape == (3, 8, 8)


def test_a_folder_without_images_or_with_a_broken_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no images in 0 folders"):
        from_folder(tmp_path)
    with pytest.raises(DataError, match="this folder does not exist"):
        from_folder(tmp_path / "none")
    root = photos(tmp_path / "photos", {"anna": (8, 8)})
    (root / "anna/cat/0.png").write_text("no image")
    with pytest.raises(DataError, match=r"cat/0\.png: cannot read this image"):
        from_folder(root)
