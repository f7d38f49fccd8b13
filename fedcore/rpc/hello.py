"""The handshake of a device and a server: versions and task, compared before any work.

The device sends a `Hello` as HTTP headers; the server checks it with `check_hello`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedcore import __version__
from fedcore.errors import DeviceError
from fedcore.files import read_bytes, sha256_hex
from fedcore.observability.foreign import foreign

PROTOCOL = 2
"""Version of the protocol; increases when messages between device and server change."""
_MAX_TASK_BYTES = 16 * 2**20
_NO_TASK = (
    "Nothing was run; give the path of an existing task file: with --task on a device, as `task` "
    "in the run's file on a server."
)
_TASK_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PROCESS_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PROCESS = "fedcore-instance"
SETTINGS = "run"
"""Key under which a server sends devices the run's configuration, as JSON."""
INSTANCE = "instance"
"""Key under which a server sends devices the id of this instance of the run."""
_AGAIN = "fedcore-again-s"
_REASON = "fedcore-reason"
MAX_REASON = 200
"""Most characters of the reason that a server keeps of a device that has left."""
WAKE_PORT = "fedcore-wake-port"
"""Response header for an admitted device: the port of the stream that wakes it."""
BUNDLES = "fedcore-bundles"
"""Response header for an admitted device: ``1`` if the server takes and sends small objects in
bundles."""


@dataclass(frozen=True)
class Hello:
    """Versions of protocol, app and task."""

    task: str
    task_digest: str
    """SHA-256 of the task file; both sides must have the same file installed."""
    protocol: int = PROTOCOL
    app: str = __version__

    def headers(self, instance: str) -> dict[str, str]:
        """Returns the headers of a request; ``instance`` names the process that makes it."""
        return {
            "fedcore-protocol": str(self.protocol),
            "fedcore-app": self.app,
            "fedcore-task": f"{self.task} {self.task_digest}",
            _PROCESS: instance,
        }


def is_task_name(name: object) -> bool:
    """Returns whether a task may have this name, which travels in a request header."""
    return isinstance(name, str) and _TASK_NAME.fullmatch(name) is not None


def hello_of(name: str, path: Path) -> Hello:
    """Returns this side's `Hello` for the task ``name`` in the file ``path``."""
    raw = read_bytes(path, max_bytes=_MAX_TASK_BYTES, what="the task", otherwise=_NO_TASK)
    return Hello(task=name, task_digest=sha256_hex(raw))


def declared_name(path: Path) -> str | None:
    """Returns the name in ``task = Task(name="...")`` without running the file.

    Loading a task imports torch, which takes seconds; this allows the handshake before.

    Returns:
        The name; None if it is computed, ambiguous or invalid.

    Raises:
        DataError: the file cannot be read.
    """
    raw = read_bytes(path, max_bytes=_MAX_TASK_BYTES, what="the task", otherwise=_NO_TASK)
    try:
        module = ast.parse(raw)
    except (SyntaxError, ValueError):
        return None  # loading the file raises the error
    if sum(_binds_task(node) for node in ast.walk(module)) != 1:
        return None  # only running the file decides which one counts
    for statement in module.body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Call):
            continue
        if [ast.unparse(target) for target in statement.targets] != ["task"]:
            continue
        for keyword in statement.value.keywords:
            if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                name = keyword.value.value
                return name if isinstance(name, str) and is_task_name(name) else None
    return None


def _binds_task(node: ast.AST) -> bool:
    """Returns whether a syntax node may bind the name ``task``."""
    if isinstance(node, ast.alias):
        return (node.asname or node.name) in ("task", "*")
    if isinstance(node, ast.Global):
        return "task" in node.names
    return isinstance(node, ast.Name) and node.id == "task" and isinstance(node.ctx, ast.Store)


def instance_of(headers: Mapping[str, str]) -> str:
    """Returns the name of the requesting process; empty if missing or malformed."""
    named = headers.get(_PROCESS, "")
    return named if _PROCESS_NAME.fullmatch(named) else ""


def next_request_header(seconds: float) -> dict[str, str]:
    """Returns the header by which a device promises its next request within so many seconds."""
    return {_AGAIN: f"{seconds:.2f}"}


def next_request_s(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds in which a device promises its next request; None if absent."""
    try:
        seconds = float(headers.get(_AGAIN, ""))
    except ValueError:
        return None
    return seconds if 0.0 <= seconds < float("inf") else None


def reason_header(reason: str) -> dict[str, str]:
    """Returns the header by which a device says why it leaves, or why its process ended before."""
    shown = foreign(reason, MAX_REASON).encode("ascii", "backslashreplace").decode()
    return {_REASON: shown} if shown else {}


def reason_of(headers: Mapping[str, str]) -> str:
    """Returns the reason in a request's headers, fit to print; empty if there is none."""
    return foreign(headers.get(_REASON, ""), MAX_REASON)


def check_hello(headers: Mapping[str, str], server: Hello) -> None:
    """Compares a device's versions and task with the server's.

    Raises:
        DeviceError: they do not match; the message states what to install on the device.
    """
    theirs = headers.get("fedcore-protocol", "none")
    if theirs != str(server.protocol):
        raise DeviceError(
            f"handshake: this device speaks protocol {theirs[:16]}, but the server speaks "
            f"{server.protocol} (fedcore {server.app}). It does not take part; install "
            f"fedcore=={server.app} on it."
        )
    app = headers.get("fedcore-app", "none")
    if app.split(".")[:2] != server.app.split(".")[:2]:
        raise DeviceError(
            f"handshake: this device runs fedcore {app[:32]}, but the server runs {server.app}. "
            f"It does not take part; install fedcore=={server.app} on it."
        )
    name, _, digest = headers.get("fedcore-task", "none none").partition(" ")
    if (name, digest) != (server.task, server.task_digest):
        raise DeviceError(
            f"handshake: this device has task {name[:64]!r} (sha256 {digest[:16]}...), but the "
            f"server runs task {server.task!r} (sha256 {server.task_digest[:16]}...). It does "
            "not take part; copy the server's task file to it, and pass that with --task."
        )
