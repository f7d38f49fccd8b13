"""Limits on the work for one message: time, steps and memory, checked before and between steps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from fedcore.config.owner import OwnerPolicy
from fedcore.errors import OwnerLimit
from fedcore.observability.words import counted

_STATM = Path("/proc/self/statm")
_LOOK_S = 0.2
"""Minimum seconds between two reads of the process's memory."""


def never() -> str | None:
    """Returns None: no reason to stop."""
    return None


class Bounds:
    """Limits on the work for one message; the clock starts at construction.

    A running step is never interrupted: work ends before the first step that starts past a limit.
    """

    def __init__(
        self,
        *,
        limits_s: dict[str, float] | None = None,
        steps: int | None = None,
        memory_bytes: int | None = None,
        file: str = "owner.toml",
        stopped: Callable[[], str | None] = never,
        clock: Callable[[], float] = time.monotonic,
        resident: Callable[[], int | None] | None = None,
    ) -> None:
        """Starts the clock and records the memory in use.

        Args:
            limits_s: Time limits in seconds, by the name of their source.
            steps: Maximum number of optimiser steps.
            memory_bytes: Maximum growth of this process's memory.
            file: Name of the owner's file, for error messages.
            stopped: Returns the reason to stop now, or None to continue.
            clock: Monotonic time in seconds.
            resident: Returns this process's resident memory in bytes; None where the system doesn't
                report it.
        """
        self._limits_s = dict(limits_s or {})
        self._steps = steps
        self._memory_bytes = memory_bytes
        self._file = file
        self._stopped = stopped
        self._clock = clock
        self._resident = resident or resident_bytes
        self._began_s = self._looked_s = clock()
        self._before_bytes = self._resident() if memory_bytes is not None else None

    @property
    def left_s(self) -> float:
        """Seconds left until the nearest time limit; infinite without one."""
        return min(self._limits_s.values(), default=math.inf) - (self._clock() - self._began_s)

    def admit(self, steps: int, *, step_s: Callable[[], float] | None = None) -> None:
        """Checks the requested number of steps against the limits before work begins.

        Args:
            steps: Requested optimiser steps.
            step_s: Returns the seconds for one step, measured without the data; called only under a
                time limit.

        Raises:
            OwnerLimit: There are more steps than the owner allows, they would take too long, or
                work must already stop.
        """
        if self._steps is not None and steps > self._steps:
            raise OwnerLimit(
                f"training: the server asks for {counted(steps, 'step', ',')} in this round, but "
                f"{self._file} has max_round_steps = {self._steps:,}. Nothing was trained or "
                "charged; use fewer client.epochs or larger batches, or have the owner allow "
                "more."
            )
        self.check(memory=False)
        if step_s is None or self.left_s == math.inf:
            return
        one_s, left_s = step_s(), self.left_s
        if steps * one_s > left_s:
            raise OwnerLimit(
                f"training: the server asks for {counted(steps, 'step', ',')} in this round, "
                f"which take about {steps * one_s:,.0f} s here, but "
                f"only {max(left_s, 0.0):,.0f} s remain of {self._nearest()}. Nothing was trained "
                "or charged; use fewer client.epochs, or have the owner allow more."
            )

    def check(self, *, memory: bool = True) -> None:
        """Checks the limits between two steps.

        Args:
            memory: Whether to check memory, whose use may depend on the data.

        Raises:
            OwnerLimit: Work must end: a time or memory limit is exceeded, or ``stopped`` gives a
                reason.
        """
        if self.left_s <= 0:
            raise OwnerLimit(f"training: {self._nearest()} has passed. {_DROPPED}")
        if (reason := self._stopped()) is not None:
            raise OwnerLimit(f"training: {reason}. {_DROPPED}")
        now_s = self._clock()
        if not memory or self._before_bytes is None or now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        grown = (self._resident() or 0) - self._before_bytes
        if self._memory_bytes is not None and grown > self._memory_bytes:
            raise OwnerLimit(
                f"training: this process has grown by {grown:,} bytes, but {self._file} has "
                f"max_memory_bytes = {self._memory_bytes:,}. {_DROPPED}"
            )

    def _nearest(self) -> str:
        name, seconds = min(self._limits_s.items(), key=lambda item: item[1])
        return f"{name} ({seconds:,.0f} s)"


_DROPPED = (
    "Training was abandoned between two steps, and no update was sent; the privacy spent stays "
    "charged."
)


def unbounded() -> Bounds:
    """Returns `Bounds` without limits."""
    return Bounds()


def bounds_of(
    owner: OwnerPolicy,
    *,
    deadline_s: float | None = None,
    hours_left_s: float | None = None,
    stopped: Callable[[], str | None] = never,
) -> Bounds:
    """Returns the bounds for one message, whose clock starts now.

    Args:
        owner: The owner's limits on time, steps and memory.
        deadline_s: Longest time that the server waits for the reply.
        hours_left_s: Time until the owner's permitted hours end.
        stopped: Returns the reason to stop now, or None to continue.
    """
    limits_s = {
        "the owner's max_round_s": owner.max_round_s,
        "the round's federation.deadline_s": deadline_s,
        "the owner's hours": hours_left_s,
    }
    return Bounds(
        limits_s={name: limit for name, limit in limits_s.items() if limit is not None},
        steps=owner.max_round_steps,
        memory_bytes=owner.max_memory_bytes,
        file=owner.file,
        stopped=stopped,
    )


def resident_bytes() -> int | None:
    """Returns this process's resident memory in bytes; None where the system doesn't report it."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
