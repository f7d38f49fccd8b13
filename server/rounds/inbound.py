"""What comes back from clients: checked, counted and kept.

`server.rounds.fold` makes a mean of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedcore.errors import FedcoreError, InvalidUpdate, RoundFailed
from fedcore.observability.foreign import foreign
from fedcore.privacy.client_level import Bound
from fedcore.updates.messages import (
    ARRAYS,
    DECLINED_BY_OWNER,
    DECLINES,
    EPSILON,
    MODEL,
    REFUSED,
    TRAIN_LOSS,
    UNCLIPPED,
    Update,
    check_weights,
    refused_as,
    update_content,
)
from fedcore.updates.pack import Layout, Vector
from fedcore.updates.pieces import size_of
from fedcore.updates.replies import Reply, ReplySpec, read_reply
from server.records import VirtualRecord
from server.rounds.aggregation.exact_mean import ExactMean
from server.rounds.checkpointing import NoCheckpoints, NumberedPeers, Peers, RoundCheckpointer

_MAX_REASON = 1900  # characters that are shown of what a client says


@dataclass(frozen=True)
class Folded:
    """Updates that a grid added up where they were made."""

    mean: ExactMean
    taken: Sequence[tuple[int, Mapping[str, float]]]
    """Number of examples and metrics of each, in the order of the cohort."""
    failures: Sequence[tuple[int, str]]
    """Codes and reasons of clients that failed or declined."""


@runtime_checkable
class FoldingGrid(Protocol):
    """A grid that can add updates up where they are made, as a simulation's does."""

    @property
    def virtual(self) -> VirtualRecord | None:
        """The last round on the virtual clock; None where there is none."""

    def fold(
        self,
        content: RecordDict,
        nodes: Sequence[int],
        *,
        configs: Mapping[int, ConfigRecord],
        uniform: bool,
        deadline_s: float,
    ) -> Folded:
        """Trains these nodes on one content and adds their updates up.

        ``configs`` has the configuration of nodes whose settings are others than the content's.
        """


@dataclass
class Tally:
    """What came back in one round, beside the updates themselves."""

    asked: int
    updates: int = 0
    declined: int = 0
    failed: int = 0
    examples: int = 0
    losses: list[tuple[float, int]] = field(default_factory=list)
    """The training loss of each update that tells it, and its number of examples."""
    epsilon_max: float | None = None
    bytes_up: int = 0
    unclipped: int = 0
    """Updates that were within an adaptive bound by themselves."""
    clipped: list[tuple[int, float]] = field(default_factory=list)
    """Nodes whose updates were longer than the round's bound, and how long those were."""
    median_norm: float | None = None
    """What the round counts as the median of its updates' lengths, see `NormBound.measure`."""
    reasons: list[str] = field(default_factory=list)
    """Why clients failed."""
    spent: str = ""
    """Why the last client that declined did."""
    spent_nodes: set[int] = field(default_factory=set)
    """Those who declined, where a grid tells who."""
    owners: int = 0
    """How many of those who declined name their owner's budget."""

    kinds: set[type[FedcoreError]] = field(default_factory=set)
    """Of what kinds the errors of clients that failed are."""
    over: bool = False
    """Whether too many budgets are spent for another round."""

    @property
    def all_declined(self) -> bool:
        """Whether there is nobody left to train."""
        return 0 < self.declined == self.asked

    def refuse(self, reason: str, *, kind: type[FedcoreError] = RoundFailed) -> None:
        """Counts a client that failed, or whose update cannot be used."""
        self.failed += 1
        self.reasons.append(reason)
        self.kinds.add(kind)

    def count(self, num_examples: int, metrics: Mapping[str, float]) -> None:
        """Counts an update that was taken."""
        self.updates += 1
        self.examples += num_examples
        if TRAIN_LOSS in metrics:
            self.losses.append((metrics[TRAIN_LOSS], num_examples))
        if EPSILON in metrics:
            self.epsilon_max = max(self.epsilon_max or 0.0, metrics[EPSILON])
        self.unclipped += metrics.get(UNCLIPPED) == 1.0

    @property
    def train_loss(self) -> float | None:
        """The mean over the examples of those who told it, in whatever order; None without any."""
        if not self.losses:
            return None
        total = math.fsum(loss * count for loss, count in self.losses)
        return total / sum(count for _, count in self.losses)

    def failure(self, code: int, reason: str) -> None:
        """Counts a client that answered with an error."""
        if code in DECLINES:
            self.declined += 1
            self.spent = reason
            self.owners += code == DECLINED_BY_OWNER
        else:
            self.refuse(reason, kind=refused_as(code))


@dataclass(frozen=True)
class Intake:
    """What the replies to one question are held to, and who keeps those that are taken."""

    asked: ReplySpec
    checkpointer: RoundCheckpointer = field(default_factory=NoCheckpoints)
    peers: Peers = field(default_factory=NumberedPeers)
    base: Vector | None = None
    """The weights that were sent, where the distance to them is to be measured."""
    bound: Bound | None = None
    """Of client-level privacy."""
    on_note: Callable[[str], None] = lambda text: None
    budgets: bool = True
    """Whether clients have budgets that may be spent; where they have none, who declines fails."""

    def where(self, reply: Message) -> str:
        """Whose a reply is, for what is said of it."""
        return f"{_WHAT[self.asked.purpose]} {self.peers.name(reply.metadata.src_node_id)}"

    def read(self, reply: Message) -> Reply:
        """The reply, checked.

        Raises:
            InvalidUpdate: it is not what was asked for.
        """
        where = self.where(reply)
        found = read_reply(reply, self.asked, where=where, base=self.base)
        if self.bound is not None:
            self.bound.check(found.parts(), found.metrics, where=where)
        return found


_WHAT = {MessageType.TRAIN: "update from", MessageType.EVALUATE: "metrics from"}


def accepted(
    replies: Iterable[Message], intake: Intake, tally: Tally, *, first: int
) -> Iterator[tuple[Message, Reply]]:
    """Replies that passed every check and are kept, as they arrive; none is held here.

    Each is checked, then kept, then handed on; one that is refused is counted, told of by its
    name, and changes nothing else. After ``first`` that were taken no other is waited for.
    """
    taken = 0
    for reply in replies:
        if reply.has_error():
            code, reason = failure_of(reply)
            if code in DECLINES and not intake.budgets:
                code = REFUSED
            node = reply.metadata.src_node_id
            tally.failure(code, intake.peers.said(node, reason))
            if code in DECLINES:
                tally.spent_nodes.add(node)
            continue
        try:
            found = intake.read(reply)
            tally.bytes_up += payload_bytes(reply)
        except InvalidUpdate as error:
            _refuse(reply, intake, tally, str(error))
            del reply
            continue
        kept = intake.checkpointer.accept(reply)
        if found.arrays:
            arrays = kept.content[ARRAYS]
            found = replace(found, arrays={name: arrays[name] for name in found.arrays})  # type: ignore[misc]
        del reply
        yield kept, found
        del kept, found
        taken += 1
        if taken == first:
            return


def _refuse(reply: Message, intake: Intake, tally: Tally, reason: str) -> None:
    if intake.checkpointer.discard(reply):
        intake.on_note(f"Dropped from the journal, which an earlier process had kept: {reason}")
    intake.peers.refused(reply.metadata.src_node_id, reason)
    tally.refuse(reason)


def fold_in_place(
    grid: FoldingGrid,
    instruction: Message,
    nodes: Sequence[int],
    tally: Tally,
    *,
    configs: Mapping[int, ConfigRecord],
    uniform: bool,
    deadline_s: float,
) -> ExactMean:
    """The same, where the grid does the adding.

    Every node gets the content of ``instruction``; those in ``configs`` with settings of their own.
    """
    folded = grid.fold(
        instruction.content, nodes, configs=configs, uniform=uniform, deadline_s=deadline_s
    )
    for code, reason in folded.failures:
        tally.failure(code, reason)
    sent = payload_bytes(instruction)  # as many bytes as an update: one array of one layout
    for num_examples, metrics in folded.taken:
        tally.count(num_examples, metrics)
        tally.bytes_up += sent
    return folded.mean


def carry(mean: Vector, weight: int, instruction: Message) -> Message:
    """A mean of updates that weigh so much together, as the one reply to what was asked.

    A strategy that looks at the mean alone cannot tell it from the updates that it is the mean of.
    """
    return Message(update_content(Update(mean, weight, {})), reply_to=instruction)


def aggregated(arrays: ArrayRecord, layout: Layout, number: int) -> Vector:
    """What a strategy made of a round's updates, as weights that can be sent.

    Raises:
        RoundFailed: they are no weights.
    """
    try:
        # FedMedian and others compute in float64.
        weights = arrays[MODEL].numpy().astype(np.float32, copy=False)
        return check_weights(weights, layout, where="aggregate")
    except InvalidUpdate as error:
        raise RoundFailed(
            f"round {number}: {error} The global model is that of round {number - 1}; lower the "
            "strategy's learning rate."
        ) from None


def failure_of(reply: Message) -> tuple[int, str]:
    """The code of a reply with an error, and why, in its client's own words: a line of them."""
    code, reason = reply.error.code, reply.error.reason
    said = foreign(reason, _MAX_REASON) if isinstance(reason, str) else ""
    return code, said or f"error {code}"


def payload_bytes(message: Message) -> int:
    """Bytes of the arrays in a message."""
    return sum(
        size_of(array)
        for record in message.content.values()
        if isinstance(record, ArrayRecord)
        for array in record.values()
    )
