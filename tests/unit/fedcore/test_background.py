"""A command in a process of its own ends as its command line says."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest

from fedcore.background import Background
from fedcore.errors import ConfigError, ResourceError

WAIT_S = 120.0


def test_a_command_ends_with_its_result_or_its_error(tmp_path: Path) -> None:
    done = Background("runs", "list", "--runs", tmp_path)
    failed = Background("runs", "list", "--runs", tmp_path / "nosuch")
    assert done.wait(WAIT_S)
    assert not done.running
    assert done.output.read_text() == f"{tmp_path}: no runs yet.\n"
    with pytest.raises(ConfigError, match=r"nosuch: there is no such folder") as caught:
        failed.wait(WAIT_S)
    assert "ConfigError" not in str(caught.value)


def test_a_command_is_stopped_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fedcore").mkdir()
    (tmp_path / "fedcore" / "__init__.py").write_text("")
    (tmp_path / "fedcore" / "cli.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.chdir(tmp_path)  # the module that `python -m` finds first
    slow = Background("server", "start")
    with pytest.raises(ResourceError, match="still runs after"):
        slow.wait(0.01)
    process, files = slow._process, slow.output.parent
    slow.stop(WAIT_S)
    assert (slow.wait(WAIT_S), slow.running) == (False, False)
    again = Background("server", "start")
    process = again._process
    del slow, again
    gc.collect()
    assert process.poll() is not None
    assert not files.exists()


def test_a_process_that_was_killed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fedcore").mkdir()
    (tmp_path / "fedcore" / "__init__.py").write_text("")
    (tmp_path / "fedcore" / "cli.py").write_text(
        "import os, signal, sys\n"
        "print('KeyError: no error of fedcore', file=sys.stderr, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.chdir(tmp_path)
    began_s = time.monotonic()
    with pytest.raises(ResourceError, match="exit code -9: KeyError: no error of fedcore"):
        Background("server", "start").wait(WAIT_S)
    assert time.monotonic() - began_s < WAIT_S
