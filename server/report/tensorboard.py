"""Metrics as TensorBoard events.

Records are written synchronously. ``SummaryWriter`` writes them in a thread, where a full disk
surfaces rounds later, as a traceback.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event as Record
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from fedcore.observability.events import Event, RoundFinished, Sink, StageFinished, Value
from fedcore.observability.jsonl import appending

EVENTS_FILE = "events.out.tfevents.fedcore"
"""TensorBoard reads every file whose name contains ``tfevents``."""

_TAGS = {
    "train_loss": "train/loss",
    "epsilon_max": "privacy/epsilon_max",
    "updates": "clients/updates",
    "declined": "clients/declined",
    "failed": "clients/failed",
    "bytes_up": "bytes/up",
    "bytes_down": "bytes/down",
    "seconds": "seconds/round",
    "clients_per_s": "pace/clients_per_s",
    "memory_bytes": "pace/memory_bytes",
}


@contextmanager
def tensorboard_events(folder: Path) -> Iterator[Sink]:
    """Yields a sink that writes rounds and durations of stages as scalars into ``folder``.

    A round's values are at its number as step, a stage's at step 0. TensorBoard can follow a
    running run. Events of an earlier run are replaced.

    Raises:
        DiskFull: the disk is full; the file contains the previous rounds.
    """
    with appending(folder / EVENTS_FILE) as append:
        append(_record(file_version="brain.Event:2"))

        def sink(event: Event) -> None:
            if isinstance(event, RoundFinished):
                step, scalars = _round_scalars(event.values)
                append(_record(step=step, summary=_summary(scalars)))
            elif isinstance(event, StageFinished):
                scalars = {f"seconds/{event.stage}": event.seconds}
                append(_record(step=0, summary=_summary(scalars)))

        yield sink


def _round_scalars(values: Mapping[str, Value]) -> tuple[int, dict[str, float]]:
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    metrics = values.get("metrics")
    scalars = {tag: numbers[name] for name, tag in _TAGS.items() if name in numbers}
    for name, value in metrics.items() if isinstance(metrics, dict) else ():
        if value is not None:  # undefined in this round
            scalars[f"metrics/{name}"] = value
    for group in ("virtual", "client"):
        figures = values.get(group)
        for name, value in figures.items() if isinstance(figures, dict) else ():
            scalars[f"{group}/{name}"] = value
    return int(numbers["round"]), scalars


def _summary(scalars: Mapping[str, float]) -> Summary:
    return Summary(
        value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    )


def _record(**fields: Any) -> bytes:
    """Encodes one event in TensorBoard's file framing, with lengths and checksums."""
    framed = BytesIO()
    RecordWriter(framed).write(Record(wall_time=time.time(), **fields).SerializeToString())
    return framed.getvalue()
