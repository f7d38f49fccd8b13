"""Findings of a check, and their form as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedcore.observability.words import counted

Place = Literal["simulation", "server", "device"]
"""Where the checked task will run: with all data, without the clients', or with one client's."""


@dataclass(frozen=True)
class CheckFinding:
    """A finding: the result of a step, or one fault that the step found."""

    step: str
    ok: bool
    required: bool
    """Whether the run needs this to be right; else the finding is a note."""
    detail: str
    seconds: float
    client: str | None = None
    """The client whose data the fault is in; None for the result of a step, or other data."""
    row: int | None = None
    """The first row with this fault, counted from 0."""
    column: tuple[int, ...] | None = None
    """Position in the input of that row; None if the fault is not at one position."""
    fault: str | None = None
    """Kind of fault, such as ``shape`` or ``not finite``; None for the result of a step."""

    @property
    def line(self) -> str:
        """The finding as one line: mark, step and detail; for a step's result also its duration."""
        mark = "ok  " if self.ok else ("FAIL" if self.required else "note")
        timed = f" [{self.seconds:.2f} s]" if self.fault is None else ""
        return f"{mark} {self.step:<12} {self.detail}{timed}"


@dataclass(frozen=True)
class TaskCheck:
    """The findings of a check, at least one for each step; ``str`` gives one line for each.

    Example::

        checked = fedcore.check("task.py", clients="all")
        assert checked.ok, checked
    """

    findings: tuple[CheckFinding, ...]

    @property
    def ok(self) -> bool:
        """Whether everything that the run requires is right."""
        return all(finding.ok or not finding.required for finding in self.findings)

    @property
    def notes(self) -> int:
        """Number of findings that do not stop a run."""
        return sum(not finding.ok and not finding.required for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The overall result as a sentence."""
        if not self.ok:
            return "This task would fail."
        return (
            f"This task is ready, with {counted(self.notes, 'note')}."
            if self.notes
            else ("This task is ready.")
        )

    def __str__(self) -> str:
        """Returns one line per finding, at most `SHOWN` for one kind of fault, and the verdict."""
        shown = LineFilter()
        lines = [line for finding in self.findings for line in shown.lines(finding)]
        return "\n".join([*lines, *shown.rest(), self.verdict])


SHOWN = 8
"""Lines shown for one kind of fault in a step; JSON and ``findings`` have all."""


class LineFilter:
    """Turns findings into lines: of a kind of fault that many clients have, the first ones."""

    def __init__(self) -> None:
        self._kind: tuple[str, str | None] = ("", None)
        self._count = 0

    def lines(self, finding: CheckFinding) -> list[str]:
        """Returns the lines to show for the next finding."""
        kind = (finding.step, finding.fault)
        ended = [] if kind == self._kind else self.rest()
        self._count = self._count + 1 if kind == self._kind else 1
        self._kind = kind
        hidden = finding.fault is not None and self._count > SHOWN
        return ended if hidden else [*ended, finding.line]

    def rest(self) -> list[str]:
        """Returns the line that says how many of the latest kind of fault were not shown."""
        (step, fault), more = self._kind, self._count - SHOWN
        self._count = 0
        if fault is None or more <= 0:
            return []
        return [f"     {step:<12} and {more} more with this fault; --json names all"]
