"""Grids: what stands between a ServerApp and its nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

Handler = Callable[[Message], Message]
CohortHandler = Callable[[Sequence[Message]], Iterator[Message]]
"""Answers all training messages of a round together."""


class _SynchronousGrid(Grid):
    """A grid whose replies come out of `send_and_receive` alone."""

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

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError("this grid answers through send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError("this grid answers through send_and_receive")


class InProcessGrid(_SynchronousGrid):
    """Runs every node in this process, one after the other, as its reply is asked for.

    Replies are made lazily, so a server that folds them holds one at a time.
    """

    def __init__(
        self,
        run_id: int,
        node_ids: Sequence[int],
        handle: Handler,
        handle_cohort: CohortHandler | None = None,
    ) -> None:
        super().__init__(run_id)
        self._node_ids = tuple(node_ids)
        self._handle = handle
        self._handle_cohort = handle_cohort

    def get_node_ids(self) -> Iterable[int]:
        """Every node."""
        return self._node_ids

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Replies in the order of the messages; none is begun after ``timeout`` seconds."""
        end = time.monotonic() + timeout if timeout is not None else float("inf")
        messages = list(messages)
        kinds = {message.metadata.message_type for message in messages}
        if self._handle_cohort is not None and kinds == {MessageType.TRAIN}:
            yield from self._handle_cohort(messages)
            return
        for message in messages:
            if time.monotonic() >= end:
                return
            yield self._handle(message)


class CohortGrid(_SynchronousGrid):
    """Shows a strategy only the nodes of one round, and sends through the grid behind.

    Flower's strategies draw nodes from an unseeded global generator, and wait for ever when there
    are too few. Shown exactly the cohort that we selected, they have nothing left to draw.
    """

    def __init__(self, behind: Grid, cohort: Sequence[int]) -> None:
        super().__init__(behind.run.run_id)
        self._behind = behind
        self._cohort = tuple(cohort)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of the round."""
        return self._cohort

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """What the grid behind answers."""
        return self._behind.send_and_receive(messages, timeout=timeout)
