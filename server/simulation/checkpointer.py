"""Keeps checkpoints of a simulation while its rounds go on."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedcore.privacy.ledger import Ledger
from server.process.signals import Asked
from server.records import RoundRecord
from server.report.folder import CHECKPOINT
from server.rounds.checkpointing import Progress
from server.simulation.checkpoint import Checkpoint, Told, write_checkpoint
from server.simulation.virtual.nodes import FIRST_NODE_ID
from server.simulation.virtual.state import SimulationState

FAILED = "failed"
"""Folder of checkpoints from before rounds in which clients failed."""
_EVERY_S = 30.0
_MOST_OF_TIME = 0.05  # spent on writing
_MOST_FAILED = 8  # checkpoints in `FAILED`


@dataclass(frozen=True)
class _Cohort:
    """What was remembered of the clients of a round before it."""

    names: Mapping[int, str]
    """By node."""
    ledgers: Mapping[str, Ledger | None]
    rounds: Mapping[str, int]
    clock_s: float


class FileCheckpointer:
    """Writes a checkpoint now and then, when rounds end, and from before one that fails."""

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        clients: Sequence[str],
        *,
        state: SimulationState,
        told: Sequence[Told],
        stopping: Asked,
        command: str,
        elapsed_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Writes to ``folder``.

        Args:
            folder: The run's.
            identity: What fixes the run.
            clients: Names, in the order of their nodes.
            state: Of the clients; it changes from round to round.
            told: What was told of rounds; it grows from round to round.
            stopping: Whether rounds are to end with the one that is going on.
            command: The command line that runs this, for advice.
            elapsed_s: What rounds took before this process began.
            clock: Gives seconds.
        """
        self._folder = folder
        self._identity = identity
        self._clients = clients
        self._state = state
        self._told = told
        self._stopping = stopping
        self._command = command
        self._clock = clock
        self._began_s = clock() - elapsed_s
        self._due_s = clock()
        self._told_before = len(told)
        self._stop = False
        self._cohort: _Cohort | None = None

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        """Writes a checkpoint where one is due, where rounds are over or are to stop."""
        self._told_before, self._cohort = len(self._told), None
        self._stop = self._stopping()
        if self._stop or progress.over or self._clock() >= self._due_s:
            started_s = self._clock()
            write_checkpoint(self._folder / CHECKPOINT, self._before(progress))
            took_s = self._clock() - started_s
            self._due_s = self._clock() + max(_EVERY_S, took_s / _MOST_OF_TIME)

    def may_continue(self, progress: Progress) -> bool:
        """False where the last commit found that rounds are to stop."""
        return not self._stop

    def cohort(self, kind: str, draw: Callable[[], list[int]]) -> list[int]:
        """What ``draw`` returns: a simulation resumes at the beginning of a round."""
        return draw()

    def begin(self, nodes: Sequence[int]) -> None:
        """Remembers what the round will change; the rest of the clients costs nothing."""
        state = self._state
        names = {node: self._clients[node - FIRST_NODE_ID] for node in nodes}
        self._cohort = _Cohort(
            names,
            {name: state.ledgers.get(name) for name in names.values()},
            {name: state.rounds.get(name, 0) for name in names.values()},
            state.clock_s,
        )

    def accept(self, reply: Message) -> Message:
        """The reply as it is: what a round took is computed again."""
        return reply

    def discard(self, reply: Message) -> bool:
        """Nothing was accepted before."""
        return False

    def advice(self, progress: Progress, reasons: Sequence[str]) -> Sequence[str]:
        """Keeps what the clients of the round were sent; names the command to see one fail."""
        folder, number = self._folder / FAILED, progress.round + 1
        write_checkpoint(folder / f"round-{number}.safetensors", self._before(progress))
        kept = sorted(folder.glob("round-*.safetensors"), key=lambda path: path.stat().st_mtime)
        for path in kept[:-_MOST_FAILED]:
            path.unlink()
        names = self._cohort.names if self._cohort else {}
        starts = {f"client {name!r}:": name for name in names.values()}
        starts |= {f"update from node {node}:": name for node, name in names.items()}
        named = (starts[start] for start in starts if reasons[0].startswith(start))
        asked = f"{number}:{next(named, 'CLIENT')}"
        return [f"`{self._command} --replay {shlex.quote(asked)}` shows how."]

    def fail(self, progress: Progress) -> None:
        """Writes what was before the round."""
        write_checkpoint(self._folder / CHECKPOINT, self._before(progress))

    def _before(self, progress: Progress) -> Checkpoint:
        """The state of things when ``progress`` was made."""
        state, cohort = self._state, self._cohort
        if cohort is not None:
            ledgers, rounds = dict(state.ledgers), Counter(state.rounds)
            for name, ledger in cohort.ledgers.items():
                ledgers.pop(name, None)
                if ledger is not None:
                    ledgers[name] = ledger
            rounds.update({name: cohort.rounds[name] - rounds[name] for name in cohort.rounds})
            state = SimulationState(ledgers, +rounds, cohort.clock_s, state.choice)
        elapsed_s = self._clock() - self._began_s
        told = self._told[: self._told_before]
        return Checkpoint(self._identity, progress, told, state, elapsed_s)
