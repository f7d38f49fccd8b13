"""Time floor: a lower bound on the current time, by which a device judges expiry.

A device's clock may be wrong: its battery is flat, or an attacker set it back to pass an old
repository off as current. ``trust/clock.json`` therefore keeps two kinds of time, apart from the
models, which may be wiped:

* signing times in verified metadata and manifests, and
* readings of the clock, up to the expiry of the newest verified timestamp.

The bound on readings is enough for the purpose: a repository once seen as expired stays expired,
wherever the clock is set. A clock that was ahead for a while does no lasting harm: metadata signed
later expires after the floor, and is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict
from tuf.api.metadata import (  # type: ignore[attr-defined]  # implicit re-export
    Root,
    Timestamp,
)

from edge_client.delivery.state_file import read_state
from fedcore.artifacts.statements import signed_at
from fedcore.files import write_atomic

_MAX_BYTES = 1024
_SLACK = timedelta(minutes=10)
"""Smaller differences between clocks are ignored."""
_LONG = timedelta(days=90)


class TimeFloor(BaseModel):
    """A device's time floor and the readings behind it: the content of ``clock.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    signed: AwareDatetime | None = None
    """The latest signing time in verified metadata and manifests."""
    clock: AwareDatetime | None = None
    """The latest reading of this device's clock, never after ``until``."""
    until: AwareDatetime | None = None
    """Expiry of the newest verified timestamp; None before the first."""
    latest: AwareDatetime | None = None
    """The latest reading of all, used only to explain errors."""

    @property
    def at(self) -> datetime | None:
        """The floor: the later of ``signed`` and ``clock``; None before the first update."""
        return max(filter(None, (self.signed, self.clock)), default=None)


@dataclass(frozen=True)
class ClockReading:
    """The clock's reading and the floor in one update, and what follows from them."""

    now: datetime
    """Reading of the device's clock."""
    floor: TimeFloor
    """The floor before this update."""

    @property
    def at(self) -> datetime:
        """The time by which expiry is judged: the clock's reading, or the floor if later."""
        return max(self.now, self.floor.at or self.now)

    @property
    def is_slow(self) -> bool:
        """Whether the clock is behind a signing time by more than 10 minutes."""
        signed = self.floor.signed
        return signed is not None and signed - self.now > _SLACK

    @property
    def held(self) -> bool:
        """Whether the floor is ahead of the clock by more than 10 minutes."""
        return self.at - self.now > _SLACK

    def latest_earlier_reading(self) -> datetime | None:
        """Returns the latest earlier reading if it is 10 minutes ahead of the clock, or None."""
        latest = self.floor.latest
        return latest if latest and latest - self.now > _SLACK else None

    def jumped(self) -> bool:
        """Returns whether the clock has advanced by over 90 days, longer than a usual downtime."""
        latest = self.floor.latest
        return latest is not None and self.now - latest > _LONG

    def clock_warning(self) -> str | None:
        """Returns what is wrong with the clock, for the owner; None if no fault is known."""
        if self.is_slow and self.floor.signed is not None:
            return (
                f"this device's clock says {shown(self.now)}, which is slow: the time is "
                f"{shown(self.floor.signed)} or later, as newer signatures show. Expiry was "
                "checked against that time. Set the clock; NTP keeps it correct (timedatectl "
                "set-ntp true)"
            )
        if (later := self.latest_earlier_reading()) is not None:
            return (
                f"this device's clock says {shown(self.now)}, but it showed {shown(later)} "
                "before: it was fast then, or is slow now. Check that it is right; NTP keeps it "
                "correct (timedatectl set-ntp true)"
            )
        return None


def read_floor(trust: Path) -> TimeFloor:
    """Reads the time floor from the folder of the trusted state; empty before the first update.

    Raises:
        DataError: the file is damaged.
    """
    found = read_state(
        _path(trust),
        TimeFloor,
        max_bytes=_MAX_BYTES,
        what="the earliest possible time",
        remedy="Check that this device's clock is right, then remove the file and run again.",
    )
    return found or TimeFloor()


def write_floor(trust: Path, floor: TimeFloor) -> None:
    """Writes the time floor durably to the folder of the trusted state.

    Raises:
        DiskFull: there was no room.
    """
    write_atomic(_path(trust), floor.model_dump_json().encode() + b"\n")


def floor_after(floor: TimeFloor, now: datetime) -> TimeFloor:
    """Returns the floor after a reading ``now`` of the clock."""
    latest = max(now, floor.latest or now)
    if floor.until is None:
        return floor.model_copy(update={"latest": latest})
    clock = min(now, floor.until)
    return floor.model_copy(update={"clock": max(clock, floor.clock or clock), "latest": latest})


def learned(
    floor: TimeFloor, now: datetime, *, root: Root, timestamp: Timestamp, created: datetime | None
) -> TimeFloor:
    """Returns the floor after an update has verified its metadata.

    Signing times count only up to the expiry of timestamp and root: a stolen online key cannot
    raise the floor beyond that.

    Args:
        floor: The floor before.
        now: Reading of the device's clock.
        root: The verified root, in force.
        timestamp: The verified timestamp, not expired.
        created: Creation time in the release's manifest, if it states one.
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
    after = floor_after(known, now)
    # Report once that the clock was ahead: unless it is behind, its reading now counts as right.
    return after if ClockReading(now, known).is_slow else after.model_copy(update={"latest": now})


def forgotten(root: Root) -> TimeFloor:
    """Returns the floor after a key rotation: times signed with the old keys no longer count."""
    return TimeFloor(signed=signed_at(root.unrecognized_fields))


def stale_since(trust: Path, now: datetime | None = None) -> str | None:
    """Returns until when the newest verified metadata was valid, if that is over.

    A device keeps serving then. Either nobody signed the repository again, or newer releases do not
    reach the device.
    """
    until = read_floor(trust).until
    return shown(until) if until is not None and until < (now or datetime.now(UTC)) else None


def shown(moment: datetime) -> str:
    """Formats a moment in UTC, for errors and findings."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _path(trust: Path) -> Path:
    return trust / "clock.json"
