"""A device whose clock is wrong, or was set so that an old repository looks current.

Whatever the clock says, what has been seen to expire stays expired; what is signed again is taken.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from edge_client.delivery.roots import anchor
from edge_client.delivery.source import folder_source
from edge_client.delivery.trust import current_offer
from fedcore.artifacts.manifest import manifest_bytes
from fedcore.errors import DataError, SignatureInvalid
from server.release.publish import refresh

T0 = datetime(2026, 5, 1, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def world(tmp_path: Any, new_world: Callable[..., Any]) -> Any:
    """Version 1, published and installed at T0."""
    world = new_world(tmp_path, now=T0)
    world.publish(1.0, created=T0)
    assert world.update(now=T0).version == 1
    return world


@pytest.mark.parametrize("wiped", ["", "models", "trust/metadata"])
def test_a_clock_set_back_does_not_thaw_a_frozen_repository(world: Any, wiped: str) -> None:
    shutil.copytree(world.repository, world.folder / "frozen")
    frozen = folder_source(world.folder / "frozen")
    with pytest.raises(SignatureInvalid, match=r"\(freeze attack\); this device's clock"):
        world.update(frozen, now=T0 + 20 * DAY)
    if wiped:
        shutil.rmtree(world.store / wiped)
    for days in (1, 6, -1, -9999):
        with pytest.raises(SignatureInvalid, match="it is slow, or was set back"):
            world.update(frozen, now=T0 + days * DAY)
    if wiped != "models":
        assert world.answers() == 1.0
    world.publish(2.0, created=T0 + 21 * DAY)
    done = world.update(now=T0 + 21 * DAY)
    assert (done.version, done.clock) == (2, None)


def test_a_store_from_before_there_was_a_floor_is_protected_too(world: Any) -> None:
    (world.store / "trust" / "clock.json").unlink()
    for days in (20, 1):
        with pytest.raises(SignatureInvalid, match="have expired"):
            world.update(now=T0 + days * DAY)
    world.publish(2.0, created=T0 + DAY)
    assert world.update(now=T0 + DAY).version == 2


def test_a_release_dated_far_ahead_does_not_make_its_own_metadata_expire(world: Any) -> None:
    manifest = world.publish(2.0, created=T0)
    ahead = manifest.model_copy(update={"created": "2099-01-01T00:00:00Z"})
    world.sign({"models/digits/release.json": manifest_bytes(ahead)}, now=T0)
    for hours in (0, 1, 100):
        assert world.update(now=T0 + timedelta(hours=hours)).version == 2
    refresh(world.repository, world.keys, now=T0 + 5 * DAY, offline=False)
    assert not world.update(now=T0 + 5 * DAY).changed


def test_a_clock_that_is_behind_is_said_and_does_not_keep_a_release_away(world: Any) -> None:
    world.publish(2.0, created=T0 + DAY)
    done = world.update(now=datetime(1970, 1, 1, 0, 5, tzinfo=UTC))
    assert done.version == 2
    assert "says 1970-01-01 00:05 UTC, which is slow: the time is 2026-05-02 00:00" in done.clock
    world.publish(3.0, created=T0 + 2 * DAY)
    done = world.update(now=datetime(1970, 1, 1, 0, 5, tzinfo=UTC))
    assert "the time is 2026-05-03 00:00 UTC or later" in done.clock


def test_a_clock_that_was_ahead_for_a_while_is_forgiven(world: Any) -> None:
    far = T0 + 4000 * DAY
    with pytest.raises(SignatureInvalid, match="may be fast: even the root has expired"):
        world.update(now=far)
    refresh(world.repository, world.keys, now=T0 + DAY, offline=False)
    with pytest.raises(SignatureInvalid, match="signed again since this device's last update"):
        world.update(now=T0 + 300 * DAY)
    done = world.update(now=T0 + DAY)  # the clock is right again, and so is all else
    assert not done.changed
    assert "it was fast then, or is slow now" in done.clock
    for days in range(2, 40, 6):
        world.publish(float(days), created=T0 + days * DAY)
        done = world.update(now=T0 + days * DAY)
        assert done.changed
        assert done.clock is None


def test_signed_times_far_ahead_are_forgotten_with_the_key_that_signed_them(world: Any) -> None:
    world.publish(2.0, created=T0 + 60 * DAY)  # a publisher whose clock is wrong, or a thief
    assert "is slow" in world.update(now=T0).clock
    world.publish(3.0, created=T0 + DAY)
    with pytest.raises(SignatureInvalid, match=r"checked against 2026-06-30 .* it is slow"):
        world.update(now=T0 + DAY)
    world.rotate("timestamp", created=T0 + DAY)
    done = world.update(now=T0 + DAY)
    assert (done.version, done.clock) == (3, None)


def test_a_clock_that_leaps_is_suspected(world: Any) -> None:
    with pytest.raises(SignatureInvalid, match="it showed a much earlier time"):
        world.update(now=T0 + 200 * DAY)


def test_time_that_passes_is_no_cause_for_complaint(world: Any) -> None:
    for days in range(1, 60, 5):
        refresh(world.repository, world.keys, now=T0 + days * DAY, offline=False)
        for hours in (1, 20, 100):
            done = world.update(now=T0 + days * DAY + timedelta(hours=hours))
            assert done.clock is None


def test_a_floor_that_was_damaged_is_an_error_and_one_that_is_gone_begins_again(world: Any) -> None:
    path = world.store / "trust" / "clock.json"
    path.write_bytes(b"{")
    with pytest.raises(DataError, match=r"clock\.json: its content is not what was written"):
        world.update(now=T0)
    path.unlink()
    assert not world.update(now=T0).changed
    assert path.exists()


def test_a_root_dates_the_first_update(tmp_path: Any, new_world: Callable[..., Any]) -> None:
    world = new_world(tmp_path, now=T0)
    world.publish(1.0, created=T0)
    offer = current_offer(
        folder_source(world.repository),
        trust=tmp_path / "trust",
        start=anchor(tmp_path / "trust", (world.keys / "root.json").read_bytes()),
        model="digits",
        now=datetime(1970, 1, 1, tzinfo=UTC),
    )
    assert offer.manifest.version == 1
