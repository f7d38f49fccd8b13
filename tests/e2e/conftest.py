"""The command line as a real process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).with_name("fedcore")
Done = subprocess.CompletedProcess[str]
Fedcore = Callable[..., Done]


def environment(**changed: str) -> dict[str, str]:
    """This process's, on one thread and without data sets of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "FEDCORE_DATA"}
    return {**kept, "OMP_NUM_THREADS": "1", **changed}


def _fedcore(*arguments: object, cwd: Path, env: dict[str, str] | None = None, **more: Any) -> Done:
    return subprocess.run(
        [BIN, *map(str, arguments)],
        cwd=cwd,
        env=environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=240,
        **more,
    )


@pytest.fixture(scope="session")
def fedcore() -> Fedcore:
    """Runs one command line in a folder to its end."""
    return _fedcore


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Starts one command line as the leader of a process group, as a terminal does."""

    def begin(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BIN, *map(str, arguments)],
            cwd=cwd,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return begin
