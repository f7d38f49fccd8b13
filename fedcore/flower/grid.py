"""Grids: what stands between a ServerApp and its nodes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

Handler = Callable[[Message], Message]


class OwnGrid(Grid):
    """What grids of ours have in common."""

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


class InProcessGrid(OwnGrid):
    """Runs every node in this process, one after the other, as its reply is asked for.

    Replies are made lazily, so a server that folds them holds one at a time.
    """

    def __init__(self, run_id: int, node_ids: Sequence[int], handle: Handler) -> None:
        super().__init__(run_id)
        self._node_ids = tuple(node_ids)
        self._handle = handle
        self._waiting: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        """Every node."""
        return self._node_ids

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keeps messages until their replies are pulled; nothing is computed before."""
        pushed = {uuid.uuid4().hex: message for message in messages}
        self._waiting |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to messages that were pushed, each once."""
        known = [one for one in message_ids if one in self._waiting]
        return list(self.send_and_receive([self._waiting.pop(one) for one in known]))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Replies in the order of the messages; none is begun after ``timeout`` seconds."""
        end = time.monotonic() + timeout if timeout is not None else float("inf")
        for message in messages:
            if time.monotonic() >= end:
                return
            yield self._handle(message)


class CohortGrid(OwnGrid):
    """Shows a strategy only the nodes of one round, and sends through the grid behind.

    Flower's strategies draw nodes from an unseeded global generator, and wait forever when there
    are too few. Shown exactly the cohort that we selected, they have nothing left to draw.
    """

    def __init__(self, behind: Grid, cohort: Sequence[int]) -> None:
        self._run = behind.run
        self._behind = behind
        self._cohort = tuple(cohort)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of the round."""
        return self._cohort

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Through the grid behind."""
        return self._behind.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Through the grid behind."""
        return self._behind.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """What the grid behind answers."""
        return self._behind.send_and_receive(messages, timeout=timeout)
