"""`FileCheckpointer`: writes checkpoints of a simulation while its rounds run."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Message

from fedcore.privacy.ledger import Ledger
from server.process.signals import StopRequested
from server.records import RoundRecord
from server.report.folder import CHECKPOINT
from server.rounds.checkpointing.progress import Progress
from server.rounds.cohort import Cohort, Draw
from server.simulation.checkpoint import Checkpoint, StoredEvent, write_checkpoint
from server.simulation.virtual.nodes import FIRST_NODE_ID
from server.simulation.virtual.state import SimulationState

FAILED = "failed"
"""Folder for checkpoints from before rounds in which clients failed."""
_EVERY_S = 30.0
_MAX_TIME_SHARE = 0.05  # largest share of time spent on writing
_MAX_FAILED = 8  # checkpoints in `FAILED`


@dataclass(frozen=True)
class _Cohort:
    """Client state from before a round, for the clients that the round asks."""

    names: Mapping[int, str]
    """Clients' names, by node."""
    ledgers: Mapping[str, Ledger | None]
    rounds: Mapping[str, int]
    locals: Mapping[str, bytes | None]
    clock_s: float


class FileCheckpointer:
    """Writes a checkpoint at intervals when rounds end, at the end, and before a failed round."""

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        clients: Sequence[str],
        *,
        state: SimulationState,
        events: Sequence[StoredEvent],
        stopping: StopRequested,
        command: str,
        elapsed_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Creates a checkpointer that writes to ``folder``.

        Args:
            folder: Folder of the run.
            identity: Identity of the run, see `server.rounds.checkpointing.run_identity`.
            clients: Names, in the order of their nodes.
            state: State of the clients; read at each commit, as rounds change it.
            events: Events that rounds emitted; read at each commit, as rounds append to it.
            stopping: Whether the run should stop after the current round.
            command: Command line of this run, for advice.
            elapsed_s: Duration of the rounds before this process started.
            clock: Returns seconds.
        """
        self._folder = folder
        self._identity = identity
        self._clients = clients
        self._state = state
        self._events = events
        self._stopping = stopping
        self._command = command
        self._clock = clock
        self._began_s = clock() - elapsed_s
        self._due_s = clock()
        self._events_before = len(events)
        self._stop = False
        self._cohort: _Cohort | None = None

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        """Writes a checkpoint if one is due, if the run has ended, or if it should stop."""
        self._events_before, self._cohort = len(self._events), None
        self._stop = self._stopping()
        if self._stop or progress.over or self._clock() >= self._due_s:
            started_s = self._clock()
            write_checkpoint(self._folder / CHECKPOINT, self._before(progress))
            took_s = self._clock() - started_s
            self._due_s = self._clock() + max(_EVERY_S, took_s / _MAX_TIME_SHARE)

    def wait_if_paused(self, progress: Progress) -> None:
        """Does nothing: nobody pauses a simulation."""

    def stops_after(self, progress: Progress) -> bool:
        """Returns whether the run was asked to stop before the last commit."""
        return self._stop

    def cohort(self, kind: str, draw: Draw) -> Cohort:
        """Draws a new cohort: a simulation resumes at the start of a round."""
        return draw()

    def begin(self, nodes: Sequence[int]) -> None:
        """Saves the state of the round's clients, which the round changes.

        Other clients' state is not copied.
        """
        state = self._state
        names = {node: self._clients[node - FIRST_NODE_ID] for node in nodes}
        self._cohort = _Cohort(
            names,
            {name: state.ledgers.get(name) for name in names.values()},
            {name: state.rounds.get(name, 0) for name in names.values()},
            {name: state.locals.get(name) for name in names.values()},
            state.clock_s,
        )

    def accept(self, replies: Sequence[Message]) -> Sequence[Message]:
        """Returns the replies unchanged: a resumed round computes them again."""
        return replies

    def discard(self, reply: Message) -> bool:
        """Returns False: no earlier process has accepted a reply."""
        return False

    def advice(self, progress: Progress, reasons: Sequence[str]) -> Sequence[str]:
        """Saves a checkpoint from before the round; returns advice to replay a failed client."""
        folder, number = self._folder / FAILED, progress.round + 1
        write_checkpoint(folder / f"round-{number}.safetensors", self._before(progress))
        kept = sorted(folder.glob("round-*.safetensors"), key=lambda path: path.stat().st_mtime)
        for path in kept[:-_MAX_FAILED]:
            path.unlink()
        names = self._cohort.names if self._cohort else {}
        starts = {f"client {name!r}:": name for name in names.values()}
        starts |= {f"update from node {node}:": name for node, name in names.items()}
        named = (starts[start] for start in starts if reasons[0].startswith(start))
        asked = f"{number}:{next(named, 'CLIENT')}"
        return [f"`{self._command} --replay {shlex.quote(asked)}` shows the full error."]

    def fail(self, progress: Progress) -> None:
        """Writes a checkpoint from before the failed round."""
        write_checkpoint(self._folder / CHECKPOINT, self._before(progress))

    def _before(self, progress: Progress) -> Checkpoint:
        """Returns the checkpoint for ``progress``, without the changes of the round under way."""
        state, cohort = self._state, self._cohort
        if cohort is not None:
            rounds = Counter(state.rounds)
            ledgers = _restored(state.ledgers, cohort.ledgers)
            layers = _restored(state.locals, cohort.locals)
            rounds.update({name: cohort.rounds[name] - rounds[name] for name in cohort.rounds})
            state = SimulationState(ledgers, +rounds, cohort.clock_s, state.choice, locals=layers)
        elapsed_s = self._clock() - self._began_s
        events = self._events[: self._events_before]
        return Checkpoint(self._identity, progress, events, state, elapsed_s)


_Value = TypeVar("_Value")


def _restored(now: Mapping[str, _Value], before: Mapping[str, _Value | None]) -> dict[str, _Value]:
    """Returns ``now`` with the values of ``before``; None removes one."""
    after = {name: value for name, value in now.items() if name not in before}
    return after | {name: value for name, value in before.items() if value is not None}
