"""Telling the server that this device is back, before torch and the task have been loaded.

Importing torch takes seconds. A server counts a device as gone until its process has
authenticated, and a round that is going on waits for it no longer than a few.
"""

from __future__ import annotations

import ast
import logging
import threading
from pathlib import Path

from fedcore.crypto.kit import Kit, client_context
from fedcore.errors import DeviceError
from fedcore.files import read_bytes
from fedcore.flower.fleet_client import FleetLink, NotActivated, Unreachable
from fedcore.rpc.hello import hello_of

log = logging.getLogger("fedcore.device")

_MAX_TASK_BYTES = 16 << 20


def declared_name(path: Path) -> str | None:
    """The name in ``task = Task(name="...")``, without running the file; None when it is computed.

    Raises:
        DataError: the file cannot be read.
    """
    raw = read_bytes(path, max_bytes=_MAX_TASK_BYTES, what="the task")
    try:
        statements = ast.parse(raw).body
    except (SyntaxError, ValueError):
        return None  # loading it will tell
    for statement in statements:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Call):
            continue
        if [ast.unparse(target) for target in statement.targets] != ["task"]:
            continue
        for keyword in statement.value.keywords:
            if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                return str(keyword.value.value)
    return None


def announce(kit: Kit, task: Path, instance: str) -> None:
    """Authenticates this process with the server, if that can be done at once.

    Whatever is not as it should be, the device's own loop meets again, and says.

    Args:
        kit: The device's identity.
        task: The task file that is installed here.
        instance: How this process calls itself, now and later.

    Raises:
        DataError: the task file cannot be read.
        TrustError: the server does not let this device in.
    """
    name = declared_name(task)
    if name is None:
        return
    link = FleetLink(
        kit.servers[0],
        client_context(kit),
        public_key=kit.public,
        headers=hello_of(name, task).headers(instance),
        stop=threading.Event(),
    )
    try:
        link.activate()
        log.info("authenticated as node %d", link.node_id)
    except (DeviceError, NotActivated, Unreachable) as error:
        log.debug("announcing: %s", error)
    finally:
        link.close()
