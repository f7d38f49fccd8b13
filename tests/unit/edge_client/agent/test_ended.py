"""Why a device's process ended: what it says as it leaves, and what the next one finds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_client.agent import announce, loop
from edge_client.agent.ended import ACTIVITY, Activity, ended_text, reason_of
from edge_client.agent.run import DeviceSetup
from edge_client.agent.wake import Signals
from fedcore.config.owner import OPEN_POLICY
from fedcore.errors import TaskError
from fedcore.task.definition import load_task
from tests.unit.edge_client.agent.test_refused import TASK, Answers, kitted

KILLED = """
import os, sys
from pathlib import Path
from edge_client.agent.ended import Activity
activity = Activity(Path(sys.argv[1]))
activity.begin("it loaded torch and the task")
if sys.argv[2] == "killed":
    os._exit(3)
activity.end()
"""


@pytest.mark.parametrize(
    ("how", "found"), [("killed", "it loaded torch and the task"), ("as usual", "")]
)
def test_the_next_process_finds_what_one_that_was_killed_was_doing(
    tmp_path: Path, how: str, found: str
) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), how], timeout=60, check=False)
    assert Activity(tmp_path).interrupted() == found
    killed = "ended without notice while it loaded torch and the task: killed, out of memory, or "
    assert ended_text(found) == (killed + "os._exit" if found else "")


def _long(path: Path) -> None:
    path.write_bytes(b"x" * 10_000)


def _escapes(path: Path) -> None:
    path.write_bytes(b"\x1b[2J\xff\n" * 50)


@pytest.mark.parametrize("damage", [Path.mkdir, os.mkfifo, _long, _escapes])
def test_a_note_that_is_none_stops_no_device(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    damage(tmp_path / ACTIVITY)
    activity = Activity(tmp_path)
    assert activity.interrupted().isprintable()
    assert len(activity.interrupted()) < 150
    activity.end()  # it has begun nothing, so the note may be another process's
    assert (tmp_path / ACTIVITY).exists()


def test_a_server_learns_kinds_of_errors_and_no_text_of_theirs() -> None:
    try:
        try:
            raise ModuleNotFoundError("/home/anna/records")
        except ModuleNotFoundError as error:
            raise TaskError("task.py: /home/anna/records") from error
    except TaskError as error:
        said = reason_of(error)
    assert said == "TaskError (ModuleNotFoundError); the device's log has the details"
    assert reason_of(KeyboardInterrupt()) == "stopped by a signal"
    assert "anna" not in reason_of(RuntimeError("anna"))


def _head(answers: Answers, path: str) -> str:
    until_s = time.monotonic() + 10.0
    while time.monotonic() < until_s:
        for asked, head in zip(answers.asked, answers.heads, strict=False):
            if asked.endswith(path):
                return head.decode().lower()
        time.sleep(0.01)
    raise AssertionError(f"{path} was never asked: {answers.asked}")


def test_a_process_that_fails_before_its_first_session_says_why(tmp_path: Path) -> None:
    """Its task cannot be imported, say, after it was announced."""
    answers = Answers()
    with kitted(tmp_path, answers) as (kit, state):
        sign_off = announce.announce(kit, TASK, state, "instance", ended="was killed\n\x1b\u00e9")
        assert sign_off is not None
        sign_off("TaskError")
        assert "fedcore-reason: was killed \\x1b\\xe9" in _head(answers, "/activate-node")
        left = _head(answers, "deactivate-node")
    assert "fedcore-reason: taskerror" in left
    assert "fedcore-instance: instance" in left


def test_a_session_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TaskError("/home/anna")

    monkeypatch.setattr(loop, "_answer_messages", fail)
    answers = Answers()
    with kitted(tmp_path, answers) as (kit, state):
        device = DeviceSetup(kit, load_task(TASK), TASK, OPEN_POLICY, state, ended="was killed")
        with pytest.raises(TaskError):
            loop.run_device(device, Signals())
        assert "fedcore-reason: was killed" in _head(answers, "/activate-node")
        left = _head(answers, "deactivate-node")
    assert "fedcore-reason: taskerror; the device's log has the details" in left
    assert "anna" not in left
