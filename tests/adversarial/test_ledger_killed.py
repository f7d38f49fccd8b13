"""A device that is killed between its noise and its release records what every release has cost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_killed_device_never_records_less_than_it_released(tmp_path: Path) -> None:
    """The campaign's 200 kills, in a few."""
    out = tmp_path / "kills.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.campaign.ledger_kills"),
            *("--kills", "12", "--seed", "3", "--out", str(out)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert told["kills_between_noise_and_release"] == 12
    assert told["releases"] > 0, "some lives got as far as a release"
    assert told["charges"] >= told["releases"]
    assert told["epsilon_recorded"] >= told["epsilon_released"] > 0
