"""What devices tell of their models: checked, kept, added up, and read by a timer."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedcore
from fedcore.artifacts.feedback import LATENCY_BOUNDS_S
from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.reference import BinnedFeature, Reference
from fedcore.errors import ConfigError, ReleaseError
from fedcore.rpc.delivery_pb2 import Bins, ServingReport
from server.commands import release
from server.delivery.feedback import ServingBook, fault_of_serving
from server.delivery.reports import TrialJudge, book_of
from server.release.publish import publish
from tests.unit.server.release.conftest import NOW, make_draft

BUCKETS = len(LATENCY_BOUNDS_S) + 1


@dataclass(frozen=True)
class Device:
    """What is used of a `fedcore.crypto.roster.Member`."""

    name: str

    @property
    def fingerprint(self) -> str:
        return f"{self.name}-key"


def report(*counts: list[int], **more: Any) -> ServingReport:
    """Counts of a model with one feature of two bins and one for missing values."""
    rows = sum(counts[0]) if counts else 0
    values: dict[str, Any] = {
        "model": "digits",
        "version": 1,
        "rows": rows,
        "features": [Bins(counts=row) for row in counts],
        "requests": 1000,
        "errors": 10,
        "latency": [0] * 3 + [980, 10] + [0] * (BUCKETS - 5),
    }
    return ServingReport(**{**values, **more})


@pytest.fixture
def places(publisher: Any, tmp_path: Path) -> dict[str, Path]:
    """A repository with one version that has a reference."""
    feature = BinnedFeature(side="input", measure="value", edges=(0.0,), counts=(500, 500, 0))
    reference = Reference(presentation="label", features=(feature,))
    eye = np.eye(2, dtype=np.float32)
    draft = replace(make_draft(), golden=golden_bytes(eye, eye, None, reference))
    publish(draft, repository=publisher.repository, keys=publisher.keys, created=NOW)
    return {
        "repository": publisher.repository,
        "keys": publisher.keys,
        "reports": tmp_path / "reports",
    }


def keep(places: dict[str, Path], device: str, told: ServingReport) -> None:
    assert fault_of_serving(told) == ""
    book = book_of(places["reports"], places["repository"])
    TrialJudge(book, places["repository"], places["keys"])(Device(device), told)  # type: ignore[arg-type]


def run(places: dict[str, Path], verb: str, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    release.arguments(parser)
    options = [word for name, path in places.items() for word in (f"--{name}", str(path))]
    return release.run(parser.parse_args([verb, *options, *arguments]))


def test_counts_of_all_devices_add_up_and_the_furthest_is_named(places: dict[str, Path]) -> None:
    (before,) = fedcore.measure_drift(**places)
    assert (before.devices, before.psi, before.drifted, before.worst) == (0, None, (), None)
    keep(places, "edge-1", report([510, 490, 0]))
    keep(places, "edge-2", report([100, 900, 0]))
    keep(places, "edge-2", report([90, 910, 0]))  # in place of the one before
    keep(places, "edge-3", report(errors=0, latency=[1000] + [0] * (BUCKETS - 1)))
    (found,) = fedcore.measure_drift(**places)
    assert (found.model, found.version, found.devices, found.rows) == ("digits", 1, 3, 2000)
    assert found.psi == pytest.approx(0.16928, abs=1e-5)
    assert [each.reading for each in found.features] == ["moderate"]
    assert found.drifted == ()
    assert found.worst is not None
    assert (found.worst.device, found.worst.feature) == ("edge-2", "input[0]")
    assert found.worst.psi == pytest.approx(0.95, abs=0.02)
    assert found.error_rate == pytest.approx(20 / 3000)
    assert (found.p50_us, found.p99_us) == (1000, 1000)
    (found,) = fedcore.measure_drift(**places, above=0.15)
    assert found.drifted == ("input[0]",)


def test_a_timer_gets_an_exit_code(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(places, "drift") == 0
    assert "no device has told how it is used" in capsys.readouterr().out
    keep(places, "edge-1", report([100, 900, 0]))
    assert run(places, "drift", "--model", "digits") == 12
    shown = capsys.readouterr().out
    assert "1000 requests on 1 device, 1 % failed, p50 up to 1000 us" in shown
    assert "1 of 1 feature moved" in shown
    assert "input[0]: 0.8" in shown
    assert run(places, "drift", "--above", "5", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["psi"] > 0.8, row["drifted"], row["worst"]["device"]) == (True, [], "edge-1")
    assert run(places, "show") == 0
    assert "version 1 serves" in capsys.readouterr().out
    assert run(places, "show", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["serving"]["1"]["devices"] == 1
    with pytest.raises(ReleaseError, match="no model 'dogs' has been published there"):
        run(places, "drift", "--model", "dogs")
    with pytest.raises(ConfigError, match="expected a positive number"):
        run(places, "drift", "--above", "nan")
    with pytest.raises(ConfigError, match="expected a positive number"):
        fedcore.measure_drift(**places, above=float("inf"))


def test_noise_is_part_of_chance(places: dict[str, Path]) -> None:
    keep(places, "edge-1", report([-20, 320, 20], rows=300, noise_deviation=150.0))
    (found,) = fedcore.measure_drift(**places)
    assert found.psi is not None
    assert found.psi > 0.25
    assert [each.reading for each in found.features] == ["stable"]
    assert (found.drifted, found.worst) == ((), None)


def test_counts_that_do_not_fit_the_release_count_for_nothing(
    places: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    keep(places, "edge-1", report([0, 0, 0, 1000]))
    keep(places, "edge-2", report([10, 990, 0], [500, 500, 0]))
    keep(
        places,
        "edge-3",
        report([1, 2], rows=1000, noise_deviation=50.0, features=[Bins(counts=[9, 991])]),
    )
    keep(places, "edge-4", report([1000, 0, 0], version=7))  # never published: dropped
    keep(places, "edge-5", report([500, 500, 0]))
    (places["reports"] / "digits" / "1" / "served" / "junk.json").write_text("{")
    (found,) = fedcore.measure_drift(**places)
    assert (found.devices, found.left_out, found.drifted) == (1, 3, ())
    assert "counts of a device cannot be read" in caplog.text
    assert ServingBook(places["reports"]).of("digits", 7) == []


@pytest.mark.parametrize(
    "told",
    [
        ServingReport(),
        report([500, 500, 0], model=""),
        report([500, 500, 0], model="m" * 65),
        report([500, 500, 0], version=0),
        report([500, 500, 0], version=2**63),
        report([500, 500, 0], requests=5),
        report([500, 500, 0], errors=1001),
        report([500, 500, 0], latency=[1] * (BUCKETS - 1)),
        report([500, 500, 0], latency=[2**63] * BUCKETS),
        report([50_000, 50_001, 0], requests=200_000),
        report([500, 500, 0], requests=10**13),
        report([500, 500, 0], noise_deviation=1001.0),
        report([500, 500, 0], rows=999),
        report([500, 500, 0], rows=0),
        report(rows=1000),
        report([49, 50, 0]),
        report([1500, -500, 0]),
        report([1000]),
        report([1000] + [0] * 32),
        report(*[[500, 500, 0]] * 73),
        report([500, 500, 0], noise_deviation=float("nan")),
        report([500, 500, 0], noise_deviation=float("inf")),
        report([500, 500, 0], noise_deviation=-1.0),
        report([-200, 500, 700], rows=1000, noise_deviation=10.0),
        report([500, 500, 2000], rows=1000, noise_deviation=10.0),
    ],
)
def test_a_report_that_cannot_be_true_is_refused(told: ServingReport) -> None:
    assert fault_of_serving(told) != ""
