"""Incoming replies of clients: check, count and persist each.

`accepted` turns a stream of replies into the accepted ones and counts all of them in a `Tally`.
`collect` passes the updates among them to an `Aggregation`.
"""

from __future__ import annotations

import math
from collections import deque
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
    FROZEN,
    MODEL,
    REFUSED,
    TRAIN_LOSS,
    UNCLIPPED,
    Update,
    check_weights,
    error_kind,
    update_content,
)
from fedcore.updates.pack import Layout, Vector
from fedcore.updates.pieces import size_of
from fedcore.updates.replies import Reply, ReplySpec, read_reply
from server.rounds.aggregation.interface import Aggregate, Aggregation, WeightedUpdate
from server.rounds.aggregation.mean import StreamedMean
from server.rounds.checkpointing.checkpointer import NoCheckpoints, RoundCheckpointer
from server.rounds.peers import NumberedPeers, Peers

_MAX_REASON = 1900  # characters of a client's error that are shown


@dataclass(frozen=True)
class Folded:
    """Updates that a grid has added up where they were computed."""

    total: StreamedMean
    updates: Sequence[tuple[int, Mapping[str, float]]]
    """Number of examples and metrics of each accepted update, in the order of the cohort."""
    failures: Sequence[tuple[int, str]]
    """Error codes and reasons of clients that failed or declined."""


@runtime_checkable
class FoldingGrid(Protocol):
    """Grid that can add updates up where they are computed, as the grid of a simulation does."""

    def fold(
        self,
        content: RecordDict,
        nodes: Sequence[int],
        *,
        configs: Mapping[int, ConfigRecord],
        uniform: bool,
        deadline_s: float,
    ) -> Folded:
        """Trains ``nodes`` on one content and returns the sum of their updates.

        ``configs`` contains the configuration of nodes whose settings differ from the content's.
        """


@dataclass
class Tally:
    """Counts and statistics of one round's replies."""

    selected: int
    updates: int = 0
    declined: int = 0
    failed: int = 0
    examples: int = 0
    losses: list[tuple[float, int]] = field(default_factory=list)
    """Training loss and number of examples of each update that reports a loss."""
    epsilon_max: float | None = None
    bytes_up: int = 0
    unclipped: int = 0
    """Number of updates that were within an adaptive bound before clipping."""
    clipped: list[tuple[int, float]] = field(default_factory=list)
    """Nodes whose updates exceeded the round's norm bound, with their lengths."""
    median_norm: float | None = None
    """The round's median update length, as `NormBound.measure` defines it."""
    reasons: list[str] = field(default_factory=list)
    """Failure reasons of clients."""
    spent: str = ""
    """Reason of the last client that declined."""
    spent_nodes: set[int] = field(default_factory=set)
    """Nodes that declined, where the grid identifies them."""
    owners: int = 0
    """Number of clients that declined because the budget set by their owner is spent."""

    kinds: set[type[FedcoreError]] = field(default_factory=set)
    """Types of the errors of clients that failed."""
    over: bool = False
    """Whether too many budgets are spent for another round."""

    @property
    def all_declined(self) -> bool:
        """Whether every client that was asked declined."""
        return 0 < self.declined == self.selected

    def refuse(self, reason: str, *, kind: type[FedcoreError] = RoundFailed) -> None:
        """Counts a client that failed, or whose update was rejected."""
        self.failed += 1
        self.reasons.append(reason)
        self.kinds.add(kind)

    def count(self, num_examples: int, metrics: Mapping[str, float]) -> None:
        """Counts an accepted update."""
        self.updates += 1
        self.examples += num_examples
        if TRAIN_LOSS in metrics:
            self.losses.append((metrics[TRAIN_LOSS], num_examples))
        if EPSILON in metrics:
            self.epsilon_max = max(self.epsilon_max or 0.0, metrics[EPSILON])
        self.unclipped += metrics.get(UNCLIPPED) == 1.0

    @property
    def train_loss(self) -> float | None:
        """Mean training loss over the examples of clients that report it; None without any.

        Does not depend on the order of arrival.
        """
        if not self.losses:
            return None
        total = math.fsum(loss * count for loss, count in self.losses)
        return total / sum(count for _, count in self.losses)

    def bounded(self, aggregate: Aggregate) -> None:
        """Takes over what the round's norm bound has done."""
        self.clipped.extend(aggregate.clipped)
        self.median_norm = aggregate.median_norm

    def failure(self, code: int, reason: str) -> None:
        """Counts a client that replied with an error: declined or failed, by its code."""
        if code in DECLINES:
            self.declined += 1
            self.spent = reason
            self.owners += code == DECLINED_BY_OWNER
        else:
            self.refuse(reason, kind=error_kind(code))


@dataclass(frozen=True)
class Intake:
    """Checks for the replies to one request, and the objects that persist or report them."""

    spec: ReplySpec
    checkpointer: RoundCheckpointer = field(default_factory=NoCheckpoints)
    peers: Peers = field(default_factory=NumberedPeers)
    base: Vector | None = None
    """The weights that were sent, where the distance to them must be measured; else None."""
    bound: Bound | None = None
    """Bound of client-level privacy on each update; None where the run does not use it."""
    on_note: Callable[[str], None] = lambda text: None
    weights: Mapping[int, int] | None = None
    """Weights of the replies, in examples, by node; None where each weighs what it reports."""
    budgets: bool = True
    """Whether clients have privacy budgets; where they have none, a client that declines has
    failed."""

    def where(self, reply: Message) -> str:
        """Returns the prefix of error messages about a reply: its kind and its client."""
        return f"{_WHAT[self.spec.purpose]} {self.peers.name(reply.metadata.src_node_id)}"

    def read(self, reply: Message) -> Reply:
        """Returns the checked content of a reply, with the number of examples that it weighs.

        Raises:
            InvalidUpdate: it is not a valid answer to the request.
        """
        where = self.where(reply)
        found = read_reply(reply, self.spec, where=where, base=self.base)
        if self.bound is not None:
            self.bound.check(found.parts(), found.metrics, where=where)
        if self.weights is None:
            return found
        return replace(found, num_examples=self.weights[reply.metadata.src_node_id])


_WHAT = {MessageType.TRAIN: "update from", MessageType.EVALUATE: "metrics from"}


def accepted(
    batches: Iterable[Sequence[Message]], intake: Intake, tally: Tally, *, first: int
) -> Iterator[tuple[Message, Reply]]:
    """Yields replies that pass every check, each persisted first, in order of arrival.

    The replies of a batch are persisted together. A rejected reply is counted and reported with its
    client's name, and has no other effect. After ``first`` accepted replies, no other is waited
    for. No reference to a reply is kept here.
    """
    count = 0
    for batch in batches:
        ready = _checked(batch, intake, tally, limit=first - count)
        del batch
        count += len(ready)
        kept = deque(intake.checkpointer.accept([reply for reply, _ in ready]))
        founds = deque(found for _, found in ready)
        del ready
        while kept:
            yield _as_kept(kept.popleft(), founds.popleft())
        if count == first:
            return


def _checked(
    batch: Sequence[Message], intake: Intake, tally: Tally, *, limit: int
) -> list[tuple[Message, Reply]]:
    """Returns a batch's first ``limit`` replies that pass every check, and counts those that fail.

    Replies after these are ignored.
    """
    ready: list[tuple[Message, Reply]] = []
    for reply in batch:
        if len(ready) == limit:
            break
        if reply.has_error():
            code, reason = failure_of(reply)
            if code in DECLINES and not intake.budgets:
                code = REFUSED
            node = reply.metadata.src_node_id
            tally.failure(code, intake.peers.failure_text(node, reason))
            if code in DECLINES:
                tally.spent_nodes.add(node)
            continue
        try:
            found = intake.read(reply)
            tally.bytes_up += payload_bytes(reply)
        except InvalidUpdate as error:
            _refuse(reply, intake, tally, str(error))
            continue
        ready.append((reply, found))
    return ready


def _as_kept(kept: Message, found: Reply) -> tuple[Message, Reply]:
    """Returns a reply as it was persisted, and its checked content with the persisted arrays."""
    if not found.arrays:
        return kept, found
    arrays = kept.content[ARRAYS]
    return kept, replace(found, arrays={name: arrays[name] for name in found.arrays})  # type: ignore[misc]


def _refuse(reply: Message, intake: Intake, tally: Tally, reason: str) -> None:
    if intake.checkpointer.discard(reply):
        intake.on_note(
            f"Dropped from the journal, where an earlier process had stored it: {reason}"
        )
    intake.peers.rejected(reply.metadata.src_node_id, reason)
    tally.refuse(reason)


def collect(
    updates: Iterable[tuple[Message, Reply]],
    aggregation: Aggregation,
    tally: Tally,
    *,
    uniform: bool,
) -> None:
    """Gives accepted updates their weight, and adds each to ``aggregation`` on arrival.

    ``uniform`` gives all the same weight.
    """
    for reply, found in updates:
        weight = 1 if uniform else found.num_examples
        aggregation.add(WeightedUpdate(reply, found, weight))
        tally.count(found.num_examples, found.metrics)
        del reply, found  # or this frame would keep it while the next one is read


def collect_in_place(
    grid: FoldingGrid,
    instruction: Message,
    nodes: Sequence[int],
    aggregation: StreamedMean,
    tally: Tally,
    *,
    configs: Mapping[int, ConfigRecord],
    uniform: bool,
    deadline_s: float,
) -> None:
    """Trains ``nodes`` with updates added up by the grid; takes in their sum, counts the replies.

    Every node gets the content of ``instruction``; nodes in ``configs`` get their own
    configuration.
    """
    folded = grid.fold(
        instruction.content, nodes, configs=configs, uniform=uniform, deadline_s=deadline_s
    )
    for code, reason in folded.failures:
        tally.failure(code, reason)
    sent = payload_bytes(instruction)  # an update has the same layout, so the same size
    for num_examples, metrics in folded.updates:
        tally.count(num_examples, metrics)
        tally.bytes_up += sent
    aggregation.merge(folded.total)


def mean_as_reply(mean: Vector, weight: int, instruction: Message) -> Message:
    """Returns a mean of updates with their total weight, as a single reply to ``instruction``.

    A strategy that uses only the mean computes the same result from it as from the updates.
    """
    return Message(update_content(Update(mean, weight, {})), reply_to=instruction)


def aggregated(arrays: ArrayRecord, layout: Layout, number: int) -> Vector:
    """Returns the weights in a strategy's aggregate, as float32.

    Raises:
        RoundFailed: they have another shape, or a value that is not finite.
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
    """Returns the code of an error reply, and the client's reason as one printable line."""
    code, reason = reply.error.code, reply.error.reason
    said = foreign(reason, _MAX_REASON) if isinstance(reason, str) else ""
    return code, said or f"error {code}"


def payload_bytes(message: Message) -> int:
    """Returns the bytes of a message's arrays, except frozen parameters, which travel once."""
    return sum(
        size_of(array)
        for name, record in message.content.items()
        if isinstance(record, ArrayRecord) and name != FROZEN
        for array in record.values()
    )
