"""Files that were removed or damaged while nothing ran, one case in many; a campaign tries all.

What may become of a file, and what a command may do then, stands in `tests.campaign.harms`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(280)
def test_a_damaged_file_is_refused_or_made_good_and_never_passed_over(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaign.damage", "--few", "17", "--out", str(told)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert told.is_file(), done.stderr
    found = json.loads(told.read_text())
    assert found["wrong"] == []
    assert found["cases"] >= 60
    assert {name.partition(":")[0] for name in found["verdicts"]} == {
        *("releases", "authority", "server", "device")
    }
    assert done.returncode == 0
