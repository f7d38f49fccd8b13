"""What every way of aggregating a round's updates has in common.

An `Aggregation` takes in each `WeightedUpdate` on arrival, or sums from elsewhere, and gives the
`Aggregate` that a strategy starts from. Which one a run uses depends on its strategy:

- `server.rounds.aggregation.mean.StreamedMean` for one that needs only the weighted mean;
- `server.rounds.aggregation.bounded_mean.BoundedMean` for the same, where updates are clipped;
- `server.rounds.aggregation.held.HeldUpdates` for one that needs every update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

from flwr.app import Message

from fedcore.errors import ResourceError
from fedcore.updates.replies import Reply
from server.rounds.aggregation.exact_mean import ExactMean


@dataclass(frozen=True)
class WeightedUpdate:
    """An accepted update and its weight in the aggregate."""

    reply: Message
    """The message that it came in."""
    found: Reply
    """Its checked content; its arrays may be in files."""
    weight: int
    """A positive integer: 1 where all updates weigh the same, else a number of examples."""

    @property
    def node(self) -> int:
        """The node that sent it."""
        return self.reply.metadata.src_node_id

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Raises `ResourceError` where the block cannot read the update from its storage."""
        try:
            yield
        except OSError as error:
            raise ResourceError(
                f"update from node {self.node}: cannot read its stored copy "
                f"({error.strerror or error}). The round was not aggregated, and the journal is "
                "intact; repair the disk and continue with --resume."
            ) from error


@dataclass(frozen=True)
class Aggregate:
    """The updates of a round, as the strategy needs them: their mean, or each of them."""

    mean: ExactMean | None
    """Their exact weighted mean; None where the strategy needs each update."""
    updates: Sequence[Message] = ()
    """Every update, in order of node id, where the strategy needs each; else empty."""
    clipped: Sequence[tuple[int, float]] = ()
    """Nodes whose updates exceeded the round's norm bound, with their lengths."""
    median_norm: float | None = None
    """The round's median update length, as `NormBound.measure` defines it."""


class Aggregation(Protocol):
    """Takes in the updates of one round, in any order; the result does not depend on it."""

    def add(self, update: WeightedUpdate) -> None:
        """Takes in one update.

        Raises:
            ResourceError: this machine's disk cannot read it.
        """

    def merge(self, other: Self) -> None:
        """Takes in all that another aggregation of the same kind has taken in."""

    def result(self) -> Aggregate:
        """Returns what the round's updates come to; call it once, after the last update.

        Raises:
            ResourceError: this machine's disk cannot read an update.
        """
