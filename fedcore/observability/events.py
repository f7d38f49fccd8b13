"""The events that a run emits, as frozen values, and helpers for the sinks that receive them.

Stages follow one another: each starts, may advance, and finishes. A finished round advances the
running stage to the round's number, so a stage of rounds needs no `StageAdvanced`.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from fedcore.finite import finite_or_none
from fedcore.observability.foreign import MAX_LINE_BYTES

Value = float | int | str | None | dict[str, Any]


@dataclass(frozen=True)
class StageStarted:
    """A stage of the run begins."""

    stage: str
    steps: int | None
    """Number of steps; None if unknown."""


@dataclass(frozen=True)
class StageAdvanced:
    """A step of the running stage is done."""

    stage: str
    done: int
    """Steps done so far, of the stage's ``steps``."""
    note: str
    """What the step did, in a few words; may be empty."""


@dataclass(frozen=True)
class StageFinished:
    """A stage has ended, perhaps before its last step."""

    stage: str
    seconds: float
    note: str
    """The result, in a few words; may be empty."""


@dataclass(frozen=True)
class RoundFinished:
    """A federated round has ended."""

    values: Mapping[str, Value]
    """The fields of the round's record by name, ``metrics`` as a mapping."""


@dataclass(frozen=True)
class TrainingAdvanced:
    """Steps of fine-tuning are done, within the running stage.

    Figures are of the steps since the last such event; the first ones include set-up.
    """

    model: str
    """What is trained: ``finetuned``; ``cloud_alone``, an untrained network for comparison; or
    ``round 5``, the global model after that round."""
    done: int
    """Steps done so far. After a return to a checkpoint it is lower than before."""
    steps: int
    """Steps of the whole training."""
    loss: float | None
    """Mean loss over the steps; None where it is not finite."""
    learning_rate: float
    """Learning rate of the last step."""
    examples_per_s: float | None
    tokens_per_s: float | None
    """Only where the task predicts tokens."""
    memory_bytes: int | None
    """Of all processes: resident memory on CPUs, the most that tensors have taken on GPUs."""
    remaining_s: float
    """Until all trainings of the stage are done, by the time that steps have taken lately."""


@dataclass(frozen=True)
class Noted:
    """A note for the user: a limit that was reached, a choice that was made."""

    text: str


Event = StageStarted | StageAdvanced | StageFinished | TrainingAdvanced | RoundFinished | Noted
Sink = Callable[[Event], None]

_NAMES: dict[type[Event], str] = {
    StageStarted: "stage_started",
    StageAdvanced: "stage_advanced",
    StageFinished: "stage_finished",
    TrainingAdvanced: "training_advanced",
    RoundFinished: "round_finished",
    Noted: "noted",
}


def nowhere(event: Event) -> None:
    """A sink that drops every event."""


def tee(*sinks: Sink) -> Sink:
    """Returns one sink that passes each event to all of ``sinks``, in order."""

    def sink(event: Event) -> None:
        for one in sinks:
            one(event)

    return sink


def counted_steps(sink: Sink, stage: str) -> Callable[[str], None]:
    """Returns a callback that emits a numbered progress event for each step of a stage."""
    count = itertools.count(1)
    return lambda text: sink(StageAdvanced(stage, next(count), text))


@contextmanager
def batched(sink: Sink, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Sink]:
    """Yields a sink that passes short rounds on in batches, every tenth of a second, in order.

    Writing an event can take as long as a round of a few milliseconds, and nobody watches more
    closely. Other events, including longer rounds, flush the batch at once, and so does the end of
    the block, even by an exception.
    """
    waiting: list[Event] = []
    handed_on_s = clock()

    def hand_on() -> None:
        nonlocal handed_on_s
        handed_on_s = clock()
        events = waiting.copy()
        waiting.clear()
        for event in events:
            sink(event)

    def take(event: Event) -> None:
        waiting.append(event)
        short = isinstance(event, RoundFinished) and _seconds(event) < _SHORT_S
        if not short or clock() - handed_on_s >= _PATIENCE_S:
            hand_on()

    try:
        yield take
    finally:
        hand_on()


_SHORT_S, _PATIENCE_S = 0.05, 0.1


def _seconds(event: RoundFinished) -> float:
    seconds = event.values.get("seconds")
    return seconds if isinstance(seconds, float) else math.inf


def json_line(event: Event) -> str:
    """Returns an event as a line of JSON without newline: ``event`` names it, its fields follow.

    A round's fields are at the top level. NaN and infinity become null, since JSON has neither.
    A line has at most `MAX_LINE_BYTES`: a longer one loses the ends of its texts, then metrics.

    >>> json_line(StageStarted("export", 3))
    '{"event": "stage_started", "stage": "export", "steps": 3}'
    """
    fields = event.values if isinstance(event, RoundFinished) else asdict(event)
    whole = {"event": _NAMES[type(event)], **finite_or_none(fields)}
    line = json.dumps(whole, allow_nan=False)
    while len(line) > MAX_LINE_BYTES and _shorten(whole):
        line = json.dumps(whole, allow_nan=False)
    return line


def event_of(line: str) -> Event | None:
    """Returns the event of a line from `json_line`; None for any other line.

    >>> event_of('{"event": "stage_started", "stage": "export", "steps": 3}')
    StageStarted(stage='export', steps=3)
    """
    try:
        fields = json.loads(line)
        kind = {name: kind for kind, name in _NAMES.items()}[fields.pop("event")]
        return RoundFinished(fields) if kind is RoundFinished else kind(**fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _shorten(fields: dict[str, Any]) -> bool:
    """Cuts the longest text in half, or else drops half of the metrics; False if neither exists."""
    texts = {name: value for name, value in fields.items() if isinstance(value, str)}
    longest = max(texts, key=lambda name: len(texts[name]))
    if len(texts[longest]) > _SHORT_TEXT:
        whole, _, _ = texts[longest].rpartition(_CUT)
        kept = (whole or texts[longest])[: len(texts[longest]) // 2]
        fields[longest] = kept + _CUT
        return True
    found = [value for value in fields.values() if isinstance(value, dict) and value]
    if not found:
        return False
    metrics = max(found, key=len)
    for name in list(metrics)[len(metrics) // 2 :]:
        del metrics[name]
    fields["left_out"] = "metrics, for the length of this line"
    return True


_SHORT_TEXT, _CUT = 100, "... (cut)"
