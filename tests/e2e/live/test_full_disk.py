"""A server whose disk has no room, or no inodes, while updates come in."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from flwr.app import Message

from fedcore.errors import DiskFull
from fedcore.flower import fleet_arrivals
from fedcore.updates import pieces
from tests.e2e.live.hostile.test_demanding import content_of


@pytest.mark.parametrize(
    ("module", "name"),
    [(pieces.tempfile, "mkstemp"), (fleet_arrivals.os, "pwritev")],
    ids=["no inodes", "no room"],
)
@pytest.mark.parametrize("lasts", [True, False], ids=["to the deadline", "for a while"])
def test_a_round_waits_for_room_and_names_what_was_lacking(
    project: Any,
    serve: Any,
    start: Any,
    monkeypatch: pytest.MonkeyPatch,
    lasts: bool,
    module: Any,
    name: str,
) -> None:
    project.task.write_text(project.task.read_text().replace("WEIGHTS = 0", "WEIGHTS = 100_000"))
    full = threading.Event()
    full.set()
    usual = getattr(module, name)

    def spooled(*arguments: Any, **named: Any) -> Any:
        if full.is_set() and (name == "pwritev" or named.get("prefix") == "joined-"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return usual(*arguments, **named)

    monkeypatch.setattr(module, name, spooled)
    with serve() as served:
        start()
        while not list(served.listening.presence.nodes()):
            time.sleep(0.05)
        (node,) = served.listening.presence.nodes()
        message = Message(content_of(project), node, "train")
        replies = served.listening.grid().send_and_receive([message], timeout=6 if lasts else 40)
        if lasts:
            with pytest.raises(DiskFull, match="no room for this file"):
                list(replies)
        else:
            threading.Timer(3.0, full.clear).start()
            (reply,) = replies
            assert not reply.has_error()
        full.clear()


def test_a_command_without_memory_says_so(project: Any) -> None:
    """Under `ulimit -v` a command ends with the documented code and one paragraph."""
    project.task.write_text(
        project.task.read_text().replace("WEIGHTS = 0", "WEIGHTS = 2_000_000_000")
    )
    run = project.root / "run.toml"
    run.write_text('name = "trial"\ntask = "task.py"\n[federation]\nrounds = 1\n')
    command = f"ulimit -v 7000000; exec {sys.executable} -m fedcore.cli simulate {run}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=project.root, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.returncode == 7, done.stderr[-2000:]
    assert "memory ran out" in done.stderr
