"""A model with several outputs by name goes the whole way: candidates, release, device, servers."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from torch import Tensor, nn
from torch.utils.data import Dataset

import fedcore
from edge_client.serving.opening import opener
from fedcore.cli import main
from fedcore.config.run import CANDIDATES
from fedcore.errors import DataError, DeviceError
from tests.serving import running

EXAMPLE = {"leaf": torch.zeros(4), "wet": torch.zeros(2)}
SPECIES = ("oak", "ash", "elm")


class Rows(Dataset[Any]):
    """Examples whose three targets follow from the inputs; heights are a hundred times as large."""

    def __init__(self, name: str, count: int = 120) -> None:
        rng = torch.Generator().manual_seed(sum(map(ord, name)))
        self.leaf = torch.randn(count, 4, generator=rng)
        self.wet = torch.rand(count, 2, generator=rng)

    def __len__(self) -> int:
        return len(self.leaf)

    def __getitem__(self, row: int) -> Any:
        leaf, wet = self.leaf[row], self.wet[row]
        targets = {
            "height": float(100 + 40 * leaf[3]),
            "species": int(leaf[:3].argmax()),
            "signs": (wet > 0.5).float(),
        }
        return {"leaf": leaf, "wet": wet}, targets


class Network(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.species, self.height = nn.Linear(width, 3), nn.Linear(width, 1)
        self.signs = nn.Linear(width, 2)

    def forward(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self.trunk(torch.cat([x["leaf"], 4 * x["wet"] - 2], dim=1))
        return {
            "signs": self.signs(found),
            "height": 100 + 40 * self.height(found)[:, 0],
            "species": self.species(found),
        }


def scaled(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """The usual losses, with heights in their own scale."""
    height = (outputs["height"] - targets["height"]) / 40
    return (
        nn.functional.cross_entropy(outputs["species"], targets["species"])
        + height.square().mean()
        + nn.functional.binary_cross_entropy_with_logits(outputs["signs"], targets["signs"])
    )


def task() -> fedcore.Task:
    return fedcore.Task(
        name="trees",
        kind={"species": "classification", "height": "regression", "signs": "multilabel"},
        model=lambda: Network(64),
        student=lambda: Network(16),
        clients=lambda folder: ["anna", "ben", "cleo"],
        client_data=lambda name, folder: Rows(name),
        cloud_data=lambda folder: Rows("cloud", 400),
        test_data=lambda folder: Rows("test", 60),
        example_input=EXAMPLE,  # type: ignore[arg-type]
        labels={"species": SPECIES, "signs": ("moss", "rot")},  # type: ignore[arg-type]
        loss=scaled,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A store with the released model, and the result of its run."""
    folder = tmp_path_factory.mktemp("trees")
    places = {"repository": folder / "releases", "keys": folder / "keys"}
    fedcore.create_repository(**places)
    result = fedcore.simulate(
        task(),
        progress=False,
        federation={"rounds": 8},
        client={"learning_rate": 0.1, "batch_size": 16},
        finetune={"epochs": 10, "max_metric_drop": 1.0, "learning_rate": 0.02},
        simulation={"workers": 1},
        compression={
            "timing_runs": 100,
            "candidates": ("fp32", "int8_static"),
            "max_accuracy_drop": 0.5,
            "max_slowdown": 9.0,
        },
        release={"max_test_drop": 1.0, **{name: str(place) for name, place in places.items()}},
    )
    root = places["keys"] / "root.json"
    fedcore.update_model(folder / "store", "trees", repository=places["repository"], root=root)
    return folder, result


def test_a_device_answers_by_name(released: tuple[Path, Any], capsys: Any) -> None:
    folder, result = released
    assert set(result.metrics) >= {"species_accuracy", "height_rmse", "height_mae"}
    assert result.metrics["species_accuracy"]["federated"] > 0.8
    model = fedcore.open_model(folder / "store", "trees")
    assert [(each.name, each.shape) for each in model.manifest.outputs or ()] == [
        ("species", (3,)),
        ("height", ()),
        ("signs", (2,)),
    ]
    rows = Rows("asked", 20)
    arrays = {"leaf": rows.leaf.numpy(), "wet": rows.wet.numpy()}
    with torch.inference_mode():
        expected = result.model(torch.cat([rows.leaf, rows.wet], dim=1)).numpy()
    found = model.predict_named(arrays)
    assert {name: each.shape for name, each in found.items()} == {
        "species": (20, 3),
        "height": (20,),
        "signs": (20, 2),
    }
    assert np.abs(found["height"] - expected[:, 3]).max() < 20
    assert (found["species"].argmax(1) == expected[:, :3].argmax(1)).mean() > 0.8
    one = {name: each[0] for name, each in arrays.items()}
    alone = model.predict_named(one)
    assert alone["height"].shape == ()
    assert np.array_equal(
        np.r_[alone["species"], alone["height"], alone["signs"]], model.predict(one)
    )
    assert model.predict_labels(arrays, output="species")[0] in SPECIES
    assert set(model.predict_labels(one, output="signs")) <= {"moss", "rot"}
    likely = model.predict_probabilities(arrays, output="species")
    assert np.allclose(likely.sum(axis=1), 1, atol=1e-5)
    with pytest.raises(DataError, match=r"no output 'heigth', but species, height, signs"):
        model.predict_labels(one, output="heigth")
    with pytest.raises(DeviceError, match="no labels"):
        model.predict_labels(one, output="height")
    with pytest.raises(DeviceError, match="no labels"):
        model.predict_labels(one)

    given = folder / "input.json"
    given.write_text(json.dumps({name: each.tolist() for name, each in arrays.items()}))
    infer = ["device", "infer", "--store", str(folder / "store"), "--model", "trees"]
    assert main([*infer, "--input", str(given)]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("species: ")
    assert "; height: " in line
    assert "; signs: " in line
    assert main([*infer, "--input", str(given), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert np.allclose(told["outputs"]["height"], found["height"], rtol=1e-4)
    assert told["labels"]["species"][0] in SPECIES
    assert len(told["probabilities"]["signs"]) == 20
    assert "height" not in told["labels"]


def test_servers_answer_by_name(released: tuple[Path, Any]) -> None:
    folder, _ = released
    model = fedcore.open_model(folder / "store", "trees")
    rows = Rows("asked", 5)
    arrays = {"leaf": rows.leaf.numpy(), "wet": rows.wet.numpy()}
    expected = model.predict_named(arrays)
    with running(folder / "store", opener=opener(threads=1, max_batch=8)) as server:
        http = f"127.0.0.1:{server.http}" if isinstance(server.http, int) else server.http
        with urllib.request.urlopen(f"http://{http}/v2/models/trees", timeout=60) as response:
            described = json.load(response)["outputs"]
        assert described == [
            {"name": "species", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "height", "datatype": "FP32", "shape": [-1]},
            {"name": "signs", "datatype": "FP32", "shape": [-1, 2]},
        ]
        for module, address in ((triton, server.grpc), (triton_http, http)):
            inputs = []
            for name, array in arrays.items():
                inputs.append(module.InferInput(name, list(array.shape), "FP32"))
                inputs[-1].set_data_from_numpy(array)
            with module.InferenceServerClient(str(address)) as client:
                whole = client.infer("trees", inputs)
                for name, wanted in expected.items():
                    assert np.allclose(whole.as_numpy(name), wanted, rtol=1e-4, atol=1e-4)
                wanted_one = [module.InferRequestedOutput("height")]
                part = client.infer("trees", inputs, outputs=wanted_one)
                assert np.allclose(part.as_numpy("height"), expected["height"], rtol=1e-4)
                assert part.as_numpy("species") is None


def test_each_candidate_keeps_each_output(released: tuple[Path, Any]) -> None:
    _, result = released
    made = fedcore.compress(
        task(),
        result.run,
        result.model,
        compression={
            "candidates": CANDIDATES,
            "rounding_epochs": 1,
            "prune_epochs": 5,
            "distil_epochs": 20,
        },
        progress=False,
    )
    unbuilt = set(CANDIDATES) - set(made.files)
    assert unbuilt <= {"int8_mixed"}, [each.reason for each in made.records]
    rows = Rows("asked", 50)
    vectors = torch.cat([rows.leaf, rows.wet], dim=1)
    with torch.inference_mode():
        expected = result.model(vectors).numpy()
    for name, onnx in made.files.items():
        session = onnxruntime.InferenceSession(onnx)
        found = np.concatenate(
            [session.run(None, {"input": one[None].numpy()})[0] for one in vectors]
        )
        close = 0.5 if "distilled" in name or "pruned" in name else 0.85
        assert (found[:, :3].argmax(1) == expected[:, :3].argmax(1)).mean() >= close, name
        assert np.abs(found[:, 3] - expected[:, 3]).mean() < 20, name
    static = next(each for each in made.records if each.name == "int8_static")
    assert static.agreement > 0.9  # one scale for all outputs would round the species away


def test_exports_describe_the_vector(released: tuple[Path, Any]) -> None:
    folder, _ = released
    places = {"repository": folder / "releases", "keys": folder / "keys"}
    for layout in ("triton", "plain"):
        done = fedcore.export_release("trees", layout=layout, out=folder / layout, **places)
        (manifest,) = done.folder.rglob("manifest.json")
        stated = json.loads(manifest.read_text())["outputs"]
        assert [each["name"] for each in stated] == ["species", "height", "signs"]
        assert stated[1]["tolerance"] > 5 * stated[0]["tolerance"]
