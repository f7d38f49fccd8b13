"""What a device reads of a release, of its own trusted state, and of the clock, whatever it is."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import given
from hypothesis import strategies as st
from tuf.api.metadata import Root, Timestamp  # type: ignore[attr-defined]

from edge_client.delivery.clock import ClockReading, TimeFloor, floor_after, learned, read_floor
from edge_client.delivery.roots import anchor, parse_root
from fedcore.artifacts.manifest import FileEntry, Manifest, parse_manifest
from fedcore.artifacts.statements import moment_of, parse_epochs, stamp
from fedcore.errors import DataError, DeviceError, FedcoreError, LimitExceeded, TrustError
from tests.child_answers import answer_to

_Read = TypeVar("_Read")
FILE = FileEntry(path="m", sha256="a" * 64, length=1)
T0 = datetime(2026, 1, 1, tzinfo=UTC)
EXPIRY = timedelta(days=7)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "format",
                    "epochs",
                    "digits",
                    "arrays",
                    "dtype",
                    "shape",
                    "fault",
                    "text",
                    "signed",
                    "clock",
                ]
            )
            | st.text(max_size=5)
            | st.sampled_from(["\x1b[31m", "line\nbreak", "x" * 3000]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
RAW = st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode())


def told(work: Callable[[], _Read], *kinds: type[FedcoreError]) -> _Read | None:
    """What ``work`` reads; None where it refuses, by one of ``kinds`` and in one short line."""
    read, refused = None, ""
    try:
        read = work()
    except kinds as error:
        refused = str(error)
    assert (read is None) == bool(refused)
    assert len(refused) < 2000
    assert refused.isprintable()
    return read


@given(RAW)
def test_epochs_are_read_or_refused(raw: bytes) -> None:
    epochs = told(lambda: parse_epochs(raw), TrustError)
    assert epochs is None or all(number >= 1 for number in epochs.epochs.values())


@given(RAW)
def test_no_such_manifest_is_read(raw: bytes) -> None:
    assert told(lambda: parse_manifest(raw), TrustError) is None


@given(RAW)
def test_no_root_is_read_that_no_key_has_signed(raw: bytes) -> None:
    assert told(lambda: parse_root(raw), TrustError) is None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pinned.root.json").write_bytes(raw)
        assert told(lambda: anchor(Path(folder), None), TrustError, DataError) is None


@given(RAW)
def test_a_floor_is_read_or_refused(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "clock.json").write_bytes(raw)
        floor = told(lambda: read_floor(Path(folder)), DataError)
    assert floor is None or floor.at is None or floor.at.tzinfo is UTC


@given(RAW, st.binary(max_size=64), st.integers(-64, 255))
def test_what_a_child_says_is_an_array_or_refused(head: bytes, data: bytes, status: int) -> None:
    raw = head + b"\n" + data
    manifest = Manifest.model_construct(model="model", version=1, onnx=FILE)
    arrays = told(lambda: answer_to(manifest, raw, status), DeviceError, LimitExceeded)
    assert all(array.dtype.kind in "fiub" and len(array) == 3 for array in arrays or [])


@given(JSON | st.text())
def test_a_moment_is_one_or_none(said: Any) -> None:
    moment = moment_of(said)
    assert moment is None or moment.tzinfo is UTC


HOURS = st.floats(-24 * 9000, 24 * 9000, allow_nan=False)


@given(st.lists(st.tuples(st.booleans(), HOURS, HOURS), max_size=12), HOURS)
def test_the_floor_never_falls_and_what_has_expired_once_stays_so(
    steps: list[tuple[bool, float, float]], last: float
) -> None:
    floor, highest, newest = TimeFloor(), None, None
    root = Root(expires=T0 + timedelta(days=9999), unrecognized_fields=stamp(T0))
    for verified, clock, signed in steps:
        now, at = T0 + timedelta(hours=clock), T0 + timedelta(hours=signed)
        timestamp = Timestamp(expires=at + EXPIRY, unrecognized_fields=stamp(at))
        if verified and timestamp.is_expired(ClockReading(now, floor).at):
            continue  # it would be refused
        if verified:
            floor = learned(floor, now, root=root, timestamp=timestamp, created=None)
            newest = timestamp
        else:
            floor = floor_after(floor, now)
        if highest is not None:
            assert floor.at is not None
            assert floor.at >= highest
        highest = floor.at
        if newest is not None and newest.is_expired(now):
            assert newest.is_expired(ClockReading(T0 + timedelta(hours=last), floor).at)
        if highest is not None and newest is not None:
            # Whatever the clock has said, what is signed after the newest is not too old for it.
            assert highest <= max(newest.expires, T0)
