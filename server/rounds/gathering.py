"""Waiting for clients before the first round.

`Waiting.for_cohort` waits for as many as the run asks for, `Waiting.for_all` for all that there
are. Where some clients hold back all of their data, both also wait for those that judge.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Protocol

from flwr.serverapp import Grid

from fedcore.errors import RoundFailed
from fedcore.observability.patience import Reminder
from fedcore.observability.words import counted, seconds_text
from server.rounds.roles import MIN_JUDGES, Roles

_POLL_S = 0.2


class Told(Protocol):
    """Receives what there is to say while the server waits."""

    @property
    def on_note(self) -> Callable[[str], None]:
        """Callback with a note that is kept."""

    @property
    def on_wait(self) -> Callable[[str], None]:
        """Callback with a line of progress."""


@dataclass(frozen=True)
class Waiting:
    """Waits for clients, for at most ``federation.deadline_s``."""

    grid: Grid
    roles: Roles
    deadline_s: float
    listener: Told

    def for_all(self, awaited: Callable[[], int]) -> int:
        """Waits for all awaited nodes or the deadline; returns how many of those connected train.

        Notes where some are missing at the deadline.

        Raises:
            RoundFailed: no node that trains was connected at the deadline, or too few that judge.
        """
        end, noted, reminder = time.monotonic() + self.deadline_s, False, Reminder()
        while (found := count(self.grid.get_node_ids())) < (needed := max(awaited(), 1)):
            if time.monotonic() > end:
                break
            if not noted and needed > 1:
                noted = True
                self.listener.on_note(
                    f"federation.cohort is unset: waiting for all {counted(needed, 'device')} of "
                    "the project, for at most federation.deadline_s = "
                    f"{self.deadline_s:g}."
                )
            self._remind(reminder, "devices", found, needed, end)
            time.sleep(_POLL_S)
        training = self._training
        if not training:
            raise RoundFailed(
                f"start: no client connected within federation.deadline_s = {self.deadline_s:g}"
                f"{' that trains' if found else ''}. Nothing was trained; start the clients, then "
                "start the run again."
            )
        self._require_judges()
        if found < needed:
            self.listener.on_note(
                f"{found} of {counted(needed, 'device')} connected within federation.deadline_s = "
                f"{self.deadline_s:g}: each round selects {training}. To select more, start over "
                "and set federation.cohort."
            )
        return training

    def for_cohort(self, needed: int) -> None:
        """Waits until enough nodes are connected: they connect while the server starts.

        Raises:
            RoundFailed: too few nodes were connected at the deadline.
        """
        end, reminder = time.monotonic() + self.deadline_s, Reminder()
        while (found := self._training) < needed:
            if time.monotonic() > end:
                that_train = " that train" if self._has_judges else ""
                raise RoundFailed(
                    f"start: {counted(found, 'client')}{that_train} connected within "
                    f"federation.deadline_s = {self.deadline_s:g}, "
                    f"and federation.cohort needs {needed}. Nothing was trained; wait for more "
                    "clients, or lower the cohort."
                )
            self._remind(reminder, "devices", found, needed, end)
            time.sleep(_POLL_S)
        while self._has_judges and self._judging < MIN_JUDGES and time.monotonic() <= end:
            self._remind(reminder, "devices that judge", self._judging, MIN_JUDGES, end)
            time.sleep(_POLL_S)
        self._require_judges()

    @property
    def _has_judges(self) -> bool:
        return self.roles.federation.has_judges

    @property
    def _training(self) -> int:
        return len(self.roles.training(self.grid.get_node_ids()))

    @property
    def _judging(self) -> int:
        return len(self.roles.evaluating(self.grid.get_node_ids()))

    def _require_judges(self) -> None:
        if self._has_judges and (judging := self._judging) < MIN_JUDGES:
            raise RoundFailed(
                f"start: {counted(judging, 'client')} that judge connected within "
                f"federation.deadline_s = {self.deadline_s:g}, and federation.holdout_by = "
                f"'clients' needs {MIN_JUDGES}. Nothing was trained; wait for more clients, or "
                "start over with a larger federation.holdout or with holdout_by = 'rows'."
            )

    def _remind(self, reminder: Reminder, what: str, found: int, needed: int, end: float) -> None:
        lasted_s = reminder.due()
        if lasted_s is not None:
            left_s = max(end - time.monotonic(), 0.0)
            self.listener.on_wait(
                f"waiting for {what}, {found} of {needed} connected: {seconds_text(lasted_s)} so "
                f"far, {seconds_text(left_s)} left (federation.deadline_s)"
            )


def count(nodes: Iterable[int]) -> int:
    """Returns how many nodes there are."""
    return len(nodes) if isinstance(nodes, Sized) else sum(1 for _ in nodes)
