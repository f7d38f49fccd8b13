"""The steps after the rounds: each is done once, whatever dies between any two of their writes."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task
from fedcore.artifacts.manifest import Manifest
from fedcore.config.run import RunConfig
from fedcore.errors import CompressionError, DataError, DiskFull, ReleaseError
from fedcore.files import sha256_hex, write_atomic, write_json
from fedcore.observability.events import Event, Sink
from fedcore.task.definition import Examples
from fedcore.task.model import FullModel, build_model
from fedcore.updates.pack import pack
from server.cloud import CloudData
from server.compression.compress import compress
from server.compression.compressed import Compressed
from server.finetune.launch import Finetuned
from server.live import finish as finish_module
from server.live.finish import check_finish, finish
from server.records import RoundRecord
from server.release import final_test, once
from server.release.publish import history, initialise, publish
from server.report import html
from server.report.folder import is_complete
from server.rounds.app import Outcome
from server.rounds.evaluation.judgement import Judgement
from server.rounds.evaluation.judging import Judge
from server.rounds.loop import Federated

NOW = datetime.now(UTC)


class Died(BaseException):
    """What a kill looks like to whoever it hits."""


def data(seed: int) -> Examples:
    rng = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (60,), generator=rng)
    inputs = nn.functional.one_hot(targets, 5) + 0.1
    return TensorDataset(inputs, targets)  # type: ignore[return-value]


TASK = Task(
    name="tiny",
    kind="classification",
    model=lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)),
    clients=lambda folder: [],
    client_data=lambda client, folder: data(1),
    test_data=lambda folder: data(2),
    cloud_data=lambda folder: data(3),
    example_input=torch.zeros(5),
)


def outcome(run: RunConfig) -> Outcome:
    model = build_model(TASK, run).eval()
    record = RoundRecord(
        round=1,
        rounds=1,
        seconds=2.0,
        cohort=2,
        updates=2,
        declined=0,
        failed=0,
        train_loss=None,
        metrics={"accuracy": 0.5},
        judged_on="cloud",
        epsilon_max=1.5,
        bytes_up=10,
        bytes_down=10,
    )
    return Outcome(model, Federated(pack(model.model), 1, (record,)))


PLOTS = [
    f"{name}_plot"
    for name in ("scores", "calibration", "rounds", "loss", "bytes", "candidates", "clients")
]
_COMPRESSED: dict[tuple[bytes, str, bool], Compressed] = {}


class Site:
    """A run whose rounds are over, and what its steps have cost."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, *, plots: bool) -> None:
        self.root, self.patch = root, patch
        initialise(root / "releases", root / "keys", now=NOW)
        values = {
            "name": "orchard",
            "task": "task.py",
            "federation": {"rounds": 1},
            "privacy": {"unit": "example"},
            "finetune": {"epochs": 1},
            "compression": {"timing_runs": 100, "candidates": ("fp32", "int8_dynamic")},
            "release": {"repository": "releases", "keys": "keys"},
        }
        run = RunConfig.model_validate(values)
        self.run = run.model_copy(update={"base": root})
        self.folder = root / "runs" / "orchard"
        self.done: Counter[str] = Counter()
        self.events: list[Event] = []
        patch.setattr(finish_module, "fine_tune", self._fine_tune)
        patch.setattr(finish_module, "compress", self._compress)
        if not plots:  # they are most of the time that a report takes, and have tests of their own
            patch.setattr(html, "_plots", lambda record: dict.fromkeys(PLOTS))

    def _fine_tune(
        self,
        task: Task,
        run: RunConfig,
        model: FullModel,
        cloud: CloudData,
        judge: Judge | None,
        *,
        emit: Sink,
        auto_file: Path,
    ) -> Finetuned:
        """In this process: what it comes to is not what these tests are about."""
        self.done["fine-tuning"] += 1
        candidate = copy.deepcopy(model)
        with torch.no_grad():
            next(candidate.parameters()).mul_(1.01)
        asked = judge(model, candidate) if judge else None
        alone = copy.deepcopy(model)
        return Finetuned(candidate, candidate, alone, True, 0.5, 0.6, asked, parent_sha256="a" * 64)

    def _compress(self, *arguments: Any, **more: Any) -> Compressed:
        """Of a model and settings that were compressed before, what that gave: bytes are equal."""
        self.done["compression"] += 1
        run, _, model, cloud = arguments
        key = (pack(model.model).tobytes(), f"{run.compression} {run.finetune}", cloud is None)
        if key not in _COMPRESSED:
            _COMPRESSED[key] = replace(compress(*arguments, **more), missing=(1, 3))
        return copy.deepcopy(_COMPRESSED[key])

    def finish(self, judge: Judge | None = None) -> None:
        finish(self.run, TASK, outcome(self.run), self.folder, self.events.append, judge=judge)

    def versions(self) -> tuple[Manifest, ...]:
        return history(self.root / "releases", self.root / "keys")

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch, plots=False)


def test_a_model_that_is_withheld_leaves_a_complete_run(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(final_test, "_drop", lambda primary, tested: 0.5)
    with pytest.raises(ReleaseError, match=r"release\.max_test_drop = 0\.01"):
        site.finish()
    assert site.versions() == ()
    assert "Nothing was published" in site.summary()["release"]["withheld"]
    assert not (site.folder / "steps").exists()


def test_a_release_that_fails_keeps_what_was_computed_and_can_go_on(site: Site) -> None:
    def full(*arguments: Any, **more: Any) -> Manifest:
        raise DiskFull("releases: the disk has no room.")

    with site.patch.context() as patch:
        patch.setattr(once, "publish", full)
        with pytest.raises(ReleaseError, match=r"the disk has no room\. .*--resume .*continues"):
            site.finish()
    assert "the disk has no room" in site.summary()["release"]["failed"]
    assert "The release failed." in (site.folder / "report.html").read_text()
    assert not is_complete(site.folder)
    site.finish()
    assert (site.done["fine-tuning"], site.done["compression"]) == (1, 1)
    assert site.summary()["release"]["version"] == 1
    (manifest,) = site.versions()
    assert manifest.missing == (1, 3)
    assert is_complete(site.folder)


def test_what_a_run_started_from_is_stated(site: Site) -> None:
    (site.root / "start.safetensors").write_bytes(b"weights")
    federation = site.run.federation.model_copy(update={"initial": "start.safetensors"})
    site.run = site.run.model_copy(update={"federation": federation})
    site.finish()
    (manifest,) = site.versions()
    assert manifest.lineage.initial_sha256 == sha256_hex(b"weights")
    assert manifest.privacy.before == "not known"
    stated = {"sha256": sha256_hex(b"weights"), "spent_before": "not known"}
    assert site.summary()["initial"] == stated
    report = (site.folder / "report.html").read_text()
    assert "in this run; before it, not known" in report
    assert "what training that has cost clients is not known" in report


def dies_before(what: str) -> Callable[..., None]:
    """Writes as ever, and dies before the file of that name is written."""

    def write(path: Path, content: Any, **more: Any) -> None:
        if path.name == what:
            raise Died
        (write_atomic if isinstance(content, bytes) else write_json)(path, content, **more)

    return write


def test_a_run_is_finished_released_and_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, monkeypatch, plots=True)
    site.finish()
    (manifest,) = site.versions()
    assert (manifest.lineage.run, manifest.lineage.round, manifest.version) == ("orchard", 1, 1)
    assert manifest.lineage.finetuned
    assert manifest.privacy.noise == "system"
    assert manifest.privacy.epsilon == 1.5
    summary = site.summary()
    assert summary["release"] == {
        "version": 1,
        "digest": manifest.onnx.sha256,
        "withheld": None,
        "failed": None,
        "untrained": None,
    }
    assert list(summary["seconds"]) == [
        *("federate", "finetune", "compress", "test", "release", "total")
    ]
    assert summary["seconds"]["federate"] == 2.0
    assert "trained on devices" in (site.folder / "report.html").read_text()
    found = {path.name for path in site.folder.iterdir()}
    assert found == {
        *("candidates", "finetuned.safetensors", "global.safetensors"),
        *("report.html", "summary.json"),
    }


POINTS = {
    # what is about to be written: fine-tunings and compressions in both processes together
    "global.safetensors": (1, 1),
    "candidate.safetensors": (2, 1),
    "finetune.json": (2, 1),
    "finetuned.safetensors": (1, 1),
    "golden.safetensors": (1, 2),
    "int8_dynamic.onnx": (1, 2),
    "compress.json": (1, 2),
    "publish.json": (1, 1),
    "report.html": (1, 1),
    "summary.json": (1, 1),
}


@pytest.mark.parametrize("point", POINTS)
def test_whatever_it_dies_of_each_step_is_done_once(site: Site, point: str) -> None:
    write = dies_before(point)
    with site.patch.context() as patch:
        for module in (
            "server.live.finish",
            "server.after_rounds",
            "server.report.folder",
            "server.release.once",
        ):
            patch.setattr(f"{module}.write_atomic", write)
        patch.setattr("server.report.folder.write_json", write)
        with pytest.raises(Died):
            site.finish()
    assert not (site.folder / "summary.json").exists()
    site.finish()
    (manifest,) = site.versions()
    assert site.summary()["release"] == {
        "version": 1,
        "digest": manifest.onnx.sha256,
        "withheld": None,
        "failed": None,
        "untrained": None,
    }
    assert (site.done["fine-tuning"], site.done["compression"]) == POINTS[point]


@pytest.mark.parametrize("published", [False, True])
def test_dying_while_it_publishes_publishes_once(site: Site, published: bool) -> None:
    def dying(*arguments: Any, **more: Any) -> None:
        if published:
            publish(*arguments, **more)
        raise Died

    with site.patch.context() as patch:
        patch.setattr(once, "publish", dying)
        with pytest.raises(Died):
            site.finish()
    assert len(site.versions()) == published
    site.finish()
    assert [one.version for one in site.versions()] == [1]
    assert site.summary()["release"]["version"] == 1
    (manifest,) = site.versions()
    assert manifest.missing == (1, 3)


def test_the_same_model_of_an_earlier_run_is_no_release_of_this_one(site: Site) -> None:
    site.finish()
    (site.folder / "summary.json").unlink()  # begun again, with the same bits
    site.finish()
    assert [one.version for one in site.versions()] == [1, 2]
    first, second = site.versions()
    assert first.onnx.sha256 == second.onnx.sha256
    assert site.summary()["release"]["version"] == 2


@pytest.mark.parametrize("margin", [0.01, float("inf")])
def test_devices_are_asked_once_however_often_it_dies(site: Site, margin: float) -> None:
    asked: list[FullModel] = []

    def judge(before: FullModel, after: FullModel) -> Judgement:
        asked.append(after)
        return Judgement(3, 30, 0.5, 0.6, margin)

    with site.patch.context() as patch:
        patch.setattr("server.report.folder.write_json", dies_before("summary.json"))
        with pytest.raises(Died):
            site.finish(judge)
    site.finish(judge)
    assert len(asked) == 1
    told = "accuracy on held-out data of 3 clients 0.5 before, 0.6 after"
    assert told in (site.folder / "report.html").read_text()


@pytest.mark.parametrize("name", ["candidate.safetensors", "golden.safetensors", "fp32.onnx"])
def test_a_step_whose_file_is_damaged_is_done_again(site: Site, name: str) -> None:
    with site.patch.context() as patch:
        patch.setattr("server.report.folder.write_json", dies_before("summary.json"))
        with pytest.raises(Died):
            site.finish()
    path = site.folder / "steps" / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    site.finish()
    again = (2, 1) if name == "candidate.safetensors" else (1, 2)
    assert (site.done["fine-tuning"], site.done["compression"]) == again
    assert len(site.versions()) == 1


def test_settings_that_were_changed_after_a_failure_count(site: Site) -> None:
    limits = site.run.compression.model_copy(update={"max_bytes": 10})
    site.run, run = site.run.model_copy(update={"compression": limits}), site.run
    with pytest.raises(CompressionError, match="more than max_bytes = 10"):
        site.finish()
    site.run = run
    site.finish()
    assert (site.done["fine-tuning"], site.done["compression"]) == (1, 2)
    (site.folder / "summary.json").unlink()
    site.run = run.model_copy(
        update={"finetune": run.finetune.model_copy(update={"learning_rate": 0.01})}
    )
    with site.patch.context() as patch:
        patch.setattr("server.report.folder.write_json", dies_before("summary.json"))
        with pytest.raises(Died):
            site.finish()
    site.run = run
    site.finish()
    assert site.done["fine-tuning"] == 3, "what was tuned otherwise is not this run's"


@pytest.mark.parametrize("raw", [b"{", b"{}", b"\xff", b"[NaN]"])
def test_a_note_that_is_none_counts_for_nothing(site: Site, raw: bytes) -> None:
    for name in ("finetune.json", "compress.json", "publish.json"):
        write_atomic(site.folder / "steps" / name, raw)
    site.finish()
    assert len(site.versions()) == 1


def test_what_could_only_fail_at_the_end_is_refused_at_the_beginning(site: Site) -> None:
    check_finish(site.run, TASK)
    elsewhere = site.run.release.model_copy(update={"keys": "none"})
    with pytest.raises(ReleaseError, match="none"):
        check_finish(site.run.model_copy(update={"release": elsewhere}), TASK)

    def missing(folder: Path | None) -> Examples:
        raise OSError("no such disk")

    broken = replace(TASK, test_data=missing)
    with pytest.raises(DataError, match="no such disk"):
        check_finish(site.run, broken)
