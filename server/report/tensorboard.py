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

from fedcore.observability.events import Event, Sink
from fedcore.observability.jsonl import appending
from server.report.scalars import scalars_of

EVENTS_FILE = "events.out.tfevents.fedcore"
"""TensorBoard reads every file whose name contains ``tfevents``."""


@contextmanager
def tensorboard_events(folder: Path) -> Iterator[Sink]:
    """Yields a sink that writes the numbers of events as scalars into ``folder``.

    `scalars_of` says which, and at which step. TensorBoard can follow a running run. Events of an
    earlier run are replaced.

    Raises:
        DiskFull: the disk is full; the file contains the previous rounds.
    """
    with appending(folder / EVENTS_FILE) as append:
        append(_record(file_version="brain.Event:2"))

        def sink(event: Event) -> None:
            step, scalars = scalars_of(event)
            if scalars:
                append(_record(step=step, summary=_summary(scalars)))

        yield sink


def _summary(scalars: Mapping[str, float]) -> Summary:
    return Summary(
        value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    )


def _record(**fields: Any) -> bytes:
    """Encodes one event in TensorBoard's file framing, with lengths and checksums."""
    framed = BytesIO()
    RecordWriter(framed).write(Record(wall_time=time.time(), **fields).SerializeToString())
    return framed.getvalue()
