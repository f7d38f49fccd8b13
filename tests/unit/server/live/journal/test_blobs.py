"""Values of a journal that are linked instead of written."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from fedcore.errors import DataError, DiskFull, ResourceError
from fedcore.updates.piece_digests import cuts_of, digest_of_cuts
from fedcore.updates.pieces import CutFile, CutFileArray
from server.live.journal.blobs import Blobs
from server.live.journal.packing import Packing


def joined(folder: Path, values: np.ndarray) -> CutFileArray:
    file = CutFile(folder)
    file.path.write_bytes(values.tobytes())
    array = CutFileArray("float32", values.shape, "numpy.ndarray", file, ())
    array.cuts = None  # type: ignore[assignment]
    array.cuts = cuts_of(array)
    return array


def add(blobs: Blobs, *arrays: CutFileArray) -> list[str]:
    """Adds arrays together, and returns their names."""
    with blobs.adding() as new:
        return [Packing(new).add_array(each)[0] for each in arrays]


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "values")


def test_a_file_that_came_in_becomes_a_value_without_a_copy(blobs: Blobs, tmp_path: Path) -> None:
    array = joined(tmp_path, np.arange(2_000_000, dtype=np.float32))
    with blobs.adding() as new:
        name, size_bytes = Packing(new).add_array(array)
    assert size_bytes == array.size_bytes
    assert blobs.path(name).samefile(array.path)
    before = array.data
    del array  # and with it the name that it came in under
    assert [path.parent.name for path in tmp_path.rglob("*") if path.is_file()] == ["values"]
    assert blobs.checked(name, size_bytes).read_bytes() == before


def test_one_that_is_there_already_is_replaced_by_the_same(blobs: Blobs, tmp_path: Path) -> None:
    """It may be damaged, and nobody reads it again to see."""
    values = np.arange(100_000, dtype=np.float32)
    one, other = joined(tmp_path, values), joined(tmp_path, values)
    (name,), (again,) = (add(blobs, each) for each in (one, one))
    blobs.path(name).write_bytes(b"damaged")
    with pytest.raises(DataError, match="do not match the digest"):
        blobs.checked(name, values.nbytes)
    assert add(blobs, other, other) == [name, name] == [again, again]
    assert blobs.checked(name, values.nbytes).read_bytes() == values.tobytes()
    assert [path.name for path in (tmp_path / "values").iterdir()] == [name]


def test_a_byte_that_was_changed_shows(blobs: Blobs, tmp_path: Path) -> None:
    (name,) = add(blobs, joined(tmp_path, np.zeros(2_000_000, np.float32)))
    with blobs.path(name).open("r+b") as file:
        file.seek(7_000_000)
        file.write(b"\1")
    with pytest.raises(DataError, match="do not match the digest"):
        blobs.checked(name, 8_000_000)
    blobs.path(name).unlink()
    with pytest.raises(DataError, match="cannot read"):
        blobs.checked(name, 8_000_000)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_where_there_are_no_links_it_is_copied(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*names: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    array = joined(tmp_path, np.arange(100_000, dtype=np.float32))
    (name,) = add(blobs, array)
    assert blobs.checked(name, array.size_bytes).read_bytes() == array.data
    assert [path.name for path in (tmp_path / "values").iterdir()] == [name]


class Disk:
    """What is synced, in order, by the kind of file; syncs of files in ``full`` fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: list[str] = []
        self.full: set[Path] = set()
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._noted)

    def _noted(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path in self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._fsync(descriptor)
        self.synced.append("folder" if path.is_dir() else path.suffix or "value")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def some(folder: Path, count: int) -> list[CutFileArray]:
    return [joined(folder, np.full(100_000, place, np.float32)) for place in range(count)]


def test_values_that_are_added_together_are_synced_with_one_sync_of_their_folder(
    blobs: Blobs, tmp_path: Path, disk: Disk
) -> None:
    with blobs.adding() as new:
        names = [Packing(new).add_array(each)[0] for each in some(tmp_path, 3)]
        assert disk.synced == []
        assert {path.name for path in (tmp_path / "values").iterdir()} == {*names}
    assert sorted(disk.synced) == ["folder", "value", "value", "value"]


@pytest.mark.parametrize("place", range(4))
def test_a_disk_that_is_full_leaves_nothing_behind(
    blobs: Blobs, tmp_path: Path, disk: Disk, place: int
) -> None:
    """Whichever file it has no room for, or the folder; what was there before stays."""
    (kept,) = add(blobs, joined(tmp_path, np.zeros(200_000, np.float32)))
    folder = tmp_path / "values"
    arrays = some(tmp_path, 3)
    names = (f"cuts-{digest_of_cuts(one.cuts, one.size_bytes)}" for one in arrays)
    disk.full.add([*(folder / name for name in names), folder][place])
    with pytest.raises(DiskFull, match="No partial file was left"):
        add(blobs, *arrays)
    assert [path.name for path in folder.iterdir()] == [kept]


def test_without_threads_values_are_synced_one_after_another(
    blobs: Blobs, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*given: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    names = add(blobs, *some(tmp_path, 2))
    assert disk.synced == ["value", "value", "folder"]
    full = tmp_path / "values" / names[0]
    full.unlink()
    disk.full.add(full)
    with pytest.raises(DiskFull):
        add(blobs, *some(tmp_path, 1))
    assert [path.name for path in (tmp_path / "values").iterdir()] == names[1:]


def test_a_failure_between_two_values_leaves_neither(blobs: Blobs, tmp_path: Path) -> None:
    one, other = some(tmp_path, 2)
    other.path.unlink()
    with pytest.raises(FileNotFoundError):
        add(blobs, one, other)
    assert list((tmp_path / "values").iterdir()) == []


def test_a_name_that_may_be_used_is_taken_after_its_bytes_are_on_disk(
    blobs: Blobs, tmp_path: Path, disk: Disk
) -> None:
    (one,), (same,) = some(tmp_path, 1), some(tmp_path, 1)
    add(blobs, one)
    disk.synced.clear()
    add(blobs, same)
    assert disk.synced == [".new", "folder"]


def test_a_value_that_is_there_is_durable_even_if_the_folder_was_not(
    blobs: Blobs, tmp_path: Path, disk: Disk
) -> None:
    def put() -> None:
        with blobs.adding() as new:
            new.put(lambda: [b"0" * 100_000])

    disk.full.add(tmp_path / "values")
    with pytest.raises(DiskFull):
        put()
    disk.full.clear()
    put()
    assert disk.synced == [".new", "folder"]


def put(blobs: Blobs, value: bytes) -> str:
    with blobs.adding() as new:
        return new.put(
            lambda: [value[place : place + 2**20] for place in range(0, len(value), 2**20)]
        )


def test_a_value_is_written_once_and_a_damaged_one_again(blobs: Blobs, tmp_path: Path) -> None:
    value = np.random.default_rng(0).bytes(2**24 + 1)
    name = put(blobs, value)
    path = blobs.path(name)
    assert name == hashlib.sha256(value).hexdigest()
    assert path.read_bytes() == value
    inode = path.stat().st_ino
    assert put(blobs, value) == name
    assert path.stat().st_ino == inode
    os.mkfifo(tmp_path / "values" / "pipe")
    longer = put(blobs, value + b"0")
    (tmp_path / "values" / "pipe").unlink()
    assert blobs.path(longer).read_bytes() == value + b"0"
    for place in (0, 2**23):  # seen, or not, by how the value begins
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([value[place] ^ 1]))
        assert put(blobs, value) == name
        assert path.read_bytes() == value
    assert {one.name for one in (tmp_path / "values").iterdir()} == {name, longer}


class Slow:
    """A disk that deletes nothing until it is told to, and then may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.fails = False
        self._unlink = Path.unlink
        slow = self

        def unlink(path: Path, missing_ok: bool = False) -> None:
            if path.name.startswith("cuts-"):
                assert slow.go.wait(30)
                if slow.fails:
                    raise OSError(errno.EROFS, "Read-only file system")
            slow._unlink(path, missing_ok=missing_ok)

        monkeypatch.setattr(Path, "unlink", unlink)


def test_nothing_waits_for_deletions_but_the_next_values(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that is deleted and comes again must not be deleted after it came."""
    (one,), (same,) = some(tmp_path, 1), some(tmp_path, 1)
    names = add(blobs, one)
    slow = Slow(monkeypatch)
    blobs.keep_only([])
    assert [path.name for path in (tmp_path / "values").iterdir()] == names
    threading.Timer(0.05, slow.go.set).start()
    assert add(blobs, same) == names
    blobs.close()
    assert [path.name for path in (tmp_path / "values").iterdir()] == names
    blobs.keep_only([])
    blobs.close()
    assert list((tmp_path / "values").iterdir()) == []


@pytest.mark.parametrize("closes", [False, True])
def test_a_deletion_that_fails_is_told(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closes: bool
) -> None:
    (one,) = some(tmp_path, 1)
    add(blobs, one)
    slow = Slow(monkeypatch)
    slow.fails = True
    slow.go.set()
    blobs.keep_only([])
    with pytest.raises(ResourceError, match="Read-only"):
        blobs.close() if closes else add(blobs)
    blobs.close()
