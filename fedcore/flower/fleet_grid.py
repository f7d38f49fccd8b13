"""A Flower grid over real devices: a ServerApp sends messages and receives checked replies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Protocol

from flwr.app import Error, Message
from flwr.app.message import make_message

from fedcore.errors import FedcoreError, InvalidUpdate, ResourceError
from fedcore.flower.fleet import Fleet
from fedcore.flower.fleet_store import LARGE_BYTES, ReplyBytes
from fedcore.flower.grid import OwnGrid
from fedcore.updates.messages import REFUSED
from fedcore.updates.pieces import FileArray, PathArray

GRACE_S = 3.0
"""Seconds that a round waits for a disconnected device to return, before it continues without."""
_LOOK_S = 0.25
"""Seconds between checks for devices that have been disconnected too long."""


_TOGETHER = 32
"""Most replies of a batch, which the journal makes durable with one write: some 5 ms of work."""
_LARGE_TOGETHER = 4
"""Most replies of a batch with arrays in files, each some 10 ms of work for a model of 40 MB."""


class ServerStopped(Exception):
    """The server stops, and the caller of the grid must end, too."""


class NodePresence(Protocol):
    """The connected devices, according to the network."""

    def nodes(self) -> Iterable[int]:
        """Returns the nodes that are online."""

    def wake(self, node_ids: Iterable[int]) -> None:
        """Notifies nodes that a message waits for them."""

    def offline_s(self, node_id: int) -> float:
        """Returns the seconds since a node was last online; 0 while it is."""

    def owe(self, node_ids: Iterable[int]) -> None:
        """Leaves nodes out that were online and did not reply in time, until they call again."""


Check = Callable[[Message], None]
"""Checks a reply before any use of it; raises a FedcoreError to reject it."""


class Inspector(Protocol):
    """Determines the valid replies to each message."""

    def expect(self, messages: Sequence[Message]) -> Sequence[Check]:
        """Returns a check for the reply to each message, in order."""


class FleetGrid(OwnGrid):
    """Sends messages to the fleet in this process, and yields replies as they arrive.

    A round stops waiting once every device that has not replied has been offline for `GRACE_S`.
    Devices that are online and have not replied at its end are left out until they call again.
    Messages without a reply at the end of a round are deleted; a later reply is rejected as late.

    Replies are parsed and checked on demand, and not kept: in batches of those that are complete
    together and take little memory, as their arrays are in files or small; else one at a time. A
    rejected reply becomes a reply with an error: its client counts as failed.
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
        """Creates a grid for the run that ``fleet`` has open.

        Args:
            fleet: The server's nodes and messages.
            presence: The connected devices.
            inspector: Provides the check for each reply.
            consumed: Callback with each message id whose reply is processed or no longer awaited.
            stopping: Once set, calls of the grid raise `ServerStopped`; call ``fleet.wake()``, too.
        """
        super().__init__(fleet.run_id)
        self._fleet = fleet
        self._presence = presence
        self._inspector = inspector
        self._checks: dict[str, Check] = {}
        self._consumed = consumed
        self._stopping = stopping
        self.on_wait: Callable[[], None] = lambda: None
        """Callback each time that a wait ends without a reply."""

    def get_node_ids(self) -> Iterable[int]:
        """Returns the nodes that are online."""
        self._go_on()
        return list(self._presence.nodes())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends messages and wakes their nodes; returns the message ids."""
        return list(self._send(list(messages)))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the complete replies to these messages, each once."""
        replies = []
        for message_id in message_ids:
            reply = self._checked_reply(message_id)
            if reply is not None:
                self._consumed(message_id)
                replies.append(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Sends messages and yields replies as they arrive, see `send_and_receive_batches`."""
        for batch in self.send_and_receive_batches(list(messages), timeout=timeout):
            yield from batch

    def send_and_receive_batches(
        self, messages: Sequence[Message], *, timeout: float | None
    ) -> Iterator[Sequence[Message]]:
        """Sends messages and yields replies as they arrive, in batches that take little memory.

        Ends when every node has replied, those that have not are offline, or ``timeout`` seconds
        have passed.

        Raises:
            ResourceError: the wait ended, and this machine failed to store what devices sent.
        """
        end = time.monotonic() + timeout if timeout is not None else float("inf")
        waiting = self._send(list(messages))
        del messages
        looked = time.monotonic()
        try:
            while waiting:
                self._go_on()
                now = time.monotonic()
                batch, failure = self._ready(min(_LOOK_S, max(end - now, 0.0)), waiting)
                if batch:
                    for message_id in batch:
                        del waiting[message_id]
                    try:
                        yield [*batch.values()]
                    finally:
                        for message_id in batch:
                            self._consumed(message_id)
                        batch.clear()  # frees them before the next ones are read
                    if failure is None:
                        continue
                if failure is not None:
                    raise failure
                now = time.monotonic()
                if now >= end:
                    self._presence.owe(waiting.values())
                    self._check_machine()
                    return
                self.on_wait()
                if now - looked >= _LOOK_S:
                    looked = now
                    absent = {node: self._presence.offline_s(node) for node in waiting.values()}
                    if all(seconds > GRACE_S for seconds in absent.values()):
                        self._check_machine()
                        return
        finally:
            self._fleet.forget(list(waiting))
            for message_id in waiting:
                self._checks.pop(message_id, None)
                self._consumed(message_id)

    def _check_machine(self) -> None:
        """Raises the error by which this machine failed to store replies, if there is one."""
        if self._fleet.lacks is not None:
            raise self._fleet.lacks

    def _send(self, messages: list[Message]) -> dict[str, int]:
        """Sends messages and wakes their nodes; returns the nodes by message id."""
        self._fleet.report_storage_error(None)  # earlier failures do not concern these replies
        checks = self._inspector.expect(messages)
        nodes = [message.metadata.dst_node_id for message in messages]
        sent = self._fleet.send(messages)
        self._checks.update(zip(sent, checks, strict=True))
        self._presence.wake(nodes)
        return dict(zip(sent, nodes, strict=True))

    def _ready(
        self, timeout_s: float, waiting: Collection[str]
    ) -> tuple[dict[str, Message], Exception | None]:
        """Returns checked replies that are complete, by message id; none after ``timeout_s``.

        All but the last take little memory: their arrays are in files, or small. If this machine
        fails to read one, returns the error with the replies before it: they have left the fleet,
        and must be processed before it is raised.
        """
        batch: dict[str, Message] = {}
        large = 0
        answered = self._fleet.next_answered(timeout_s)
        while answered is not None:
            try:
                size = self._fleet.reply_bytes(answered)
                reply = self._checked_reply(answered) if answered in waiting else None
            except (ResourceError, OSError) as error:
                return batch, error
            expanded, open_files = _expanded(reply)
            large += max(size.in_files, expanded.in_files) > LARGE_BYTES
            if reply is not None:
                batch[answered] = reply
            in_memory = max(size.in_memory, expanded.in_memory)
            if in_memory > LARGE_BYTES or large >= _LARGE_TOGETHER or len(batch) >= _TOGETHER:
                break
            if open_files:  # its arrays were put together here, as no honest device's are
                break
            answered = self._fleet.next_answered(0.0)
        return batch, None

    def _checked_reply(self, message_id: str) -> Message | None:
        """Returns a checked reply, or one with an error in its place; None if incomplete."""
        reply = self._fleet.pop_reply(message_id)
        if reply is None:
            return None
        check = self._checks.pop(message_id)
        if reply.has_error():
            return reply
        try:
            check(reply)
        except (ResourceError, OSError):
            raise  # a failure of this machine, not of the node
        except FedcoreError as error:
            code, said = REFUSED + error.exit_code, str(error)
        except Exception as error:  # malicious content may fail in ways that no check foresees
            code = REFUSED + InvalidUpdate.exit_code
            said = (
                f"update from node {reply.metadata.src_node_id}: verification failed "
                f"({type(error).__name__}). It was not used."
            )
        else:
            return reply
        return make_message(metadata=reply.metadata, error=Error(code, said))

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise ServerStopped("the server is stopping")


def _expanded(reply: Message | None) -> tuple[ReplyBytes, int]:
    """Returns the bytes of a reply's arrays, and how many of these hold a file open.

    They may be far more than the objects that arrived: arrays may repeat one small chunk.
    """
    if reply is None or reply.has_error():
        return ReplyBytes(0, 0), 0
    records = reply.content.array_records.values()
    arrays = {id(one): one for record in records for one in record.values()}.values()
    filed = [one for one in arrays if isinstance(one, FileArray)]
    in_memory = sum(len(one.data) for one in arrays if not isinstance(one, FileArray))
    in_files = sum(one.size_bytes for one in filed)
    return ReplyBytes(in_memory, in_files), sum(not isinstance(one, PathArray) for one in filed)
