"""A repository's copy in a bucket, here one in memory: what goes there, in which order, and what
is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest

from fedcore.errors import ConfigError, ReleaseError, ResourceError
from server.release import bucket as buckets
from server.release.bucket import Bucket, ConditionFailed, open_bucket
from server.release.publish import initialise, refresh
from server.release.push import TIMESTAMP, check_push, push, push_published
from server.release.registry.rotation import rotate
from tests.unit.server.release.conftest import Publisher

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
PREFIX = "/fleet-of-tests"
TO = f"memory:/{PREFIX}/releases"


@pytest.fixture
def objects() -> Iterator[dict[str, bytes]]:
    """The objects of the bucket in memory, by name; writable."""
    files = fsspec.filesystem("memory")

    class Objects(dict[str, bytes]):
        def __getitem__(self, name: str) -> bytes:
            return bytes(files.cat_file(f"{PREFIX}/releases/{name}"))

        def __setitem__(self, name: str, data: bytes) -> None:
            files.pipe_file(f"{PREFIX}/releases/{name}", data)

        def __iter__(self) -> Iterator[str]:
            return iter(name.removeprefix(f"{PREFIX}/releases/") for name in files.find(PREFIX))

    yield Objects()
    if files.exists(PREFIX):
        files.rm(PREFIX, recursive=True)


def copied(publisher: Publisher, folder: Path) -> Publisher:
    shutil.copytree(publisher.repository, folder)
    return Publisher(folder, publisher.keys)


def test_files_go_first_and_the_timestamp_last(
    publisher: Publisher, objects: dict[str, bytes]
) -> None:
    publisher.publish(b"one")
    told: list[str] = []
    done = push(
        publisher.repository, publisher.keys, TO, on_upload=lambda name, length: told.append(name)
    )
    assert tuple(told) == done.uploaded
    kinds = [name.partition("/")[0] for name in told]
    assert kinds == sorted(kinds, reverse=True)
    assert told[-5:] == [
        "metadata/1.targets.json",
        "metadata/2.releases.json",
        "metadata/2.snapshot.json",
        "metadata/1.root.json",
        TIMESTAMP,
    ]
    assert set(objects) == set(told)
    assert all(objects[name] == (publisher.repository / name).read_bytes() for name in told)
    assert (done.version, done.files, done.repaired) == (2, len(told), ())
    assert done.uploaded_bytes == sum(len(objects[name]) for name in told)


def test_a_push_adds_only_what_is_new(publisher: Publisher, objects: dict[str, bytes]) -> None:
    publisher.publish(b"one")
    push(publisher.repository, publisher.keys, TO)
    assert push(publisher.repository, publisher.keys, TO).uploaded == ()
    publisher.publish(b"two")
    added = push(publisher.repository, publisher.keys, TO)
    assert not [name for name in added.uploaded if "/1/" in name]
    assert added.uploaded[-1] == TIMESTAMP
    assert added.unnamed == 1  # the pointer to version 1
    refresh(publisher.repository, publisher.keys, now=NOW, offline=False)
    renewed = push(publisher.repository, publisher.keys, f"{TO}/")
    assert renewed.uploaded == (
        "metadata/4.releases.json",
        "metadata/4.snapshot.json",
        TIMESTAMP,
    )


def test_keys_and_locks_stay_here(publisher: Publisher, objects: dict[str, bytes]) -> None:
    push(publisher.repository, publisher.keys, TO)
    assert all(name.endswith(".json") for name in objects)
    assert not any(b"PRIVATE" in objects[name] for name in objects)


def test_a_push_that_broke_off_goes_on(
    publisher: Publisher, objects: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.publish(b"one")
    push(publisher.repository, publisher.keys, TO)
    before = objects[TIMESTAMP]
    publisher.publish(b"two")
    writing, left = Bucket._put, [2]

    def breaking(self: Bucket, *rest: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise ConnectionResetError("cut")
        writing(self, *rest)

    monkeypatch.setattr(Bucket, "_put", breaking)
    with pytest.raises(ReleaseError, match=r"ConnectionResetError: cut.*push` again"):
        push(publisher.repository, publisher.keys, TO)
    assert objects[TIMESTAMP] == before
    monkeypatch.setattr(Bucket, "_put", writing)
    done = push(publisher.repository, publisher.keys, TO)
    assert objects[TIMESTAMP] == publisher.metadata("timestamp.json")
    assert done.repaired == ()
    assert len([name for name in done.uploaded if name.startswith("targets/")]) == 2


def test_a_damaged_upload_is_found_before_the_timestamp(
    publisher: Publisher, objects: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = Bucket._put
    monkeypatch.setattr(
        Bucket, "_put", lambda self, name, data, told: writing(self, name, data[:-1] + b"?", told)
    )
    with pytest.raises(ReleaseError, match="not in the bucket as it was uploaded"):
        push(publisher.repository, publisher.keys, TO)
    assert TIMESTAMP not in set(objects)


def test_objects_that_differ_are_repaired_and_named(
    publisher: Publisher, objects: dict[str, bytes]
) -> None:
    publisher.publish(b"one")
    push(publisher.repository, publisher.keys, TO)
    (model,) = (name for name in objects if name.endswith(".model.onnx"))
    good = objects[model]
    objects[model] = b"two"  # as long as it was
    objects["metadata/2.snapshot.json"] = b"{}"
    done = push(publisher.repository, publisher.keys, TO)
    assert set(done.repaired) == {model, "metadata/2.snapshot.json"}
    assert objects[model] == good


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff" * 99, b"[" * 100_000, b"x" * 6_000_000])
def test_a_timestamp_that_nobody_signed_is_replaced(
    publisher: Publisher, objects: dict[str, bytes], raw: bytes
) -> None:
    push(publisher.repository, publisher.keys, TO)
    objects[TIMESTAMP] = raw
    done = push(publisher.repository, publisher.keys, TO)
    assert (done.uploaded, done.repaired) == ((TIMESTAMP,), (TIMESTAMP,))
    assert objects[TIMESTAMP] == publisher.metadata("timestamp.json")


def test_a_newer_timestamp_is_never_replaced(
    publisher: Publisher, objects: dict[str, bytes], tmp_path: Path
) -> None:
    older = copied(publisher, tmp_path / "older")
    publisher.publish(b"one")
    push(publisher.repository, publisher.keys, TO)
    before = objects[TIMESTAMP]
    with pytest.raises(ReleaseError, match=r"has version 2 of the timestamp.*has 1"):
        push(older.repository, older.keys, TO)
    with pytest.raises(ReleaseError, match="devices never go back"):
        check_push(older.repository, older.keys, TO)
    assert objects[TIMESTAMP] == before


def test_a_second_publisher_cannot_withdraw_what_the_first_published(
    publisher: Publisher, objects: dict[str, bytes], tmp_path: Path
) -> None:
    other = copied(publisher, tmp_path / "other")
    publisher.publish(b"one")
    other.publish(b"two")
    push(publisher.repository, publisher.keys, TO)
    before = objects[TIMESTAMP]
    with pytest.raises(ReleaseError, match="has version 2 of the timestamp"):
        push(other.repository, other.keys, TO)
    other.publish(b"three")
    with pytest.raises(ReleaseError, match=r"does not have the bucket's 2\.snapshot\.json"):
        push(other.repository, other.keys, TO)
    assert objects[TIMESTAMP] == before


def test_a_publisher_that_is_overtaken_meanwhile_is_told(
    publisher: Publisher, objects: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(*_: Any) -> None:
        raise ConditionFailed

    monkeypatch.setattr(Bucket, "replace", overtaken)
    with pytest.raises(ReleaseError, match="another publisher replaced the timestamp"):
        push(publisher.repository, publisher.keys, TO)
    monkeypatch.setattr(Bucket, "replace", lambda self, name, data, before: None)
    with pytest.raises(ReleaseError, match="another publisher replaced the timestamp"):
        push(publisher.repository, publisher.keys, TO)


def test_another_repository_is_left_alone(
    publisher: Publisher, objects: dict[str, bytes], tmp_path: Path
) -> None:
    initialise(tmp_path / "b", tmp_path / "kb", now=NOW)
    push(tmp_path / "b", tmp_path / "kb", TO)
    before = objects[TIMESTAMP]
    with pytest.raises(ReleaseError, match="another repository is there"):
        push(publisher.repository, publisher.keys, TO)
    with pytest.raises(ReleaseError, match="does not verify"):
        push(publisher.repository, tmp_path / "kb", TO)
    assert objects[TIMESTAMP] == before


def test_a_rotation_follows_and_retires_what_a_thief_signed(
    publisher: Publisher, objects: dict[str, bytes], tmp_path: Path
) -> None:
    thief = Publisher(tmp_path / "thief", tmp_path / "stolen")
    shutil.copytree(publisher.repository, thief.repository)
    shutil.copytree(publisher.keys, thief.keys)
    for raw in (b"one", b"two", b"three"):
        thief.publish(raw)
    push(thief.repository, thief.keys, TO)
    with pytest.raises(ReleaseError, match="devices never go back"):
        push(publisher.repository, publisher.keys, TO)
    rotate(publisher.repository, publisher.keys, roles=["timestamp", "snapshot"], now=NOW)
    done = push(publisher.repository, publisher.keys, TO)
    assert done.uploaded[-2:] == ("metadata/2.root.json", TIMESTAMP)
    assert TIMESTAMP not in done.repaired
    assert objects[TIMESTAMP] == publisher.metadata("timestamp.json")
    with pytest.raises(ReleaseError, match=r"newer root, metadata/2\.root\.json"):
        push(thief.repository, thief.keys, TO)


def test_a_planted_root_is_named(publisher: Publisher, objects: dict[str, bytes]) -> None:
    push(publisher.repository, publisher.keys, TO)
    objects["metadata/2.root.json"] = objects["metadata/1.root.json"].replace(b"2027", b"2037")
    with pytest.raises(ReleaseError, match="not signed by the keys of root 1"):
        push(publisher.repository, publisher.keys, TO)


def test_a_damaged_file_here_is_not_pushed(publisher: Publisher, objects: dict[str, bytes]) -> None:
    publisher.publish(b"one")
    (model,) = publisher.repository.rglob("*.model.onnx")
    model.write_bytes(b"two")
    with pytest.raises(ReleaseError, match="differs from what was published"):
        push(publisher.repository, publisher.keys, TO)
    assert TIMESTAMP not in set(objects)


def test_a_folder_without_a_repository_gets_no_lock(tmp_path: Path, publisher: Publisher) -> None:
    with pytest.raises(ReleaseError, match="no release repository here"):
        push(tmp_path / "none", publisher.keys, TO)
    assert not (tmp_path / "none").exists()


def test_a_failed_push_says_that_the_version_is_published(
    publisher: Publisher, tmp_path: Path
) -> None:
    manifest = publisher.publish(b"one")
    with pytest.raises(ReleaseError, match=r"digits version 1 is published in .* not pushed: "):
        push_published(manifest, publisher.repository, tmp_path, TO)
    assert push_published(manifest, publisher.repository, publisher.keys, None) == []


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("releases", "such as s3://releases/fleet"),
        ("s3://", "such as s3://releases/fleet"),
        ("s3://[/x", "such as s3://releases/fleet"),
        ("s3://bucket/two words", "printable ASCII"),
        ("https://bucket.example.org/fleet", "devices read it by https"),
        ("file:///tmp/x", "a bucket"),
        ("simplecache::s3://bucket/x", "one"),
        ("nosuch://bucket/x", "no plugin for nosuch://"),
    ],
)
def test_addresses_that_name_no_bucket_are_refused(url: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        open_bucket(url)


@pytest.mark.parametrize(
    "url", ["s3://me:hunter2@bucket/x", "s3://bucket/x?secret=hunter2", "s3://bucket/x#hunter2"]
)
def test_credentials_in_an_address_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="Credentials come from the environment") as refused:
        open_bucket(url)
    assert "hunter2" not in str(refused.value)


def test_a_missing_plugin_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str, **_: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ResourceError, match=r"s3:// is not installed.*fedcore\[s3\]"):
        open_bucket("s3://bucket/fleet")
    with pytest.raises(ResourceError, match=r"gs:// is not installed.*Install s3fs to access"):
        open_bucket("gs://bucket/fleet")


def test_a_bucket_shows_its_address_alone() -> None:
    assert repr(open_bucket(TO)) == f"Bucket(url='{TO}')"


def test_fingerprints_are_those_of_one_upload_and_of_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buckets, "_PART_BYTES", 2)
    assert buckets._fingerprints(b"abcd") == {
        "e2fc714c4727ee9395f324cd2e7f331f",
        "e700b3f8d01367198b7ee8450c5bec97-2",
    }
    assert not buckets.StoredObject(3, "e2fc714c4727ee9395f324cd2e7f331f").surely_holds(b"abcd")
