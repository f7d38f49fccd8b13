"""Trees of objects that a device announces: whatever cannot be one reply is refused at once."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_tree

from fedcore.flower.fleet_payload import MAX_OBJECTS
from fedcore.flower.fleet_tree import objects_of
from fedcore.flower.identity import assume_identity


def name(number: int) -> str:
    return f"{number:064x}"


def tree(number: int, *below: ObjectTree) -> ObjectTree:
    return ObjectTree(object_id=name(number), children=below)


def test_a_real_reply_is_taken_whole() -> None:
    assume_identity(1)
    zeros = np.zeros(3_000_000, np.float32)  # of equal chunks
    record = RecordDict({"a": ArrayRecord({"x": Array(zeros), "y": Array(np.arange(4))})})
    found = get_object_tree(Message(record, dst_node_id=5, message_type="train"))
    assert found.object_id in objects_of(found)
    assert len(objects_of(found)) >= 6


@pytest.mark.parametrize(
    ("announced", "told"),
    [
        (tree(1, ObjectTree(object_id="nonsense")), "are not digests"),
        (tree(1, tree(2, tree(3)), tree(2, tree(4))), "contains an object twice"),
        (tree(1, tree(2), tree(2, tree(4))), "contains an object twice"),
        (tree(1, tree(1)), "contains an object twice"),
        (tree(0, *(tree(n) for n in range(1, MAX_OBJECTS + 2))), "more than 4096"),
        (tree(0, *(tree(1) for _ in range(5 * MAX_OBJECTS))), "more than 4096"),
    ],
)
def test_what_cannot_be_one_reply_is_refused(announced: ObjectTree, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        objects_of(announced)


def test_a_tree_that_is_very_deep_is_refused() -> None:
    found = tree(0)
    for number in range(1, 90):
        found = tree(number, found)
    with pytest.raises(ValueError, match="too deeply"):
        objects_of(found)
