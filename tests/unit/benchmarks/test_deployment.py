"""The parts of the deployment benchmark that are not measurements."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.deployment import PANELS, Found, table, write_part
from benchmarks.deployment_project import make_project, running
from benchmarks.figures import at_most, row
from benchmarks.measure import ProgramFailed
from benchmarks.plot import plot_in_a_row
from fedcore.crypto.kit import load_kit
from fedcore.crypto.roster import Roster, load_server_identity


def test_a_project_has_a_server_and_devices_that_trust_each_other(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", 2, parameters=6000)
    identity = load_server_identity(project.root / "server")
    assert identity.port == project.port
    roster = Roster(identity.roster_path, identity.kit.authority_pem)
    kit = load_kit(project.kit("edge-1"))
    member = roster.member(kit.public)
    assert member is not None
    assert member.name == "edge-1"
    assert "torch.randn(898)" in project.task.read_text()


def test_a_program_is_watched_and_ended(tmp_path: Path) -> None:
    text = 'import time; print(\'{"event": "up", "n": 1}\', flush=True); time.sleep(60)'
    command = [sys.executable, "-c", text]
    with running(command, tmp_path, "one", environment={}) as program:
        program.wait_for("up", limit_s=10)
        assert program.events("up") == [{"event": "up", "n": 1}]
        assert program.events("down") == []
        assert program.pss_bytes() > 1_000_000
        assert program.cpu_s() < 10
    assert not Path(f"/proc/{program.process.pid}").exists()


def test_a_program_that_fails_is_said_so(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('out of paper')"]
    started = time.monotonic()
    with (
        running(command, tmp_path, "one", environment=dict(os.environ)) as program,
        pytest.raises(ProgramFailed, match="out of paper"),
    ):
        program.wait_for("up", limit_s=10)
    assert time.monotonic() - started < 10


def test_what_was_found_is_told_and_drawn(tmp_path: Path) -> None:
    found = Found(
        rows=[row("fedcore", "two nodes", "seconds_per_round", "s", [0.1, 0.2])],
        checks=[at_most("a round of two nodes, s", [0.6], 0.5)],
        failures=["memory: it fell over"],
        notes=["64 updates: Flower: the round did not end"],
    )
    text = table(found)
    assert "BROKEN a round of two nodes" in text
    assert "FAILED memory: it fell over" in text
    assert "NOTE   64 updates: Flower: the round did not end" in text
    plot_in_a_row([vars(each) for each in found.rows], tmp_path / "one.png", panels=PANELS)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    plot_in_a_row([], tmp_path / "none.png", panels=PANELS)
    assert not (tmp_path / "none.png").exists()


def test_a_part_that_is_run_alone_leaves_the_others(tmp_path: Path) -> None:
    def part(value: float) -> dict[str, object]:
        one = vars(row("fedcore", "two nodes", "seconds_per_round", "s", [value]))
        return {"rows": [one], "checks": [], "failures": [], "notes": []}

    write_part(tmp_path, "fleet", part(3.0))
    write_part(tmp_path, "rounds", part(1.0))
    write_part(tmp_path, "rounds", part(2.0))
    parts = json.loads((tmp_path / "deployment.json").read_text())["parts"]
    assert list(parts) == ["rounds", "fleet"]
    assert [each["rows"][0]["median"] for each in parts.values()] == [2.0, 3.0]
    assert (tmp_path / "deployment.png").stat().st_size > 1000
