"""Rounds over devices that survive a restart: a checkpointer and a grid on top of the journal.

`JournalCheckpointer` records cohorts, replies and commits. `JournalGrid` sends messages only to
nodes whose reply is not in the journal yet, and waits for devices that disconnect.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from flwr.app import Error, Message, MessageType
from flwr.serverapp import Grid

from fedcore.errors import RoundFailed
from fedcore.flower.fleet_grid import GRACE_S, FleetGrid
from fedcore.flower.grid import ForwardingGrid, reply_batches
from fedcore.observability.patience import Reminder
from fedcore.updates.messages import DECLINES, REFUSED
from server.live.journal.journal import Journal
from server.live.rounds.waiting import Awaited, OnWait, elapsed_text, names_text
from server.records import RoundRecord
from server.rounds.checkpointing.progress import Progress
from server.rounds.cohort import Cohort, Draw

REJOIN_S = 40.0
"""Seconds after a restart during which the server waits for devices that it asked before. They
try to reconnect at least every 30 s."""
_POLL_S = 0.2
Admit = Callable[[Collection[int]], Collection[int]]
"""Registers nodes with the underlying grid, as after a restart they may not have called yet.
Returns those that are still members."""
_ROUNDS = (MessageType.TRAIN, MessageType.EVALUATE)


class JournalCheckpointer:
    """A `RoundCheckpointer` that commits each round to the journal before it reports the round."""

    def __init__(
        self,
        journal: Journal,
        *,
        report: Callable[[RoundRecord], None],
        deadline_s: float,
        evaluated: int = 0,
        judges: Callable[[], int] | None = None,
        rejoin_s: float = 0.0,
        grace_s: float = REJOIN_S,
        missing: Callable[[str], Sequence[str]] = lambda kind: (),
        on_wait: OnWait = lambda text: None,
        on_note: OnWait = lambda text: None,
    ) -> None:
        """Continues from the last commit of ``journal``.

        Args:
            journal: The run's journal.
            report: Called with the record of each round once the round is committed.
            deadline_s: Seconds that a round waits for enough devices before it fails.
            evaluated: Wanted number of devices to evaluate; at most the number that trained.
            judges: Returns how many devices only evaluate, which bounds that number instead; None
                where all devices do both.
            rejoin_s: Seconds from now on during which a draw waits for the wanted number. Later
                draws wait for `GRACE_S`. After that it uses the devices that are connected.
            grace_s: Seconds that a round waits for its whole cohort, before it begins with the
                devices that are connected, at least the quorum.
            missing: Returns the names of devices that could be selected for messages of a kind,
                and are not connected.
            on_wait: Called from time to time while a round waits for devices.
            on_note: Called when a round begins with fewer devices than the one before.
        """
        self._journal = journal
        self._report = report
        self._on_wait = on_wait
        self._deadline_s = deadline_s
        self._evaluated = evaluated
        self._judges = judges
        self._rejoin_until = time.monotonic() + rejoin_s
        self._grace_s = grace_s
        self._missing = missing
        self._on_note = on_note
        self._accepted: dict[str, int] = {}
        """Size of the last cohort of each kind if it was short: the next need not wait for more."""

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        """Commits a round to the journal, reports it, and then deletes its updates' files.

        Deleting 40 MB takes some milliseconds of a core, which the report does not wait for.
        """
        self._journal.commit(progress, record)
        if record is not None:
            self._report(record)
        self._journal.sweep()

    def wait_if_paused(self, progress: Progress) -> None:
        """Does nothing: the journal never pauses a run."""

    def stops_after(self, progress: Progress) -> bool:
        """Returns False: the journal never stops a run."""
        return False

    def cohort(self, kind: str, draw: Draw) -> Cohort:
        """Returns the current round's cohort: the recorded one, or else a draw, which it records.

        Raises:
            RoundFailed: too few devices were connected until the deadline.
        """
        known = self._journal.selected_cohort(kind)
        if known is not None:
            return known
        wanted = self._wanted() if kind == MessageType.EVALUATE else 0
        cohort = self._draw_enough(kind, draw, wanted)
        self._journal.record_cohort(kind, cohort)
        return cohort

    def _wanted(self) -> int:
        """Returns how many devices should evaluate."""
        if self._judges is not None:
            return min(self._evaluated, self._judges())
        trained = self._journal.selected_cohort(MessageType.TRAIN)
        return min(self._evaluated, len(trained.nodes) if trained is not None else 0)

    def begin(self, nodes: Sequence[int]) -> None:
        """Does nothing: `cohort` has recorded the nodes already."""

    def accept(self, replies: Sequence[Message]) -> Sequence[Message]:
        """Writes replies to the journal; returns them with large arrays in the journal's files."""
        return self._journal.accept(*replies)

    def discard(self, reply: Message) -> bool:
        """Drops a reply from the journal; returns whether it was recorded there."""
        metadata = reply.metadata
        return self._journal.discard(metadata.message_type, metadata.src_node_id)

    def advice(self, progress: Progress, reasons: Sequence[str]) -> Sequence[str]:
        """Returns no advice: the reasons are in each device's own log."""
        return ()

    def fail(self, progress: Progress) -> None:
        """Does nothing: earlier rounds and accepted replies stay in the journal."""

    def _draw_enough(self, kind: str, draw: Draw, wanted: int) -> Cohort:
        """Repeats ``draw`` until it returns ``wanted`` nodes, or the time to rejoin has passed.

        ``draw`` raises `RoundFailed` while there are too few devices; at the deadline that error
        is raised. A short cohort is accepted as soon as no further device is expected, and at the
        deadline.
        """
        began, reminder = time.monotonic(), Reminder()
        end = began + self._deadline_s
        until = min(end, max(began + GRACE_S, self._rejoin_until))
        while True:
            try:
                cohort = draw()
                size, known = len(cohort.nodes), self._accepted.get(kind, wanted)
                if size >= min(wanted, known) or time.monotonic() >= until:
                    self._accepted.pop(kind, None)
                    if size < wanted:  # the next draw does not wait again for who is away
                        self._accepted[kind] = size
                    return cohort
                time.sleep(_POLL_S)
            except RoundFailed as error:
                why, missing = str(error).partition(". ")[0], self._missing(kind)
                named = f" Missing: {names_text(missing)}." if missing else ""
                patient = min(end, max(began + self._grace_s, self._rejoin_until))
                short = self._short(kind, draw, final=not missing or time.monotonic() >= patient)
                if short is not None:
                    self._tell_short(kind, short, why, named)
                    return short
                if time.monotonic() > end:
                    raise
                if (lasted_s := reminder.due()) is not None:
                    self._on_wait(f"{why}: {elapsed_text(lasted_s, end)}.{named}")
                time.sleep(_POLL_S)

    def _short(self, kind: str, draw: Draw, *, final: bool) -> Cohort | None:
        """Returns a short cohort that a round may begin with now; None where it should wait.

        With ``final``, no further device is expected.
        """
        try:
            cohort = draw(short=True)
        except RoundFailed:
            return None
        known = kind in self._accepted and len(cohort.nodes) >= self._accepted[kind]
        return cohort if final or known else None

    def _tell_short(self, kind: str, cohort: Cohort, why: str, named: str) -> None:
        """Notes that a round begins with a short cohort, unless the one before had as many."""
        size, before = len(cohort.nodes), self._accepted.get(kind)
        self._accepted[kind] = size
        if before != size:
            self._on_note(
                f"{why}. It begins with {size}, enough for the quorum, and so do the rounds that "
                f"follow until more connect.{named}"
            )


class JournalGrid(ForwardingGrid):
    """A Flower `Grid` that answers from the journal, and sends only messages without a reply there.

    A device that disconnects is asked again when it reconnects, for as long as the round waits for
    it: until the quorum has answered, and, after a restart of the server, until devices have had
    the time to reconnect.
    """

    def __init__(
        self,
        grid: Grid,
        journal: Journal,
        *,
        admit: Admit,
        quorum: float,
        rejoin_s: float = 0.0,
        on_missing: Callable[[], None] = lambda: None,
        on_wait: OnWait = lambda text: None,
        on_note: OnWait = lambda text: None,
        name: Callable[[int], str] = str,
    ) -> None:
        """Creates a grid for the run of ``journal``.

        Args:
            grid: The underlying grid, which reaches the devices.
            journal: Stores the replies of rounds.
            admit: Called with the nodes of a round before they are sent messages.
            quorum: Share of a cohort whose updates a round needs, from 0 to 1.
            rejoin_s: Seconds from now on during which a round waits for devices not seen yet.
            on_missing: Called at each check for disconnected devices; an exception from it ends the
                round.
            on_wait: Called from time to time with a line on the devices that a round waits for.
            on_note: Called when a round ends without nodes that it had asked.
            name: Returns a node's name for that line.
        """
        super().__init__(grid)
        self._journal = journal
        self._admit = admit
        self._quorum = quorum
        self._on_missing = on_missing
        self._rejoin_until = time.monotonic() + rejoin_s
        self._seen: set[int] = set()
        self._on_wait = on_wait
        self._on_note = on_note
        self._name = name
        self._awaited: Awaited | None = None
        if isinstance(grid, FleetGrid):
            grid.on_wait = self._remind

    def get_node_ids(self) -> Iterable[int]:
        """Returns the connected nodes, sorted."""
        connected = set(self._grid.get_node_ids())
        self._seen |= connected
        return sorted(connected)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Yields the replies in the journal, then the others as they arrive.

        See `send_and_receive_batches`.
        """
        for batch in self.send_and_receive_batches(list(messages), timeout=timeout):
            yield from batch

    def send_and_receive_batches(
        self, messages: Sequence[Message], *, timeout: float | None
    ) -> Iterator[Sequence[Message]]:
        """Yields the replies in the journal, then the others as they arrive, in batches.

        The caller must verify each reply and have the checkpointer accept or discard it before it
        takes the next batch. If it discards a reply from the journal, the node is asked again.
        ``timeout`` is in seconds. Messages of other types than train and evaluate go to the
        underlying grid, and are not recorded.
        """
        end = time.monotonic() + timeout if timeout is not None else float("inf")
        waiting = {message.metadata.dst_node_id: message for message in messages}
        kinds = {message.metadata.message_type for message in waiting.values()}
        self._awaited = None
        if not kinds <= {*_ROUNDS}:
            yield from reply_batches(self._grid, [*waiting.values()], timeout=timeout)
            return
        assert len(kinds) <= 1, "a round sends the same request to all"
        kind = next(iter(kinds), MessageType.TRAIN)
        expected, accepted_total = len(waiting), 0
        for node in list(waiting):
            kept = self._journal.reply(waiting[node])
            if kept is not None:
                yield [kept]
                del kept
                if self._journal.holds(kind, node):
                    del waiting[node]
                    accepted_total += 1
        members = self._admit(waiting)
        waiting = {node: message for node, message in waiting.items() if node in members}
        selected = accepted_total + len(waiting)
        self._awaited = Awaited(self._journal.round + 1, kind, selected, waiting.keys(), end)
        while waiting:
            left_s = end - time.monotonic() if timeout is not None else None
            for batch in reply_batches(self._grid, [*waiting.values()], timeout=left_s):
                nodes = [reply.metadata.src_node_id for reply in batch]
                for node in nodes:
                    del waiting[node]
                yield [_without_code(reply) if reply.has_error() else reply for reply in batch]
                del batch  # free it: the next one is read while this frame is suspended
                accepted = sum(self._journal.holds(kind, node) for node in nodes)
                accepted_total += accepted
                # The others declined, failed or were rejected: they are asked again only after a
                # restart.
                expected -= len(nodes) - accepted
            if not self._wait_for_rejoin(
                waiting, end, enough=accepted_total >= self._quorum * expected
            ):
                self._tell_lost(kind, waiting, late=time.monotonic() >= end)
                return
            for node, message in waiting.items():  # a grid sends the same message only once
                waiting[node] = Message(message.content, node, message.metadata.message_type)

    def _wait_for_rejoin(self, waiting: Iterable[int], end: float, *, enough: bool) -> bool:
        """Waits until a disconnected node is back; returns False if the round ends without it."""
        missing = set(waiting)
        while missing and time.monotonic() < end:
            connected = missing & set(self.get_node_ids())
            if connected:
                return True
            if enough and (not missing - self._seen or time.monotonic() >= self._rejoin_until):
                return False
            self._on_missing()
            self._remind()
            time.sleep(_POLL_S)
        return False

    def _tell_lost(self, kind: str, waiting: Iterable[int], *, late: bool) -> None:
        """Notes the nodes that a round goes on without: lost, or ``late`` at its deadline."""
        lost = [self._name(node) for node in sorted(waiting)]
        why = "the connection ended before a reply came"
        if late:
            why = "no reply came by federation.deadline_s"
        if lost:
            self._on_note(
                f"round {self._journal.round + 1} ({kind}) goes on without {names_text(lost)}: "
                f"{why}. Look whether the process still runs: a task may hang or have ended it, "
                "and the device's own log says more."
            )

    def _remind(self) -> None:
        if self._awaited is not None:
            connected = self._grid.get_node_ids
            self._awaited.remind(self._on_wait, name=self._name, connected=lambda: set(connected()))


def _without_code(reply: Message) -> Message:
    """Replaces the error code that a device reports, so that no device can fake a server's error.

    Keeps the codes by which a device declines because its privacy budget is spent.
    """
    if reply.error.code in DECLINES:
        return reply
    reply.error = Error(REFUSED, reply.error.reason)
    return reply
