from __future__ import annotations

import argparse
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import fedcore
from edge_client.delivery.clock import TimeFloor, write_floor
from edge_client.doctor import _releases_clock, examine
from fedcore import doctor
from fedcore.errors import ConfigError

NOW = datetime(2026, 5, 1, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("floor", "verdict", "told"),
    [
        (TimeFloor(), "warn", "no release has been verified here yet"),
        (TimeFloor(signed=NOW - DAY, until=NOW + DAY), "ok", "later than 2026-04-30 00:00 UTC"),
        (
            TimeFloor(signed=NOW + DAY, until=NOW + 8 * DAY),
            "fail",
            "is slow: the time is 2026-05-02",
        ),
        (TimeFloor(signed=NOW - DAY, latest=NOW + DAY), "warn", "it was fast then, or is slow now"),
        (TimeFloor(signed=NOW - 9 * DAY, until=NOW - DAY), "warn", "was valid until 2026-04-30"),
    ],
)
def test_the_clock_is_compared_with_what_was_signed(
    tmp_path: Path, floor: TimeFloor, verdict: str, told: str
) -> None:
    write_floor(tmp_path / "trust", floor)
    found = _releases_clock(tmp_path, NOW)
    assert found.verdict == verdict
    assert told in found.detail
    assert (found.remedy != "") == (verdict != "ok")


def test_a_damaged_floor_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "trust").mkdir()
    (tmp_path / "trust" / "clock.json").write_text("{")
    found = list(examine(doctor.Checkup(store=tmp_path)))
    assert [(one.check, one.verdict) for one in found] == [("store", "fail"), ("disk", "ok")]


def test_a_device_that_only_infers_is_looked_at(
    publisher: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edge_client.delivery.source import folder_source
    from edge_client.delivery.update import update

    publisher.publish()
    store = tmp_path / "store"
    update(
        folder_source(publisher.repository),
        store=store,
        model="digits",
        root=publisher.root,
        threads=1,
    )
    parser = argparse.ArgumentParser()
    doctor.doctor.arguments(parser)
    assert doctor.doctor.run(parser.parse_args(["--store", str(store)])) == 0
    assert "OK   store        the clock is later than" in capsys.readouterr().out


@pytest.mark.parametrize("sides", [[], ["--store", "s", "--identity", "i"]])
def test_a_side_has_to_be_named(sides: list[str]) -> None:
    parser = argparse.ArgumentParser()
    doctor.doctor.arguments(parser)
    with pytest.raises(ConfigError, match=r"doctor: .*Nothing was checked"):
        doctor.doctor.run(parser.parse_args(sides))


def test_a_diagnosis_is_a_list_of_findings(tmp_path: Path) -> None:
    found = fedcore.diagnose(store=tmp_path / "store", task=tmp_path / "task.py")
    by_check = {one.check: one for one in found}
    assert {"versions", "store", "disk", "gpu", "onnxruntime"} <= set(by_check)
    assert by_check["task"].verdict == "fail", "there is no such file"
    with pytest.raises(ConfigError, match="got none"):
        fedcore.diagnose()
    for device in ({"kit": tmp_path}, {"store": tmp_path}):
        with pytest.raises(ConfigError, match="is for a device"):
            fedcore.diagnose(identity=tmp_path, **device)
