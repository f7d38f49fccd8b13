from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.delivery.fetch import fetch
from edge_client.delivery.source import Source
from fedcore.artifacts.manifest import FileEntry
from fedcore.errors import DataError, DigestMismatch
from fedcore.files import sha256_hex

DATA = bytes(range(256)) * 4


def entry_of(data: bytes) -> FileEntry:
    return FileEntry(path="models/m/1/model.onnx", sha256=sha256_hex(data), length=len(data))


def serving(data: bytes, asked: list[int], *, chunk: int = 100, break_after: int = -1) -> Source:
    """A source of ``data`` that notes the offsets asked for, and may break off."""

    def read(name: str, offset: int) -> Iterator[bytes]:
        asked.append(offset)
        return chunks(offset)

    def chunks(offset: int) -> Iterator[bytes]:
        for start in range(offset, len(data), chunk):
            if 0 <= break_after <= start:
                raise DataError("the line broke")
            yield data[start : start + chunk]

    return read


def test_the_bytes_arrive_whole(tmp_path: Path) -> None:
    path = fetch(serving(DATA, []), "x", entry_of(DATA), tmp_path)
    assert path.read_bytes() == DATA
    assert list(tmp_path.iterdir()) == [path]


@given(broken_at=st.integers(0, len(DATA)), chunk=st.integers(1, 300))
def test_an_interrupted_fetch_goes_on_where_it_stopped(
    tmp_path_factory: pytest.TempPathFactory, broken_at: int, chunk: int
) -> None:
    folder, asked = tmp_path_factory.mktemp("incoming"), list[int]()
    broken = serving(DATA, asked, chunk=chunk, break_after=broken_at)
    try:
        fetch(broken, "x", entry_of(DATA), folder)
    except DataError:
        pass
    else:
        assert broken_at >= len(DATA) - chunk
    path = fetch(serving(DATA, asked), "x", entry_of(DATA), folder)
    assert path.read_bytes() == DATA
    assert asked[0] == 0
    if len(asked) == 2:  # it asks for the rest alone, and not at all when nothing is missing
        assert broken_at <= asked[1] < broken_at + chunk


def test_a_damaged_beginning_is_fetched_again_once(tmp_path: Path) -> None:
    asked: list[int] = []
    (tmp_path / f"{sha256_hex(DATA)}.part").write_bytes(b"?" * 500)
    assert fetch(serving(DATA, asked), "x", entry_of(DATA), tmp_path).read_bytes() == DATA
    assert asked == [500, 0]


def test_a_beginning_longer_than_the_whole_is_thrown_away(tmp_path: Path) -> None:
    asked: list[int] = []
    (tmp_path / f"{sha256_hex(DATA)}.part").write_bytes(DATA + b"!")
    assert fetch(serving(DATA, asked), "x", entry_of(DATA), tmp_path).read_bytes() == DATA
    assert asked == [0]


@pytest.mark.parametrize("place", [0, 511, len(DATA) - 1])
def test_one_byte_changed_is_refused_and_nothing_is_left(tmp_path: Path, place: int) -> None:
    wrong = bytearray(DATA)
    wrong[place] ^= 1
    asked: list[int] = []
    with pytest.raises(DigestMismatch, match="expected 1024 bytes"):
        fetch(serving(bytes(wrong), asked), "x", entry_of(DATA), tmp_path)
    assert asked == [0]  # nothing lay here that could be to blame
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_never_ends_is_cut_off(tmp_path: Path) -> None:
    taken = 0

    def endless(name: str, offset: int) -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 100
            yield b"x" * 100

    with pytest.raises(DigestMismatch, match="more bytes"):
        fetch(endless, "x", entry_of(DATA), tmp_path)
    assert taken <= len(DATA) + 100
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_short_is_refused_and_its_beginning_kept(tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch, match="the first 1000"):
        fetch(serving(DATA[:1000], []), "x", entry_of(DATA), tmp_path)
    asked: list[int] = []
    assert fetch(serving(DATA, asked), "x", entry_of(DATA), tmp_path).read_bytes() == DATA
    assert asked == [1000]


def test_a_file_that_is_not_there_is_an_error_of_data(tmp_path: Path) -> None:
    def nothing(name: str, offset: int) -> Iterator[bytes]:
        raise FileNotFoundError(name)

    with pytest.raises(DataError, match="lacks this file"):
        fetch(nothing, "x", entry_of(DATA), tmp_path)
