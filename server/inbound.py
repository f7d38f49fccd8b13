"""What comes back from clients: checked, counted, and folded or held for the strategy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import Message

from fedcore.errors import FedcoreError, InvalidUpdate, RoundFailed
from fedcore.updates.messages import (
    DECLINED,
    EPSILON,
    TRAIN_LOSS,
    Update,
    read_update,
    refused_as,
    update_content,
)
from fedcore.updates.pack import Layout
from server.aggregation.exact import ExactMean


@dataclass
class Tally:
    """What came back in one round, beside the updates themselves."""

    updates: int = 0
    declined: int = 0
    failed: int = 0
    examples: int = 0
    loss: float = 0.0
    has_loss: bool = False
    epsilon_max: float | None = None
    bytes_up: int = 0
    reasons: list[str] = field(default_factory=list)
    """Why clients failed."""
    spent: str = ""
    """Why the last client that declined did."""

    kinds: set[type[FedcoreError]] = field(default_factory=set)
    """Of what kinds the errors of clients that failed are."""

    def refuse(self, reason: str, *, kind: type[FedcoreError] = RoundFailed) -> None:
        """Counts a client that failed, or whose update cannot be used."""
        self.failed += 1
        self.reasons.append(reason)
        self.kinds.add(kind)

    def count(self, update: Update) -> None:
        """Counts an update that was taken."""
        self.updates += 1
        self.examples += update.num_examples
        if TRAIN_LOSS in update.metrics:
            self.has_loss = True
            self.loss += update.metrics[TRAIN_LOSS] * update.num_examples
        if EPSILON in update.metrics:
            self.epsilon_max = max(self.epsilon_max or 0.0, update.metrics[EPSILON])


def accepted(
    replies: Iterable[Message], layout: Layout, tally: Tally
) -> Iterator[tuple[Message, Update]]:
    """Replies that passed every check, as they arrive."""
    for reply in replies:
        if reply.has_error():
            reason = reply.error.reason or f"error {reply.error.code}"
            if reply.error.code == DECLINED:
                tally.declined += 1
                tally.spent = reason
            else:
                tally.refuse(reason, kind=refused_as(reply.error.code))
            continue
        tally.bytes_up += payload_bytes(reply)
        try:
            update = read_update(reply, layout)
        except InvalidUpdate as error:
            tally.refuse(str(error))
            continue
        yield reply, update


def hold(taken: Iterator[tuple[Message, Update]], tally: Tally, *, uniform: bool) -> list[Message]:
    """Every update of the round, in the order of the cohort.

    Flower refuses a whole round over one metric that not every client sends, so what some do not
    send is left out.
    """
    held = sorted(taken, key=lambda pair: pair[0].metadata.src_node_id)
    common = set.intersection(*(set(update.metrics) for _, update in held)) if held else set()
    for reply, update in held:
        tally.count(update)
        reply.content = update_content(
            Update(
                update.weights,
                1 if uniform else update.num_examples,
                {name: value for name, value in update.metrics.items() if name in common},
            )
        )
    return [reply for reply, _ in held]


def fold(
    taken: Iterator[tuple[Message, Update]], layout: Layout, tally: Tally, *, uniform: bool
) -> list[Message]:
    """All updates as one reply that carries their exact weighted mean.

    A strategy that looks at the mean alone cannot tell it from the updates, and the server holds
    one update at a time.
    """
    mean = ExactMean(layout.size)
    carrier: Message | None = None
    for reply, update in taken:
        try:
            mean.add(update.weights, 1 if uniform else update.num_examples)
        except InvalidUpdate as error:
            tally.refuse(str(error))
            continue
        tally.count(update)
        carrier = carrier or reply
    if carrier is None:
        return []
    carrier.content = update_content(Update(mean.mean(), mean.weight, {}))
    return [carrier]


def check_quorum(tally: Tally, quorum: float, cohort: int, number: int) -> None:
    """Fails a round that too few clients answered; those whose budget is spent do not count.

    Raises:
        RoundFailed: clients failed for different reasons, or were silent.
        FedcoreError: of the kind that every client failed with, where it is one kind.
    """
    asked = cohort - tally.declined
    needed = quorum * asked
    if tally.updates >= needed:
        return
    silent = cohort - tally.updates - tally.declined - tally.failed
    reasons = "; ".join(tally.reasons[:3]) or "no reason was given"
    kind = tally.kinds.pop() if len(tally.kinds) == 1 and not silent else RoundFailed
    raise kind(
        f"round {number}: {tally.updates} of {asked} clients sent an update, and federation.quorum "
        f"= {quorum:g} needs {needed:.3g} ({tally.failed} failed, {silent} silent at the "
        f"deadline). The round was dropped. First: {reasons}"
    )


def payload_bytes(message: Message) -> int:
    """Bytes of the arrays in a message."""
    arrays = message.content.array_records.values()
    return sum(len(array.data) for record in arrays for array in record.values())
