"""What a device does with a repository that is someone else's, has run out, or is an old one.

Each case names the error, and each ends with the newest version it had still answering.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from edge_client.delivery.source import folder_source
from fedcore.errors import DigestMismatch, RollbackRefused, SignatureInvalid, TrustError
from server.release.publish import refresh
from server.release.registry import repository as registry
from server.release.registry.keys import ONLINE, read_keys, read_trusted_root


def test_a_repository_signed_by_someone_else(world: Any, new_world: Callable[..., Any]) -> None:
    other = new_world(world.folder / "other")
    for factor in (5.0, 6.0, 7.0):
        other.publish(factor)
    shutil.rmtree(world.repository)
    other.repository.rename(world.repository)
    world.check_refused(SignatureInvalid, "not signed by the keys that this device trusts")
    (world.keys / "root.json").write_bytes((other.keys / "root.json").read_bytes())
    world.check_refused(TrustError, "neither the one that this device has trusted")


def test_a_new_root_that_the_old_one_does_not_vouch_for(
    world: Any, new_world: Callable[..., Any]
) -> None:
    other = new_world(world.folder / "other")
    other.publish(5.0)
    theirs = read_keys(other.keys, ("root", "targets", *ONLINE))
    state = registry.read_state(other.repository, read_trusted_root(other.keys))
    root = state.root
    root.version = 2
    raw = registry.sign(root, theirs, "root")
    (world.repository / "metadata" / "2.root.json").write_bytes(raw)
    world.check_refused(SignatureInvalid, "not signed by the keys")


def test_signatures_that_have_run_out(tmp_path: Path, new_world: Callable[..., Any]) -> None:
    then = datetime.now(UTC) - timedelta(days=8)
    world = new_world(tmp_path, now=then)
    world.publish(1.0, created=then)
    with pytest.raises(SignatureInvalid, match=r"have expired .*timestamp"):
        world.update()
    world.publish(2.0)
    assert world.update().version == 2
    world.publish(3.0, created=then)
    with pytest.raises(SignatureInvalid, match="have expired"):
        world.update()
    assert world.answers() == 2.0


@pytest.mark.parametrize("wiped", ["", "models"])
def test_an_older_repository(world: Any, wiped: str) -> None:
    shutil.copytree(world.repository, world.folder / "old")
    world.publish(2.0)
    assert world.update().version == 2
    if wiped:
        shutil.rmtree(world.store / wiped)
    with pytest.raises(RollbackRefused, match="older than this device has seen"):
        world.update(folder_source(world.folder / "old"))
    if wiped:
        assert world.update().version == 2
    assert world.answers() == 2.0


def test_an_older_snapshot_under_the_newer_name(world: Any) -> None:
    world.publish(2.0)
    metadata = world.repository / "metadata"
    shutil.copy(metadata / "2.snapshot.json", metadata / "3.snapshot.json")
    world.check_refused(DigestMismatch, "differs from what was signed")


def test_older_metadata_signed_again_by_a_thief_of_the_timestamp_key(world: Any) -> None:
    world.publish(2.0)
    assert world.update().version == 2
    root = read_trusted_root(world.keys)
    timestamp = registry.read_state(world.repository, root).timestamp
    timestamp.version += 1
    timestamp.snapshot_meta.version = 2
    raw = (world.repository / "metadata" / "2.snapshot.json").read_bytes()
    timestamp.snapshot_meta = type(timestamp.snapshot_meta).from_data(2, raw, ["sha256"])
    stolen = registry.sign(timestamp, read_keys(world.keys, ONLINE), "timestamp")
    (world.repository / "metadata" / "timestamp.json").write_bytes(stolen)
    with pytest.raises(RollbackRefused, match="older than this device has seen"):
        world.update()
    assert world.answers() == 2.0


@pytest.mark.parametrize("offline", [False, True])
def test_signatures_that_are_renewed_in_time_are_followed(world: Any, offline: bool) -> None:
    refresh(world.repository, world.keys, now=datetime.now(UTC), offline=offline)
    assert not world.update().changed
    world.publish(2.0)
    assert world.update().version == 2
    assert world.answers() == 2.0
