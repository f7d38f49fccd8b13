"""Grids, through which a ServerApp sends messages to nodes and receives replies."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

Handler = Callable[[Message], Message]


@runtime_checkable
class BatchingGrid(Protocol):
    """Grid that yields replies that are ready at the same time together."""

    def send_and_receive_batches(
        self, messages: Sequence[Message], *, timeout: float | None
    ) -> Iterator[Sequence[Message]]:
        """Sends messages and yields their replies, in batches, as they arrive.

        The caller must be done with a batch before it takes the next: then its replies are
        accepted, and durable, or rejected.
        """


def reply_batches(
    grid: Grid, messages: Sequence[Message], *, timeout: float | None
) -> Iterator[Sequence[Message]]:
    """Sends messages and yields batches of replies; of one reply each unless the grid batches."""
    if isinstance(grid, BatchingGrid):
        return grid.send_and_receive_batches(messages, timeout=timeout)
    # Unlike a generator, this keeps no reply while the next one is computed.
    return map(_alone, grid.send_and_receive(messages, timeout=timeout))


def _alone(reply: Message) -> Sequence[Message]:
    return (reply,)


class OwnGrid(Grid):
    """Base class of fedcore's grids."""

    def __init__(self, run_id: int) -> None:
        self._run = Run.create_empty(run_id)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class LazyGrid(OwnGrid):
    """Base class of grids that compute replies only as they are consumed."""

    def __init__(self, run_id: int) -> None:
        super().__init__(run_id)
        self._waiting: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Stores messages until their replies are pulled; computes nothing yet."""
        pushed = {uuid.uuid4().hex: message for message in messages}
        self._waiting |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies to pushed messages, each once."""
        known = [one for one in message_ids if one in self._waiting]
        return list(self.send_and_receive([self._waiting.pop(one) for one in known]))


class ForwardingGrid(OwnGrid):
    """Base class of grids in front of another grid, in the same run."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid.run.run_id)
        self._run = grid.run
        self._grid = grid

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pushes messages through the inner grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pulls replies through the inner grid."""
        return self._grid.pull_messages(message_ids)


class InProcessGrid(LazyGrid):
    """Runs every node in this process, one after the other, as its reply is consumed.

    Replies are computed lazily, so a server that folds them has one in memory at a time.
    """

    def __init__(self, run_id: int, node_ids: Sequence[int], handle: Handler) -> None:
        super().__init__(run_id)
        self._node_ids = tuple(node_ids)
        self._handle = handle

    def get_node_ids(self) -> Iterable[int]:
        """Returns all nodes."""
        return self._node_ids

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Yields replies in the order of the messages; starts none after ``timeout`` seconds."""
        end = time.monotonic() + timeout if timeout is not None else float("inf")
        for message in messages:
            if time.monotonic() >= end:
                return
            yield self._handle(message)


class CohortGrid(ForwardingGrid):
    """Presents only the nodes of one round to a strategy, and sends through another grid.

    Flower's strategies draw nodes from an unseeded global generator, and wait forever if there
    are too few. With exactly the selected cohort to draw from, the draw has only one outcome.
    """

    def __init__(self, grid: Grid, cohort: Sequence[int]) -> None:
        super().__init__(grid)
        self._cohort = tuple(cohort)

    def get_node_ids(self) -> Iterable[int]:
        """Returns the nodes of the round."""
        return self._cohort

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Sends through the inner grid and returns its replies."""
        return self._grid.send_and_receive(messages, timeout=timeout)
