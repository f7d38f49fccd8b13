from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from fedcore.artifacts.golden import MAX_GOLDEN_BYTES
from fedcore.artifacts.manifest import NamedOutput, NamedTensor, TestStatement, parse_manifest
from fedcore.errors import DiskFull, FedcoreError, ReleaseError
from fedcore.files import sha256_hex
from server.release import publish as release
from server.release.draft import Draft
from server.release.publish import history, initialise, publish, rollback
from server.release.registry import repository as registry
from server.release.registry.keys import read_trusted_root


def current(publisher: Any, model: str = "digits") -> bytes:
    state = registry.read_state(publisher.repository, read_trusted_root(publisher.keys))
    return registry.read_target(publisher.repository, state, f"models/{model}/release.json")


def test_versions_grow_by_one_and_each_model_has_its_own(publisher: Any) -> None:
    assert [publisher.publish(b"%d" % n).version for n in range(3)] == [1, 2, 3]
    assert publisher.publish(model="other").version == 1
    assert publisher.publish().version == 4


def test_the_manifest_names_each_file_with_its_digest(publisher: Any) -> None:
    manifest = publisher.publish(b"weights")
    assert manifest.onnx.path == "models/digits/1/model.onnx"
    assert manifest.golden.path == "models/digits/1/golden.safetensors"
    assert (manifest.onnx.sha256, manifest.onnx.length) == (sha256_hex(b"weights"), 7)
    assert manifest.created == "2026-01-01T12:00:00Z"
    assert parse_manifest(current(publisher)) == manifest


def test_the_same_draft_at_the_same_moment_gives_the_same_manifest(
    publisher: Any, tmp_path: Path
) -> None:
    initialise(tmp_path / "r2", tmp_path / "k2", now=datetime(2026, 1, 1, tzinfo=UTC))
    other = type(publisher)(tmp_path / "r2", tmp_path / "k2")
    publisher.publish()
    other.publish()
    assert current(publisher) == current(other)


def test_publishing_needs_no_offline_key(publisher: Any) -> None:
    shutil.rmtree(publisher.keys / "offline")
    assert publisher.publish().version == 1


def test_a_moment_in_another_time_zone_is_told_in_utc(publisher: Any, draft: Any) -> None:
    moment = datetime(2026, 1, 1, 14, 30, tzinfo=timezone(timedelta(hours=2)))
    manifest = publish(
        draft(), repository=publisher.repository, keys=publisher.keys, created=moment
    )
    assert manifest.created == "2026-01-01T12:30:00Z"
    with pytest.raises(ValueError, match="time zone"):
        publish(
            draft(),
            repository=publisher.repository,
            keys=publisher.keys,
            created=moment.replace(tzinfo=None),
        )


def test_rolling_back_publishes_the_old_bytes_under_a_new_version(
    publisher: Any, now: datetime
) -> None:
    first = publisher.publish(b"good")
    publisher.publish(b"bad")
    manifest = rollback(
        "digits", 1, repository=publisher.repository, keys=publisher.keys, created=now
    )
    assert manifest.version == 3
    assert manifest.lineage.rollback_of == 1
    assert manifest.onnx.sha256 == first.onnx.sha256
    assert manifest.onnx.path == "models/digits/3/model.onnx"
    assert parse_manifest(current(publisher)) == manifest
    assert [m.version for m in history(publisher.repository, publisher.keys)] == [1, 2, 3]


@pytest.mark.parametrize("version", [0, 2, 3, -1])
def test_only_an_older_version_can_be_rolled_back_to(
    publisher: Any, now: datetime, version: int
) -> None:
    publisher.publish()
    publisher.publish()
    before = current(publisher)
    with pytest.raises(ReleaseError, match=r"older than the current version 2 are: 1"):
        rollback(
            "digits", version, repository=publisher.repository, keys=publisher.keys, created=now
        )
    assert current(publisher) == before


def test_rolling_back_damaged_bytes_is_refused(publisher: Any, now: datetime) -> None:
    publisher.publish(b"good")
    publisher.publish(b"bad")
    next((publisher.repository / "targets").rglob("1/*.model.onnx")).write_bytes(b"evil")
    with pytest.raises(ReleaseError, match="differs from what was published"):
        rollback("digits", 1, repository=publisher.repository, keys=publisher.keys, created=now)
    assert parse_manifest(current(publisher)).version == 2


@pytest.mark.parametrize(
    "name", ["", "../digits", "a/b", "Digits", "-x", "a" * 65, "digits\n", ".", "*", "di gits"]
)
def test_a_name_that_could_lead_elsewhere_is_refused(
    publisher: Any, draft: Any, now: datetime, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ReleaseError, match="model name"):
        publisher.publish(model=name)
    with pytest.raises(ReleaseError, match="model name"):
        rollback(name, 1, repository=publisher.repository, keys=publisher.keys, created=now)
    with pytest.raises(ReleaseError, match="model name"):
        initialise(tmp_path / "r2", tmp_path / "k2", models=[name], now=now)
    assert not (tmp_path / "r2").exists()


def test_models_that_were_not_named_cannot_be_published(
    tmp_path: Path, now: datetime, draft: Any
) -> None:
    repository, keys = tmp_path / "r", tmp_path / "k"
    initialise(repository, keys, models=["digits", "letters"], now=now)
    assert publish(draft(), repository=repository, keys=keys, created=now).version == 1
    with pytest.raises(ReleaseError, match="'other'"):
        publish(draft(model="other"), repository=repository, keys=keys, created=now)


def test_keys_of_another_repository_are_refused(
    publisher: Any, tmp_path: Path, now: datetime, draft: Any
) -> None:
    initialise(tmp_path / "r2", tmp_path / "k2", now=now)
    before = current_bytes(publisher)
    with pytest.raises(ReleaseError, match="does not verify"):
        publish(draft(), repository=publisher.repository, keys=tmp_path / "k2", created=now)
    # the right root, but a private key of others
    stolen = tmp_path / "k2" / "online" / "releases.pem"
    (publisher.keys / "online" / "releases.pem").write_bytes(stolen.read_bytes())
    with pytest.raises(ReleaseError, match="another key"):
        publisher.publish()
    assert current_bytes(publisher) == before


def current_bytes(publisher: Any) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in publisher.repository.rglob("*.json")}


def test_missing_keys_or_repository_are_told_apart(
    publisher: Any, tmp_path: Path, now: datetime, draft: Any
) -> None:
    with pytest.raises(ReleaseError, match="no release repository"):
        publish(draft(), repository=tmp_path / "none", keys=publisher.keys, created=now)
    with pytest.raises(ReleaseError, match="private key"):
        publish(draft(), repository=publisher.repository, keys=tmp_path / "none", created=now)
    (publisher.keys / "root.json").unlink()
    with pytest.raises(ReleaseError, match="trusted root"):
        publisher.publish()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"onnx": b""}, "its model has 0 bytes"),
        ({"golden": b""}, "its golden file has 0 bytes"),
        ({"golden": b"x" * (MAX_GOLDEN_BYTES + 1)}, "its golden file"),
        ({"golden": b"no safetensors"}, "golden"),
        ({"labels": ("x" * 600_000, "y" * 600_000)}, "manifest would have"),
    ],
)
def test_what_devices_would_refuse_is_not_published(
    publisher: Any, draft: Any, now: datetime, change: dict[str, Any], match: str
) -> None:
    with pytest.raises(ReleaseError, match=match):
        publish(
            replace(draft(), **change),
            repository=publisher.repository,
            keys=publisher.keys,
            created=now,
        )
    assert publisher.publish().version == 1


def test_a_list_of_files_longer_than_devices_read_is_refused(
    publisher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.publish()
    size = len(publisher.metadata("2.releases.json"))
    monkeypatch.setattr(registry, "MAX_METADATA_BYTES", size + 10)
    with pytest.raises(ReleaseError, match="start a new repository"):
        publisher.publish()
    assert parse_manifest(current(publisher)).version == 1


def test_publishers_take_turns(publisher: Any) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda n: publisher.publish(b"%d" % n), range(8)))
    assert sorted(manifest.version for manifest in done) == list(range(1, 9))
    assert len(history(publisher.repository, publisher.keys)) == 8
    assert parse_manifest(current(publisher)).version == 8


def test_history_tells_models_and_versions_apart(publisher: Any) -> None:
    assert history(publisher.repository, publisher.keys) == ()
    publisher.publish(model="b")
    publisher.publish(model="a")
    publisher.publish(model="b")
    found = [(m.model, m.version) for m in history(publisher.repository, publisher.keys)]
    assert found == [("a", 1), ("b", 1), ("b", 2)]


def test_initialising_overwrites_nothing(publisher: Any, tmp_path: Path, now: datetime) -> None:
    before = current_bytes(publisher)
    with pytest.raises(ReleaseError, match="expected an empty folder"):
        initialise(publisher.repository, tmp_path / "k2", now=now)
    with pytest.raises(ReleaseError, match="already exist"):
        initialise(tmp_path / "r2", publisher.keys, now=now)
    assert current_bytes(publisher) == before
    assert not (tmp_path / "k2").exists()
    assert not (tmp_path / "r2").exists()
    assert publisher.publish().version == 1


@pytest.mark.parametrize("inside", ["", "keys", "metadata/../deep/keys"])
def test_keys_within_the_repository_would_be_delivered(
    tmp_path: Path, now: datetime, inside: str
) -> None:
    with pytest.raises(ReleaseError, match="is inside"):
        initialise(tmp_path / "r", tmp_path / "r" / inside, now=now)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("stop", ["write_keys", "write_atomic"])
def test_an_initialisation_that_fails_can_be_run_again(
    tmp_path: Path, now: datetime, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    repository, keys = tmp_path / "r", tmp_path / "k"

    def full(*arguments: Any) -> None:
        raise DiskFull("full")

    with monkeypatch.context() as patch:
        patch.setattr(release, stop, full)
        with pytest.raises(DiskFull):
            initialise(repository, keys, now=now)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    shutil.rmtree(repository)
    assert initialise(repository, keys, now=now).exists()


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path, now: datetime) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FedcoreError, match="cannot write this file"):
        initialise(tmp_path / "file" / "r", tmp_path / "k", now=now)
    assert not (tmp_path / "k").exists()


def test_a_rollback_keeps_all_that_the_manifest_says(
    publisher: Any, draft: Callable[..., Draft], now: datetime
) -> None:
    """A field that the copy forgets would be the default one: no test, no named inputs."""
    numbers = {"dtype": "float32", "shape": (2,)}
    output = {"name": "y", "shape": (2,), "presentation": "values", "tolerance": 1e-3}
    first = replace(
        draft(),
        kind="own",
        presentation="label",
        missing="all",
        inputs=(NamedTensor.model_validate({"name": "x", **numbers}),),
        outputs=(NamedOutput.model_validate(output),),
        test=TestStatement(
            metric="accuracy", examples=9, federated=0.9, released=0.8, drop=0.1, clients=3
        ),
    )
    unset = {each.name for each in fields(Draft) if getattr(first, each.name) is None}
    assert unset == {"canary"}
    place = {"repository": publisher.repository, "keys": publisher.keys}
    old = publish(first, created=now, **place)
    publisher.publish(b"worse")
    new = rollback("digits", 1, created=now, **place)
    both = [
        each.model_dump(exclude={"version", "onnx", "golden", "lineage"}) for each in (old, new)
    ]
    assert both[0] == both[1]
    assert new.lineage.model_copy(update={"rollback_of": None}) == old.lineage
    assert new.onnx.sha256 == old.onnx.sha256
