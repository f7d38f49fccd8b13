"""Arrays in files: the same bytes as in memory, one piece at a time."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedcore.updates.pieces import PIECE_BYTES, FileArray, pieces, size_of

RAW = np.random.default_rng(0).bytes(2 * PIECE_BYTES + 5)


def in_file(folder: Path, raw: bytes = RAW) -> FileArray:
    path = folder / "array"
    path.write_bytes(raw)
    return FileArray("float32", (3,), "numpy.ndarray", path.open("rb"))


@pytest.fixture(params=["memory", "file"])
def array(request: pytest.FixtureRequest, tmp_path: Path) -> Array:
    return (
        Array("float32", (3,), "numpy.ndarray", RAW)
        if request.param == "memory"
        else in_file(tmp_path)
    )


def test_pieces_are_all_of_it_in_order(array: Array) -> None:
    assert size_of(array) == len(RAW)
    assert b"".join(pieces(array)) == RAW == array.data
    assert b"".join(pieces(array, 128)) == RAW[128:]
    assert [len(piece) for piece in pieces(array)] == [PIECE_BYTES, PIECE_BYTES, 5]


def test_an_empty_array_has_no_pieces(tmp_path: Path) -> None:
    assert list(pieces(Array("float32", (0,), "numpy.ndarray", b""))) == []
    assert list(pieces(in_file(tmp_path, b""))) == []


def test_it_is_an_array_as_any_other(tmp_path: Path) -> None:
    array, plain = in_file(tmp_path), Array("float32", (3,), "numpy.ndarray", RAW)
    assert (array.dtype, array.shape, array.stype) == (plain.dtype, plain.shape, plain.stype)
    assert array.object_id == plain.object_id


def test_a_file_that_was_removed_is_read_and_one_that_was_cut_is_not(tmp_path: Path) -> None:
    array = in_file(tmp_path)
    (tmp_path / "array").unlink()
    assert array.data == RAW
    cut = in_file(tmp_path)
    os.truncate(tmp_path / "array", 10)
    with pytest.raises(OSError, match="ends after 10 bytes"):
        list(pieces(cut))


def test_the_file_is_closed_with_the_array(tmp_path: Path) -> None:
    array = in_file(tmp_path)
    file: IO[bytes] = array.file
    record = ArrayRecord()
    record["model"] = array
    del array
    assert not file.closed
    del record
    gc.collect()
    assert file.closed
