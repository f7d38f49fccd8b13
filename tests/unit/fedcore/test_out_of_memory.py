from __future__ import annotations

import argparse

import pytest

from fedcore import cli
from fedcore.cli import Command, is_out_of_memory


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of range"), False),
    ],
)
def test_what_memory_that_ran_out_looks_like(error: Exception, memory: bool) -> None:
    assert is_out_of_memory(error) == memory


def test_a_command_that_lacks_memory_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: argparse.Namespace) -> int:
        raise MemoryError("Unable to allocate 8 GiB\x1b[31m")

    command = Command("x", lambda parser: None, run)
    entry = type("Entry", (), {"name": "eat", "load": lambda self: command})()
    monkeypatch.setattr(cli, "entry_points", lambda group: [entry])
    assert cli.main(["eat"]) == 7
    said = capsys.readouterr().err
    assert said.startswith("InsufficientMemory: memory ran out (Unable to allocate 8 GiB\\x1b[31m)")
    assert said.count("\n") == 1
