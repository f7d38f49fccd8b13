"""A model with several inputs by name goes the whole way to a device's answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fedcore
from fedcore.errors import DataError
from server.compression.runtime import answer, open_session

EXAMPLE = {
    "image": torch.zeros(2, 3),
    "age": torch.zeros((), dtype=torch.float16),
    "words": torch.zeros(4, dtype=torch.long),
    "ill": torch.tensor(False),
}


class Rows(Dataset[Any]):
    """Examples of which the image's first number decides, and age is missing at times."""

    def __init__(self, name: str, count: int = 40) -> None:
        rng = torch.Generator().manual_seed(sum(map(ord, name)))
        self.inputs = {
            "words": torch.randint(9, (count, 4), generator=rng),
            "image": torch.randn(count, 2, 3, generator=rng),
            "age": torch.randn(count, generator=rng).half(),
            "ill": torch.rand(count, generator=rng) > 0.5,
        }
        self.inputs["age"][::5] = torch.nan

    def __len__(self) -> int:
        return len(self.inputs["age"])

    def __getitem__(self, row: int) -> Any:
        values = {name: part[row] for name, part in self.inputs.items()}
        return values, int(values["image"][0, 0] > 0)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 2)
        self.layers = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        age = torch.nan_to_num(x["age"].float())[:, None]
        parts = [
            x["image"].flatten(1),
            age,
            x["ill"].float()[:, None],
            self.words(x["words"]).mean(1),
        ]
        return self.layers(torch.cat(parts, dim=1))


def test_named_inputs_are_released_and_answered_by_name(tmp_path: Path) -> None:
    task = fedcore.Task(
        name="named",
        kind="classification",
        model=Network,
        clients=lambda folder: ["anna", "ben", "cleo"],
        client_data=lambda name, folder: Rows(name),
        cloud_data=lambda folder: Rows("cloud", 60),
        test_data=lambda folder: Rows("test", 60),
        example_input=EXAMPLE,  # type: ignore[arg-type]
        labels=("no", "yes"),
    )
    places = {"repository": tmp_path / "releases", "keys": tmp_path / "keys"}
    fedcore.create_repository(**places)
    result = fedcore.simulate(
        task,
        progress=False,
        federation={"rounds": 2},
        client={"learning_rate": 0.5, "batch_size": 8},
        finetune={"epochs": 1, "max_metric_drop": 1.0},
        simulation={"workers": 1},
        compression={"timing_runs": 100, "candidates": ("fp32",)},
        release={"max_test_drop": 1.0, **{name: str(place) for name, place in places.items()}},
    )
    fedcore.update_model(
        tmp_path / "store",
        "named",
        repository=places["repository"],
        root=places["keys"] / "root.json",
    )
    model = fedcore.open_model(tmp_path / "store", "named")
    described = [(each.name, each.dtype, each.shape) for each in model.manifest.inputs or ()]
    assert described == [
        ("image", "float32", (2, 3)),
        ("age", "float16", ()),
        ("words", "int64", (4,)),
        ("ill", "bool", ()),
    ]
    assert model.manifest.missing == (6,)  # the age

    inputs = Rows("asked").inputs
    with torch.inference_mode():
        expected = result.model(_vectors(inputs)).numpy()
    arrays = {name: part.numpy() for name, part in inputs.items()}
    assert np.abs(model.predict(arrays) - expected).max() < 1e-4
    one = {name: part[0].tolist() for name, part in inputs.items()}
    assert np.abs(model.predict(one) - expected[0]).max() < 1e-4
    assert model.predict_labels(one) == ("no", "yes")[int(expected[0].argmax())]
    for wrong in ({**one, "words": [0.5] * 4}, {**one, "image": [[torch.nan] * 3] * 2}):
        with pytest.raises(DataError, match=r"words|missing value"):
            model.predict(wrong)

    compressed = fedcore.compress(
        task,
        result.run,
        result.model,
        compression={"candidates": ("fp32", "int8_static", "int8_dynamic")},
        progress=False,
    )
    for name, onnx in compressed.files.items():
        found = answer(open_session(onnx, threads=1), _vectors(inputs).numpy())
        wrong_by = np.abs(found - expected).mean()  # the largest are of inputs out of range
        assert wrong_by < 0.03 * np.abs(expected).max(), name
    assert set(compressed.files) == {"fp32", "int8_static", "int8_dynamic"}


def _vectors(inputs: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([inputs[name].double().reshape(40, -1) for name in EXAMPLE], dim=1)
