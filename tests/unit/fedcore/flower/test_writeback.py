"""What is asked of the system beforehand, so that syncing takes less time."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from fedcore.flower import writeback
from fedcore.flower.writeback import Writeback


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT)


def is_closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return False


def ended(one: Writeback) -> None:
    thread = one._thread
    one.close()
    if thread is not None:
        thread.join(10)
        assert not thread.is_alive()


def test_each_file_is_let_go_once_the_system_was_asked(tmp_path: Path) -> None:
    one = Writeback()
    for _ in range(2):  # what was closed begins again
        descriptors = [opened(tmp_path / str(each)) for each in range(3)]
        for each in descriptors:
            os.write(each, bytes(10_000))
            one.begin(each, 0, 10_000)
        ended(one)
        assert all(map(is_closed, descriptors))


def test_a_disk_that_hangs_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, asked = threading.Event(), list[tuple[int, int]]()

    def ask(descriptor: int, start: int, count: int) -> int:
        goes_on.wait(10)
        asked.append((start, count))
        return -1

    monkeypatch.setattr(writeback, "_find_writeback_call", lambda: ask)
    one = Writeback()
    descriptors = [opened(tmp_path / str(each)) for each in range(100)]
    for place, each in enumerate(descriptors):
        one.begin(each, place, 1)
    still_open = sum(not is_closed(each) for each in descriptors)
    assert 64 <= still_open <= 65
    goes_on.set()
    ended(one)
    assert asked[:64] == [(place, 1) for place in range(64)]
    assert all(map(is_closed, descriptors))


def test_where_the_system_knows_no_such_thing_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writeback, "_find_writeback_call", lambda: None)
    one, descriptor = Writeback(), opened(tmp_path / "a")
    one.begin(descriptor, 0, 1)
    assert is_closed(descriptor)
    assert one._thread is None
    one.close()
