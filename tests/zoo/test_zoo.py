"""What `fedcore.check` calls ready goes all the way to a device's answer; the rest is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedcore
from fedcore.artifacts.parity import FloatArray
from server.compression.runtime import answer, open_session
from tests.zoo.tasks import READY, REFUSED, Case

RUN: dict[str, Any] = {
    "name": "zoo",
    "federation": {"rounds": 1},
    "client": {"batch_size": 4, "learning_rate": 0.05},
    "simulation": {"training": "loop", "workers": 1},
    "finetune": {"epochs": 1, "batch_size": 8, "max_metric_drop": 1e9},
    "compression": {
        "timing_runs": 100,
        "candidates": ("fp32", "int8_static", "int8_dynamic"),
        "max_accuracy_drop": 1e9,
    },
    "release": {"max_test_drop": 1e9},
}


def settings_of(case: Case) -> dict[str, Any]:
    """The zoo's settings, with the case's own over them, section by section."""
    merged = dict(RUN)
    for section, own in case.run.items():
        base = merged.get(section, {})
        merged[section] = {**base, **own} if isinstance(own, Mapping) else own
    return {**merged, "progress": False}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A signed repository and its keys, for all releases of the zoo."""
    folder = tmp_path_factory.mktemp("zoo")
    found = {"repository": folder / "releases", "keys": folder / "keys"}
    fedcore.create_repository(**found)
    return found


def demanded(checked: fedcore.TaskCheck) -> str:
    """What the findings that end a check say."""
    return " ".join(one.detail for one in checked.findings if one.required and not one.ok)


def test_the_zoo_is_large() -> None:
    names = [case.name for case in READY + REFUSED]
    assert len(set(names)) == len(names) >= 50


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_would_fail_is_refused_with_a_remedy(case: Case) -> None:
    checked = fedcore.check(case.task(), **settings_of(case))
    assert not checked.ok, str(checked)
    assert re.search(case.remedy, demanded(checked)), str(checked)


@pytest.mark.parametrize("case", READY, ids=lambda case: case.name)
def test_what_is_ready_answers_on_a_device(
    case: Case, places: dict[str, Path], tmp_path: Path
) -> None:
    task, settings = case.task(), settings_of(case)
    checked = fedcore.check(task, **settings)
    assert checked.ok, str(checked)

    result = fedcore.simulate(task, **settings)
    (row,) = result.history.rows()
    assert (row["failed"], row["declined"]) == (0, 0)
    files, chosen = result.compressed.files, result.compressed.chosen
    assert "fp32" in files
    if task.cloud_data is not None:  # without it there is no int8 variant
        assert {"int8_dynamic", "int8_static"} & files.keys(), result.compressed.records
    assert fedcore.publish(result.compressed, result, model=task.name, **places).lineage.round == 1

    store, root = tmp_path / "device", places["keys"] / "root.json"
    fedcore.update_model(store, task.name, repository=places["repository"], root=root)
    examples = task.client_data("anna", None)
    asked = torch.stack([examples[row][0] for row in range(5)])  # as a client has them
    found = fedcore.open_model(store, task.name).predict(asked.numpy())
    inputs = asked.to(task.example_input.dtype)
    with torch.inference_mode():
        expected = result.model(inputs).numpy()
    scale = max(1.0, float(np.abs(expected).max()))
    assert found.shape == expected.shape
    assert np.abs(_answers(files[chosen], inputs) - found).max() <= 1e-5 * scale
    assert np.abs(_answers(files["fp32"], inputs) - expected).max() <= 1e-4 * scale
    assert np.abs(found - expected).max() <= (1e-4 if chosen == "fp32" else 0.1) * scale


def _answers(onnx: bytes, inputs: torch.Tensor) -> FloatArray:
    return answer(open_session(onnx, threads=1), inputs.numpy())
