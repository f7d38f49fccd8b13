"""A rollback that is killed at any moment leaves the state before it, or the one after, whole."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fedcore.config.run import RunConfig
from fedcore.flower.identity import assume_identity
from fedcore.updates.messages import ARRAYS
from server.live.journal.journal import create, reopen
from server.live.rollback import roll_back
from server.report.folder import JOURNAL_FOLDER
from server.rounds.cohort import Cohort
from tests.unit.server.live.journal.journals import IDENTITY, LARGE, answer, asked, progress, record

RUN = RunConfig.model_validate({"name": "trial", "task": "task.py"})
WRITES = {
    "journal.py": ("roll_back", "_drop_after"),
    "journal_head.py": ("write_head", "shorten_head", "_write_commits"),
    "entries.py": ("write",),
    "files.py": ("write_atomic", "sync_folder"),
    "audit.py": ("record",),
}
"""Functions that change something, by file; it is killed before each of their lines."""


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def begun(root: Path) -> None:
    """A run after five rounds, in the midst of the sixth."""
    (root / "identity").mkdir(parents=True, mode=0o700)
    folder = root / "runs" / "trial" / JOURNAL_FOLDER
    folder.mkdir(parents=True)
    with closing(create(folder, IDENTITY)) as journal:
        for number in range(6):
            journal.commit(progress(number, LARGE), record(number) if number else None)
        journal.record_cohort("train", Cohort([4, 7], dict.fromkeys([4, 7], 1)))
        journal.accept(answer(asked(4), 0.5, LARGE))


def back(root: Path) -> None:
    roll_back(RUN, root / "runs", 4, identity=root / "identity", by="uid 0")


def state(root: Path) -> tuple[Any, ...]:
    """All that a server goes on from."""
    copy = root.with_name(root.name + "-seen")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    folder = copy / "runs" / "trial" / JOURNAL_FOLDER
    journal = reopen(folder)
    assert journal is not None
    with closing(journal):
        assert journal.repairs == ""
        assert not [*folder.glob("*.damaged")]
        assert journal.start is not None
        now, reply = journal.start.progress, journal.reply(asked(4))
        arrays = reply.content.array_records[ARRAYS].values() if reply is not None else ()
        return (
            now.round,
            now.weights.tobytes(),
            now.best.tobytes(),
            journal.start.records,
            journal.rounds_kept(),
            journal.selected_cohort("train"),
            [array.numpy().tobytes() for array in arrays],
        )


def killed_at(root: Path, step: int) -> bool:
    """Rolls back in a process that dies before its so-manyeth line; False where it ended first."""
    child = os.fork()
    if not child:
        left = [step]

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            place, name = Path(frame.f_code.co_filename).name, frame.f_code.co_name
            if name not in WRITES.get(place, ()):
                return None
            if event in ("line", "return"):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            back(root)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_whenever_it_is_killed_one_of_the_two_states_is_found(tmp_path: Path) -> None:
    begun(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "last")
    back(tmp_path / "last")
    before, after = state(tmp_path / "first"), state(tmp_path / "last")
    assert (before[0], after[0]) == (5, 4)
    assert before[5] == Cohort([4, 7], {4: 1, 7: 1})
    assert before[6]
    found = []
    root = tmp_path / "trial"
    for step in range(10_000):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "first", root)
        died = killed_at(root, step)
        now = state(root)
        assert now in (before, after), f"after {step} lines"
        found.append(now == after)
        if not died:
            break
        if now == before:  # it is asked for again
            back(root)
            assert state(root) == after
    assert found == sorted(found), "never forth and back"
    assert 30 < found.index(True) < len(found) - 10
