"""What the ingest benchmark makes of its runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ingest
from benchmarks.deployment import Found
from benchmarks.deployment_flower import Taken
from benchmarks.ingest import EARLIER, OURS, STOCK, Runs, Sizes, summarise

MB = 1_000_000


def taken(seconds: float, risen_mb: int = 100) -> Taken:
    return Taken(seconds, seconds / 2, 300 * MB, (300 + risen_mb) * MB)


def test_runs_of_one_repeat_are_compared_with_each_other() -> None:
    runs = Runs(
        limits=[{"tls_ms": 20.0, "sha256_ms": 20.0}],
        fleets={OURS: [(1.0, 0.5), (3.0, 0.5), (2.0, 0.5)]},
    )
    for ours, stock, earlier in ((1.0, 5.0, 3.0), (2.0, 10.0, 6.0)):
        runs.add(OURS, 8, taken(ours))
        runs.add(STOCK, 8, taken(stock, 1000))
        runs.add(EARLIER, 8, taken(earlier))
    found = Found()
    summarise(runs, Sizes(cohorts=(8,), fleet=500, repeats=2, stock=True), found)
    assert {check.name: (check.value, check.holds) for check in found.checks} == {
        "Flower's time over ours for 8 updates": (5.0, True),
        "the earlier time over ours for 8 updates": (3.0, False),
        "memory above idle with 8 updates, MB": (100.0, True),
        "a round of 500 devices, s": (2.0, True),
    }
    rows = {(row.system, row.metric): row.median for row in found.rows}
    assert rows["fedcore", "bytes_per_s"] == pytest.approx(8 * 40 * MB * 0.75)
    assert rows["fedcore", "bytes_per_cpu_s"] == pytest.approx(8 * 40 * MB * 1.5)
    assert rows["limit", "bytes_per_s"] == pytest.approx(40 * MB / 0.04)


def test_what_fails_is_written_down_with_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(root: Path, sizes: Sizes, runs: Runs) -> None:
        raise ingest.ProgramFailed("the round did not end")

    monkeypatch.setattr(ingest, "measure", fails)
    assert ingest.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "FAILED the round did not end" in capsys.readouterr().out
    assert "the round did not end" in (tmp_path / "ingest.json").read_text()
