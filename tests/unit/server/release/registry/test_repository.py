from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import DelegatedRole

from fedcore.errors import DiskFull, ReleaseError
from fedcore.files import write_atomic
from server.release.publish import initialise, refresh
from server.release.registry import repository as registry
from server.release.registry.creation import delegated_paths
from server.release.registry.keys import ONLINE, read_keys, read_trusted_root


def state_of(publisher: Any) -> registry.RepositoryState:
    return registry.read_state(publisher.repository, read_trusted_root(publisher.keys))


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("models/digits/release.json", True),
        ("models/digits/12/model.onnx", True),
        ("models/digits/12/manifest.json", True),
        ("models/digits/12/golden.safetensors", True),
        ("models/digits/12/run.sh", False),
        ("models/digits/model.onnx", False),
        ("models/other/release.json", False),
        ("models/digits/1/2/model.onnx", False),
        ("root.json", False),
        ("apps/digits/12/model.onnx", False),
    ],
)
def test_the_online_key_may_sign_the_files_of_its_models_alone(path: str, allowed: bool) -> None:
    role = DelegatedRole("releases", [], 1, True, delegated_paths(["digits"]))
    assert role.is_delegated_path(path) is allowed


def test_without_names_any_model_may_be_published_but_nothing_else() -> None:
    role = DelegatedRole("releases", [], 1, True, delegated_paths([]))
    assert role.is_delegated_path("models/anything/3/model.onnx")
    assert not role.is_delegated_path("models/anything/3/run.sh")
    assert not role.is_delegated_path("models/a/b/3/model.onnx")


def test_each_role_has_its_key_and_its_expiry(publisher: Any, now: datetime) -> None:
    state = state_of(publisher)
    keys = read_keys(publisher.keys, ("root", "targets", *ONLINE))
    for role in ("root", "targets", "snapshot", "timestamp"):
        assert state.root.get_delegated_role(role).keyids == keys.ids(role)
    assert state.targets.get_delegated_role("releases").keyids == keys.ids("releases")
    assert state.root.consistent_snapshot
    assert state.root.expires == state.targets.expires == now + timedelta(days=365)
    assert state.releases.expires == state.snapshot.expires == now + timedelta(days=30)
    assert state.timestamp.expires == now + timedelta(days=7)


def test_what_follows_from_the_offline_keys_does_not_change_with_a_release(publisher: Any) -> None:
    before = state_of(publisher)
    publisher.publish()
    after = state_of(publisher)
    assert (before.root, before.targets) == (after.root, after.targets)
    assert after.releases.version == before.releases.version + 1
    assert after.snapshot.version == before.snapshot.version + 1
    assert after.timestamp.version == before.timestamp.version + 1


def test_refreshing_moves_expiry_and_keeps_the_releases(publisher: Any, now: datetime) -> None:
    publisher.publish()
    before, later = state_of(publisher), now + timedelta(days=40)  # everything online has expired
    after = refresh(publisher.repository, publisher.keys, now=later, offline=False)
    assert after.releases.targets == before.releases.targets
    assert after.timestamp.expires == later + timedelta(days=7)
    assert after.releases.expires == after.snapshot.expires == later + timedelta(days=30)
    assert after.root == before.root
    assert after == state_of(publisher)


def test_offline_metadata_that_expired_stops_publishing_until_it_is_renewed(
    publisher: Any, now: datetime
) -> None:
    publisher.publish()
    later = now + timedelta(days=366)
    with pytest.raises(ReleaseError, match="--offline"):
        refresh(publisher.repository, publisher.keys, now=later, offline=False)
    after = refresh(publisher.repository, publisher.keys, now=later, offline=True)
    assert (after.root.version, after.targets.version) == (2, 2)
    assert after.root.expires == after.targets.expires == later + timedelta(days=365)
    assert after.targets.get_delegated_role("releases") is not None
    assert after.releases.targets
    again = refresh(publisher.repository, publisher.keys, now=later, offline=False)
    assert again.root.version == 2


def test_renewing_needs_the_offline_keys(publisher: Any, now: datetime) -> None:
    (publisher.keys / "offline" / "root.pem").unlink()
    before = publisher.metadata("timestamp.json")
    with pytest.raises(ReleaseError, match="offline folder"):
        refresh(publisher.repository, publisher.keys, now=now, offline=True)
    assert publisher.metadata("timestamp.json") == before
    assert not (publisher.repository / "metadata" / "2.root.json").exists()


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.releases.json"])
def test_metadata_with_one_byte_changed_is_not_built_upon(publisher: Any, name: str) -> None:
    publisher.publish()
    path = publisher.repository / "metadata" / name
    raw = bytearray(path.read_bytes())
    raw[raw.index(b'"version":') + len(b'"version":')] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ReleaseError, match="does not verify"):
        publisher.publish()


def test_metadata_of_another_type_is_refused(publisher: Any) -> None:
    path = publisher.repository / "metadata"
    (path / "timestamp.json").write_bytes((path / "1.root.json").read_bytes())
    with pytest.raises(ReleaseError, match="does not verify"):
        state_of(publisher)
    (path / "timestamp.json").unlink()
    with pytest.raises(ReleaseError, match="does not exist"):
        state_of(publisher)


def test_a_root_put_there_by_others_is_not_followed(publisher: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    initialise(other / "repository", other / "keys", now=datetime.now().astimezone())
    theirs = other / "repository" / "metadata" / "1.root.json"
    (publisher.repository / "metadata" / "2.root.json").write_bytes(theirs.read_bytes())
    with pytest.raises(ReleaseError, match="does not verify"):
        state_of(publisher)


def test_a_published_file_that_changed_is_not_read(publisher: Any) -> None:
    manifest = publisher.publish()
    path = next((publisher.repository / "targets").rglob("*.model.onnx"))
    state = state_of(publisher)
    assert registry.read_target(publisher.repository, state, manifest.onnx.path) == b"model"
    path.write_bytes(b"modem")
    with pytest.raises(ReleaseError, match="differs from what was published"):
        registry.read_target(publisher.repository, state, manifest.onnx.path)


def test_failing_at_any_write_leaves_what_was_and_no_rubbish(
    publisher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.publish()
    files = {path: path.read_bytes() for path in publisher.repository.rglob("*") if path.is_file()}
    real = write_atomic
    for stop in range(7):  # 4 files, releases, snapshot, timestamp
        count = 0

        def failing(path: Path, data: bytes, *, stop: int = stop) -> None:
            nonlocal count
            if count == stop:
                raise DiskFull(f"{path}: full")
            count += 1
            real(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(registry, "write_atomic", failing)
            with pytest.raises(DiskFull):
                publisher.publish(b"second")
        now_there = {
            path: path.read_bytes() for path in publisher.repository.rglob("*") if path.is_file()
        }
        assert now_there == files, stop
    assert publisher.publish(b"second").version == 2


def test_a_failure_after_the_switch_leaves_the_new_release_whole(
    publisher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = write_atomic

    def failing(path: Path, data: bytes) -> None:
        real(path, data)
        if path.name == "timestamp.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "write_atomic", failing)
        with pytest.raises(KeyboardInterrupt):
            publisher.publish(b"first")
    state = state_of(publisher)
    assert registry.read_target(publisher.repository, state, "models/digits/1/model.onnx")


def test_metadata_is_plain_json_without_secrets(publisher: Any) -> None:
    publisher.publish()
    for path in (publisher.repository / "metadata").iterdir():
        text = path.read_text()
        assert {"signed", "signatures"} == set(json.loads(text))
        assert "PRIVATE" not in text


def test_what_a_killed_process_left_half_written_goes_under_the_lock(publisher: Any) -> None:
    names = ("metadata/.timestamp.json.abcdefgh", "targets/models/digits/.x.onnx.abcdefgh")
    for name in names:
        (publisher.repository / name).parent.mkdir(parents=True, exist_ok=True)
        (publisher.repository / name).touch()
    with registry.locked(publisher.repository):
        assert not [*publisher.repository.rglob(".*.abcdefgh")]
    state_of(publisher)
