"""Messages without a complete reply, indexed by message, node and object."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from fedcore.updates.pieces import CutFile


class IncomingObject(Protocol):
    """An object whose bytes are arriving."""

    @property
    def content_bytes(self) -> int:
        """The object's size."""


@dataclass
class PendingMessage:
    """A message to a node, with the state of its partial reply."""

    node_id: int
    objects: frozenset[str]
    """Ids of the objects that the node may pull."""
    payload_bytes: int
    """Bytes of the arrays in the message."""
    reply: ObjectTree | None = None
    """Objects of the reply that the node has begun to push; None before."""
    missing: set[str] = field(default_factory=set)
    """Ids of the reply's objects that have not arrived."""
    held: frozenset[str] = frozenset()
    """Ids of the reply's objects, see `FleetStore.hold`."""
    session: str = ""
    received_bytes: int = 0
    """Bytes of the reply that have arrived."""
    arriving: dict[str, IncomingObject] = field(default_factory=dict)
    """The current writer of each object that is arriving: the latest if there are several."""
    places: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Parent and index below it, for each object of the reply without children."""
    files: dict[str, CutFile] = field(default_factory=dict)
    """The files that receive chunks, by the id of the chunks' parent."""
    ends: dict[str, int] = field(default_factory=dict)
    """Upper bounds of the lengths of these files, also after failed writes."""

    def announce(self, tree: ObjectTree, session: str, missing: set[str]) -> None:
        """Records the start of a reply, with the objects that have not arrived."""
        self.reply, self.session, self.missing = tree, session, missing
        self.places = {
            child.object_id: (each.object_id, place)
            for each in iterate_object_tree(tree)
            for place, child in enumerate(each.children)
            if not child.children
        }

    def drop_reply(self) -> None:
        """Deletes the state of a partial reply; threads that are writing parts of it must stop."""
        self.reply, self.session, self.received_bytes = None, "", 0
        self.held = frozenset()
        for one in (self.missing, self.arriving, self.places, self.files, self.ends):
            one.clear()

    @property
    def reply_limit_bytes(self) -> int:
        """Largest reply accepted, in bytes: twice the message's, plus room for small records."""
        return 2 * self.payload_bytes + 2**20


class PendingMessages(Mapping[str, PendingMessage]):
    """All messages without a complete reply. The caller holds the fleet's lock.

    Lookups for one node's requests take a time that does not depend on the number of nodes.
    """

    def __init__(self) -> None:
        self._all: dict[str, PendingMessage] = {}
        self._of: defaultdict[int, dict[str, PendingMessage]] = defaultdict(dict)
        self._objects = Counter[str]()

    def __getitem__(self, message_id: str) -> PendingMessage:
        return self._all[message_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def of(self, node_id: int) -> list[tuple[str, PendingMessage]]:
        """Returns a node's messages without a complete reply, by message id."""
        return list(self._of[node_id].items()) if node_id in self._of else []

    def sends(self, object_id: str) -> bool:
        """Returns whether an object is part of any message in this mapping."""
        return object_id in self._objects

    def add(self, message_id: str, pending: PendingMessage) -> None:
        """Adds a message that is being sent."""
        self._all[message_id] = self._of[pending.node_id][message_id] = pending
        self._objects.update(pending.objects)

    def pop(self, message_id: str) -> PendingMessage | None:
        """Removes a message that was answered or dropped, and returns it; None if unknown."""
        pending = self._all.pop(message_id, None)
        if pending is None:
            return None
        del self._of[pending.node_id][message_id]
        if not self._of[pending.node_id]:
            del self._of[pending.node_id]
        self._objects.subtract(pending.objects)
        for object_id in pending.objects:
            if not self._objects[object_id]:
                del self._objects[object_id]
        return pending
