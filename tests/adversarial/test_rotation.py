"""Keys that are stolen or lost: what a thief can do with them, until the owner has rotated.

Before the rotation devices refuse the owner's versions; afterwards they take them, wherever they
stood. An online key alone never brings a device back to an older version.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Timestamp

from edge_client.delivery import store as installed
from edge_client.delivery.source import folder_source
from fedcore.artifacts.manifest import manifest_bytes
from fedcore.artifacts.statements import EPOCHS, Epochs
from fedcore.errors import DataError, ReleaseError, RollbackRefused, SignatureInvalid, TrustError
from server.release.draft import files_of
from server.release.registry import repository as registry
from server.release.registry.keys import (
    ONLINE,
    Keys,
    Quorum,
    generate_keys,
    read_keys,
    read_trusted_root,
)
from tests.adversarial.conftest import matmul_draft

FAR = 2**40


def steal(world: Any) -> Any:
    """The online keys as they are now, and a copy of the repository that the thief serves."""
    keys = read_keys(world.keys, ONLINE)
    shutil.copytree(world.repository, world.folder / "thief")
    return keys


def fast_forward(
    world: Any, keys: Any, version: int = FAR, *, below: dict[str, int] | None = None
) -> None:
    """Signs timestamp and snapshot of a version that the owner never reaches.

    ``below`` is what the snapshot says of the versions of other metadata, where that is not so.
    """
    state = registry.read_state(world.folder / "thief", read_trusted_root(world.keys))
    now = datetime.now(UTC)
    meta = {name: MetaFile(version=file.version) for name, file in state.snapshot.meta.items()}
    meta |= {name: MetaFile(version=number) for name, number in (below or {}).items()}
    snapshot = Snapshot(version=version, expires=now + timedelta(days=3000), meta=meta)
    raw = registry.sign(snapshot, keys, "snapshot")
    timestamp = Timestamp(
        version=version,
        expires=now + timedelta(days=3000),
        snapshot_meta=MetaFile.from_data(version, raw, ["sha256"]),
        unrecognized_fields={"signed_at": "2033-01-01T00:00:00Z"},
    )
    metadata = world.folder / "thief" / "metadata"
    (metadata / f"{version}.snapshot.json").write_bytes(raw)
    signed = registry.sign(timestamp, keys, "timestamp")
    (metadata / "timestamp.json").write_bytes(signed)


def forge_model(world: Any, keys: Any, version: int = FAR) -> None:
    """Publishes a model of the thief's under a version that the owner never reaches."""
    thief = world.folder / "thief"
    # The owner's own code, by the thief's keys.
    manifest, files = files_of(matmul_draft(66.0), version, datetime.now(UTC))
    assert manifest.version == version
    with registry.locked(thief):
        state = registry.read_state(thief, read_trusted_root(world.keys))
        registry.add(thief, state, keys, files, now=datetime.now(UTC))


def from_thief(world: Any) -> Any:
    return folder_source(world.folder / "thief")


@pytest.mark.parametrize(
    "roles", [ONLINE, ("timestamp",), ("snapshot",), ("snapshot", "timestamp")]
)
def test_a_fast_forward_is_recovered_from_by_rotation(world: Any, roles: tuple[str, ...]) -> None:
    keys = steal(world)
    fast_forward(world, keys)
    assert not world.update(from_thief(world)).changed  # the metadata is in force there now
    world.publish(2.0)
    for _ in range(2):
        world.check_refused(RollbackRefused, "fedcore release rotate")
    world.rotate(*roles)
    done = world.update()
    assert (done.version, done.changed, done.clock) == (2, True, None)
    assert world.answers() == 2.0
    if "timestamp" in roles:
        with pytest.raises(SignatureInvalid, match="not signed by the keys"):
            world.update(from_thief(world))
    world.publish(3.0)
    assert world.update().version == 3


@pytest.mark.parametrize("role", ["targets", "releases"])
def test_a_fast_forward_of_what_the_snapshot_lists_is_recovered_from(world: Any, role: str) -> None:
    fast_forward(world, steal(world), below={f"{role}.json": FAR})
    with pytest.raises(DataError, match=f"{FAR}.{role}.json is not in the repository"):
        world.update(from_thief(world))
    world.publish(2.0)
    world.check_refused(RollbackRefused, "fedcore release rotate")
    world.rotate(*ONLINE)
    assert world.update().version == 2
    assert world.answers() == 2.0


def test_a_model_far_ahead_is_recovered_from_by_an_epoch(world: Any) -> None:
    keys = steal(world)
    forge_model(world, keys)
    assert world.update(from_thief(world)).version == FAR
    assert world.answers() == 66.0
    world.publish(2.0)
    world.publish(2.5)
    with pytest.raises(RollbackRefused, match=f"version 3, older than version {FAR}"):
        world.update()
    world.rotate(*ONLINE)
    with pytest.raises(RollbackRefused, match=f"version 3, older than version {FAR}"):
        world.update()  # new keys alone do not take a model back
    assert world.answers() == 66.0
    done = world.rotate(*ONLINE, last_good={"digits": 1})
    assert done.epochs == {"digits": 1}
    assert world.update().version == 1
    assert world.answers() == 1.0
    assert world.publish(3.0).version == 2  # after the last good one
    assert world.update().version == 2
    assert world.answers() == 3.0
    record = installed.read_record(world.store, "digits", "active")
    assert (record.epoch, record.version) == (1, 2)


def test_what_a_thief_left_in_the_owners_own_repository_is_withdrawn(world: Any) -> None:
    world.publish(2.0)
    keys = steal(world)
    forge_model(world, keys)
    shutil.rmtree(world.repository)
    (world.folder / "thief").rename(world.repository)
    assert world.update().version == FAR
    world.rotate(*ONLINE, last_good={"digits": 2})
    assert world.update().version == 2
    assert world.answers() == 2.0
    assert world.publish(3.0).version == 3
    assert world.update().version == 3


def test_versions_of_two_epochs_do_not_touch_each_other(world: Any) -> None:
    for factor in (2.0, 3.0):
        world.publish(factor)
    assert world.update().version == 3
    world.rotate(*ONLINE, last_good={"digits": 2})
    world.publish(30.0)  # version 3 once more, of the new epoch
    done = world.update()
    assert (done.version, done.previous) == (3, 3)
    assert world.answers() == 30.0
    (world.store / "models" / "digits" / "1.3" / "model.onnx").write_bytes(b"x")
    assert world.answers() == 3.0  # the version before is what it was
    assert world.update().changed
    assert world.answers() == 30.0
    for epoch in (2, 3):
        world.rotate(*ONLINE, last_good={"digits": 2})
        assert world.update().version == 2
        assert installed.read_record(world.store, "digits", "active").epoch == epoch


def test_an_online_key_alone_cannot_state_an_epoch(world: Any) -> None:
    world.publish(2.0)
    assert world.update().version == 2
    raw = Epochs(epochs={"digits": 9}).to_bytes()
    first = next((world.repository / "targets").rglob("1/*.manifest.json")).read_bytes()
    world.sign({EPOCHS: raw, "models/digits/release.json": first})
    with pytest.raises(RollbackRefused, match="version 1, older than version 2"):
        world.update()
    assert world.answers() == 2.0


def test_an_epoch_is_not_taken_back(world: Any) -> None:
    shutil.copytree(world.repository, world.folder / "before")
    world.rotate(*ONLINE, last_good={"digits": 1})
    assert world.update().version == 1
    shutil.rmtree(world.store / "trust" / "metadata")
    with pytest.raises(SignatureInvalid, match="not signed by the keys"):
        world.update(folder_source(world.folder / "before"))
    state = registry.read_state(world.repository, read_trusted_root(world.keys))
    keys = read_keys(world.keys, ("targets", *ONLINE))
    targets = state.targets
    del targets.targets[EPOCHS]  # even the offline keys: an epoch only grows
    targets.version += 1
    registry._replace_online(
        world.repository, state, keys, {}, {"targets": targets}, now=datetime.now(UTC)
    )
    with pytest.raises(RollbackRefused, match="version 1, older than version 1 of epoch 1"):
        world.update()
    assert world.answers() == 1.0


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}x",
        b'{"epochs":{"digits":-1}}',
        b'{"epochs":{"../x":1}}',
        b'{"format":2}',
        b'{"epochs":{"digits":1e99}}',
        b"[" * 5000,
    ],
)
def test_epochs_that_are_none_are_refused(world: Any, raw: bytes) -> None:
    state = registry.read_state(world.repository, read_trusted_root(world.keys))
    keys = read_keys(world.keys, ("targets", *ONLINE))
    info = TargetFile.from_data(EPOCHS, raw, ["sha256"])
    (world.repository / "targets" / info.get_prefixed_paths()[0]).write_bytes(raw)
    state.targets.targets[EPOCHS] = info
    state.targets.version += 1
    registry._replace_online(
        world.repository, state, keys, {}, {"targets": state.targets}, now=datetime.now(UTC)
    )
    world.check_refused(TrustError, r"epochs\.json")


@pytest.mark.parametrize("wiped", ["", "trust/metadata", "models"])
def test_a_device_that_was_off_for_every_rotation_follows(world: Any, wiped: str) -> None:
    first = (world.keys / "root.json").read_bytes()
    for turn in range(5):
        world.rotate("root", *ONLINE)
        world.publish(float(turn + 2))
    if wiped:
        shutil.rmtree(world.store / wiped)
    done = world.update()  # the owner gives the newest root, as docs say
    assert (done.version, done.changed) == (6, True)
    assert world.answers() == 6.0
    pinned = world.store / "trust" / "pinned.root.json"
    assert pinned.read_bytes() == (world.keys / "root.json").read_bytes() != first
    (world.keys / "root.json").write_bytes(first)  # or the first one still
    assert not world.update().changed
    shutil.rmtree(world.store / "trust" / "metadata")
    for version in range(1, 6):  # what led there is not needed again
        (world.repository / "metadata" / f"{version}.root.json").unlink()
    assert not world.update().changed


def test_many_rotations(world: Any) -> None:
    for _ in range(300):  # python-tuf's own limit is 256
        chain(world)
    world.publish(2.0)
    assert world.update().version == 2
    root: Metadata[Root] = Metadata.from_file(str(world.store / "trust" / "pinned.root.json"))
    assert root.signed.version == 301
    history = world.store / "trust" / "metadata" / "root_history"
    assert [path.name for path in history.iterdir()] == ["301.root.json"]


def chain(world: Any) -> None:
    """A new root with a new root key, and nothing else."""
    state = registry.read_state(world.repository, (world.keys / "root.json").read_bytes())
    old = read_keys(world.keys, ["root"])
    new = generate_keys(["root"])
    root = state.root
    root.version += 1
    (was,) = old.ids("root")
    root.revoke_key(was, "root")
    root.add_key(new.public("root")[0], "root")
    raw = registry.sign(root, new, "root", old)
    (world.repository / "metadata" / f"{root.version}.root.json").write_bytes(raw)
    (world.keys / "offline" / "root.pem").write_bytes(new.signers["root"][0].private_bytes)
    (world.keys / "root.json").write_bytes(raw)


def test_a_new_root_below_the_threshold_of_the_old_one(
    tmp_path: Path, new_world: Callable[..., Any]
) -> None:
    world = new_world(tmp_path, quorums={"root": Quorum(2, 3)})
    world.publish(1.0)
    assert world.update().version == 1
    for path in sorted((world.keys / "offline").glob("root-*.pem")):
        path.rename(tmp_path / path.name)
    with pytest.raises(ReleaseError, match="needs 2 of its 3 keys, and 1 is given"):
        world.rotate("root")
    thief = read_keys(world.keys, ["root"])
    state = registry.read_state(world.repository, read_trusted_root(world.keys))
    root, own = state.root, generate_keys(["root"])
    root.version += 1
    root.roles["root"].keyids, root.roles["root"].threshold = own.ids("root"), 1
    root.keys |= {key.keyid: key for key in own.public("root")}
    raw = registry.sign(root, own, "root", thief, Keys({"root": own.signers["root"] * 2}))
    (world.repository / "metadata" / "2.root.json").write_bytes(raw)
    world.check_refused(SignatureInvalid, "not signed by the keys")
    (world.repository / "metadata" / "2.root.json").unlink()
    (tmp_path / "root-3.pem").rename(world.keys / "offline" / "root-3.pem")
    world.rotate("root")
    world.publish(2.0)
    assert world.update().version == 2


def test_a_root_that_skips_or_repeats_a_version(world: Any) -> None:
    world.rotate("root")
    metadata = world.repository / "metadata"
    shutil.copy(metadata / "1.root.json", metadata / "3.root.json")
    world.check_refused(SignatureInvalid, "not signed")


def test_a_rotation_does_not_let_an_older_root_be_given(
    world: Any, new_world: Callable[..., Any]
) -> None:
    other = new_world(world.folder / "other")
    world.rotate("root")
    assert not world.update().changed
    for _ in range(3):
        other.rotate("root")
    (world.keys / "root.json").write_bytes((other.keys / "root.json").read_bytes())
    with pytest.raises(TrustError, match="nor a successor signed by it"):
        world.update()  # of a later version, but not on the way from the pinned one
    assert world.answers() == 1.0


def test_a_release_of_a_withdrawn_version_is_not_taken_after_all(world: Any) -> None:
    manifest = world.publish(2.0)
    assert world.update().version == 2
    world.rotate(*ONLINE, last_good={"digits": 1})
    world.sign({"models/digits/release.json": manifest_bytes(manifest)})
    with pytest.raises(TrustError, match="it is not signed"):
        world.update()
    world.publish(3.0)
    assert world.update().version == 2
    assert world.answers() == 3.0
