"""The rules that tests/conftest.py keeps, each on a suite of one test in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CONFTEST = ROOT / "tests" / "conftest.py"


def outcome(folder: Path, test: str, *, data: str | None) -> str:
    shutil.copy(CONFTEST, folder / "conftest.py")
    (folder / "test_one.py").write_text(test)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = data\n    gpu\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment.pop("FEDCORE_DATA", None)
    environment["PYTHONPATH"] = str(ROOT)  # of `tests`, from which it imports
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=folder,
        env=environment | ({"FEDCORE_DATA": data} if data is not None else {}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout


USES_DATA = "def test_it(data_folder):\n    assert data_folder.is_dir()\n"


def test_a_test_that_needs_data_is_skipped_with_the_reason(tmp_path: Path) -> None:
    said = outcome(tmp_path, USES_DATA, data=None)
    assert "1 skipped" in said
    assert "FEDCORE_DATA is not set" in said


def test_with_data_it_runs(tmp_path: Path) -> None:
    assert "1 passed" in outcome(tmp_path, USES_DATA, data=str(tmp_path))


def test_with_data_a_skip_is_a_failure(tmp_path: Path) -> None:
    skips = "import pytest\n@pytest.mark.data\ndef test_it():\n    pytest.skip('no file')\n"
    said = outcome(tmp_path, skips, data=str(tmp_path))
    assert "1 failed" in said
    assert "must run" in said
    assert "no file" in said


def test_data_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    said = outcome(tmp_path, USES_DATA, data=str(tmp_path / "nowhere"))
    assert "1 error" in said
    assert "does not exist" in said


def test_a_process_left_running_is_an_error(tmp_path: Path) -> None:
    leaves = (
        "import subprocess, sys\n"
        "def test_it(request):\n"
        "    code = 'import time; time.sleep(5)'\n"
        "    request.config.left = subprocess.Popen([sys.executable, '-c', code])\n"
    )
    said = outcome(tmp_path, leaves, data=None)
    assert "1 passed, 1 error" in said
    assert "left child processes" in said
