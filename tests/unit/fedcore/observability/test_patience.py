from __future__ import annotations

import re
import sys
import time
from types import ModuleType

import pytest

from fedcore.observability import patience
from fedcore.observability.patience import Reminder, note_if_slow, report_loading


def test_what_takes_long_is_told_while_it_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    with note_if_slow("note: at it", after_s=0.01):
        until = time.monotonic() + 5.0
        said = ""
        while not said and time.monotonic() < until:
            time.sleep(0.01)
            said = capsys.readouterr().err
    assert said == "note: at it\n"


def test_what_is_quick_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with note_if_slow("note: at it", after_s=0.2):
        pass
    time.sleep(0.3)
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "")


def test_what_fails_is_not_told_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), note_if_slow("note: at it", after_s=0.2):
        raise ValueError("no")
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_a_reminder_comes_each_time_that_it_has_lasted_twice_as_long() -> None:
    now = [0.0]
    reminder = Reminder(lambda: now[0])
    told = []
    for _ in range(300):
        now[0] += 1.0
        if (lasted_s := reminder.due()) is not None:
            told.append(round(lasted_s))
    assert told == [2, 4, 8, 16, 32, 64, 124, 184, 244]


def test_imports_that_take_long_are_told_of_with_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "SILENT_S", 0.1)
    told: list[str] = []
    with report_loading(told.append, modules=len(sys.modules) + 100):
        for number in range(50):
            monkeypatch.setitem(sys.modules, f"made_up_{number}", ModuleType("made_up"))
        time.sleep(0.4)
    assert re.search(r"loading torch .* modules in 0\.\d+ s, about 0\.\d+ s left", told[0])
    count = len(told)
    time.sleep(0.3)
    assert len(told) == count, "nothing once it is over"


def test_imports_that_are_quick_are_not_told_of() -> None:
    told: list[str] = []
    with report_loading(told.append):
        pass
    assert not told
