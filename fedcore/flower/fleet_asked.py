"""What nodes were sent and have not answered in full, found by message, by node and by object."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from fedcore.updates.pieces import Joined


class Arriving(Protocol):
    """An object that is coming in."""

    @property
    def content_bytes(self) -> int:
        """How many bytes it will have."""


@dataclass
class PendingMessage:
    """A message that a node was sent and has not answered in full."""

    node_id: int
    objects: frozenset[str]
    """What its node may pull."""
    payload_bytes: int
    """What its node is sent."""
    reply: ObjectTree | None = None
    """The reply that the node has begun to push."""
    missing: set[str] = field(default_factory=set)
    """Objects of the reply that have not come yet."""
    session: str = ""
    came_bytes: int = 0
    """What has come of the reply."""
    arriving: dict[str, Arriving] = field(default_factory=dict)
    """Who writes each object that is coming in now: the last that began to."""
    places: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Of each object of the reply that has none below it: the one above, and its number there."""
    files: dict[str, Joined] = field(default_factory=dict)
    """What chunks are written into, by the object above them."""
    ends: dict[str, int] = field(default_factory=dict)
    """How long these may have become, whatever became of the chunks."""

    def announce(self, tree: ObjectTree, session: str, missing: set[str]) -> None:
        """A reply is about to come, without what is there already."""
        self.reply, self.session, self.missing = tree, session, missing
        self.places = {
            child.object_id: (each.object_id, place)
            for each in iterate_object_tree(tree)
            for place, child in enumerate(each.children)
            if not child.children
        }

    def drop_reply(self) -> None:
        """Forgets what has come of the reply; threads that are writing some of it may not go on."""
        self.reply, self.session, self.came_bytes = None, "", 0
        for one in (self.missing, self.arriving, self.places, self.files, self.ends):
            one.clear()

    @property
    def reply_limit_bytes(self) -> int:
        """The most that a reply may hold: twice what was sent, and room for small records."""
        return 2 * self.payload_bytes + 2**20


class PendingMessages(Mapping[str, PendingMessage]):
    """All that was asked and is not answered. Belongs to the fleet, whose lock is held around it.

    Whatever a call of one node's looks up takes the same time however many nodes there are.
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
        """What a node was sent and has not answered in full."""
        return list(self._of[node_id].items()) if node_id in self._of else []

    def sends(self, object_id: str) -> bool:
        """Whether an object is part of what nodes were sent."""
        return object_id in self._objects

    def add(self, message_id: str, asked: PendingMessage) -> None:
        """A message is sent."""
        self._all[message_id] = self._of[asked.node_id][message_id] = asked
        self._objects.update(asked.objects)

    def pop(self, message_id: str) -> PendingMessage | None:
        """A message is answered, or forgotten."""
        asked = self._all.pop(message_id, None)
        if asked is None:
            return None
        del self._of[asked.node_id][message_id]
        if not self._of[asked.node_id]:
            del self._of[asked.node_id]
        self._objects.subtract(asked.objects)
        for object_id in asked.objects:
            if not self._objects[object_id]:
                del self._objects[object_id]
        return asked
