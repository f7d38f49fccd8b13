from __future__ import annotations

import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, Root  # type: ignore[attr-defined]

from fedcore.artifacts.statements import EPOCHS
from fedcore.errors import DiskFull, ReleaseError
from server.release.publish import history, initialise, refresh
from server.release.registry import pending, rotation
from server.release.registry import repository as registry
from server.release.registry.keys import (
    OFFLINE,
    ONLINE,
    ROLES,
    Quorum,
    key_files,
    read_keys,
    read_trusted_root,
)
from server.release.registry.rotation import read_epochs, rotate


def state_of(publisher: Any) -> registry.RepositoryState:
    return registry.read_state(publisher.repository, read_trusted_root(publisher.keys))


def ids(publisher: Any) -> dict[str, list[str]]:
    state = state_of(publisher)
    return {
        role: (state.targets if role == "releases" else state.root).get_delegated_role(role).keyids
        for role in ROLES
    }


def files(*folders: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


def turn(publisher: Any, *roles: str, now: datetime, **more: Any) -> rotation.Rotation:
    return rotate(publisher.repository, publisher.keys, roles=roles, now=now, **more)


@pytest.mark.parametrize("roles", [ONLINE, OFFLINE, ROLES, *((role,) for role in ROLES)])
def test_new_keys_count_and_old_ones_do_not(
    publisher: Any, now: datetime, roles: tuple[str, ...]
) -> None:
    publisher.publish(b"one")
    before, old = ids(publisher), read_keys(publisher.keys, ROLES)
    done = turn(publisher, *roles, now=now)
    after = ids(publisher)
    for role in ROLES:
        assert (set(before[role]) & set(after[role]) == set()) is (role in roles)
        assert read_keys(publisher.keys, [role]).ids(role) == after[role]
    assert done.roles == tuple(role for role in ROLES if role in roles)
    assert done.root_version == (1 if roles == ("releases",) else 2)
    assert len(done.removed) == len(done.written) == len(roles)
    assert publisher.publish(b"two").version == 2
    state = state_of(publisher)
    assert set(state.root.keys) == {key for role in after for key in after[role]} - set(
        after["releases"]
    )
    for role in roles:
        with pytest.raises(ReleaseError, match="another key"):
            registry.trusted_keys(state, type(old)({role: old.signers[role]}), publisher.repository)


def test_the_new_root_is_signed_by_the_old_one_and_by_itself(publisher: Any, now: datetime) -> None:
    turn(publisher, "root", now=now)
    first, second = (
        Metadata[Root].from_bytes(publisher.metadata(f"{version}.root.json")) for version in (1, 2)
    )
    for root in (first.signed, second.signed):
        root.verify_delegate("root", second.signed_bytes, second.signatures)
    assert second.signed.expires == now + timedelta(days=365)
    assert second.signed.unrecognized_fields == {"signed_at": "2026-01-01T12:00:00Z"}
    assert read_trusted_root(publisher.keys) == publisher.metadata("2.root.json")


def test_keys_that_are_lost_can_be_replaced_but_roots_cannot(publisher: Any, now: datetime) -> None:
    shutil.rmtree(publisher.keys / "online")
    (publisher.keys / "offline" / "root.pem").rename(publisher.keys / "away")
    with pytest.raises(ReleaseError, match="Restore the offline folder"):
        turn(publisher, *ONLINE, now=now)
    (publisher.keys / "away").rename(publisher.keys / "offline" / "root.pem")
    turn(publisher, *ONLINE, now=now)
    (publisher.keys / "offline" / "targets.pem").unlink()
    turn(publisher, "targets", now=now)
    assert publisher.publish().version == 1
    (publisher.keys / "offline" / "root.pem").unlink()
    with pytest.raises(ReleaseError, match="Restore the offline folder"):
        turn(publisher, "root", now=now)


def test_thresholds_are_kept_until_they_are_changed(tmp_path: Path, now: datetime) -> None:
    from tests.unit.server.release.conftest import Publisher

    made = Publisher(tmp_path / "r", tmp_path / "k")
    quorums = {"root": Quorum(2, 3), "releases": Quorum(2, 2), "timestamp": Quorum(1, 2)}
    initialise(made.repository, made.keys, quorums=quorums, now=now)
    names = {path.relative_to(made.keys).as_posix() for path in made.keys.rglob("*.pem")}
    assert names >= {"offline/root.pem", "offline/root-2.pem", "offline/root-3.pem"}
    assert names >= {"online/releases-2.pem", "online/timestamp-2.pem", "online/snapshot.pem"}
    assert made.publish().version == 1
    (made.keys / "online" / "timestamp.pem").unlink()  # either of two will do
    (made.keys / "offline" / "root-2.pem").unlink()  # and two of three
    turn(made, "root", "releases", now=now)
    state = state_of(made)
    assert (state.root.roles["root"].threshold, len(ids(made)["root"])) == (2, 3)
    assert state.targets.get_delegated_role("releases").threshold == 2
    assert made.publish().version == 2
    key_files(made.keys, "releases")[0].unlink()
    with pytest.raises(ReleaseError, match="needs 2 of its 2 keys, and 1 is given"):
        made.publish()
    turn(made, "root", "releases", quorums={"root": Quorum(1, 1), "releases": Quorum()}, now=now)
    assert made.publish().version == 3
    assert refresh(made.repository, made.keys, now=now, offline=True).root.version == 4
    assert len(key_files(made.keys, "root")) == 1


@pytest.mark.parametrize("numbers", [(0, 1), (2, 1), (1, 17), (-1, 3)])
def test_a_quorum_that_cannot_be_is_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(ReleaseError, match="expected a threshold from 1"):
        Quorum(*numbers)


def test_what_came_after_the_last_good_version_is_withdrawn(publisher: Any, now: datetime) -> None:
    for raw in (b"one", b"two", b"bad", b"worse"):
        publisher.publish(raw)
    publisher.publish(b"other", model="other")
    done = turn(publisher, *ONLINE, last_good={"digits": 2}, now=now)
    assert done.epochs == {"digits": 1}
    found = [(one.model, one.version) for one in history(publisher.repository, publisher.keys)]
    assert found == [("digits", 1), ("digits", 2), ("other", 1)]
    state = state_of(publisher)
    pointer = registry.read_target(publisher.repository, state, "models/digits/release.json")
    assert b'"version":2' in pointer
    assert set(state.targets.targets) == {EPOCHS}
    assert publisher.publish(b"three").version == 3
    refresh(publisher.repository, publisher.keys, now=now, offline=True)
    turn(publisher, *ONLINE, last_good={"other": 1}, now=now)
    epochs = read_epochs(publisher.repository, state_of(publisher))
    assert epochs.epochs == {"digits": 1, "other": 1}


@pytest.mark.parametrize("wrong", [{"digits": 2}, {"digits": 0}, {"other": 1}, {"../x": 1}])
def test_a_version_that_never_was_is_not_gone_back_to(
    publisher: Any, now: datetime, wrong: dict[str, int]
) -> None:
    publisher.publish()
    before = files(publisher.repository, publisher.keys)
    with pytest.raises(ReleaseError, match="there is no version"):
        turn(publisher, *ONLINE, last_good=wrong, now=now)
    assert files(publisher.repository, publisher.keys) == before


def test_a_damaged_version_is_not_gone_back_to(publisher: Any, now: datetime) -> None:
    publisher.publish(b"one")
    publisher.publish(b"two")
    next((publisher.repository / "targets").rglob("1/*.model.onnx")).write_bytes(b"evil")
    with pytest.raises(ReleaseError, match="differs from what was published"):
        turn(publisher, *ONLINE, last_good={"digits": 1}, now=now)
    assert publisher.publish().version == 3


def test_roles_that_are_none_are_named(publisher: Any, now: datetime) -> None:
    with pytest.raises(ReleaseError, match="role 'online': expected one of root"):
        turn(publisher, "online", now=now)
    with pytest.raises(ReleaseError, match="'root': a threshold is given, but"):
        turn(publisher, "targets", quorums={"root": Quorum(1, 2)}, now=now)


def test_a_rotation_that_fails_leaves_all_as_it_was(
    publisher: Any, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.publish()
    before = files(publisher.repository, publisher.keys)

    def full(*_: Any, **__: Any) -> None:
        raise DiskFull("full")

    for place, name in (
        (registry, "write_atomic"),
        (pending, "write_json"),
        (rotation, "add_keys"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(DiskFull):
                turn(publisher, *ROLES, now=now)
        assert files(publisher.repository, publisher.keys) == before
    assert publisher.publish().version == 2


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"../../x": "y"}', b"[" * 9999])
def test_a_pending_file_that_is_none_is_refused(publisher: Any, raw: bytes) -> None:
    (publisher.repository / "metadata" / ".pending.json").write_bytes(raw)
    with pytest.raises(ReleaseError, match=r"\.pending\.json"):
        publisher.publish()


def test_keys_that_count_for_nothing_are_passed_over(publisher: Any, now: datetime) -> None:
    stray = publisher.keys / "online" / "timestamp-7.pem"
    initialise(publisher.keys.parent / "r2", publisher.keys.parent / "k2", now=now)
    stray.write_bytes((publisher.keys.parent / "k2" / "online" / "timestamp.pem").read_bytes())
    assert publisher.publish().version == 1
    done = turn(publisher, "timestamp", now=now)
    assert [path.name for path in done.written] == ["timestamp-2.pem"]
    assert stray in done.removed
