from __future__ import annotations

import argparse
import shutil
from collections import namedtuple
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedcore import doctor
from fedcore.doctor import Finding, disk, expiry, guarded, providers, task_layers, versions
from fedcore.errors import DataError
from server.api.checking import check

NOW = datetime(2026, 5, 1, tzinfo=UTC)
TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from fedcore import Task
data = lambda *_: TensorDataset(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
task = Task(name="t", kind="classification", model=lambda: nn.Sequential(LAYERS),
            clients=lambda folder: ["a"], client_data=data, test_data=data,
            example_input=torch.zeros(3))
"""


@pytest.mark.parametrize(
    ("days", "verdict"), [(-1, "fail"), (0, "fail"), (5, "warn"), (13.9, "warn"), (30, "ok")]
)
def test_a_certificate_is_told_in_good_time(days: float, verdict: str) -> None:
    found = expiry("it", NOW + timedelta(days=days), remedy="renew it", now=NOW)
    assert found.verdict == verdict
    assert (found.remedy == "renew it") == (verdict != "ok")


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (timedelta(seconds=-60), "UTC: expired 1 minute ago"),
        (timedelta(hours=-5.5), "UTC: expired 5 hours ago"),
        (timedelta(days=-1.5), "UTC: expired 1 day ago"),
        (timedelta(minutes=59), "UTC (59 minutes): expires soon"),
        (timedelta(days=30, hours=1), "UTC (30 days)"),
    ],
)
def test_how_long_ago_or_still_is_told_in_its_own_unit(left: timedelta, said: str) -> None:
    assert expiry("it", NOW + left, remedy="renew it", now=NOW).detail.endswith(said)


def test_an_error_is_a_finding_with_its_remedy() -> None:
    def work() -> Finding:
        raise DataError("x: there is none.")

    assert guarded("x", work, remedy="make one") == Finding(
        "x", "fail", "x: there is none.", "make one"
    )


@pytest.mark.parametrize(
    ("free", "verdict"), [(1 << 20, "fail"), (1 << 30, "warn"), (1 << 40, "ok")]
)
def test_a_disk_that_fills_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, verdict: str
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 41, 0, free))
    found = disk(tmp_path / "not" / "there" / "yet")
    assert found.verdict == verdict
    assert str(tmp_path) in found.detail


def test_another_version_of_flower_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions().verdict == "ok"
    for version, verdict in (
        ("1.40.0", "fail"),
        ("1.41.3", "ok"),
        ("1.42.0", "ok"),
        ("1.4", "fail"),
    ):
        told = {"flwr": version}
        monkeypatch.setattr(doctor, "_version", lambda name, told=told: told.get(name, "1"))
        assert versions().verdict == verdict
    assert versions().remedy == "`pip install 'flwr==1.42.*'`"
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert versions().verdict == "warn"


def test_onnxruntime_has_the_provider_that_releases_are_tested_on() -> None:
    found = providers()
    assert found.verdict == "ok"
    assert "CPUExecutionProvider" in found.detail


def test_layers_that_privacy_cannot_take_are_named(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text(TASK.replace("LAYERS", "nn.Linear(3, 2)"))
    assert task_layers(path).verdict == "ok"
    path.write_text(TASK.replace("LAYERS", "nn.BatchNorm1d(3), nn.Linear(3, 2)"))
    found = task_layers(path)
    assert found.verdict == "warn"
    assert "BatchNorm" in found.detail
    assert {finding.step for finding in check(path).findings if not finding.ok} == {"privacy"}


def test_a_side_must_be_named() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    doctor.doctor.arguments(parser)
    assert parser.parse_args(["--kit", "x"]).kit == Path("x")
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parser.parse_args(["--kit", "x", "--identity", "y"])
