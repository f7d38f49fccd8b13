from __future__ import annotations

import time

import pytest

from fedcore.observability.patience import told_if_slow


def test_what_takes_long_is_told_while_it_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    with told_if_slow("note: at it", after_s=0.01):
        until = time.monotonic() + 5.0
        said = ""
        while not said and time.monotonic() < until:
            time.sleep(0.01)
            said = capsys.readouterr().err
    assert said == "note: at it\n"


def test_what_is_quick_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with told_if_slow("note: at it", after_s=0.2):
        pass
    time.sleep(0.3)
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "")


def test_what_fails_is_not_told_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), told_if_slow("note: at it", after_s=0.2):
        raise ValueError("no")
    time.sleep(0.3)
    assert capsys.readouterr().err == ""
