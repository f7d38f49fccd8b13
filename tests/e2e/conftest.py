"""The command line as a real process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.prefork import Prefork, Process

BIN = Path(sys.executable).with_name("fedcore")
Done = subprocess.CompletedProcess[str]
Fedcore = Callable[..., Done]


def environment(**changed: str) -> dict[str, str]:
    """This process's, on one thread and without data sets of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "FEDCORE_DATA"}
    return {**kept, "OMP_NUM_THREADS": "1", **changed}


_WAITING = ("note: loading torch ", "note: running a first step. ")


def without_waiting(said: str) -> str:
    """Standard error without notes of how long imports take, which a busy machine adds."""
    lines = said.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(_WAITING))


@pytest.fixture(scope="session")
def fresh_fedcore() -> Fedcore:
    """Runs one command line, in a folder and an interpreter of its own, to its end."""

    def run(*arguments: object, cwd: Path, env: dict[str, str] | None = None, **more: Any) -> Done:
        done = subprocess.run(
            [BIN, *map(str, arguments)],
            cwd=cwd,
            env=environment(**(env or {})),
            capture_output=True,
            text=True,
            timeout=240,
            **more,
        )
        done.stderr = without_waiting(done.stderr)
        return done

    return run


@pytest.fixture(scope="session")
def fedcore(prefork: Prefork) -> Fedcore:
    """Runs one command line in a folder to its end; see `tests.prefork`."""

    def run(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> Done:
        done = prefork.run(arguments, cwd=cwd, env=environment(**(env or {})))
        done.stderr = without_waiting(done.stderr)
        return done

    return run


@pytest.fixture(scope="session")
def start(prefork: Prefork) -> Callable[..., Process]:
    """Starts one command line as the leader of a process group, as a terminal does."""

    def begin(*arguments: object, cwd: Path) -> Process:
        return prefork.start(arguments, cwd=cwd, env=environment())

    return begin
