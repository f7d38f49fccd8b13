"""Conversion of progress and replies to journal entries and back.

An entry is a JSON document and a byte string. The document contains a place for each array: a
range of the byte string, or for a large array the name of a file in `Blobs`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from fedcore.errors import DataError
from fedcore.flower.records import read_record, record_bytes
from fedcore.observability.foreign import foreign
from fedcore.updates.messages import ENVELOPE
from fedcore.updates.pieces import CutFileArray, PathArray, pieces, size_of
from fedcore.updates.seal import ReplySignature
from server.live.journal.blobs import Blobs, NewBlobs, Pieces
from server.live.journal.entries import Entries, JournalEntry, format_checked, new_entry
from server.live.journal.head import COHORT, RUN, SIGNATURE
from server.records import RoundRecord
from server.rounds.checkpointing.progress import Progress
from server.rounds.checkpointing.progress_codec import (
    decode_progress,
    decode_record,
    encode_progress,
)
from server.rounds.cohort import Cohort

_INLINE_BYTES = 2**16
FORMAT = 2
"""Version of the journal's format."""


class Packing:
    """Collects the arrays of one entry: small ones in ``data``, large ones in files.

    A place is ``[start, end]`` in ``data``, or ``[file name, bytes]`` for more than 64 KiB.
    """

    def __init__(self, blobs: NewBlobs) -> None:
        """Starts with empty ``data``; large arrays go to ``blobs``."""
        self._blobs = blobs
        self._taken: list[tuple[NDArray[Any], list[Any]]] = []
        self.data = bytearray()

    def add(self, values: NDArray[Any]) -> list[Any]:
        """Stores a NumPy array and returns its place."""
        for one, place in self._taken:  # the latest weights may be the best ones: hash them once
            if one is values:
                return place
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        self._taken.append((values, self._add(lambda: (raw,), len(raw))))
        return self._taken[-1][1]

    def add_array(self, array: Array) -> list[Any]:
        """Stores an array of a Flower message and returns its place; links a file if it is one."""
        if isinstance(array, CutFileArray) and array.size_bytes > _INLINE_BYTES:
            name = self._blobs.adopt(array.path, array.cuts, array.size_bytes)
            return [name, array.size_bytes]
        return self._add(lambda: pieces(array), size_of(array))

    def _add(self, value: Pieces, size_bytes: int) -> list[Any]:
        if size_bytes > _INLINE_BYTES:
            return [self._blobs.put(value), size_bytes]
        start = len(self.data)
        for piece in value():
            self.data += piece
        return [start, len(self.data)]


def _unpacked(place: Sequence[Any], data: bytes, blobs: Blobs) -> bytes:
    first, last = place
    return blobs.get(first, last) if isinstance(first, str) else data[first:last]


def digests_of(entry: JournalEntry) -> list[str]:
    """Returns the names of the files that an entry refers to."""
    values = entry.values
    with format_checked(entry):
        places = [described[-1] for described in values.get("arrays", ())]
        return [place[0] for place in places if isinstance(place[0], str)]


def content_doc(content: RecordDict, packed: Packing) -> dict[str, Any]:
    """Returns the document for a reply's content, and stores its arrays in ``packed``.

    Leaves out its signature, which has an entry of its own, see `signature_entry`.
    """
    arrays = {name: one for name, one in content.items() if isinstance(one, ArrayRecord)}
    rest = {name: one for name, one in content.items() if name not in (*arrays, ENVELOPE)}
    start = len(packed.data)
    packed.data += record_bytes(RecordDict(rest))
    return {
        "rest": [start, len(packed.data)],
        "records": list(arrays),
        "arrays": [
            [name, key, array.dtype, list(array.shape), array.stype, packed.add_array(array)]
            for name, record in arrays.items()
            for key, array in record.items()
        ],
    }


def signature_entry(
    purpose: str, number: int, node: int, signature: ReplySignature
) -> JournalEntry:
    """Returns the entry for the signature of a node's reply in round ``number``."""
    values = {"signer": signature.signer, "verified_at_s": signature.verified_at_s}
    return new_entry(SIGNATURE + purpose, number, node, values, signature.envelope)


def signature_from(entry: JournalEntry) -> ReplySignature:
    """Reads the signature that `signature_entry` wrote to ``entry``.

    Raises:
        DataError: the document is malformed.
    """
    values = entry.values
    with format_checked(entry):
        signer, verified_at_s = values["signer"], values["verified_at_s"]
        if not isinstance(signer, str) or not isinstance(verified_at_s, float):
            raise TypeError("it does not tell who signed, and when it was verified")
    return ReplySignature(entry.data, signer, verified_at_s)


def progress_doc(progress: Progress, packed: Packing) -> dict[str, Any]:
    """Returns the document for ``progress``, and stores its arrays in ``packed``."""
    encoded = encode_progress(progress)
    arrays = [
        [name, one.dtype.str, list(one.shape), packed.add(one)]
        for name, one in encoded.arrays.items()
    ]
    return encoded.doc | {"arrays": arrays}


def progress_from(entry: JournalEntry, blobs: Blobs) -> Progress:
    """Reads the `Progress` that `progress_doc` wrote to ``entry``.

    Raises:
        DataError: the document is malformed, or an array is missing or damaged.
    """
    values, raw, arrays = entry.values, dict[str, bytes](), dict[str, NDArray[Any]]()
    with format_checked(entry):
        for name, dtype, shape, place in values["arrays"]:
            key = json.dumps(place)  # the latest weights may be the best ones: read them once
            if key not in raw:
                raw[key] = _unpacked(place, entry.data, blobs)
            arrays[name] = np.frombuffer(raw[key], np.dtype(dtype)).reshape(shape)
        progress = decode_progress(values, arrays)
        if progress.round != entry.round:
            raise ValueError(f"it is of round {progress.round}")
    return progress


def content_from(entry: JournalEntry, blobs: Blobs, *, where: str) -> RecordDict:
    """Reads the content that `content_doc` wrote to ``entry``; large arrays stay in their files.

    ``where`` names the journal in error messages.

    Raises:
        DataError: the document is malformed, or an array is missing or damaged.
    """
    with format_checked(entry):
        return _content_from(entry, blobs, where=where)


def _content_from(entry: JournalEntry, blobs: Blobs, *, where: str) -> RecordDict:
    values = entry.values
    start, end = values["rest"]
    content = read_record(entry.data[start:end], where=where)
    # The constructor of ArrayRecord reads and copies arrays; item assignment does not.
    records = {name: ArrayRecord() for name in values["records"]}
    for name, key, dtype, shape, stype, (first, last) in values["arrays"]:
        records[name][key] = (
            PathArray(dtype, tuple(shape), stype, blobs.checked(first, last))
            if isinstance(first, str)
            else Array(dtype, tuple(shape), stype, entry.data[first:last])
        )
    content.update(records)
    return content


def read_run(entries: Entries) -> dict[str, Any]:
    """Reads the entry that describes the run, written when it began: its identity and instance.

    Raises:
        DataError: the document is malformed, or of another format.
    """
    entry = entries.one(RUN, 0, 0)
    if entry is None:
        raise DataError(f"{entries.path}: no run is in this journal.")
    values = entry.values
    with format_checked(entry):
        found = values["format"]
        if found != FORMAT:
            raise DataError(
                f"{entries.path}: format {foreign(found, 40)}, expected {FORMAT}: another version "
                "of fedcore wrote this journal. Nothing was run; go on with that version."
            )
        if not isinstance(values["identity"], dict) or not isinstance(values["instance"], str):
            raise TypeError("it does not tell which run it is of")
    return values


def record_from(entry: JournalEntry) -> RoundRecord:
    """Reads the record of a round.

    Raises:
        DataError: the document is malformed.
    """
    values = entry.values
    with format_checked(entry):
        record = decode_record(values)
        if record.round != entry.round:
            raise ValueError(f"it is of round {record.round!r}")
    return record


def cohort_entry(purpose: str, number: int, cohort: Cohort) -> JournalEntry:
    """Returns the entry for the cohort that round ``number`` sends messages of type ``purpose``."""
    weights, nodes = cohort.weights, list(cohort.nodes)
    values: dict[str, list[int] | None] = {"nodes": nodes, "weights": None}
    if weights is not None:
        values["weights"] = [weights[node] for node in nodes]
    return new_entry(COHORT + purpose, number, 0, values)


def cohort_from(entry: JournalEntry) -> Cohort:
    """Reads the cohort that `cohort_entry` wrote to ``entry``.

    Raises:
        DataError: the document is malformed.
    """
    values = entry.values
    with format_checked(entry):
        nodes, weights = _numbers(values["nodes"]), values["weights"]
        if weights is None:
            return Cohort(nodes)
        return Cohort(nodes, dict(zip(nodes, _numbers(weights), strict=True)))


def _numbers(values: object) -> list[int]:
    if not isinstance(values, list) or not all(type(one) is int for one in values):
        raise TypeError("expected a list of whole numbers")
    return values
