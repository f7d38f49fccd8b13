"""Values of a journal that are linked instead of written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from fedcore.errors import DataError, DiskFull
from fedcore.updates.piece_digests import cuts_of
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


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "values")


def test_a_file_that_came_in_becomes_a_value_without_a_copy(blobs: Blobs, tmp_path: Path) -> None:
    array = joined(tmp_path, np.arange(2_000_000, dtype=np.float32))
    name, size_bytes = Packing(blobs).add_array(array)
    assert size_bytes == array.size_bytes
    assert blobs.path(name).samefile(array.path)
    before = array.data
    del array  # and with it the name that it came in under
    assert [path.parent.name for path in tmp_path.rglob("*") if path.is_file()] == ["values"]
    assert blobs.checked(name).read_bytes() == before


def test_one_that_is_there_already_is_replaced_by_the_same(blobs: Blobs, tmp_path: Path) -> None:
    """It may be damaged, and nobody reads it again to see."""
    values = np.arange(100_000, dtype=np.float32)
    one, other = joined(tmp_path, values), joined(tmp_path, values)
    (name, _), (again, _) = (Packing(blobs).add_array(each) for each in (one, one))
    blobs.path(name).write_bytes(b"damaged")
    with pytest.raises(DataError, match="do not match the digest"):
        blobs.checked(name)
    assert Packing(blobs).add_array(other)[0] == name == again
    assert blobs.checked(name).read_bytes() == values.tobytes()
    assert [path.name for path in (tmp_path / "values").iterdir()] == [name]


def test_a_byte_that_was_changed_shows(blobs: Blobs, tmp_path: Path) -> None:
    name, _ = Packing(blobs).add_array(joined(tmp_path, np.zeros(2_000_000, np.float32)))
    with blobs.path(name).open("r+b") as file:
        file.seek(7_000_000)
        file.write(b"\1")
    with pytest.raises(DataError, match="do not match the digest"):
        blobs.checked(name)
    blobs.path(name).unlink()
    with pytest.raises(DataError, match="cannot read"):
        blobs.checked(name)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_where_there_are_no_links_it_is_copied(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*names: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    array = joined(tmp_path, np.arange(100_000, dtype=np.float32))
    name, _ = Packing(blobs).add_array(array)
    assert blobs.checked(name).read_bytes() == array.data
    assert [path.name for path in (tmp_path / "values").iterdir()] == [name]


def test_a_disk_that_is_full_leaves_nothing_behind(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        Packing(blobs).add_array(joined(tmp_path, np.arange(100_000, dtype=np.float32)))
    assert list((tmp_path / "values").iterdir()) == []


def test_a_new_name_stands_for_nothing_until_its_bytes_are_on_disk(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First its bytes, then its folder; a name that something may refer to is taken last."""
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append("folder" if path.is_dir() else path.suffix or "value")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    values = np.arange(100_000, dtype=np.float32)
    (name, _), (again, _) = (Packing(blobs).add_array(joined(tmp_path, values)) for _ in range(2))
    assert name == again
    assert synced == ["value", "folder", ".new", "folder"]
