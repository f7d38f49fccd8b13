"""The tutorials work word by word: their code and commands run, and print what the pages show."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
NUMBER = re.compile(r"\d+\.\d+")


def blocks(name: str, language: str) -> list[str]:
    text = (TUTORIALS / name).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def run(command: list[str], folder: Path) -> str:
    """Runs a command that must succeed, and ends all that it started; what it printed."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("FEDCORE_DATA", "FEDCORE_PASSPHRASE", "HTTPS_PROXY", "https_proxy"):
        environment.pop(name, None)
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complaints = process.communicate(timeout=240)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{said[-3000:]}\n{complaints[-3000:]}"
    return said


@pytest.mark.slow
def test_the_first_federation_prints_what_its_page_shows(tmp_path: Path) -> None:
    (tmp_path / "tutorial.py").write_text("\n".join(blocks("simulate.md", "python")))
    said = run([sys.executable, "tutorial.py"], tmp_path)
    shown = "".join(blocks("simulate.md", "text"))
    assert NUMBER.sub("#", said) == NUMBER.sub("#", shown)
    # Other processors round otherwise, and say so in the last digits that the page shows.
    assert [float(x) for x in NUMBER.findall(said)] == pytest.approx(
        [float(x) for x in NUMBER.findall(shown)], abs=0.05
    )
    assert (tmp_path / "first-run" / "report.html").exists()


@pytest.mark.slow
def test_the_server_and_two_devices_work_word_by_word(tmp_path: Path) -> None:
    script = "\n".join(blocks("live.md", "bash")) + "wait\n"
    said = run(["bash", "-euo", "pipefail", "-c", script], tmp_path)
    for line in "".join(blocks("live.md", "text")).splitlines():
        assert line in said
    assert "This task is ready." in said
    assert said.count("in force") == 2
    assert "This device is ready." in said
    spent = re.search(r"run churn: epsilon (\d\.\d+)", said)
    assert spent
    assert 0 < float(spent[1]) <= 4
    paths = re.findall(r"^\| `([\w/.-]+)` \|", (TUTORIALS / "live.md").read_text(), re.M)
    assert len(paths) == 5
    for path in paths:
        assert (tmp_path / path).exists()
