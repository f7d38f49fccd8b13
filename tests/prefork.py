"""Processes that run a command line at once: forked from one that has imported the slow modules.

Importing torch, Flower and Opacus takes about four seconds of a core, the first export to ONNX and
the first plot two more, and the tests start hundreds of commands. A `Prefork` does all this once;
each command is then a process of its own, with its own session, environment and streams, that
starts in milliseconds and can be killed as any other. It ends after its exit handlers: taking apart
a million objects, of which a forked process has to copy every page, would take most of a second.
Tests of how a process starts or ends by itself (imports, an interpreter's exit) use a fresh one.
"""

from __future__ import annotations

import array
import atexit
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent
_STATUS = struct.Struct("<i")
_IMPORTS = """
from fedcore.rpc.tls import require_tls_1_3, silence_grpc_core
silence_grpc_core()  # both before grpc is imported, as the commands that need them do
require_tls_1_3()
import torch._dynamo  # by the first training step of a process, else
import server.after_rounds, server.api.checking, server.api.simulation, server.commands
import server.live.commands, server.live.run, server.report.tensorboard
import server.report.html, server.report.plots
import server.simulation.replay, server.simulation.resume
import edge_client.agent.commands, edge_client.agent.run, edge_client.client_commands
import edge_client.commands
import fedcore.kernels.normal  # numba
import server.compression.export  # the exporter loads and registers most at its first export
from tests.onnx_registry import share_registry
share_registry()
_model = torch.nn.Linear(2, 1)
server.compression.export.export_onnx(_model, torch.zeros(2, 2), labels=(), kind="regression")
"""
_OF_IMPORTS = ("GRPC_VERBOSITY", "GRPC_SSL_CIPHER_SUITES")
# The installed script does not find modules in the folder where it runs; `python -c` does.
_RUN = """
import sys
sys.path[:] = filter(None, sys.path)
from fedcore.cli import main
sys.exit(main())
"""


class Process:
    """A command that runs; the part of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, status: int, stdout: IO[str] | None, stderr: IO[str] | None):
        self.pid = pid
        self.returncode: int | None = None
        self.stdout, self.stderr = stdout, stderr
        self._status = status

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal; None while the process runs."""
        return self._read(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._read(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Reads what the process prints until it ends."""
        parts = ["", ""]

        def read(number: int, stream: IO[str]) -> None:
            parts[number] = stream.read()

        streams = [each for each in enumerate((self.stdout, self.stderr)) if each[1] is not None]
        readers = [threading.Thread(target=read, args=each, daemon=True) for each in streams]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(10)
        return parts[0], parts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = _STATUS.unpack(os.read(self._status, _STATUS.size))[0]
            os.close(self._status)
        return self.returncode

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()


class Prefork:
    """Starts command lines of fedcore in forked processes.

    Args:
        prepare: Python that the parent of all of them runs once, after its imports.
    """

    def __init__(self, prepare: str = "") -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        serve = f"p.serve({theirs.fileno()}, leave)"
        code = f"import tests.prefork as p\nleave = p.Leave()\n{_IMPORTS}\n{prepare}\n{serve}"
        self._parent = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1"},
        )
        theirs.close()

    def start(
        self,
        arguments: Sequence[object],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: int | IO[str] | None = subprocess.PIPE,
        stderr: int | IO[str] | None = subprocess.PIPE,
        code: str = _RUN,
    ) -> Process:
        """Starts `fedcore ARGUMENTS`, or other Python ``code`` with these ``sys.argv[1:]``."""
        words = [*map(str, arguments)]
        asked = {"arguments": words, "cwd": str(cwd), "env": dict(env), "code": code}
        reading: list[IO[str] | None] = []
        ours: list[int] = []
        sent: list[int] = []
        for where in (subprocess.DEVNULL, stdout, stderr):
            read, write = _stream(where)
            reading.append(read)
            sent.append(write)
            if where in (subprocess.PIPE, subprocess.DEVNULL):
                ours.append(write)
        status, their_status = os.pipe()
        with self._lock:
            _send(self._socket, json.dumps(asked).encode(), [*sent, their_status])
            pid = int(self._socket.recv(32))
        for number in (*ours, their_status):
            os.close(number)
        return Process(pid, status, reading[1], reading[2])

    def run(
        self,
        arguments: Sequence[object],
        *,
        cwd: Path,
        env: Mapping[str, str],
        timeout: float = 240.0,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command line to its end."""
        with self.start(arguments, cwd=cwd, env=env) as process:
            try:
                out, err = process.communicate(timeout)
            finally:
                process.kill()
            return subprocess.CompletedProcess([*arguments], process.wait(), out, err)

    def close(self) -> None:
        """Ends the parent.

        Raises:
            AssertionError: processes of tests are still running.
        """
        deadline = time.monotonic() + 3
        while (left := _children(self._parent.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._socket.close()
        self._parent.wait(20)
        assert not left, f"{len(left)} processes that tests have started still run"


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _stream(where: int | IO[str] | None) -> tuple[IO[str] | None, int]:
    """The end that is read here, if any, and the descriptor that the process gets."""
    if where == subprocess.PIPE:
        read, write = os.pipe()
        return os.fdopen(read), write
    if where == subprocess.DEVNULL:
        return None, os.open(os.devnull, os.O_RDWR)
    assert where is not None
    return None, where if isinstance(where, int) else where.fileno()


def _send(to: socket.socket, text: bytes, descriptors: list[int]) -> None:
    packed = array.array("i", descriptors)
    to.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)])


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError):
            found += map(int, listing.read_text().split())
    return found


class Leave:
    """Ends this process after all exit handlers registered later, if its exit code is known."""

    def __init__(self) -> None:
        self.code: int | None = None
        atexit.register(self._end)

    def _end(self) -> None:
        if self.code is not None:
            with suppress(OSError, ValueError):  # the interpreter reports what cannot be written
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(self.code)


def serve(number: int, leave: Leave) -> None:
    """Forks a process for each request, until the other end closes."""
    import gc

    gc.freeze()  # a collection in a forked process would copy every page
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who wait for commands need no waiting for
    with socket.socket(fileno=number) as requests:
        while True:
            text, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 4)
            if not text:
                leave.code = 0
                return
            # A process between waits for each command, and reports how it ended.
            if not os.fork():
                _watch(json.loads(text), descriptors, requests, leave)
            for each in descriptors:
                os.close(each)


def _watch(
    asked: dict[str, object], descriptors: list[int], requests: socket.socket, leave: Leave
) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, status = descriptors
    pid = os.fork()
    if not pid:
        requests.close()
        os.close(status)
        _become(asked, streams, leave)
        return
    requests.send(str(pid).encode())
    for each in streams:
        os.close(each)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(BrokenPipeError):
        os.write(status, _STATUS.pack(code))
    os._exit(0)


def _become(asked: dict[str, object], streams: list[int], leave: Leave) -> None:
    """Runs the command in this process, which ends with it."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(str(asked["cwd"]))
    kept = {name: os.environ[name] for name in _OF_IMPORTS}
    os.environ.clear()
    os.environ.update({**asked["env"], **kept})  # type: ignore[dict-item]
    sys.argv = ["fedcore", *asked["arguments"]]  # type: ignore[misc]
    try:
        exec(compile(str(asked["code"]), "<command>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):  # else a text to print
            leave.code = (end.code or 0) & 0xFF
        raise
    leave.code = 0
    sys.exit(0)
