"""Comparisons over seeds: rows, bounds, exit codes and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.seeded import Bound, Comparison, main


def comparison(**changed: Any) -> Comparison:
    values: dict[str, Any] = {
        "workload": "toy",
        "metric": "accuracy",
        "unit": "fraction",
        "run": lambda folder, seed: {"one": 0.5, "other": 0.6 + 0.1 * seed},
        "bounds": (
            Bound(name="gain", value=lambda each: each["other"] - each["one"], least=0.15),
            Bound(name="one", value=lambda each: each["one"], most=0.5),
        ),
    }
    return Comparison(**values | changed)


@pytest.mark.parametrize(("seeds", "code"), [((0, 1, 2), 0), ((0,), 1)])
def test_the_median_over_seeds_is_held_to_its_bound(
    seeds: tuple[int, ...], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    assert main("toy", [comparison()], description=None, seeds=seeds, arguments=out) == code
    found = json.loads((tmp_path / "toy.json").read_text())
    assert [each["holds"] for each in found["checks"]] == [code == 0, True]
    assert [each["seed"] for each in found["runs"]] == [*seeds]
    (row,) = [each for each in found["rows"] if each["system"] == "other"]
    assert (row["min"], row["repeats"]) == (0.6, len(seeds))
    assert ("holds  toy: gain" in capsys.readouterr().out) == (code == 0)


def test_data_that_is_missing_is_said_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    needy = comparison(needs_data=True, run=lambda folder, seed: pytest.fail("ran"))
    assert main("toy", [needy], description=None, seeds=(0,), arguments=[]) != 0
    assert "FEDCORE_DATA is not set" in capsys.readouterr().err
