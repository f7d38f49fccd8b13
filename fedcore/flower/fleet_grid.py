"""A grid over devices that are really there, beside the server's own record of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from flwr.app import Error, Message
from flwr.app.message import make_message

from fedcore.errors import FedcoreError, InvalidUpdate, ResourceError
from fedcore.flower.fleet import Fleet
from fedcore.flower.grid import OwnGrid
from fedcore.updates.messages import REFUSED

GRACE_S = 3.0
"""How long a round waits for a device that is gone to come back, before it goes on without it."""
_LOOK_S = 0.25
"""How often a round looks whether a device that it waits for has been gone for too long."""


class Stopped(Exception):
    """The server stops; what asked the grid is to end, too."""


class NodePresence(Protocol):
    """Who is there, as the network tells."""

    def nodes(self) -> Iterable[int]:
        """The nodes that are there now."""

    def wake(self, node_ids: Iterable[int]) -> None:
        """Tells nodes that work awaits them."""

    def absent_s(self, node_id: int) -> float:
        """Seconds since a node was last there; 0 while it is."""


Check = Callable[[Message], None]
"""Looks at a reply before anything of it is used; raises a FedcoreError when it is refused."""


class Inspector(Protocol):
    """Knows what the reply to each message must be."""

    def expect(self, messages: Sequence[Message]) -> Sequence[Check]:
        """A check for the reply to each message, in order."""


class FleetGrid(OwnGrid):
    """Hands messages to the fleet in this process, and replies back as they come in.

    A device that is gone for `GRACE_S` is waited for no longer, and is silent in its round. What
    is left unanswered at the end of a round is forgotten; a reply to it is refused as late.

    Replies are inflated and checked one at a time, as they are asked for, and none is held here
    after that. One that is refused gives a reply with an error: its client failed.
    """

    def __init__(
        self,
        fleet: Fleet,
        presence: NodePresence,
        *,
        inspector: Inspector,
        consumed: Callable[[str], None],
        stopping: threading.Event,
    ) -> None:
        """A grid for the run that ``fleet`` has open.

        Args:
            fleet: The server's record of nodes and messages.
            presence: Who is there.
            inspector: Checks replies.
            consumed: Hears of each message whose reply is done with, or waited for no longer.
            stopping: Once it is set, whoever asks the grid gets `Stopped`; wake ``fleet`` then.
        """
        super().__init__(fleet.run_id)
        self._fleet = fleet
        self._presence = presence
        self._inspector = inspector
        self._checks: dict[str, Check] = {}
        self._consumed = consumed
        self._stopping = stopping
        self.waits: Callable[[], None] = lambda: None
        """Called each time that a round looks for replies that have not come."""

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are there."""
        self._go_on()
        return list(self._presence.nodes())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends, and wakes those who are to answer."""
        return list(self._send(list(messages)))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come in full, each once."""
        replies = []
        for message_id in message_ids:
            reply = self._take(message_id)
            if reply is not None:
                self._consumed(message_id)
                replies.append(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Replies as they come in, until all have, or those who have not are gone, or time is up.

        ``timeout`` is in seconds.

        Raises:
            ResourceError: time is up, and this machine could not take in what devices sent.
        """
        end = time.monotonic() + timeout if timeout is not None else float("inf")
        waiting = self._send(list(messages))
        del messages
        looked = time.monotonic()
        try:
            while waiting:
                self._go_on()
                now = time.monotonic()
                answered = self._fleet.next_answered(min(_LOOK_S, max(end - now, 0.0)))
                reply = self._take(answered) if answered in waiting else None
                if answered is not None and reply is not None:
                    del waiting[answered]
                    try:
                        yield reply
                    finally:
                        del reply  # the next one is read while this frame waits
                        self._consumed(answered)
                    continue
                now = time.monotonic()
                if now >= end:
                    self._check_machine()
                    return
                self.waits()
                if now - looked >= _LOOK_S:
                    looked = now
                    absent = {node: self._presence.absent_s(node) for node in waiting.values()}
                    if all(seconds > GRACE_S for seconds in absent.values()):
                        self._check_machine()
                        return
        finally:
            self._fleet.forget(list(waiting))
            for message_id in waiting:
                self._checks.pop(message_id, None)
                self._consumed(message_id)

    def _check_machine(self) -> None:
        """Ends a round that devices did answer: this machine had no room for what they sent."""
        if self._fleet.lacks is not None:
            raise self._fleet.lacks

    def _send(self, messages: list[Message]) -> dict[str, int]:
        """Sends, wakes, and returns the node of each message by the message's id."""
        self._fleet.lack(None)  # what was lacking before says nothing of what comes now
        checks = self._inspector.expect(messages)
        nodes = [message.metadata.dst_node_id for message in messages]
        sent = self._fleet.send(messages)
        self._checks.update(zip(sent, checks, strict=True))
        self._presence.wake(nodes)
        return dict(zip(sent, nodes, strict=True))

    def _take(self, message_id: str) -> Message | None:
        """A reply that passed its check, or one with an error in its place."""
        reply = self._fleet.take(message_id)
        if reply is None:
            return None
        check = self._checks.pop(message_id)
        if reply.has_error():
            return reply
        try:
            check(reply)
        except (ResourceError, OSError):
            raise  # this machine's, and no fault of the node's
        except FedcoreError as error:
            code, said = REFUSED + error.exit_code, str(error)
        except Exception as error:  # what was made up may fail in ways that no check foresees
            code = REFUSED + InvalidUpdate.exit_code
            said = (
                f"update from node {reply.metadata.src_node_id}: it cannot be checked "
                f"({type(error).__name__}). It was not used."
            )
        else:
            return reply
        return make_message(metadata=reply.metadata, error=Error(code, said))

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise Stopped("the server stops")
