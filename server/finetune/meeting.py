"""Waits until the address at which nodes meet can be reached, before torchrun looks for it.

torch's store reports a name that nobody knows, and a port at which nobody listens, by pages of C++
stack frames on standard error. Start with `wait_for_host`.
"""

from __future__ import annotations

import socket
import time

from fedcore.config.finetune import Finetune
from fedcore.errors import TrainingError

_AGAIN_S = 0.2
_TRY_S = 5.0


def wait_for_host(settings: Finetune, *, hosts: bool) -> None:
    """Returns once ``finetune.rendezvous`` has an address and, for nodes that join, answers.

    Both may take a while: in clusters a name is often known only when its machine runs.

    Args:
        settings: ``rendezvous`` and ``rendezvous_s`` are used.
        hosts: Whether this node hosts the rendezvous, so that nobody listens there yet.

    Raises:
        TrainingError: that did not happen within ``finetune.rendezvous_s``.
    """
    name, _, port = (settings.rendezvous or "").rpartition(":")
    address = (name.strip("[]"), int(port))
    until_s = time.monotonic() + settings.rendezvous_s
    while True:
        try:
            if hosts:
                socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
            else:
                left_s = until_s - time.monotonic()
                socket.create_connection(address, timeout=min(_TRY_S, max(0.1, left_s))).close()
            return
        except OSError as error:  # an unknown name, too
            if time.monotonic() + _AGAIN_S >= until_s:
                raise apart(settings, f" (the last try: {error})") from error
        time.sleep(_AGAIN_S)


def apart(settings: Finetune, detail: str = "") -> TrainingError:
    """Returns the error of nodes that did not meet, or lost one."""
    return TrainingError(
        f"fine-tuning: {settings.nodes} nodes did not meet at {settings.rendezvous} within "
        f"finetune.rendezvous_s = {settings.rendezvous_s:g}, or one left and did not come back"
        f"{detail}. Nothing more was trained; start the command on every node, one of them the "
        "host of that address, and see what the others report. With finetune.checkpoints training "
        "continues where it was."
    )
