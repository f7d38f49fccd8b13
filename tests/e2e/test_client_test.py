"""Test splits that live with the clients, and runs that nothing judges or tests."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcore
from fedcore.errors import ConfigError
from fedcore.training.batches import gather_all
from server.release.publish import initialise
from tests.unit.fedcore.clients import data, make_task

NAMES = ["anna", "ben", "carl"]
SETTINGS: dict[str, Any] = {
    "federation": {"rounds": 3},
    "client": {"learning_rate": 0.5},
    "compression": {"timing_runs": 100, "candidates": ("fp32",)},
    "simulation": {"workers": 1},
    "progress": False,
}


def test_results_are_pooled_and_by_client(tmp_path: Path) -> None:
    task = make_task(
        clients=lambda folder: NAMES,
        test_data=None,
        client_test=lambda client, folder: data(f"test of {client}"),
    )
    places = {"repository": tmp_path / "releases", "keys": tmp_path / "keys"}
    initialise(**places, now=datetime.now(UTC))
    release = {name: str(place) for name, place in places.items()}
    result = fedcore.simulate(task, runs=tmp_path, release=release, **SETTINGS)
    tests = [gather_all(data(f"test of {name}")) for name in NAMES]
    pooled = torch.cat([inputs for inputs, _ in tests]), torch.cat([each for _, each in tests])
    with torch.inference_mode():
        expected = fedcore.ACCURACY.compute(result.federated(pooled[0]), pooled[1])
    assert result.metrics["accuracy"]["federated"] == pytest.approx(expected, abs=1e-6)
    tested = result.summary["test"]
    assert (tested["clients"], tested["examples"]) == (3, len(pooled[0]))
    by_client = {each["client"]: each for each in tested["by_client"]}
    assert by_client.keys() == set(NAMES)
    with torch.inference_mode():
        alone = fedcore.ACCURACY.compute(result.federated(tests[1][0]), tests[1][1])
    assert by_client["ben"]["federated"] == pytest.approx(alone, abs=1e-6)
    assert result.record.manifest is not None
    assert result.record.manifest.test is not None
    assert (result.record.manifest.test.clients, result.record.manifest.test.drop) == (3, 0.0)
    report = (result.folder / "report.html").read_text()
    assert "client&#39;s test data (3)" in report

    again = fedcore.publish(result.compressed, result, **places)
    assert again.test == result.record.manifest.test


def test_a_run_that_nothing_judges_calls_no_round_the_best(tmp_path: Path) -> None:
    task = make_task(clients=lambda folder: NAMES, test_data=None)
    result = fedcore.simulate(task, runs=tmp_path, **SETTINGS)
    assert result.record.best_round == 3
    assert result.metrics == {}
    assert result.summary["test"] is None
    assert result.summary["best_round"] is None
    (note,) = (each for each in result.record.notes if "no final test" in each)
    assert "has no test_data" in note
    report = (result.folder / "report.html").read_text()
    assert "last round kept" in report
    assert "the best" not in report
    assert "best:" not in report


def test_patience_without_a_judge_is_refused_before_anything_runs(tmp_path: Path) -> None:
    task = make_task(clients=lambda folder: NAMES)
    settings = SETTINGS | {"federation": {"rounds": 3, "patience": 1}}
    with pytest.raises(ConfigError, match=r"no data judge the rounds.*Nothing was run"):
        fedcore.simulate(task, runs=tmp_path, **settings)
    assert not list(tmp_path.iterdir())
    judged = replace(task, cloud_data=lambda folder: data("cloud"))
    finetune = {"epochs": 0}
    assert fedcore.simulate(judged, finetune=finetune, **settings).summary["best_round"] is not None


def test_without_a_judge_the_check_says_what_is_missing() -> None:
    checked = fedcore.check(make_task(test_data=None), progress=False)
    assert checked.ok, checked
    assert "no final test can show" in str(checked)
    task = make_task(test_data=None, client_test=lambda client, folder: data(client))
    assert "80 examples of 2 clients" in str(fedcore.check(task, progress=False))
