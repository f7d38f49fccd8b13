"""Early authentication: announces a starting device before torch and the task are loaded.

Importing torch takes seconds. A server counts a device as offline until its process has
authenticated, and a running round waits for it no longer than a few seconds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from edge_client.agent.wake import open_stream
from edge_client.device_folder import DeviceFolder
from fedcore.crypto.kit import Kit
from fedcore.errors import FedcoreError, TrustError
from fedcore.flower.fleet_client import FleetLink
from fedcore.flower.fleet_errors import NotActivated, Unreachable
from fedcore.rpc.hello import declared_name, hello_of

log = logging.getLogger("fedcore.device")

_LONGEST_S = 15.0
"""How long a request to a busy server is retried."""
_LAST_S = 1.0
"""Timeout of each network step of the last request."""


def announce(
    kit: Kit,
    task: Path,
    folder: DeviceFolder,
    instance: str,
    passed: Callable[[int], None] | None = None,
    *,
    ended: str = "",
) -> Callable[[str], None] | None:
    """Activates this process with the server and opens a stream, if the server answers soon.

    From then on the server counts the device as online, and notices at once if this process dies.
    Other failures are only logged: the training session meets them again and reports them. Does
    nothing if the task file computes its name: only running the file would reveal it.

    Args:
        kit: The device's identity.
        task: The task file that is installed here.
        folder: The device's folder.
        instance: Name of this process, which its first training session must use too.
        passed: Callback with the bytes transferred; may block to limit bandwidth.
        ended: Why this device's process before ended; empty if as usual.

    Returns:
        A function that signs off again, with the reason; None if the server has not admitted it.

    Raises:
        DataError: the task file cannot be read.
        TrustError: the server does not admit this device.
        DeviceError: the folder belongs to another identity.
    """
    name = declared_name(task)
    if name is None:
        return None
    late = threading.Event()
    connect = partial(
        FleetLink,
        kit,
        headers=hello_of(name, task).headers(instance),
        stop=late,
        was_admitted=folder.was_admitted(kit.public),
        passed=passed,
    )
    link = connect(ended=ended)
    # A server that stays busy must not keep this device from loading torch.
    ending = threading.Timer(_LONGEST_S, late.set)
    ending.daemon = True
    ending.start()
    try:
        link.activate()
        folder.record_admission(kit.public)
        log.info("authenticated as node %d", link.node_id)
        if link.wake_port:
            open_stream(link, instance, passed)
        return lambda reason: _sign_off(connect(), link.node_id, reason)
    except TrustError:
        raise
    except (FedcoreError, NotActivated, Unreachable) as error:
        log.debug("announcing: %s", error)
        return None
    finally:
        ending.cancel()
        link.close()


def _sign_off(link: FleetLink, node_id: int, reason: str) -> None:
    try:
        link.deactivate(_LAST_S, reason, node_id=node_id)
    except (FedcoreError, ConnectionError) as error:
        log.debug("cannot tell the server why this device ends: %s", error)
    finally:
        link.close()
