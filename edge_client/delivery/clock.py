"""The earliest that it can be: a floor of time that a device keeps, for judging what has expired.

A device's clock may be wrong, by a flat battery or by someone who would have it take an old
repository for a current one. Two kinds of time are kept in ``trust/clock.json``, apart from what
may be wiped:

* what verified metadata and manifests say of when they were signed, and
* what this device's clock has said, up to the expiry of the newest timestamp that it has verified.

The clock's own word is bounded so because that is all that is needed of it: a repository that has
once been seen to have expired stays so, wherever the clock is set to. A clock that was ahead for a
while does no lasting harm: whatever is signed next expires later than the floor, and is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # re-exported unsaid
    Root,
    Timestamp,
)

from fedcore.artifacts.statements import signed_at
from fedcore.errors import DataError
from fedcore.files import read_if_there, write_atomic

_MAX_BYTES = 1024
_SLACK = timedelta(minutes=10)
"""Clocks that differ by less are not spoken of."""
_LONG = timedelta(days=90)


class Floor(BaseModel):
    """What a device knows of the time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    signed: AwareDatetime | None = None
    """The latest moment at which something verified says that it was signed."""
    clock: AwareDatetime | None = None
    """The latest reading of this device's clock, never after ``until``."""
    until: AwareDatetime | None = None
    """When the newest timestamp that was verified expires; None before the first."""
    latest: AwareDatetime | None = None
    """The latest reading at all: it judges nothing, and helps to say what is wrong."""

    @property
    def at(self) -> datetime | None:
        """The floor; None on a device that has verified nothing yet."""
        return max(filter(None, (self.signed, self.clock)), default=None)


@dataclass(frozen=True)
class Judged:
    """The time by which expiry is judged in one update, and what the clock says."""

    now: datetime
    floor: Floor
    """What was known before this update."""

    @property
    def at(self) -> datetime:
        """The clock's reading, or the floor where that is later."""
        return max(self.now, self.floor.at or self.now)

    @property
    def behind(self) -> bool:
        """Whether the clock says less than what was signed, by more than clocks differ."""
        signed = self.floor.signed
        return signed is not None and signed - self.now > _SLACK

    @property
    def held(self) -> bool:
        """Whether expiry is judged by a later time than the clock's, by more than clocks differ."""
        return self.at - self.now > _SLACK

    def said_later(self) -> datetime | None:
        """What the clock has said before, where that is later than what it says now."""
        latest = self.floor.latest
        return latest if latest and latest - self.now > _SLACK else None

    def jumped(self) -> bool:
        """Whether the clock has moved on by more than a device is likely to have been off."""
        latest = self.floor.latest
        return latest is not None and self.now - latest > _LONG

    def complaint(self) -> str | None:
        """What is wrong with the clock; None where nothing is known to be."""
        if self.behind and self.floor.signed is not None:
            return (
                f"this device's clock says {shown(self.now)}, which is behind: it is "
                f"{shown(self.floor.signed)} at least, as what was signed since shows. Expiry was "
                "judged by that. Set the clock; NTP keeps it right (timedatectl set-ntp true)"
            )
        if (later := self.said_later()) is not None:
            return (
                f"this device's clock says {shown(self.now)}, and has said {shown(later)} before: "
                "it was ahead, or is behind now. See that it is right; NTP keeps it so "
                "(timedatectl set-ntp true)"
            )
        return None


def read_floor(trust: Path) -> Floor:
    """What this device knows of the time; nothing on its first update.

    Raises:
        DataError: it does not hold what was written there.
    """
    path = _path(trust)
    raw = read_if_there(path, max_bytes=_MAX_BYTES, what="the floor of time")
    if raw is None:
        return Floor()
    try:
        return Floor.model_validate_json(raw)
    except ValidationError:
        raise DataError(
            f"{path}: it does not hold the times that were written; the disk may be failing. "
            "Nothing was installed; the version before keeps serving. See that this device's clock "
            "is right, then remove the file and run again."
        ) from None


def write_floor(trust: Path, floor: Floor) -> None:
    """Makes it durable.

    Raises:
        DiskFull: there was no room.
    """
    write_atomic(_path(trust), floor.model_dump_json().encode() + b"\n")


def looked(floor: Floor, now: datetime) -> Floor:
    """The floor once the clock has been read."""
    latest = max(now, floor.latest or now)
    if floor.until is None:
        return floor.model_copy(update={"latest": latest})
    clock = min(now, floor.until)
    return floor.model_copy(update={"clock": max(clock, floor.clock or clock), "latest": latest})


def learned(
    floor: Floor, now: datetime, *, root: Root, timestamp: Timestamp, created: datetime | None
) -> Floor:
    """The floor once an update was verified.

    Nothing that is signed is dated after it expires, nor after the root that vouches for it does:
    the keys that stay online cannot lift the floor above that.

    Args:
        floor: As it was.
        now: What the clock says.
        root: In force.
        timestamp: In force, and so not expired.
        created: When a manifest says that its release was made.
    """
    times = (signed_at(timestamp.unrecognized_fields), signed_at(root.unrecognized_fields), created)
    most = min(timestamp.expires, root.expires) - timedelta(seconds=1)
    signed = max((min(time, most) for time in times if time), default=None)
    known = floor.model_copy(
        update={
            "signed": max(filter(None, (signed, floor.signed)), default=None),
            "until": timestamp.expires,
        }
    )
    after = looked(known, now)
    # That the clock was ahead is said once; what it says now is right, as far as can be told.
    return after if Judged(now, known).behind else after.model_copy(update={"latest": now})


def forgotten(root: Root) -> Floor:
    """The floor after keys were rotated: nothing that the old ones said counts any more."""
    return Floor(signed=signed_at(root.unrecognized_fields))


def shown(moment: datetime) -> str:
    """A moment as errors and findings show it."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _path(trust: Path) -> Path:
    return trust / "clock.json"
