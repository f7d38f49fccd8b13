"""A run that fails at its end or at its beginning: nothing that was computed before is lost."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedcore
from fedcore.errors import DiskFull
from server.release.bucket import Bucket
from server.release.publish import initialise, registry
from server.report.folder import is_complete


def data(seed: int) -> TensorDataset:
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


TASK = fedcore.Task(
    name="corners",
    kind="classification",
    model=lambda: nn.Linear(3, 2),
    clients=lambda folder: ["one", "two"],
    client_data=lambda client, folder: data(len(client)),
    test_data=lambda folder: data(9),
    example_input=torch.zeros(3),
)
SETTINGS: dict[str, Any] = {
    "federation": {"rounds": 1},
    "simulation": {"workers": 1, "training": "loop"},
    "compression": {"timing_runs": 100},
}


def test_it_is_resumed_with_or_without_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"repository": str(tmp_path / "releases"), "keys": str(tmp_path / "keys")}
    initialise(tmp_path / "releases", tmp_path / "keys", now=datetime.now(UTC))

    def simulate(**more: Any) -> fedcore.Result:
        return fedcore.simulate(TASK, runs=tmp_path / "runs", progress=False, **SETTINGS, **more)

    def full(*arguments: Any, **more: Any) -> None:
        raise DiskFull("releases: the disk has no room.")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "add", full)
        result = simulate(release=places)
    assert "the disk has no room" in result.record.unreleased
    assert result.record.manifest is None
    folder = tmp_path / "runs" / "corners"
    model = (folder / "global.safetensors").read_bytes()
    assert json.loads((folder / "summary.json").read_text())["accuracy"]["released"] is not None
    with pytest.raises(fedcore.FedcoreError, match=r"interrupted after round 1.*resume=True"):
        simulate(release=places)
    assert not is_complete(folder)
    alone = simulate(resume=True)
    assert (alone.record.unreleased, alone.record.manifest) == ("", None)
    assert is_complete(folder)
    assert (folder / "global.safetensors").read_bytes() == model


def test_a_release_that_could_not_be_pushed_is_published_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialise(tmp_path / "releases", tmp_path / "keys", now=datetime.now(UTC))
    release = {
        "repository": str(tmp_path / "releases"),
        "keys": str(tmp_path / "keys"),
        "push": "memory://fleet-of-runs/releases",
    }

    def cut(*_: Any) -> None:
        raise ConnectionResetError("cut")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "_put", cut)
        result = fedcore.simulate(
            TASK, runs=tmp_path / "runs", progress=False, **SETTINGS, release=release
        )
    assert result.record.manifest is not None
    assert "corners version 1 is published in" in result.record.unreleased
    assert "but was not pushed: memory://fleet-of-runs/releases" in result.record.unreleased
    done = fedcore.push_release(release["repository"], release["keys"], to=release["push"])
    assert (done.version, done.repaired, done.unnamed) == (2, (), 0)
    assert len(done.uploaded) == done.files
    fsspec.filesystem("memory").rm("/fleet-of-runs", recursive=True)


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ({"federation": {"rounds": 1, "normalisation": "cloud"}}, "has no cloud_data"),
        ({"client": {"learning_rate": 1e30, "epochs": 5}}, "."),
    ],
)
def test_a_run_that_cannot_train_replaces_none(
    tmp_path: Path, refused: dict[str, Any], said: str
) -> None:
    def simulate(**more: Any) -> fedcore.Result:
        settings = {**SETTINGS, **more}
        return fedcore.simulate(TASK, runs=tmp_path, progress=False, **settings)

    folder = simulate().folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(fedcore.FedcoreError, match=said):
        simulate(fresh=True, **refused)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
