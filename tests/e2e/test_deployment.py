"""The README's section on real devices, word by word: real processes in folders of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]


def blocks() -> list[str]:
    section = (ROOT / "README.md").read_text().partition("## Real devices\n")[2]
    return re.findall(r"^```bash\n(.*?)^```", section.partition("\n## ")[0], re.M | re.S)


class Shell:
    """A shell that is typed into; it stops at the first command that fails."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("FEDCORE_DATA", "FEDCORE_PASSPHRASE", "HTTPS_PROXY", "https_proxy"):
            environment.pop(name, None)
        self.log = folder / "terminal.log"
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                ["bash", "-e", "-s"],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                text=True,
                start_new_session=True,
            )
        self.done = 0

    def type(self, text: str, seconds: float = 120.0) -> None:
        """Types a block, and waits until the shell has done all of it."""
        self.done += 1
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\necho block {self.done} is done\n")
        self.process.stdin.flush()
        self.wait_for(f"block {self.done} is done", seconds)

    def wait_for(self, text: str, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # whatever it left in the background


@pytest.mark.slow
def test_the_section_on_real_devices_works_word_by_word(tmp_path: Path) -> None:
    provision, start, look, train = blocks()
    shell = Shell(tmp_path)
    try:
        shell.type("fedcore new churn")
        shell.type(provision)
        for name in ("client-1", "client-2", "client-3"):
            assert (tmp_path / name / "key.pem").stat().st_mode & 0o777 == 0o600
        shell.type(start)
        shell.wait_for("wakes on")  # "when it listens"
        shell.type(look)
        said = shell.log.read_text()
        assert "Run:     churn, waiting; 0 of 5 rounds" in said
        assert "Devices: 0 connected of 3 members" in said
        assert "This device is ready." in said
        shell.type(train)
        assert "round 5/5" in shell.log.read_text()
        shell.wait_for("the best; its model is in live/churn/global.safetensors", 5)
    finally:
        shell.close()
    weights = load_file(tmp_path / "live" / "churn" / "global.safetensors")
    assert sum(array.size for array in weights.values()) > 400
    assert (tmp_path / "live" / "churn" / "metrics.jsonl").read_text().count('"round_finished"')
    for name in ("client-1", "client-2", "client-3"):
        assert list((tmp_path / name / "device" / "state").iterdir())
