"""docs/python.md is a program: its snippets run in their order, in one process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedcore
from tests.e2e.conftest import environment

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "python.md"
STEP = """
import json, subprocess, sys
for language, text in json.loads(sys.stdin.read()):
    if language == "bash":
        subprocess.run([sys.executable, "-c", "import sys; from fedcore.cli import main; "
                        "sys.exit(main(sys.argv[1:]))", *text.split()[1:]], check=True)
    else:
        exec(compile(text, "python.md", "exec"), globals())
assert compressed.chosen in compressed.files and best in found
assert manifest.model == "corners" and (back.version, back.lineage.rollback_of) == (3, 1)
assert model.version == done.version == 3 and rotated.roles and again.ok
assert model.predict(torch.zeros(6)).shape == (3,)
"""


def snippets() -> list[tuple[str, str]]:
    return re.findall(r"^```(python|bash)\n(.*?)^```", PAGE.read_text(), re.M | re.S)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEP],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        input=json.dumps(snippets()),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "This task is ready." in done.stdout
    assert "ConfigError" in done.stdout
    assert "rounds" in done.stdout.splitlines()[-1]
    assert (tmp_path / "runs/first/report.html").is_file()


def test_the_page_names_every_call() -> None:
    text = PAGE.read_text()
    calls = ("check", "simulate", "finetune", "compress", "publish", "open_model", "replay")
    calls += ("new_task", "create_repository", "list_releases", "roll_back", "refresh_repository")
    calls += ("rotate_keys", "update_model")
    assert all(f"fedcore.{name}(" in text for name in calls)
    assert set(calls) <= set(fedcore.__all__)
