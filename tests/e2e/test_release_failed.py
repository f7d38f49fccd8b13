"""A run that fails at its end or at its beginning: nothing that was computed before is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Attempts:
    """A run that failed to publish, was resumed and failed to push, and was resumed again."""

    folder: Path
    release: dict[str, str]
    full: fedcore.Result
    model: bytes
    """The model of the rounds after the first attempt."""
    released: float | None
    """The accuracy of the release in the first summary."""
    again: str
    """Why the run was not replaced by another of its name."""
    unpushed: fedcore.Result
    pushed: fedcore.Result


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attempts]:
    place = tmp_path_factory.mktemp("attempts")
    initialise(place / "releases", place / "keys", now=datetime.now(UTC))
    release = {"repository": str(place / "releases"), "keys": str(place / "keys")}
    folder = place / "runs" / "corners"

    def simulate(**more: Any) -> fedcore.Result:
        return fedcore.simulate(TASK, runs=place / "runs", progress=False, **SETTINGS, **more)

    def full(*arguments: Any, **more: Any) -> None:
        raise DiskFull("releases: the disk has no room.")

    def cut(*_: Any) -> None:
        raise ConnectionResetError("cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "add", full)
        first = simulate(release=release)
    model = (folder / "global.safetensors").read_bytes()
    summary = json.loads((folder / "summary.json").read_text())
    with pytest.raises(fedcore.FedcoreError) as again:
        simulate(release=release)
    release["push"] = "memory://fleet-of-runs/releases"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "_put", cut)
        second = simulate(release=release, resume=True)
    assert not is_complete(folder)
    third = simulate(release=release, resume=True)
    released = summary["accuracy"]["released"]
    yield Attempts(folder, release, first, model, released, str(again.value), second, third)
    fsspec.filesystem("memory").rm("/fleet-of-runs", recursive=True)


def test_a_run_that_could_not_publish_is_kept_and_resumed(attempts: Attempts) -> None:
    record = attempts.full.record
    assert "the disk has no room" in record.unreleased
    assert record.manifest is None
    assert attempts.released is not None
    assert re.search(r"interrupted after round 1.*resume=True", attempts.again)
    assert (attempts.folder / "global.safetensors").read_bytes() == attempts.model
    assert attempts.unpushed.record.manifest is not None


def test_a_release_that_could_not_be_pushed_is_published_once_and_pushed_by_a_resumed_run(
    attempts: Attempts,
) -> None:
    record, release = attempts.unpushed.record, attempts.release
    assert "corners version 1 is published in" in record.unreleased
    assert "but was not pushed: memory://fleet-of-runs/releases" in record.unreleased
    assert attempts.pushed.record.unreleased == ""
    assert attempts.pushed.record.manifest == record.manifest
    versions = fedcore.list_releases(release["repository"], release["keys"])
    assert [each.version for each in versions] == [1]
    assert is_complete(attempts.folder)
    done = fedcore.push_release(release["repository"], release["keys"], to=release["push"])
    assert (done.version, done.uploaded, done.repaired, done.unnamed) == (2, (), (), 0)


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ({"federation": {"rounds": 1, "normalisation": "cloud"}}, "has no cloud_data"),
        ({"client": {"learning_rate": 1e30, "epochs": 5}}, "."),
    ],
)
def test_a_run_that_cannot_train_replaces_none(
    attempts: Attempts, refused: dict[str, Any], said: str
) -> None:
    folder = attempts.folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(fedcore.FedcoreError, match=said):
        fedcore.simulate(
            TASK, runs=folder.parent, progress=False, fresh=True, **{**SETTINGS, **refused}
        )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
