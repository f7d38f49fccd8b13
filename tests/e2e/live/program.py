"""A verb of the command line in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.prefork import Process

RUN_VERB = """
import sys
from importlib import import_module
from fedcore import cli
module, name = sys.argv[1].split(":")
command = getattr(import_module(module), name)
entry = type("Entry", (), {"name": sys.argv[2], "load": lambda self: command})()
cli.entry_points = lambda group: [entry]
sys.exit(cli.main(sys.argv[2:]))
"""


@dataclass
class Program:
    """A verb of the command line in a process of its own, and what it has logged."""

    process: Process | subprocess.Popen[str]
    log: Path
    words: tuple[str, ...]
    """Its entry point and arguments: `launch` starts the same command once more."""

    def wait_for(self, text: str, seconds: float = 90.0, *, times: int = 1) -> float:
        """Waits for a line of the log; returns how long that took."""
        started = time.monotonic()
        while self.log.read_text().count(text) < times:
            assert time.monotonic() - started < seconds, f"no {text!r} in:\n{self.log.read_text()}"
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)
        return time.monotonic() - started

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = 20.0) -> int:
        return self.process.wait(seconds)

    def rss_bytes(self) -> int:
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
