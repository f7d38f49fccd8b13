"""Telling the server that this device is back, before torch and the task have been loaded.

Importing torch takes seconds. A server counts a device as gone until its process has
authenticated, and a round that is going on waits for it no longer than a few.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from edge_client.agent.wake import hold_stream
from edge_client.device_folder import DeviceFolder
from fedcore.crypto.kit import Kit
from fedcore.errors import FedcoreError, TrustError
from fedcore.flower.fleet_client import FleetLink
from fedcore.flower.fleet_errors import NotActivated, Unreachable
from fedcore.rpc.hello import declared_name, hello_of

log = logging.getLogger("fedcore.device")

_LONGEST_S = 15.0
"""How long a busy server is asked again."""


def announce(
    kit: Kit,
    task: Path,
    folder: DeviceFolder,
    instance: str,
    passed: Callable[[int], None] | None = None,
) -> None:
    """Authenticates this process with the server, if that can be done at once, and stays in touch.

    From then on the server sees at once when this process dies, and counts on it until then.
    Whatever is not as it should be, the device's own loop meets again, and says.

    Args:
        kit: The device's identity.
        task: The task file that is installed here.
        folder: What this device keeps.
        instance: How this process calls itself, now and later.
        passed: Told how many bytes each call, and the stream, have moved; it may wait.

    Raises:
        DataError: the task file cannot be read.
        TrustError: the server does not let this device in.
        DeviceError: the folder is another identity's.
    """
    name = declared_name(task)
    if name is None:
        return
    late = threading.Event()
    link = FleetLink(
        kit,
        headers=hello_of(name, task).headers(instance),
        stop=late,
        let_in_before=folder.let_in_before(kit.public),
        passed=passed,
    )
    # A server that is busy again and again must not keep this device from loading what it needs.
    ending = threading.Timer(_LONGEST_S, late.set)
    ending.daemon = True
    ending.start()
    try:
        link.activate()
        folder.note_let_in(kit.public)
        log.info("authenticated as node %d", link.node_id)
        if link.wake_port:
            hold_stream(link, instance, passed)
    except TrustError:
        raise
    except (FedcoreError, NotActivated, Unreachable) as error:
        log.debug("announcing: %s", error)
    finally:
        ending.cancel()
        link.close()
