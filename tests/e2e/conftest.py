"""The command line as a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
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


_WAITING = "note: loading torch "


def without_waiting(said: str) -> str:
    """Standard error without notes of how long imports take, which a busy machine adds."""
    lines = said.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(_WAITING))


def _fedcore(*arguments: object, cwd: Path, env: dict[str, str] | None = None, **more: Any) -> Done:
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


@pytest.fixture(scope="session")
def fedcore() -> Fedcore:
    """Runs one command line in a folder to its end."""
    return _fedcore


_FORKING = """
import json, os, sys, traceback
import fedcore.cli
import server.api.checking, server.api.simulation
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(asked["cwd"])
        os.environ.update(asked["env"])
        for number, path in enumerate([os.devnull, "../out.txt", "../err.txt"]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        try:
            code = fedcore.cli.main(asked["arguments"])
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # libraries would wait for threads that a forked process does not have
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def forked() -> Iterator[Fedcore]:
    """As ``fedcore``, from a process that has imported everything: quicker by seconds each time.

    What it prints is kept beside ``cwd``.
    """
    with subprocess.Popen(
        [sys.executable, "-c", _FORKING],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ask, hear = process.stdin, process.stdout

        def run(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> Done:
            asked = {"arguments": [*map(str, arguments)], "cwd": str(cwd), "env": env or {}}
            ask.write(json.dumps(asked) + "\n")
            ask.flush()
            code = int(hear.readline())
            out, err = (cwd.parent / name for name in ("out.txt", "err.txt"))
            return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())

        yield run
        ask.close()


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
