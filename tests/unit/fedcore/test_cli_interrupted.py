"""Ctrl-C while a command is still being loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_RUN = """
import sys

class Interrupted:
    def find_spec(self, name, *more):
        if name == {name!r}:
            raise KeyboardInterrupt

sys.modules.pop({name!r}, None)
sys.meta_path.insert(0, Interrupted())
from fedcore.cli import main
sys.exit(main({words!r}))
"""


@pytest.mark.parametrize(
    "name", ["argparse", "importlib.metadata", "fedcore.errors", "fedcore.task.templates"]
)
def test_ctrl_c_while_a_command_loads_leaves_no_traceback(name: str, tmp_path: Path) -> None:
    code = _RUN.format(name=name, words=["new", "turbines"])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines() == ["Interrupted: stopped at once; no partial file was left."]
