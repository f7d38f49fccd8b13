"""A child process with limits that keeps one untrusted model loaded, and answers requests.

An ONNX file is a program: it may loop forever, use all memory, or crash onnxruntime. Here that
affects only a child process without locks, keys or open files, which dies with its parent.
`edge_client.inference.confined_child` is the child's side.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from edge_client.inference.pipes import has_more, read_exactly, read_line, write_all
from edge_client.inference.responses import (
    MAX_HEAD_BYTES,
    MAX_OUTPUT_BYTES,
    ArrayHead,
    Interface,
    array_heads,
    arrays_of,
    explain_end,
    explain_fault,
    head_of,
    interface_of,
    malformed,
)
from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.manifest import Manifest
from fedcore.errors import LimitExceeded, ResourceError

MIN_SECONDS, MAX_SECONDS = 1.0, 86_400.0
MIN_MEMORY_BYTES, MAX_MEMORY_BYTES = 256 << 20, 1 << 40
_BASE_BYTES = 1 << 30
"""Default address space for Python and onnxruntime (150 MB) and for activations."""
_THREAD_BYTES = 160 << 20
"""Default address space per thread: its stack, and its arena of the allocator."""
_COPIES = 6
"""Copies of the weights while onnxruntime loads a file, optimizes it and packs it for the CPU."""
_PROCESSOR_MARGIN_S = 10
"""CPU time beyond the time limit. The CPU limit ends the child if the parent is suspended, and so
cannot enforce the time limit itself."""
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from edge_client.inference.confined_child import main; main()"
)
_GOES_ON = ("run", "output")
"""Faults after which the process takes further requests."""
_KEPT = ("LD_LIBRARY_PATH", "LANG", "LC_ALL")
_SET = {
    "OMP_NUM_THREADS": "1",  # onnxruntime has threads of its own
    "OPENBLAS_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",  # telemetry would open a database and connections at load time
}


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """Time and memory that one call may use to run a model."""

    seconds: float = 120.0
    """Wall-clock time from start to last output, `MIN_SECONDS` to `MAX_SECONDS`."""
    memory_bytes: int | None = None
    """Address space, `MIN_MEMORY_BYTES` to `MAX_MEMORY_BYTES`. None: 1 GiB, plus 160 MiB per
    thread, six times the model's file and four times the inputs."""

    def __post_init__(self) -> None:
        if not MIN_SECONDS <= self.seconds <= MAX_SECONDS:
            raise ValueError(
                f"seconds: expected {MIN_SECONDS} to {MAX_SECONDS}, got {self.seconds}"
            )
        most = self.memory_bytes
        if most is not None and not MIN_MEMORY_BYTES <= most <= MAX_MEMORY_BYTES:
            raise ValueError(
                f"memory_bytes: expected {MIN_MEMORY_BYTES} to {MAX_MEMORY_BYTES}, got {most}"
            )


class _StarterEnded(Exception):
    """The kernel killed the process because the thread that had started it ended."""


class ModelProcess:
    """One model in a process of its own, started when it is first asked. Not thread-safe.

    Guarantee:
        `ask` returns or raises within little more than ``limits.seconds``. A process that breaches
        a limit, or answers what it cannot, is killed; the next request starts another. The process
        also ends when this one does, for whatever reason.
    """

    def __init__(
        self,
        manifest: Manifest,
        onnx: Path,
        *,
        threads: int,
        limits: ModelLimits,
        input_bytes: int,
        decode: bool = False,
    ) -> None:
        """Describes the process; starts nothing.

        Args:
            manifest: The model's manifest.
            onnx: The model's file; run only if it has the manifest's digest.
            threads: Threads of one inference.
            limits: Time for each request, and memory of the process.
            input_bytes: Bytes of a request's inputs to leave room for.
            decode: Whether to run the decode graph of the file (`fedcore.artifacts.decode`).
        """
        self._of = named(manifest)
        self._onnx, self._sha256 = onnx, manifest.onnx.sha256
        self._threads, self._seconds = threads, limits.seconds
        self._decode = decode
        self._memory_bytes = limits.memory_bytes or (
            _BASE_BYTES + _THREAD_BYTES * threads + _COPIES * manifest.onnx.length + 4 * input_bytes
        )
        self._child: subprocess.Popen[bytes] | None = None
        self._interface: Interface | None = None
        self._held = bytearray()
        self._starter = threading.current_thread()
        self._end: Callable[[], object] = _nothing

    def __enter__(self) -> ModelProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def interface(self) -> Interface:
        """Returns what the model takes and gives; starts the process if none runs.

        Raises:
            LimitExceeded, DeviceError, ResourceError: see `ask`.
        """
        with self._killed_if_unsure():
            self._start(time.monotonic() + self._seconds)
        assert self._interface is not None
        return self._interface

    def ask(
        self,
        inputs: Sequence[AnyArray],
        *,
        names: Sequence[str] | None = None,
        rows: int | None = None,
        **how: Any,
    ) -> list[AnyArray]:
        """Sends inputs to the model and returns its outputs.

        Args:
            inputs: One array ``(B, ...)`` for each input.
            names: Names of the inputs; those of the file, in its order, when None.
            rows: Rows that each output must have; None for any number.
            how: Further fields of the request (see `edge_client.inference.confined_child.main`).

        Returns:
            One array for each output, in the file's order.

        Raises:
            LimitExceeded: the model exceeded its limits, or its outputs are too large.
            DeviceError: onnxruntime cannot run the model, or failed; or the file has changed.
            ResourceError: no process could be started.
        """
        deadline = time.monotonic() + self._seconds
        request = {
            "names": names,
            "arrays": [{"dtype": each.dtype.str, "shape": each.shape} for each in inputs],
            "processor_s": self._processor_s(),
            "max_output_bytes": MAX_OUTPUT_BYTES,
            **how,
        }
        parts: list[bytes | memoryview] = [json.dumps(request).encode() + b"\n"]
        parts += [_bytes_of(each) for each in inputs]
        try:
            head, heads, raw = self._asked(parts, rows, deadline)
        except _StarterEnded:
            head, heads, raw = self._asked(parts, rows, deadline)
        if "fault" not in head:
            return arrays_of(heads, raw)
        if head["fault"] not in _GOES_ON:
            self.close()
        return explain_fault(head, self._of, self._memory_bytes)

    def close(self) -> None:
        """Ends the process. A later request starts another."""
        self._child, self._interface = None, None
        self._end()

    def _processor_s(self) -> int:
        return int(self._seconds * self._threads) + _PROCESSOR_MARGIN_S

    def _asked(
        self, parts: Sequence[bytes | memoryview], rows: int | None, deadline: float
    ) -> tuple[dict[str, Any], list[ArrayHead], bytearray]:
        with self._killed_if_unsure():
            self._start(deadline)
            head = self._exchange(parts, deadline)
            heads = [] if "fault" in head else array_heads(head, self._of, rows)
            return head, heads, self._payload(sum(each.nbytes for each in heads), deadline)

    def _start(self, deadline: float) -> None:
        if self._child is not None and has_more(_fd(self._child.stdout)):
            self.close()  # it ended, or said what nobody asked for
        if self._child is not None:
            return
        self._child, self._held = start_child(self._of), bytearray()
        self._end = weakref.finalize(self, _end, self._child)
        self._starter = threading.current_thread()
        os.set_blocking(_fd(self._child.stdin), False)
        start = {
            "parent": os.getpid(),
            "model": str(self._onnx.absolute()),
            "sha256": self._sha256,
            "threads": self._threads,
            "memory_bytes": self._memory_bytes,
            "processor_s": self._processor_s(),
            "decode": self._decode,
        }
        head = self._exchange([json.dumps(start).encode() + b"\n"], deadline)
        if "fault" in head:
            explain_fault(head, self._of, self._memory_bytes)
        self._interface = interface_of(head, self._of)

    def _exchange(self, parts: Sequence[bytes | memoryview], deadline: float) -> dict[str, Any]:
        """Writes a request, and returns the head of the answer."""
        assert self._child is not None
        with self._explained(deadline):
            # A process that ended early may have said why: it is read first.
            with contextlib.suppress(BrokenPipeError):
                for part in parts:
                    write_all(_fd(self._child.stdin), part, deadline)
            line = read_line(_fd(self._child.stdout), self._held, MAX_HEAD_BYTES, deadline)
        return head_of(line, self._of)

    def _payload(self, size: int, deadline: float) -> bytearray:
        assert self._child is not None
        with self._explained(deadline):
            raw = read_exactly(_fd(self._child.stdout), self._held, size, deadline)
        if self._held:
            raise malformed(self._of, ValueError("more bytes than it announced"))
        return raw

    @contextlib.contextmanager
    def _killed_if_unsure(self) -> Iterator[None]:
        """Ends the process after any error: what it does then is not known."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def _explained(self, deadline: float) -> Iterator[None]:
        """Turns the end of a pipe or of the time into the error that explains it."""
        try:
            yield
        except EOFError:
            assert self._child is not None
            try:
                status = self._child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise self._too_slow() from None
            if status == -signal.SIGKILL and not self._starter.is_alive():
                raise _StarterEnded from None
            explain_end(status, self._of, self._memory_bytes)
        except TimeoutError:
            raise self._too_slow() from None

    def _too_slow(self) -> LimitExceeded:
        return LimitExceeded(
            f"{self._of}: it gave no answer within {self._seconds:g} s, this device's time limit, "
            "and was stopped. --max-seconds allows more (from Python, ModelLimits.seconds)."
        )


def named(manifest: Manifest) -> str:
    """Returns how errors name a version of a model."""
    return f"model {manifest.model!r} version {manifest.version}"


def start_child(of: str) -> subprocess.Popen[bytes]:
    """Starts a process that waits for the name of a model on its standard input.

    Raises:
        ResourceError: no process could be started.
    """
    ours = str(Path(__file__).resolve().parents[2])
    path = [ours, *(place for place in sys.path if Path(place).is_absolute())]
    try:
        return subprocess.Popen(  # noqa: S603 - this interpreter, and a fixed program
            # -S skips `site` and its hooks: start-up takes a third of the time.
            [sys.executable, "-I", "-S", "-c", _START, json.dumps(path)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=_SET | {name: os.environ[name] for name in _KEPT if name in os.environ},
            close_fds=True,
            start_new_session=True,  # keeps Ctrl-C at the terminal from reaching the child
        )
    except OSError as error:
        raise ResourceError(
            f"{of}: cannot start a process to run it ({error.strerror}). Nothing was answered; "
            "run again when the machine has processes and memory available."
        ) from error


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        assert stream is not None
        stream.close()


def _nothing() -> None:
    """Ends no process: none was started."""


def _fd(stream: IO[bytes] | None) -> int:
    assert stream is not None
    return stream.fileno()


def _bytes_of(array: AnyArray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
