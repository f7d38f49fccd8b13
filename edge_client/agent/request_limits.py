"""Limits on a server's requests: the size of a message, and when to abort work on one."""

from __future__ import annotations

import logging
import time

from edge_client.agent.wake import Signals
from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.errors import FedcoreError
from fedcore.task.definition import Task
from fedcore.task.model import build_model

log = logging.getLogger("fedcore.device")

GONE_S = 120.0
"""Work on a message is aborted when the server has been unreachable for this long."""
_COPIES = 4
"""Size limit of a message, in copies of the model: a strategy may send state in addition to it."""
_ROOM_BYTES = 4 << 20
"""Added to that limit for names, settings and statistics of the preprocessing."""
_UNKNOWN_BYTES = 256 << 20
"""Size limit of a message if the task's model cannot be built; training reports the reason."""


def message_limit_bytes(task: Task, run: RunConfig, owner: OwnerPolicy) -> int:
    """Returns the size limit in bytes of one message from the server.

    It is a multiple of the installed model's size, or less if the owner's limits on bytes or memory
    are lower.
    """
    try:
        state = build_model(task, run).state_dict().values()
        model_bytes = sum(max(one.element_size(), 4) * one.numel() for one in state)
        usual_bytes = _COPIES * model_bytes + _ROOM_BYTES
    except FedcoreError as error:  # training reports it to the server
        log.debug("the size of messages is unknown: %s", error)
        usual_bytes = _UNKNOWN_BYTES
    limits = (usual_bytes, owner.max_round_bytes, owner.max_memory_bytes)
    return min(limit for limit in limits if limit is not None)


def reason_to_stop(signals: Signals) -> str | None:
    """Returns why the work on a message must be aborted now; None while it may continue."""
    if signals.stop.is_set():
        return "the owner's limits on hours or battery stop this device from taking part"
    lost = signals.lost
    if lost is not None and time.monotonic() - lost > GONE_S:
        return f"no sign of the server for {GONE_S:.0f} s"
    return None
