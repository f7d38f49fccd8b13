"""The object tree of a reply, checked before Flower stores any of it."""

from __future__ import annotations

import re

from flwr.proto.message_pb2 import ObjectTree

from fedcore.flower.fleet_payload import MAX_OBJECTS

_MOST_DEPTH = 8  # a message, its records, their records, arrays, chunks
_MOST_NODES = 4 * MAX_OBJECTS  # equal chunks are one object in several places
_DIGEST = re.compile(r"[0-9a-f]{64}")


def objects_of(tree: ObjectTree) -> set[str]:
    """Returns the ids of a reply's objects, after checking the tree.

    Raises:
        ValueError: there are too many, they nest too deep, an id is no digest, or one id occurs
            twice with different children: a chunk's parent would be ambiguous.
    """
    below: dict[str, tuple[str, ...]] = {}
    left, count = [(tree, 1)], 0
    while left:
        node, depth = left.pop()
        count += 1
        own = tuple(child.object_id for child in node.children)
        if depth > _MOST_DEPTH or count > _MOST_NODES or len(below) > MAX_OBJECTS:
            raise ValueError(
                f"it has more than {MAX_OBJECTS} objects, or they are nested too deeply"
            )
        if not _DIGEST.fullmatch(node.object_id):
            raise ValueError("the identifiers of its objects are not digests")
        if below.setdefault(node.object_id, own) != own:
            raise ValueError("it contains an object twice with different children")
        left.extend((child, depth + 1) for child in node.children)
    return set(below)
