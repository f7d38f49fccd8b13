"""Digests of an array by its cuts."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedcore.updates.piece_digests import CUT_BYTES, cut_digests, cuts_of, digest_of_cuts
from fedcore.updates.pieces import PIECE_BYTES


@pytest.mark.parametrize("size", [0, 1, CUT_BYTES // 4, 3 * CUT_BYTES // 4])
def test_they_are_what_flower_calls_the_chunks(size: int) -> None:
    """So a byte that has come in is hashed once. See `fedcore/updates/piece_digests.py`."""
    array = Array(np.random.default_rng(0).random(size, np.float32))
    chunks = [key for key, one in get_all_nested_objects(array).items() if one is not array]
    assert [*cuts_of(array)] == chunks[: len(chunks)]
    assert len(chunks) == -(-(4 * size + 128) // CUT_BYTES)


def test_another_byte_or_another_length_is_another_digest() -> None:
    values = [b"", b"a", b"b", bytes(CUT_BYTES), bytes(CUT_BYTES + 1), bytes(2 * CUT_BYTES)]
    found = set()
    for raw in values:
        cuts = [*cut_digests(iter(_pieces(raw)), len(raw))]
        found.add(digest_of_cuts(cuts, len(raw)))
    assert len(found) == len(values)


def test_a_value_that_ends_early_is_told() -> None:
    with pytest.raises(OSError, match="ends before its 10 bytes"):
        list(cut_digests(iter([b"abc"]), 10))


def _pieces(raw: bytes) -> list[bytes]:
    return [raw[place : place + PIECE_BYTES] for place in range(0, len(raw), PIECE_BYTES)]
