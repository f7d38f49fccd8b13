"""How much a server may ask of a device: the size of a message, and when work on one ends."""

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
"""A server that has not been heard of for so long gets no more work done."""
_COPIES = 4
"""So many times the bytes of the model a message may have; a strategy may send state of its own."""
_ROOM_BYTES = 4 << 20
"""Beside those: names, settings, statistics of the preprocessing."""
_UNKNOWN_BYTES = 256 << 20
"""What a message may have where the task's model cannot be built: training says why."""


def message_limit_bytes(task: Task, run: RunConfig, owner: OwnerPolicy) -> int:
    """Most bytes of one message from the server: what the installed model and the owner allow."""
    try:
        state = build_model(task, run).state_dict().values()
        model_bytes = sum(max(one.element_size(), 4) * one.numel() for one in state)
        usual_bytes = _COPIES * model_bytes + _ROOM_BYTES
    except FedcoreError as error:  # told to the server once the message is worked on
        log.debug("the size of messages is not known: %s", error)
        usual_bytes = _UNKNOWN_BYTES
    limits = (usual_bytes, owner.max_round_bytes, owner.max_memory_bytes)
    return min(limit for limit in limits if limit is not None)


def reason_to_stop(signals: Signals) -> str | None:
    """Why the work on a message is to end now; None while it may go on."""
    if signals.stop.is_set():
        return "this device takes part no longer, by its owner's hours or battery"
    lost = signals.lost
    if lost is not None and time.monotonic() - lost > GONE_S:
        return f"the server has not been heard of for {GONE_S:.0f} s"
    return None
