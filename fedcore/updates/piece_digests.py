"""Digests of the cuts of an array, so that received bytes are hashed once for all purposes.

A cut is the chunk size in which Flower sends an array, and its digest is Flower's id of the chunk.
Signatures, journal entries and the network's own check all derive from these digests, so no byte
of a large array is hashed again after its arrival.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from flwr.app import Array

from fedcore.updates.pieces import FileArray, pieces, size_of

CUT_BYTES = 5 * 2**20
"""Size of every cut of an array except the last, which may be shorter."""
_DOMAIN = b"fedcore cuts\x00"


def cut_head(size_bytes: int) -> bytes:
    """Returns the header that Flower writes before a cut; the digest covers both."""
    return b"ArrayChunk  %d\x00" % size_bytes


def cuts_of(array: Array) -> Sequence[str]:
    """Returns the SHA-256 of each cut of an array, in hexadecimal; reads the array if unknown."""
    if isinstance(array, FileArray) and array.cuts is not None:
        return array.cuts
    return [*cut_digests(pieces(array), size_of(array))]


def cut_digests(value: Iterator[bytes | memoryview], size_bytes: int) -> Iterator[str]:
    """Yields the SHA-256 of each cut of a value, in hexadecimal.

    Args:
        value: The bytes, in pieces that never cross the end of a cut.
        size_bytes: The number of bytes.

    Raises:
        OSError: there are fewer bytes.
    """
    for start in range(0, size_bytes, CUT_BYTES):
        left = min(CUT_BYTES, size_bytes - start)
        found = hashlib.sha256(cut_head(left))
        while left > 0:
            piece = next(value, b"")
            if not piece:
                raise OSError(f"a value ends before its {size_bytes} bytes")
            found.update(piece)
            left -= len(piece)
        yield found.hexdigest()


def digest_of_cuts(cuts: Sequence[str], size_bytes: int) -> str:
    """Returns one digest, in hexadecimal, over the digests of all cuts of a value.

    Guarantee:
        Equal digests mean equal bytes, unless SHA-256 has a collision: the number of bytes
        determines where each value is cut.
    """
    found = hashlib.sha256(_DOMAIN + size_bytes.to_bytes(8, "big"))
    for cut in cuts:
        found.update(bytes.fromhex(cut))
    return found.hexdigest()
