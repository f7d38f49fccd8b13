"""What a device and a server tell each other of themselves before anything else."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedcore import __version__
from fedcore.errors import DeviceError
from fedcore.files import read_bytes, sha256_hex

PROTOCOL = 2
"""Grows when what passes between device and server changes."""
_MAX_TASK_BYTES = 16 * 2**20
_NO_TASK = (
    "Nothing was run; name the task file that is there: by --task on a device, as `task` in the "
    "run's file on a server."
)
_TASK_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PROCESS_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PROCESS = "fedcore-instance"
SETTINGS = "run"
"""Under this name a server tells devices of its run: the run's configuration, as JSON."""
INSTANCE = "instance"
"""Under this name, which instance of that run it is."""
_AGAIN = "fedcore-again-s"
WAKE_PORT = "fedcore-wake-port"
"""Header of the answer to a device that is let in: the port of the stream that wakes it."""


@dataclass(frozen=True)
class Hello:
    """Versions of protocol, app and task."""

    task: str
    task_digest: str
    """SHA-256 of the task file: both sides must have the same one installed."""
    protocol: int = PROTOCOL
    app: str = __version__

    def headers(self, instance: str) -> dict[str, str]:
        """As headers of a call; ``instance`` names the process that makes it."""
        return {
            "fedcore-protocol": str(self.protocol),
            "fedcore-app": self.app,
            "fedcore-task": f"{self.task} {self.task_digest}",
            _PROCESS: instance,
        }


def is_task_name(name: object) -> bool:
    """Whether a task may be called so: its name goes with a device's calls, in a header."""
    return isinstance(name, str) and _TASK_NAME.fullmatch(name) is not None


def hello_of(name: str, path: Path) -> Hello:
    """What this side says of itself, with the task ``name`` in the file ``path``."""
    raw = read_bytes(path, max_bytes=_MAX_TASK_BYTES, what="the task", otherwise=_NO_TASK)
    return Hello(task=name, task_digest=sha256_hex(raw))


def declared_name(path: Path) -> str | None:
    """The name in ``task = Task(name="...")``, without running the file.

    None when it is computed, or no name for a task.

    Loading a task imports torch, which takes seconds; the two sides find each other before.

    Raises:
        DataError: the file cannot be read.
    """
    raw = read_bytes(path, max_bytes=_MAX_TASK_BYTES, what="the task", otherwise=_NO_TASK)
    try:
        module = ast.parse(raw)
    except (SyntaxError, ValueError):
        return None  # loading it will tell
    if sum(_binds_task(node) for node in ast.walk(module)) != 1:
        return None  # which of them counts, only running it tells
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
    """Whether something may be called ``task`` from here on."""
    if isinstance(node, ast.alias):
        return (node.asname or node.name) in ("task", "*")
    if isinstance(node, ast.Global):
        return "task" in node.names
    return isinstance(node, ast.Name) and node.id == "task" and isinstance(node.ctx, ast.Store)


def instance_of(headers: Mapping[str, str]) -> str:
    """The process that makes a call; empty when it does not say, or by no name of a process."""
    named = headers.get(_PROCESS, "")
    return named if _PROCESS_NAME.fullmatch(named) else ""


def again_in(seconds: float) -> dict[str, str]:
    """As a header: this device calls again within so many seconds, if it is still there."""
    return {_AGAIN: f"{seconds:.2f}"}


def again_s_of(headers: Mapping[str, str]) -> float | None:
    """Within how many seconds a device calls again; None when it does not say."""
    try:
        seconds = float(headers.get(_AGAIN, ""))
    except ValueError:
        return None
    return seconds if 0.0 <= seconds < float("inf") else None


def check_hello(headers: Mapping[str, str], server: Hello) -> None:
    """Compares what a device says of itself with what the server is.

    Raises:
        DeviceError: they do not fit; the message says what to install on the device.
    """
    theirs = headers.get("fedcore-protocol", "none")
    if theirs != str(server.protocol):
        raise DeviceError(
            f"handshake: this device speaks protocol {theirs[:16]}, and the server "
            f"{server.protocol} (fedcore {server.app}). It takes no part; install "
            f"fedcore=={server.app} on it."
        )
    app = headers.get("fedcore-app", "none")
    if app.split(".")[:2] != server.app.split(".")[:2]:
        raise DeviceError(
            f"handshake: this device runs fedcore {app[:32]}, and the server {server.app}. It "
            f"takes no part; install fedcore=={server.app} on it."
        )
    name, _, digest = headers.get("fedcore-task", "none none").partition(" ")
    if (name, digest) != (server.task, server.task_digest):
        raise DeviceError(
            f"handshake: this device has task {name[:64]!r} (sha256 {digest[:16]}...), and the "
            f"server runs task {server.task!r} (sha256 {server.task_digest[:16]}...). It takes no "
            "part; put the server's task file on it, and name it with --task."
        )
