"""Progress of a training as events, also from processes that train elsewhere on this machine.

In: parts of a training's course, as processes exchange them. Out: `TrainingAdvanced` events, at
most two a second.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedcore.finite import finite_or_none
from fedcore.observability.events import Event, Sink, TrainingAdvanced, event_of, json_line
from server.finetune.control import Exchanged
from server.process.signals import signals_blocked

EVERY_S = 0.5
"""Least time between two events of a training, except before its last one."""
_LOOK_S = 0.25
_WEIGHT = 0.3  # of the latest event in the moving mean of a step's time


@dataclass(frozen=True)
class Extent:
    """How long a training is, known before its first step."""

    steps: int
    tokens_per_example: int | None
    """Tokens of an example of text; None for other kinds of tasks."""


OnPart = Callable[[Exchanged, Extent], None]
"""Callback for each part of a training's course."""


@dataclass
class TrainingProgress:
    """Turns the parts of one training's course into events."""

    emit: Sink
    model: str
    """What is trained, see `TrainingAdvanced.model`."""
    later: int = 0
    """Trainings of equal length that follow, for the remaining time."""
    _waiting: list[Exchanged] = field(default_factory=list)
    _step_s: float = 0.0
    _events: int = 0

    def __call__(self, part: Exchanged, extent: Extent) -> None:
        """Adds a part; emits an event if one is due."""
        done = part.first_step + len(part.losses)
        # Steps after a return to a checkpoint replace those before it.
        self._waiting = [each for each in self._waiting if each.first_step < part.first_step]
        self._waiting.append(part)
        seconds = sum(each.seconds for each in self._waiting)
        if seconds < EVERY_S and done < extent.steps:
            return
        losses = [loss for each in self._waiting for loss in each.losses]
        examples = sum(each.examples for each in self._waiting)
        rate = examples / seconds if seconds else None
        tokens = extent.tokens_per_example
        left = max(0, extent.steps - done) + self.later * extent.steps
        step_s = self._mean_step_s(seconds / len(losses))
        self.emit(
            TrainingAdvanced(
                model=self.model,
                done=done,
                steps=extent.steps,
                loss=finite_or_none(sum(losses) / len(losses)),
                learning_rate=part.learning_rate,
                examples_per_s=rate,
                tokens_per_s=None if rate is None or tokens is None else rate * tokens,
                memory_bytes=sum(part.memory_bytes) or None,
                remaining_s=left * step_s,
            )
        )
        self._waiting = []

    def _mean_step_s(self, latest_s: float) -> float:
        """Returns the moving mean of a step's time, without the first event's, which has set-up."""
        self._events += 1
        weight = max(_WEIGHT, 1 / max(1, self._events - 1))
        self._step_s += weight * (latest_s - self._step_s)
        return self._step_s


def appended_to(path: Path) -> Sink:
    """Returns a sink that appends each event to a file, which `followed` reads elsewhere."""

    def sink(event: Event) -> None:
        with path.open("a") as stream:
            stream.write(json_line(event) + "\n")

    return sink


@contextmanager
def followed(path: Path, emit: Sink) -> Iterator[None]:
    """Passes on the events that other processes append to a file, until the block ends.

    A thread of its own reads the file, so that nothing that ``emit`` does slows those processes.

    Raises:
        Exception: what ``emit`` raised, once the block has ended; it gets no further events.
    """
    ended, failed = threading.Event(), list[Exception]()

    def follow() -> None:
        read = 0
        while True:
            last = ended.wait(_LOOK_S)
            found, read = _new_lines(path, read)
            try:
                for line in found:
                    if event := event_of(line):
                        emit(event)
            except Exception as error:  # raised in the caller's thread
                failed.append(error)
                return
            if last:
                return

    thread = threading.Thread(target=follow, name="fedcore-progress", daemon=True)
    with signals_blocked():  # they are for the main thread
        thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failed:
        raise failed[0]


def _new_lines(path: Path, read: int) -> tuple[list[str], int]:
    """Returns the complete lines from byte ``read`` on, and where the next ones begin."""
    if not path.exists():
        return [], read
    with path.open("rb") as stream:
        stream.seek(read)
        found = stream.read()
    whole, _, _ = found.rpartition(b"\n")
    return whole.decode().splitlines(), read + (len(whole) + 1 if whole else 0)
