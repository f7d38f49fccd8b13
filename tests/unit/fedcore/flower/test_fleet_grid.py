"""Replies that are complete at the same time come together, as far as they take little memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedcore.errors import DiskFull
from fedcore.flower.fleet import Fleet
from fedcore.flower.fleet_grid import Check, FleetGrid
from fedcore.flower.identity import assume_identity
from tests.unit.fedcore.flower.answering import answer_whole

SMALL, LARGE = 10, 100_000


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    (tmp_path / "spool").mkdir()
    one = Fleet(tmp_path / "spool")
    assume_identity(one.open_run({"run": "{}"}))
    yield one
    one.end_run()


class Answering:
    """Devices that have all answered, in order, by the time that they are woken."""

    def __init__(self, fleet: Fleet, weights: Sequence[int], *, to_files: bool = False) -> None:
        self.fleet, self.sizes, self.to_files = fleet, weights, to_files
        self.keys = [bytes([place]) * 9 for place in range(len(weights))]
        self.messages = [
            Message(_content(size), fleet.register_node(key), MessageType.TRAIN)
            for key, size in zip(self.keys, weights, strict=True)
        ]
        self.done: list[str] = []
        self.beside: dict[int, ArrayRecord | ConfigRecord] = {}
        """What replies hold in addition, by their place."""
        self.grid = FleetGrid(
            fleet, self, inspector=self, consumed=self.done.append, stopping=threading.Event()
        )

    def nodes(self) -> list[int]:
        return []

    def offline_s(self, node_id: int) -> float:
        return 60.0

    def owe(self, node_ids: Iterable[int]) -> None:
        self.owing = list(node_ids)

    def wake(self, node_ids: Iterable[int]) -> None:
        devices = zip(self.keys, self.messages, self.sizes, strict=True)
        for place, (key, message, size) in enumerate(devices):
            content = _content(size, place + 0.5)  # equal chunks would be stored once
            if place in self.beside:
                content["beside"] = self.beside[place]
            reply = Message(content, reply_to=message)
            answer_whole(self.fleet, key, reply, to_file=self.to_files)

    def expect(self, messages: Sequence[Message]) -> list[Check]:
        return [lambda reply: None for _ in messages]

    def batches(self) -> Iterator[Sequence[Message]]:
        return self.grid.send_and_receive_batches(self.messages, timeout=30)


def _content(size: int, first: float = 0.0) -> RecordDict:
    values = np.arange(size, dtype=np.float32) + np.float32(first)
    arrays = ArrayRecord({"model": Array(values)})
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})


def test_small_replies_come_together_and_a_large_one_ends_a_batch(fleet: Fleet) -> None:
    devices = Answering(fleet, [SMALL, SMALL, LARGE, SMALL, LARGE, LARGE])
    assert [len(batch) for batch in devices.batches()] == [3, 2, 1]
    assert len(devices.done) == 6


def test_large_replies_in_files_come_together_up_to_four(fleet: Fleet) -> None:
    devices = Answering(fleet, [SMALL, LARGE, LARGE, SMALL, *[LARGE] * 7], to_files=True)
    assert [len(batch) for batch in devices.batches()] == [6, 4, 1]
    assert len(devices.done) == 11


def test_one_that_has_much_beside_its_file_ends_a_batch(fleet: Fleet) -> None:
    devices = Answering(fleet, [LARGE, LARGE, LARGE], to_files=True)
    devices.beside[1] = ConfigRecord({"much": bytes(100_000)})
    assert [len(batch) for batch in devices.batches()] == [2, 1]


def test_what_others_have_sent_counts_for_each_that_has_it(fleet: Fleet) -> None:
    """Objects are stored once, and every reply that names one holds it in memory."""
    devices = Answering(fleet, [SMALL, SMALL, SMALL])
    devices.beside = dict.fromkeys(range(3), ConfigRecord({"much": bytes(100_000)}))
    assert [len(batch) for batch in devices.batches()] == [1, 1, 1]


def repeated(arrays: int, size_bytes: int) -> ArrayRecord:
    """Arrays that all consist of one chunk."""
    chunk = bytes(size_bytes)
    forms = {str(each): (each, 1) for each in range(arrays)}
    return ArrayRecord(
        {name: Array("float32", shape, "numpy.ndarray", chunk) for name, shape in forms.items()}
    )


def test_arrays_that_repeat_a_small_chunk_count_as_often_as_they_do(fleet: Fleet) -> None:
    devices = Answering(fleet, [SMALL, LARGE, SMALL], to_files=True)
    devices.beside = dict.fromkeys(range(3), repeated(20, 30_000))
    assert [len(batch) for batch in devices.batches()] == [1, 1, 1]


def test_an_array_put_together_from_one_small_chunk_ends_a_batch(fleet: Fleet) -> None:
    """30 kB arrived, and it holds a file open, of which a server may have few."""
    record = repeated(1, 30_000)
    array: Any = record["0"]
    array.__dict__["_chunks"] = array.slice_array() * 4
    devices = Answering(fleet, [SMALL] * 3)
    devices.beside = dict.fromkeys(range(3), record)
    assert [len(batch) for batch in devices.batches()] == [1, 1, 1]


def test_arrays_that_repeat_a_large_chunk_take_few_files(fleet: Fleet) -> None:
    devices = Answering(fleet, [10 * LARGE] * 2, to_files=True)
    devices.beside = {0: repeated(60, 70_000), 1: repeated(70, 70_000)}
    replies = [reply for batch in devices.batches() for reply in batch]
    assert [reply.has_error() for reply in replies] == [False, True]
    assert "more than 64 arrays of equal chunks" in replies[1].error.reason


def test_a_batch_has_an_end(fleet: Fleet) -> None:
    devices = Answering(fleet, [SMALL] * 70)
    assert [len(batch) for batch in devices.batches()] == [32, 32, 6]


def test_what_is_taken_one_by_one_is_the_same(fleet: Fleet) -> None:
    devices = Answering(fleet, [SMALL, LARGE, SMALL])
    replies = list(devices.grid.send_and_receive(devices.messages, timeout=30))
    asked = [message.metadata.dst_node_id for message in devices.messages]
    assert [reply.metadata.src_node_id for reply in replies] == asked


def test_a_disk_that_fails_amid_a_batch_loses_no_reply_and_keeps_no_room(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise DiskFull("no room")

    devices = Answering(fleet, [SMALL, LARGE])
    monkeypatch.setattr(fleet.store, "scratch", full)
    batches = devices.batches()
    assert len(next(batches)) == 1, "the one that was read before"
    with pytest.raises(DiskFull):
        next(batches)
    assert len(devices.done) == 2
    assert not fleet.pending


def test_a_caller_with_enough_leaves_the_rest(fleet: Fleet) -> None:
    devices = Answering(fleet, [SMALL, LARGE, SMALL])
    batches = devices.batches()
    assert len(next(batches)) == 2
    batches.close()  # type: ignore[attr-defined]
    assert len(devices.done) == 3
    assert not fleet.pending


def test_who_is_there_and_does_not_reply_in_time_owes_a_reply(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = Answering(fleet, [SMALL, SMALL])
    monkeypatch.setattr(devices, "wake", lambda node_ids: None)
    monkeypatch.setattr(devices, "offline_s", lambda node_id: 0.0)
    assert list(devices.grid.send_and_receive_batches(devices.messages, timeout=0.01)) == []
    assert devices.owing == [one.metadata.dst_node_id for one in devices.messages]
