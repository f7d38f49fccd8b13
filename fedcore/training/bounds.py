"""How far the work on one message may go: asked before it begins and between its steps."""

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
"""How often the process's memory is looked at, at most."""


def never() -> str | None:
    """No reason to stop."""
    return None


class Bounds:
    """What bounds the work on one message; its time begins when this is made.

    A single step is not interrupted: work ends at the first step that begins too late.
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
        """Begins to count.

        Args:
            limits_s: Seconds that the work may take, by what bounds them.
            steps: Most steps of the optimiser.
            memory_bytes: By so much this process may grow.
            file: What the owner's file is called.
            stopped: Says why work is to end now; None while it may go on.
            clock: Seconds, which no change of the time of day moves.
            resident: Bytes of memory that this process holds; None where the system does not tell.
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
        """Seconds that are left; infinite without a limit."""
        return min(self._limits_s.values(), default=math.inf) - (self._clock() - self._began_s)

    def admit(self, steps: int, *, step_s: Callable[[], float] | None = None) -> None:
        """Refuses work before it begins, by its number of steps.

        Args:
            steps: How many are asked for.
            step_s: Gives the seconds that one takes, measured without the data; called only where
                the time is bounded.

        Raises:
            OwnerLimit: there are more than the owner allows, or they would take too long.
        """
        if self._steps is not None and steps > self._steps:
            raise OwnerLimit(
                f"training: the server asks for {counted(steps, 'step', ',')} in this round, and "
                f"{self._file} has max_round_steps = {self._steps:,}. Nothing was trained or "
                "charged; fewer client.epochs or larger batches ask for less, or the owner allows "
                "more."
            )
        self.check(memory=False)
        if step_s is None or self.left_s == math.inf:
            return
        one_s, left_s = step_s(), self.left_s
        if steps * one_s > left_s:
            raise OwnerLimit(
                f"training: the server asks for {counted(steps, 'step', ',')} in this round, which "
                f"take about {steps * one_s:,.0f} s here, and {max(left_s, 0.0):,.0f} s are left "
                f"of {self._nearest()}. Nothing was trained or charged; fewer client.epochs ask "
                "for less, or the owner allows more."
            )

    def check(self, *, memory: bool = True) -> None:
        """Ends work that has gone on for too long or grown too large, between two steps.

        Args:
            memory: Whether to look at memory, which may depend on the data.

        Raises:
            OwnerLimit: it is to end.
        """
        if self.left_s <= 0:
            raise OwnerLimit(f"training: {self._nearest()} is over. {_DROPPED}")
        if (reason := self._stopped()) is not None:
            raise OwnerLimit(f"training: {reason}. {_DROPPED}")
        now_s = self._clock()
        if not memory or self._before_bytes is None or now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        grown = (self._resident() or 0) - self._before_bytes
        if self._memory_bytes is not None and grown > self._memory_bytes:
            raise OwnerLimit(
                f"training: this process has grown by {grown:,} bytes, and {self._file} has "
                f"max_memory_bytes = {self._memory_bytes:,}. {_DROPPED}"
            )

    def _nearest(self) -> str:
        name, seconds = min(self._limits_s.items(), key=lambda item: item[1])
        return f"{name} ({seconds:,.0f} s)"


_DROPPED = "The work was dropped between two steps, and no update was sent; what was charged stays."


def unbounded() -> Bounds:
    """Work that nothing bounds."""
    return Bounds()


def bounds_of(
    owner: OwnerPolicy,
    *,
    deadline_s: float | None = None,
    hours_left_s: float | None = None,
    stopped: Callable[[], str | None] = never,
) -> Bounds:
    """The bounds of one message that comes now.

    Args:
        owner: Their limits on time, steps and memory.
        deadline_s: How long the server waits for the reply at most.
        hours_left_s: Until the owner's hours end.
        stopped: Says why work is to end now; None while it may go on.
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
    """Memory of this process; None where the system does not tell."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
