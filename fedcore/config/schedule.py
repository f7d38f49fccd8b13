"""Schedules: settings of local training that change from round to round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fedcore.config.section import Rounds, Section

Value = Annotated[float, Field(ge=0, le=1e9)]


class Schedule(Section):
    """``[client.schedule.NAME]``: one setting, round by round; in short, its kind or a list."""

    kind: Literal["constant", "step", "cosine", "list"] = "constant"
    """``constant``: the setting's own value. ``step``: times ``factor`` after every ``every``
    rounds. ``cosine``: falls along half a cosine from the setting's value towards ``end``, which
    the round after the last would reach. ``list``: ``values``."""
    warmup: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """The value rises evenly to the setting's over so many rounds, and then follows ``kind``."""
    every: Rounds | None = None
    """For ``step``: rounds between two changes."""
    factor: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    """For ``step``: what the value is multiplied by."""
    end: Value = 0.0
    """For ``cosine``: where it ends, in the setting's own unit."""
    values: tuple[Value, ...] = ()
    """For ``list``: the value of each round; the last one holds in all rounds after."""

    def value(self, base: float, number: int, rounds: int) -> float:
        """Returns the value in round ``number`` (from 1) of ``rounds``, before any rounding.

        Args:
            base: The setting's own value.
            number: The round; one after the last has the last one's value.
            rounds: ``federation.rounds``.
        """
        number = max(1, min(number, rounds))
        if self.kind == "list":
            return self.values[min(number, len(self.values)) - 1]
        if number < self.warmup:
            return base * number / self.warmup
        first = max(self.warmup, 1)  # the round with the setting's own value
        passed = number - first
        if self.kind == "step":
            assert self.every is not None
            assert self.factor is not None
            try:
                return base * self.factor ** (passed // self.every)
            except OverflowError:
                return math.inf
        if self.kind == "cosine":
            share = (1 + math.cos(math.pi * passed / (rounds - first + 1))) / 2
            return self.end + (base - self.end) * share
        return base

    def extremes(self, rounds: int) -> Sequence[int]:
        """Returns rounds among which every value that is largest or smallest appears."""
        if self.kind == "list":
            return range(1, min(len(self.values), rounds) + 1)
        return sorted({1, min(max(self.warmup, 1), rounds), rounds})

    @property
    def problem(self) -> str:
        """What is missing or contradictory in this schedule; empty where nothing is."""
        if self.kind == "list" and not self.values:
            return "kind 'list' needs values: a list with a value for each round"
        if self.kind == "step" and (self.every is None or self.factor is None):
            return "kind 'step' needs every and factor, such as every = 10 and factor = 0.5"
        used = {"step": ("every", "factor"), "cosine": ("end",), "list": ("values",)}
        for kind, names in used.items():
            for name in names:
                changed = getattr(self, name) != type(self).model_fields[name].default
                if changed and kind != self.kind:
                    return f"{name} belongs to kind {kind!r}, and this one is {self.kind!r}"
        if self.kind == "list" and self.warmup:
            return "a list has no warmup: put the lower values first in it"
        return ""


def _from_short_form(given: Any) -> Any:
    """Returns the table for a kind alone (``"cosine"``) or a list of values."""
    if isinstance(given, str):
        return {"kind": given}
    if isinstance(given, list | tuple):
        return {"kind": "list", "values": tuple(given)}
    if isinstance(given, dict) and isinstance(given.get("values"), list):
        return given | {"values": tuple(given["values"])}
    return given


Scheduled = Annotated[Schedule | None, BeforeValidator(_from_short_form)]


class ClientSchedule(Section):
    """``[client.schedule]``: settings of local training that change from round to round."""

    learning_rate: Scheduled = None
    """Schedule of ``client.learning_rate``."""
    epochs: Scheduled = None
    """Schedule of ``client.epochs``, rounded to whole numbers, at least 1. Under example-level
    privacy each round's epochs are charged, and noise is planned for those of all rounds."""
    clip_norm: Scheduled = None
    """Schedule of ``client.max_grad_norm``; under example-level privacy of ``privacy.clip_norm``,
    which noise and charge are relative to, so that it costs nothing."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the settings that have a schedule."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)


NO_SCHEDULE = ClientSchedule()
"""Nothing changes from round to round."""
