"""Rounds over devices, kept in a journal as they go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from flwr.app import Error, Message, MessageType
from flwr.serverapp import Grid

from fedcore.errors import RoundFailed
from fedcore.flower.fleet_grid import GRACE_S, FleetGrid
from fedcore.flower.grid import OwnGrid
from fedcore.observability.patience import Reminder
from fedcore.updates.messages import DECLINES, REFUSED
from server.live.journal.journal import Journal
from server.live.network.members import weigh
from server.live.rounds.waiting import Awaited, Tell, so_far
from server.records import RoundRecord
from server.rounds.checkpointing import Progress

REJOIN_S = 40.0
"""How long after its own restart a server waits for devices that it asked before: they look for it
every 30 s at least."""
_LOOK_S = 0.2
Admit = Callable[[Collection[int]], Collection[int]]
"""Has the grid behind know nodes, which after a restart have not called yet; those who are no
members any more are left out of what it gives back."""
Weights = Callable[[Sequence[int]], Sequence[int]]
"""What a reply of each node would weigh, in examples, as the list of members is now."""
_ROUNDS = (MessageType.TRAIN, MessageType.EVALUATE)


class JournalCheckpointer:
    """Commits each round to the journal before anyone is told of it."""

    def __init__(
        self,
        journal: Journal,
        *,
        report: Callable[[RoundRecord], None],
        deadline_s: float,
        weights: Weights,
        evaluated: int = 0,
        rejoin_s: float = 0.0,
        waits: Tell = lambda text: None,
    ) -> None:
        """Goes on where ``journal`` ends.

        Args:
            journal: Of the run.
            report: Called with each round once it is committed.
            deadline_s: How long a round that lacks devices waits before it fails.
            weights: What those asked weigh; noted down with them.
            evaluated: How many a round asks to evaluate; as many as trained, where those are fewer.
            rejoin_s: How long from now on they are waited for; `GRACE_S` at any other time. Then
                whoever is there is asked.
            waits: Told now and then of a round that lacks devices.
        """
        self._journal = journal
        self._report = report
        self._waits = waits
        self._deadline_s = deadline_s
        self._weights = weights
        self._evaluated = evaluated
        self._rejoin_until = time.monotonic() + rejoin_s

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        """Writes it to the journal, and only then reports the round."""
        self._journal.commit(progress, record)
        if record is not None:
            self._report(record)

    def may_continue(self, progress: Progress) -> bool:
        """Always."""
        return True

    def cohort(self, kind: str, draw: Callable[[], list[int]]) -> list[int]:
        """Whom the round asked before it was interrupted; else whom ``draw`` names, noted down.

        Raises:
            RoundFailed: there were too few devices until the deadline.
        """
        known = self._journal.asked(kind)
        # An empty list is a draw of nobody; to evaluate, servers kept one that asked for no more.
        if known or (known is not None and kind == MessageType.TRAIN):
            return known
        trained = self._journal.asked(MessageType.TRAIN) or ()
        wanted = min(self._evaluated, len(trained)) if kind == MessageType.EVALUATE else 0
        nodes = self._drawn(draw, wanted)
        self._journal.ask(kind, nodes, self._weights(nodes))
        return nodes

    def begin(self, nodes: Sequence[int]) -> None:
        """Nothing: `cohort` has made them durable."""

    def accept(self, reply: Message) -> Message:
        """Writes it to the journal."""
        return self._journal.accept(reply)

    def discard(self, reply: Message) -> bool:
        """Drops it from the journal, where an earlier process had written it."""
        metadata = reply.metadata
        return self._journal.discard(metadata.message_type, metadata.src_node_id)

    def advice(self, progress: Progress, reasons: Sequence[str]) -> Sequence[str]:
        """No advice: each device has its own log."""
        return ()

    def fail(self, progress: Progress) -> None:
        """Nothing: the journal holds what came before, and what was accepted since."""

    def _drawn(self, draw: Callable[[], list[int]], wanted: int) -> list[int]:
        """What ``draw`` gives, once it gives ``wanted`` nodes, or there was time enough for that.

        It raises until it can give any.
        """
        began, reminder = time.monotonic(), Reminder()
        end = began + self._deadline_s
        until = min(end, max(began + GRACE_S, self._rejoin_until))
        while True:
            try:
                nodes = draw()
                if len(nodes) >= wanted or time.monotonic() >= until:
                    return nodes
                time.sleep(_LOOK_S)
            except RoundFailed as error:
                if time.monotonic() > end:
                    raise
                if (lasted_s := reminder.due()) is not None:
                    why, _, _ = str(error).partition(". ")
                    self._waits(f"{why}: {so_far(lasted_s, end)}")
                time.sleep(_LOOK_S)


class JournalGrid(OwnGrid):
    """Sends through the grid behind what the journal has no reply to.

    A device that is gone is asked again when it comes back, as long as the round needs it: until
    enough others have answered, or, after a restart of the server, until it had the time to find
    the server again.
    """

    def __init__(
        self,
        behind: Grid,
        journal: Journal,
        *,
        admit: Admit,
        quorum: float,
        rejoin_s: float = 0.0,
        lacks: Callable[[], None] = lambda: None,
        waits: Tell = lambda text: None,
        name: Callable[[int], str] = str,
    ) -> None:
        """A grid for the run of ``journal``.

        Args:
            behind: Reaches the devices.
            journal: Keeps replies to what rounds ask.
            admit: Asked before nodes are sent anything.
            quorum: The share of a cohort whose updates a round needs.
            rejoin_s: How long from now on devices that were not seen yet are waited for.
            lacks: Called each time that a round looks whether those who are gone are back; what
                it raises ends the round.
            waits: Told now and then whom a round waits for.
            name: What a node is called there.
        """
        super().__init__(behind.run.run_id)
        self._behind = behind
        self._journal = journal
        self._admit = admit
        self._quorum = quorum
        self._lacks = lacks
        self._rejoin_until = time.monotonic() + rejoin_s
        self._seen: set[int] = set()
        self._waits = waits
        self._name = name
        self._awaited: Awaited | None = None
        if isinstance(behind, FleetGrid):
            behind.waits = self._remind

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are there."""
        there = set(self._behind.get_node_ids())
        self._seen |= there
        return sorted(there)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Through the grid behind: what is asked outside rounds is not kept."""
        return self._behind.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Through the grid behind."""
        return self._behind.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Replies that were kept, then the others as they come in.

        The caller checks each and has the checkpointer accept or discard it before asking for the
        next. A kept one that is discarded has its node asked again. ``timeout`` is in seconds.
        """
        end = time.monotonic() + timeout if timeout is not None else float("inf")
        waiting = {message.metadata.dst_node_id: message for message in messages}
        kinds = {message.metadata.message_type for message in waiting.values()}
        self._awaited = None
        if not kinds <= {*_ROUNDS}:
            yield from self._behind.send_and_receive(waiting.values(), timeout=timeout)
            return
        assert len(kinds) <= 1, "a round asks all for the same"
        kind = next(iter(kinds), MessageType.TRAIN)
        weights = self._journal.weights(kind)
        asked, came = len(waiting), 0
        for node in list(waiting):
            kept = self._journal.reply(waiting[node])
            if kept is not None:
                # It was kept by another rule, where the round failed and was selected again since.
                _weigh(kept, node, weights)
                yield kept
                del kept
                if self._journal.holds(kind, node):
                    del waiting[node]
                    came += 1
        members = self._admit(waiting)
        waiting = {node: message for node, message in waiting.items() if node in members}
        all_asked = came + len(waiting)
        self._awaited = Awaited(self._journal.round + 1, kind, all_asked, waiting.keys(), end)
        while waiting:
            left_s = end - time.monotonic() if timeout is not None else None
            for reply in self._behind.send_and_receive(list(waiting.values()), timeout=left_s):
                node = reply.metadata.src_node_id
                del waiting[node]
                if reply.has_error():
                    reply = _of_no_kind(reply)
                else:
                    _weigh(reply, node, weights)
                yield reply
                del reply  # the next one is read while this frame waits
                if self._journal.holds(kind, node):
                    came += 1
                else:  # it declined, failed or was refused: asked again after a restart
                    asked -= 1
            if not self._back(waiting, end, enough=came >= self._quorum * asked):
                return
            for node, message in waiting.items():  # one message is sent once
                waiting[node] = Message(message.content, node, message.metadata.message_type)

    def _back(self, waiting: Iterable[int], end: float, *, enough: bool) -> bool:
        """Waits until one of those who are gone is back; False when the round ends without them."""
        gone = set(waiting)
        while gone and time.monotonic() < end:
            there = gone & set(self.get_node_ids())
            if there:
                return True
            if enough and (not gone - self._seen or time.monotonic() >= self._rejoin_until):
                return False
            self._lacks()
            self._remind()
            time.sleep(_LOOK_S)
        return False

    def _remind(self) -> None:
        if self._awaited is not None:
            there = self._behind.get_node_ids
            self._awaited.remind(self._waits, name=self._name, there=lambda: set(there()))


def _of_no_kind(reply: Message) -> Message:
    """A failure without its kind: what devices report is not what this machine lacks.

    A device declines where its budget is spent; that stays told apart.
    """
    if reply.error.code in DECLINES:
        return reply
    reply.error = Error(REFUSED, reply.error.reason)
    return reply


def _weigh(reply: Message, node: int, weights: Mapping[int, int] | None) -> None:
    """As was noted when the round selected; one that did not note it leaves it to the seal."""
    if weights is not None and node in weights:
        weigh(reply, weights[node])
