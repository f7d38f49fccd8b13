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

from fedcore.flower.records import read_record, record_bytes
from fedcore.updates.pieces import CutFileArray, PathArray, pieces, size_of
from server.live.journal.blobs import Blobs, Pieces
from server.live.journal.entries import JournalEntry, as_written
from server.rounds.checkpointing import Progress
from server.rounds.protection import noise_of, protection_doc, protection_of
from server.rounds.strategies.state import StrategyState

_INLINE_BYTES = 2**16


class Packing:
    """Collects the arrays of one entry: small ones in ``data``, large ones in files.

    A place is ``[start, end]`` in ``data``, or ``[file name, bytes]`` for more than 64 KiB.
    """

    def __init__(self, blobs: Blobs) -> None:
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
    with as_written(entry):
        places = [described[-1] for described in values.get("arrays", ())]
        return [place[0] for place in places if isinstance(place[0], str)]


def content_doc(content: RecordDict, packed: Packing) -> dict[str, Any]:
    """Returns the document for a reply's content, and stores its arrays in ``packed``."""
    arrays = {name: one for name, one in content.items() if isinstance(one, ArrayRecord)}
    rest = RecordDict({name: one for name, one in content.items() if name not in arrays})
    start = len(packed.data)
    packed.data += record_bytes(rest)
    return {
        "rest": [start, len(packed.data)],
        "records": list(arrays),
        "arrays": [
            [name, key, array.dtype, list(array.shape), array.stype, packed.add_array(array)]
            for name, record in arrays.items()
            for key, array in record.items()
        ],
    }


def progress_doc(progress: Progress, packed: Packing) -> dict[str, Any]:
    """Returns the document for ``progress``, and stores its arrays in ``packed``."""
    noise = noise_of(progress.protection)
    vectors: list[NDArray[Any]] = [progress.weights, progress.best, *noise]
    vectors += progress.strategy.arrays
    described = [[one.dtype.str, list(one.shape), packed.add(one)] for one in vectors]
    raw = np.frombuffer(progress.preprocess, np.uint8)
    preprocess = ["|u1", [len(raw)], packed.add(raw)]
    return {
        "round": progress.round,
        "over": progress.over,
        "best_round": progress.best_round,
        "most_failed": progress.most_failed,
        "strategy": progress.strategy.tree,
        "protection": protection_doc(progress.protection),
        "arrays": [preprocess, *described],
    }


def progress_from(entry: JournalEntry, blobs: Blobs) -> Progress:
    """Reads the `Progress` that `progress_doc` wrote to ``entry``.

    Raises:
        DataError: the document is malformed, or an array is missing or damaged.
    """
    with as_written(entry):
        return _progress_from(entry, blobs)


def _progress_from(entry: JournalEntry, blobs: Blobs) -> Progress:
    values, raw = entry.values, dict[str, bytes]()
    for *_, place in values["arrays"]:  # the latest weights may be the best ones: read them once
        key = json.dumps(place)
        raw[key] = raw.get(key) or _unpacked(place, entry.data, blobs)
    preprocess, weights, best, *rest = [
        np.frombuffer(raw[json.dumps(place)], np.dtype(dtype)).reshape(shape)
        for dtype, shape, place in values["arrays"]
    ]
    protection = values.get("protection")  # absent in journals of older versions
    noise = protection["noise"] if protection else 0
    if not all(_is_vector(one) for one in (weights, best)) or weights.shape != best.shape:
        raise ValueError("its weights are not float32 vectors of one length")
    numbers = (values["round"], values["best_round"], values["most_failed"])
    if {*map(type, numbers)} != {int} or values["round"] != entry.round:
        raise ValueError("its round numbers are invalid")
    return Progress(
        round=values["round"],
        over=bool(values["over"]),
        weights=weights,
        best=best,
        best_round=values["best_round"],
        most_failed=values["most_failed"],
        strategy=StrategyState(values["strategy"], tuple(rest[noise:])),
        preprocess=preprocess.tobytes(),
        protection=protection_of(protection, rest[:noise]),
    )


def _is_vector(values: NDArray[Any]) -> bool:
    return values.dtype == np.float32 and values.ndim == 1


def content_from(entry: JournalEntry, blobs: Blobs, *, where: str) -> RecordDict:
    """Reads the content that `content_doc` wrote to ``entry``; large arrays stay in their files.

    ``where`` names the journal in error messages.

    Raises:
        DataError: the document is malformed, or an array is missing or damaged.
    """
    with as_written(entry):
        return _content_from(entry, blobs, where=where)


def _content_from(entry: JournalEntry, blobs: Blobs, *, where: str) -> RecordDict:
    values = entry.values
    start, end = values["rest"]
    content = read_record(entry.data[start:end], where=where)
    # The constructor of ArrayRecord reads and copies arrays; item assignment does not.
    records = {name: ArrayRecord() for name in values["records"]}
    for name, key, dtype, shape, stype, (first, last) in values["arrays"]:
        records[name][key] = (
            PathArray(dtype, tuple(shape), stype, blobs.checked(first))
            if isinstance(first, str)
            else Array(dtype, tuple(shape), stype, entry.data[first:last])
        )
    content.update(records)
    return content
