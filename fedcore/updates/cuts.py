"""An array's bytes by cuts, each with a digest: what comes in by cuts is hashed once for all uses.

A cut is what Flower sends an array by, and its digest is the id that Flower gives the cut. A
signature, a journal's value and the network's own check all follow from these digests, so no byte
of a large array is hashed again after it has come in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from flwr.app import Array

from fedcore.updates.pieces import FileArray, pieces, size_of

CUT_BYTES = 5 * 2**20
"""Of every cut but an array's last, which may be shorter."""
_DOMAIN = b"fedcore cuts\x00"


def cut_head(size_bytes: int) -> bytes:
    """What Flower writes before the bytes of a cut; the digest is over both."""
    return b"ArrayChunk  %d\x00" % size_bytes


def cuts_of(array: Array) -> Sequence[str]:
    """SHA-256 of each cut of an array, in hexadecimal; read only where nobody knows them yet."""
    if isinstance(array, FileArray) and array.cuts is not None:
        return array.cuts
    return [*cut_digests(pieces(array), size_of(array))]


def cut_digests(value: Iterator[bytes | memoryview], size_bytes: int) -> Iterator[str]:
    """SHA-256 of each cut of a value of so many bytes, in hexadecimal.

    Args:
        value: Its bytes by pieces that never reach over the end of a cut.
        size_bytes: How many there are.

    Raises:
        OSError: there are fewer.
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
    """One digest, in hexadecimal, over the digests of all cuts of a value.

    Guarantee:
        Two values have the same one only where they have the same bytes, as far as SHA-256 has no
        collisions: the number of bytes says where each is cut.
    """
    found = hashlib.sha256(_DOMAIN + size_bytes.to_bytes(8, "big"))
    for cut in cuts:
        found.update(bytes.fromhex(cut))
    return found.hexdigest()
