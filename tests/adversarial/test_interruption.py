"""A device or a publisher that is killed, or whose disk is full or damages what it holds.

Whatever happens, a version that was released answers, and the next try goes through.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_client.delivery import store as installed
from edge_client.delivery.source import folder_source
from fedcore.errors import DigestMismatch, DiskFull, FedcoreError, RollbackRefused, SignatureInvalid
from fedcore.files import write_atomic
from server.release.registry import repository as registry
from server.release.registry.keys import ONLINE


@pytest.mark.parametrize("name", ["model.onnx", "golden.safetensors", "manifest.json"])
def test_one_byte_changed_in_the_store(
    world: Any, name: str, flip: Callable[[Path, int], None]
) -> None:
    world.publish(2.0)
    world.update()
    flip(world.store / "models" / "digits" / "2" / name, 50)
    with pytest.raises(DigestMismatch, match="has changed since it was installed"):
        installed.read(world.store, "digits", "active")
    assert world.answers() == 1.0  # the version before
    assert world.update().changed
    assert world.answers() == 2.0


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "releases.json"])
def test_trusted_metadata_that_was_damaged_does_not_bring_back_an_old_version(
    world: Any, name: str
) -> None:
    shutil.copytree(world.repository, world.folder / "old")
    world.publish(2.0)
    world.update()
    (world.store / "trust" / "metadata" / name).write_bytes(b"")
    with pytest.raises(RollbackRefused):
        world.update(folder_source(world.folder / "old"))
    assert world.answers() == 2.0


def test_a_fetch_that_is_killed_between_chunks_goes_on(world: Any) -> None:
    world.publish(2.0, padding=5_000_000)
    length, whole = world.target("model.onnx").stat().st_size, folder_source(world.repository)

    def killed(name: str, offset: int) -> Iterator[bytes]:
        for number, chunk in enumerate(whole(name, offset)):
            if number == 2:
                raise KeyboardInterrupt
            yield chunk

    with pytest.raises(KeyboardInterrupt):
        world.update(killed)
    assert world.answers() == 1.0
    asked: list[tuple[str, int]] = []

    def noting(name: str, offset: int) -> Iterator[bytes]:
        asked.append((name, offset))
        return whole(name, offset)

    assert world.update(noting).version == 2
    assert world.answers() == 2.0
    (offset,) = [offset for name, offset in asked if name.endswith("model.onnx")]
    assert 0 < offset < length


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_child(work: Callable[[], int]) -> int:
    """Runs ``work`` in a process of its own, which may die; returns its exit status."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying(work: Callable[[], object], step: int) -> Callable[[], int]:
    """``work`` killed before its ``step``-th rename; 0 when it has ended before."""

    def run() -> int:
        left = step

        def rename(path: Path, target: Path, *, really: Callable[..., Path]) -> Path:
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return really(path, target)

        for name in ("rename", "replace"):
            really = getattr(Path, name)
            setattr(Path, name, lambda path, to, really=really: rename(path, to, really=really))
        work()
        return 0

    return run


def test_a_device_that_is_killed_at_any_step_answers_and_recovers(world: Any) -> None:
    world.publish(2.0)
    shutil.copytree(world.store, world.folder / "saved")
    for step in range(100):
        status = in_child(dying(world.update, step))
        factor = world.answers()
        assert factor in (1.0, 2.0)
        assert world.update().version == 2
        assert world.answers() == 2.0
        folder = world.store / "models" / "digits"
        if status == 0:
            assert step > 4  # pinning apart, it takes so many renames
            break
        assert status == 9
        assert {path.name for path in folder.iterdir()} >= {"1", "2", "active", "previous"}
        shutil.rmtree(world.store)
        shutil.copytree(world.folder / "saved", world.store)
    else:
        raise AssertionError("the update never ended")


def test_a_publisher_that_is_killed_at_any_step_leaves_a_release_in_force(world: Any) -> None:
    shutil.copytree(world.repository, world.folder / "saved")
    for step in range(100):
        status = in_child(dying(lambda: world.publish(2.0), step))
        done = world.update()
        assert world.answers() == done.version
        if status == 0:
            assert done.version == 2
            assert step == 7  # four files and three kinds of metadata
            break
        assert (status, done.version) == (9, 1)
    else:
        raise AssertionError("the publication never ended")
    assert world.publish(3.0).version == 3  # what was left lying does no harm
    assert world.update().version == 3


def test_a_rotation_that_is_killed_at_any_step_is_finished_or_never_was(world: Any) -> None:
    for name in ("repository", "keys", "store"):
        shutil.copytree(world.folder / name, world.folder / "saved" / name, symlinks=True)
    versions, refused = set(), 0
    for step in range(100):
        status = in_child(
            dying(lambda: world.rotate("root", *ONLINE, last_good={"digits": 1}), step)
        )
        try:
            world.update()
        except SignatureInvalid:  # between a new root and the timestamp that its keys sign
            refused += 1
        assert world.answers() == 1.0
        root = (world.keys / "root.json").read_bytes()
        assert world.publish(2.0).version == 2  # with the keys that are there, and count
        versions.add(len(list((world.repository / "metadata").glob("*.root.json"))))
        assert world.update().version == 2
        assert world.answers() == 2.0
        if status == 0:
            assert step == 13  # four keys, two files, four of metadata, and three in one step
            assert b'"version":2' in root
            break
        assert status == 9
        for name in ("repository", "keys", "store"):
            shutil.rmtree(world.folder / name)
            shutil.copytree(world.folder / "saved" / name, world.folder / name, symlinks=True)
    else:
        raise AssertionError("the rotation never ended")
    assert versions == {1, 2}
    assert refused == 1


def limited(work: Callable[[], object], max_bytes: int) -> Callable[[], int]:
    """``work`` on a disk that takes no file above a size; 0 when it says `DiskFull`."""

    def run() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
        try:
            work()
        except DiskFull as error:
            return 0 if "no room" in str(error) else 1
        return 2

    return run  # Python ignores SIGXFSZ, so that the write fails with EFBIG


def test_a_full_disk_on_the_device(world: Any) -> None:
    world.publish(2.0, padding=300_000)
    assert in_child(limited(world.update, 100_000)) == 0
    assert world.answers() == 1.0
    assert list((world.store / "incoming").rglob("*.part")) == []
    assert in_child(limited(world.update, 100)) == 0  # not even metadata
    assert world.answers() == 1.0
    assert world.update().version == 2
    assert world.answers() == 2.0


def test_a_full_disk_at_the_publisher(world: Any) -> None:
    before = files(world.repository)
    assert in_child(limited(lambda: world.publish(2.0, padding=300_000), 100_000)) == 0
    assert files(world.repository) == before
    assert not world.update().changed
    assert world.publish(2.0).version == 2


def test_a_publication_that_fails_before_the_timestamp(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = write_atomic

    def failing(path: Path, data: bytes) -> None:
        if path.name == "timestamp.json":
            raise OSError(5, "Input/output error")
        really(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "write_atomic", failing)
        with pytest.raises(OSError, match="Input/output"):
            world.publish(2.0)
    assert not world.update().changed
    assert world.answers() == 1.0
    assert world.publish(3.0).version == 2
    assert world.update().version == 2
    assert world.answers() == 3.0


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + b"{}"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:40]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_of_a_store_is_damaged_nothing_goes_back(world: Any, damage: str) -> None:
    shutil.copytree(world.repository, world.folder / "old")
    world.publish(2.0)
    world.rotate("root")
    assert world.update().version == 2
    shutil.copytree(world.store, world.folder / "whole", symlinks=True)
    paths = [path for path in world.store.rglob("*") if path.is_file() and path.stat().st_size]
    names = [path.relative_to(world.store) for path in paths]
    assert len(names) > 15
    refused = dict[str, str]()
    for name in names:
        if (world.store / name).is_symlink():
            continue
        DAMAGES[damage](world.store / name)
        with pytest.raises(FedcoreError):
            world.update(folder_source(world.folder / "old"))
        try:
            assert world.update().version == 2
            assert world.answers() == 2.0
        except FedcoreError as error:
            refused[name.name] = str(error)
        shutil.rmtree(world.store)
        shutil.copytree(world.folder / "whole", world.store, symlinks=True)
    # What only this device knows is asked for; all else comes back from the repository.
    known = set() if damage == "removed" else {"clock.json", "pinned.root.json", "versions.json"}
    assert set(refused) == known
    assert all(text.isprintable() for text in refused.values())


def test_the_store_holds_plain_files_only(world: Any) -> None:
    for path in (world.store / "models").rglob("*"):
        assert path.suffix in ("", ".json", ".onnx", ".safetensors")
        assert not path.is_symlink()
    active = json.loads((world.store / "models" / "digits" / "active").read_text())
    assert set(active) == {"version", "manifest_sha256"}
