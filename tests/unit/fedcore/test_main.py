"""``python -m fedcore`` is the command line."""

import runpy
import sys

import pytest


def test_the_module_runs_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedcore", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fedcore", run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("fedcore ")
