from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedcore.observability import pace
from fedcore.observability.pace import RoundPace, memory_bytes


def test_pace_follows_the_latest_rounds() -> None:
    watching = RoundPace(clock=lambda: 0.0)
    first = watching.after(2.0, 10, left=5)
    assert first["clients_per_s"] == 5.0
    assert first["remaining_s"] == 10.0
    for _ in range(200):
        later = watching.after(0.5, 10, left=4)
    assert later["clients_per_s"] == pytest.approx(20.0, rel=1e-3)
    assert later["remaining_s"] == pytest.approx(2.0, rel=1e-3)


def test_what_the_first_round_sets_up_is_forgotten() -> None:
    watching = RoundPace(clock=lambda: 0.0)
    watching.after(60.0, 10, left=9)
    assert watching.after(0.5, 10, left=8)["clients_per_s"] == 20.0
    assert watching.after(1.0, 10, left=4)["remaining_s"] == 3.0


def test_memory_is_looked_at_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, now_s = [10, 20], [0.0]
    monkeypatch.setattr(pace, "memory_bytes", lambda: looks.pop(0))
    watching = RoundPace(clock=lambda: now_s[0])
    found = []
    for now_s[0] in (0.0, 0.9, 1.1, 2.0):
        found.append(watching.after(0.1, 1, left=1)["memory_bytes"])
    assert found == [10, 10, 20, 20]


def test_memory_counts_this_process_and_those_below() -> None:
    alone = memory_bytes()
    assert alone is not None
    assert alone > 10_000_000
    code = "held = bytearray(60_000_000); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        together = memory_bytes()
        child.communicate("\n")
    assert together is not None
    assert together - alone > 55_000_000


def test_where_the_system_does_not_tell_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pace, "_PROC", tmp_path / "none")
    assert memory_bytes() is None
    assert RoundPace().after(1.0, 1, left=0)["memory_bytes"] is None
