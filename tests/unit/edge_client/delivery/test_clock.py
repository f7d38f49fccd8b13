from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Root, Timestamp  # type: ignore[attr-defined]

from edge_client.delivery.clock import (
    ClockReading,
    TimeFloor,
    floor_after,
    forgotten,
    learned,
    read_floor,
    write_floor,
)
from fedcore.artifacts.statements import stamp
from fedcore.errors import DataError

T0 = datetime(2026, 5, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def timestamp(at: datetime, *, fields: dict[str, Any] | None = None) -> Timestamp:
    return Timestamp(expires=at + 7 * DAY, unrecognized_fields=fields or stamp(at))


def root(at: datetime = T0) -> Root:
    return Root(expires=at + 365 * DAY, unrecognized_fields=stamp(at))


def updated(floor: TimeFloor, now: datetime, at: datetime, **more: Any) -> TimeFloor:
    """The floor after an update at which a repository was signed ``at`` some time."""
    return learned(floor_after(floor, now), now, root=root(), timestamp=timestamp(at), created=None)


def test_a_first_look_judges_nothing() -> None:
    floor = floor_after(TimeFloor(), T0 + 1000 * DAY)
    assert floor.at is None
    assert ClockReading(T0, floor).at == T0


def test_what_was_signed_is_past() -> None:
    floor = updated(TimeFloor(), T0 - 20_000 * DAY, T0)
    assert floor.at == T0
    judged = ClockReading(T0 - 20_000 * DAY, floor)
    assert judged.at == T0
    assert judged.is_slow
    assert "is slow: the time is 2026-05-01 00:00 UTC or later" in (judged.clock_warning() or "")


def test_a_clock_set_back_is_judged_by_what_it_has_said() -> None:
    floor = updated(TimeFloor(), T0, T0)
    floor = floor_after(floor, T0 + 20 * DAY)  # the repository has expired, and was refused
    back = ClockReading(T0 + DAY, floor)
    assert back.at == T0 + 7 * DAY == timestamp(T0).expires  # expired, wherever the clock goes
    assert back.held
    assert not back.is_slow  # for all that is known, it was ahead then


def test_a_clock_that_was_ahead_locks_nobody_out() -> None:
    floor = updated(TimeFloor(), T0, T0)
    floor = floor_after(floor, T0 + 4000 * DAY)
    right = ClockReading(T0 + DAY, floor)
    assert not timestamp(T0 + DAY).is_expired(right.at)  # what is signed next is taken
    floor = updated(floor, T0 + DAY, T0 + DAY)
    assert floor.at is not None
    assert floor.at <= T0 + 8 * DAY
    assert "it showed 2037-04-13 00:00 UTC before" in (right.clock_warning() or "")
    floor = updated(floor, T0 + 8 * DAY, T0 + 8 * DAY)
    assert ClockReading(T0 + 8 * DAY, floor).clock_warning() is None  # said once


def test_the_clock_is_spoken_of_only_where_it_is_off_by_minutes() -> None:
    floor = updated(TimeFloor(), T0, T0)
    assert ClockReading(T0 - timedelta(minutes=9), floor).clock_warning() is None
    assert ClockReading(T0 - timedelta(minutes=11), floor).clock_warning() is not None


@pytest.mark.parametrize("created", [None, T0 + 3 * DAY, T0 + 9999 * DAY])
def test_signed_times_cannot_lift_the_floor_beyond_the_offline_root(
    created: datetime | None,
) -> None:
    far = T0 + 100_000 * DAY
    stolen = Timestamp(expires=far + DAY, unrecognized_fields=stamp(far))
    floor = learned(TimeFloor(), T0, root=root(), timestamp=stolen, created=created)
    assert floor.at is not None
    assert not root().is_expired(floor.at)
    assert forgotten(root(T0 + 2 * DAY)).at == T0 + 2 * DAY


def test_a_manifest_dates_a_release_too() -> None:
    bare = timestamp(T0, fields={"other": 1})
    old = Root(expires=T0 + 365 * DAY)
    floor = learned(TimeFloor(), T0 - 9 * DAY, root=old, timestamp=bare, created=T0 - DAY)
    assert floor.signed == T0 - DAY


@pytest.mark.parametrize(
    "said",
    [
        "",
        "yesterday",
        "2026-05-01",
        "2026-05-01T00:00:00",
        5,
        None,
        [],
        "9999-12-31T23:59:59-23:00",
    ],
)
def test_times_that_are_none_are_not_believed(said: Any) -> None:
    odd = timestamp(T0, fields={"signed_at": said})
    old = Root(expires=T0 + 365 * DAY, unrecognized_fields={"signed_at": said})
    floor = learned(TimeFloor(), T0, root=old, timestamp=odd, created=None)
    assert floor.signed is None
    assert floor.at == T0


def test_it_is_kept_and_read_back(tmp_path: Path) -> None:
    assert read_floor(tmp_path) == TimeFloor()
    floor = updated(TimeFloor(), T0, T0)
    write_floor(tmp_path, floor)
    assert read_floor(tmp_path) == floor


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'{"signed": 1}x',
        b'{"more": 1}',
        b'{"clock": "2026-05-01T00:00:00"}',
        b"[" * 900,
        b"\xff",
        b" " * 2000,
    ],
)
def test_a_damaged_floor_is_not_taken_for_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "clock.json").write_bytes(raw)
    with pytest.raises(DataError, match=r"clock\.json"):
        read_floor(tmp_path)
