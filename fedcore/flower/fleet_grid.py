"""A grid over devices that are really there, beside the server's own record of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from flwr.app import Message

from fedcore.flower.fleet import Fleet
from fedcore.flower.grid import OwnGrid

GRACE_S = 3.0
"""How long a round waits for a device that is gone to come back, before it goes on without it."""
_LOOK_S = 0.25
"""How often a round looks whether a device that it waits for has been gone for too long."""


class Stopped(Exception):
    """The server stops; what asked the grid is to end, too."""


class Presence(Protocol):
    """Who is there, as the network tells."""

    def nodes(self) -> Iterable[int]:
        """The nodes that are there now."""

    def wake(self, node_ids: Iterable[int]) -> None:
        """Tells nodes that work awaits them."""

    def absent_s(self, node_id: int) -> float:
        """Seconds since a node was last there; 0 while it is."""


class FleetGrid(OwnGrid):
    """Hands messages to the fleet in this process, and replies back as they come in.

    A device that is gone for `GRACE_S` is waited for no longer, and is silent in its round. What
    is left unanswered at the end of a round is forgotten; a reply to it is refused as late.

    Replies are inflated one at a time, as they are asked for.
    """

    def __init__(
        self,
        fleet: Fleet,
        presence: Presence,
        *,
        consumed: Callable[[str], None],
        stopping: threading.Event,
    ) -> None:
        """A grid for the run that ``fleet`` has open.

        Args:
            fleet: The server's record of nodes and messages.
            presence: Who is there.
            consumed: Hears of each message whose reply is done with, or waited for no longer.
            stopping: Once it is set, whoever asks the grid gets `Stopped`; wake ``fleet`` then.
        """
        super().__init__(fleet.run_id)
        self._fleet = fleet
        self._presence = presence
        self._consumed = consumed
        self._stopping = stopping

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are there."""
        self._go_on()
        return list(self._presence.nodes())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends, and wakes those who are to answer."""
        messages = list(messages)
        sent = self._fleet.send(messages)
        self._presence.wake(message.metadata.dst_node_id for message in messages)
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come in full, each once."""
        replies = []
        for message_id in message_ids:
            reply = self._fleet.take(message_id)
            if reply is not None:
                self._consumed(message_id)
                replies.append(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Replies as they come in, until all have, or those who have not are gone, or time is up.

        ``timeout`` is in seconds.
        """
        messages = list(messages)
        end = time.monotonic() + timeout if timeout is not None else float("inf")
        nodes = [message.metadata.dst_node_id for message in messages]
        waiting = dict(zip(self._fleet.send(messages), nodes, strict=True))
        self._presence.wake(nodes)
        del messages
        looked = time.monotonic()
        try:
            while waiting:
                self._go_on()
                now = time.monotonic()
                answered = self._fleet.next_answered(min(_LOOK_S, max(end - now, 0.0)))
                reply = self._fleet.take(answered) if answered in waiting else None
                if answered is not None and reply is not None:
                    del waiting[answered]
                    try:
                        yield reply
                    finally:
                        self._consumed(answered)
                    continue
                now = time.monotonic()
                if now >= end:
                    return
                if now - looked >= _LOOK_S:
                    looked = now
                    absent = {node: self._presence.absent_s(node) for node in waiting.values()}
                    if all(seconds > GRACE_S for seconds in absent.values()):
                        return
        finally:
            self._fleet.forget(list(waiting))
            for message_id in waiting:
                self._consumed(message_id)

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise Stopped("the server stops")
