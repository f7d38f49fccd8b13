"""A ``fedcore`` command in a process of its own, for functions that start one and return.

A server and a training device own their process: its signals, the TLS settings that gRPC reads
when it is imported, its memory. So Python code that starts one starts another process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fedcore import errors
from fedcore.errors import INTERRUPTED, FedcoreError, ResourceError

_MAX_TAIL_BYTES = 1 << 16
_LAST_S = 5.0
"""Seconds to end a process that nobody has stopped."""


@dataclass(frozen=True)
class RunningCommand:
    """A started server or device; used in a ``with`` block, it stops at the block's end."""

    _process: Background = field(repr=False, kw_only=True)

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        return self._process.running

    @property
    def log(self) -> str:
        """The text that it has logged on standard error."""
        return self._process.log.read_text(errors="replace")

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until it has ended.

        Returns:
            Whether it ended by itself, with success; False if it was stopped.

        Raises:
            FedcoreError: the error that ended it.
            ResourceError: it still runs after ``timeout_s``.
        """
        return self._process.wait(timeout_s)

    def stop(self, *, timeout_s: float = 60.0) -> None:
        """Stops it as soon as it can; everything that it has finished is kept.

        Args:
            timeout_s: Seconds after which its process is killed.
        """
        self._process.stop(timeout_s)

    def __enter__(self) -> Self:
        """Returns the started command."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stops it, if it still runs."""
        self.stop()


class Background:
    """A running command: its exit code, its log, and how to end it."""

    def __init__(self, *words: object) -> None:
        """Starts ``fedcore WORDS``, in a session of its own: Ctrl-C here does not reach it.

        The process is ended with this object, or with this interpreter.

        Args:
            words: The command line after ``fedcore``.

        Raises:
            ResourceError: no process can be started, or no temporary file written.
        """
        self._kept = tempfile.TemporaryDirectory(prefix="fedcore-")
        self.output = Path(self._kept.name) / "stdout"
        """File with what the command prints."""
        self.log = Path(self._kept.name) / "stderr"
        """File with the command's standard error."""
        try:
            with self.output.open("wb") as stdout, self.log.open("wb") as stderr:
                self._process = subprocess.Popen(  # noqa: S603 - no shell, our own program
                    [sys.executable, "-m", "fedcore.cli", *map(str, words)],
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
        except OSError as error:
            raise ResourceError(
                f"{words[0]}: cannot start a process ({error}). Nothing was started; free memory "
                "or disk space, and try again."
            ) from None
        self._stopped = False
        self._ended = weakref.finalize(self, _end, self._process, _LAST_S)

    @property
    def running(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def wait(self, timeout_s: float | None) -> bool:
        """Waits for the end; returns True if the command succeeded, False if it was stopped.

        Raises:
            FedcoreError: the error that ended the command, of its own class.
            ResourceError: the command still runs after ``timeout_s``, or ended in another way.
        """
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ResourceError(
                f"process {self._process.pid} still runs after {timeout_s:g} s. Nothing was "
                "stopped; wait longer, or stop it."
            ) from None
        if code in (0, INTERRUPTED, -signal.SIGTERM) or self._stopped:
            return code == 0
        raise self._error(code)

    def stop(self, timeout_s: float) -> None:
        """Asks the process to end, waits for that, and kills it after ``timeout_s``."""
        self._stopped = True
        _end(self._process, timeout_s)

    def _error(self, code: int) -> FedcoreError:
        with self.log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _MAX_TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            name, found, message = line.partition(": ")
            kind: Any = getattr(errors, name, None) if found else None
            if isinstance(kind, type) and issubclass(kind, FedcoreError):
                return kind(message)
        said = lines[-1] if lines else "it logged nothing"
        return ResourceError(f"process {self._process.pid} ended with exit code {code}: {said}")


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
