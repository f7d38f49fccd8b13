"""Runs a program, notes when each of its lines arrives, and samples the memory of its processes."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_S = 1.0
_SAMPLING_SHARE = 0.02  # of the time, at most: what is measured shares the cores with the sampler


@dataclass(frozen=True)
class Observed:
    """A program that has ended well."""

    launched_s: float
    """By the monotonic clock, as every time here."""
    lines: tuple[tuple[float, str], ...]
    """Each line of its standard output, and when it arrived."""
    memory: tuple[tuple[float, int], ...]
    """Samples: when, and the bytes of all of its processes together (PSS: shared pages count
    once)."""

    def peak_bytes(self, until_s: float = float("inf")) -> int:
        """The most memory seen up to a time."""
        return max((size for when, size in self.memory if when <= until_s), default=0)


class ProgramFailed(Exception):
    """A measured program left with an error, or ran out of time."""


def observe(
    command: Sequence[str], *, environment: Mapping[str, str], folder: Path, limit_s: float
) -> Observed:
    """Runs ``command`` in ``folder`` to its end.

    Args:
        command: The program and its arguments.
        environment: Set beside this process's own.
        folder: Its working directory.
        limit_s: It is killed with its children after so long.

    Raises:
        ProgramFailed: it left with an error, which is quoted, or was killed.
    """
    lines: list[tuple[float, str]] = []
    memory: list[tuple[float, int]] = []
    family: set[int] = set()
    with tempfile.TemporaryFile() as errors:
        launched_s = time.monotonic()
        with subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            stdout = process.stdout

            def read() -> None:
                lines.extend((time.monotonic(), line) for line in stdout)

            reader = threading.Thread(target=read)
            reader.start()
            try:
                while process.poll() is None and time.monotonic() - launched_s < limit_s:
                    began = time.monotonic()
                    family = tree(process.pid)
                    memory.append((began, sum(map(pss_bytes, family))))
                    took = time.monotonic() - began
                    _wait(process, max(_SAMPLE_S, took / _SAMPLING_SHARE))
            finally:
                _kill(process, family)
                reader.join()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    if process.returncode != 0:
        raise ProgramFailed(
            f"{' '.join(map(str, command))}: left with {process.returncode} after "
            f"{time.monotonic() - launched_s:.0f} s. It said: {' / '.join(said[-8:])}"
        )
    return Observed(launched_s, tuple(lines), tuple(memory))


def _wait(process: subprocess.Popen[str], seconds: float) -> None:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return


def _kill(process: subprocess.Popen[str], family: set[int]) -> None:
    """Ends what is still there: Ray's daemons may have left the program's session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        for member in family:
            try:
                os.kill(member, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def tree(root: int) -> set[int]:
    """A process and all that descend from it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it has just ended
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {root}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def processor() -> str:
    """What the machine computes with."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def pss_bytes(process: int) -> int:
    """A process's share of memory: its own pages, and its part of those it shares."""
    return _rollup_bytes(process, "Pss")


def anonymous_bytes(process: int) -> int:
    """What a process has allocated: unlike its share, other processes' ends do not change it."""
    return _rollup_bytes(process, "Pss_Anon")


def _rollup_bytes(process: int, field: str) -> int:
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:  # it has just ended
        return 0
    for line in rollup.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
