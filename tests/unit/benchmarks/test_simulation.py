"""The benchmark itself, on data made up here, with the bare loop for a peer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.plot import plot
from benchmarks.simulation import main, table


def write_partition(folder: Path, *, clients: int, examples: int) -> None:
    """Images whose brightest pixel tells the digit."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, clients * examples)
    images = rng.normal(0, 0.1, (len(labels), 784)).astype(np.float32)
    images[np.arange(len(labels)), labels] = 3.0
    folder.mkdir(parents=True)
    arrays = {
        "images": images,
        "labels": labels,
        "offsets": np.arange(0, len(labels) + 1, examples),
        "test_images": images[:100],
        "test_labels": labels[:100],
    }
    save_file(arrays, folder / "w2.safetensors")


@pytest.mark.slow
def test_quick_measures_fedcore_and_the_bare_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_partition(tmp_path / "data", clients=20, examples=20)
    options = ["--quick", "--workloads", "w2", "--out", str(tmp_path)]
    assert main([*options, "--peers-python", sys.executable]) == 0
    result = json.loads((tmp_path / "simulation.json").read_text())
    assert result["machine"]["cores"] >= 1
    assert result["checks"] == result["failures"] == []
    rows = {(row["system"], row["metric"]): row for row in result["rows"]}
    for system in ("fedcore", "bare"):
        assert rows[system, "accuracy"]["median"] > 0.9
        assert rows[system, "peak_bytes"]["median"] > 50e6  # torch alone is more
        seconds = rows[system, "seconds_per_round"]
        assert rows[system, "clients_per_s"]["median"] == pytest.approx(10 / seconds["median"])
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert rows["roofline", "seconds_per_round"]["median"] > 0
    assert rows["fedcore", "times_the_floor"]["median"] > 1
    assert (tmp_path / "simulation.png").read_bytes().startswith(b"\x89PNG")
    assert "times_the_floor" in capsys.readouterr().out


def test_data_that_is_missing_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    assert main(["--quick", "--workloads", "w2", "--out", str(tmp_path)]) == 4
    assert "FEDCORE_DATA is not set" in capsys.readouterr().err
    assert not (tmp_path / "simulation.json").exists()


def test_a_peer_that_fails_fails_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_partition(tmp_path / "data", clients=20, examples=20)
    broken = tmp_path / "python"
    versions = """[ "$1" = -c ] && echo '{}' && exit 0"""
    broken.write_text(f"#!/bin/sh\n{versions}\necho no torch >&2\nexit 9\n")
    broken.chmod(0o755)
    options = ["--workloads", "w2", "--systems", "bare", "--out", str(tmp_path)]
    assert main([*options, "--peers-python", str(broken)]) == 1
    (failure,) = json.loads((tmp_path / "simulation.json").read_text())["failures"]
    assert "left with 9" in failure
    assert "no torch" in failure


ROW = {
    "system": "fedcore",
    "workload": "w2",
    "metric": "seconds_per_round",
    "unit": "s",
    "median": 0.5,
    "min": 0.25,
    "max": 1.0,
    "repeats": 3,
}


def test_the_table_says_what_does_not_hold() -> None:
    check = {"name": "x", "value": 3.0, "bound": 4.0, "holds": False, "min": 2.0, "max": 5.0}
    text = table({"rows": [ROW], "checks": [check], "peers": [], "failures": ["gone"]})
    assert "BROKEN x: 3 (2 to 5), bound 4" in text
    assert "FAILED gone" in text
    assert "seconds_per_round" in text


def test_a_plot_of_one_row_can_be_drawn(tmp_path: Path) -> None:
    plot([ROW], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
