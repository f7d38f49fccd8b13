"""Server state in memory, on top of Flower's: the nodes, the current run, its messages and replies.

The network accesses it through `fedcore.flower.fleet_api`, a ServerApp through
`fedcore.flower.fleet_grid`. All three share one lock, and none of them copies a payload.
"""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import Array, Error, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.superlink.federation import NoOpFederationManager

from fedcore.errors import ResourceError, TrainingError
from fedcore.flower.fleet_payload import read_message
from fedcore.flower.fleet_pending import PendingMessage, PendingMessages
from fedcore.flower.fleet_store import FleetStore, ReplyBytes
from fedcore.flower.writeback import Writeback
from fedcore.observability.foreign import foreign
from fedcore.updates.messages import REFUSED

_SHOWN = 200  # most characters of an error about malicious bytes
_FOREVER = datetime.max.replace(tzinfo=UTC)
_TTL_S = 10 * 365 * 86_400.0
"""Time to live of a message in Flower, by the wall clock; it never ends a round, whose deadline
uses a monotonic clock."""


def node_id_of(public_key: bytes) -> int:
    """Returns the node id of a public key: constant over servers and restarts.

    63 bits of the key's SHA-256, so that it fits a signed integer; Flower reserves 0 and 1.
    """
    return (int.from_bytes(hashlib.sha256(public_key).digest()[:8], "big") >> 1) | 2


class FleetState(InMemoryLinkState):
    """Flower's LinkState with an inbox per node, so that a lookup does not scan all messages."""

    def __init__(self, store: FleetStore) -> None:
        super().__init__(NoOpFederationManager(), store)
        self.inbox: defaultdict[int, deque[str]] = defaultdict(deque)

    def get_message_ins(
        self, node_id: int, limit: int | None, *, run_id: int | None = None
    ) -> list[Message]:
        """Returns the messages that wait for ``node_id``, and removes them from its inbox."""
        found: list[Message] = []
        with self.lock:
            waiting = self.inbox[node_id]
            while waiting and (limit is None or len(found) < limit):
                message = self.message_ins_store.get(waiting.popleft())
                if message is not None and run_id in (None, message.metadata.run_id):
                    found.append(message)
        return found

    def store_message_and_object_tree(
        self, message: Message, object_tree: ObjectTree, session_id: str
    ) -> tuple[bool, list[str]]:
        """Stores a message as Flower does; ends its session if no object is to follow."""
        missing: list[str] = []
        try:
            stored, missing = super().store_message_and_object_tree(
                message, object_tree, session_id
            )
        finally:
            if not missing:
                self.end_session(session_id)
        return stored, missing

    def end_session(self, session_id: str) -> None:
        """Forgets what a push was to bring; Flower would remember that until the run ends."""
        self._cleanup_push_session(session_id, cleanup_messages=False)


class _Content:
    """Content of a message, and what a server needs to know of it to send it to many nodes."""

    def __init__(self, content: RecordDict) -> None:
        self.content = content  # keeps its id from being another's
        self.objects = get_all_nested_objects(content)
        self.tree = get_object_tree(content)
        # Counts each value once for its chunks: equal chunks are sent once.
        self.payload_bytes = sum(
            len(one.data) for one in self.objects.values() if isinstance(one, Array)
        )


class Fleet:
    """The server's nodes, known by their keys, and the messages of at most one run at a time.

    Every method may be called from any thread.
    """

    def __init__(self, spool: Path) -> None:
        """Starts without nodes or messages; large payloads go to the empty folder ``spool``."""
        self.store = FleetStore(spool)
        self.state = FleetState(self.store)
        self.pending = PendingMessages()
        self.writeback = Writeback()
        self.run_id = 0
        self.lacks: ResourceError | None = None
        """The error of this machine in its last failure to store a reply; None after a success."""
        self._sent: defaultdict[int, int] = defaultdict(int)
        self._answered = threading.Condition()
        self._ready: deque[str] = deque()

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """The lock around all access to pending messages."""
        return self.state.lock

    def open_run(self, settings: Mapping[str, str]) -> int:
        """Starts a run, whose ``settings`` every node may read, and returns its id.

        Raises:
            TrainingError: another run is in progress.
        """
        if self.run_id:
            raise TrainingError(
                "start: a run is already in progress. Nothing was started; wait until it ends, "
                "or start a second server in its own folder."
            )
        state = self.state
        self.run_id = state.create_run(
            fab_id=None,
            fab_version=None,
            fab_hash=None,
            override_config=dict(settings),
            federation_id=NOOP_FEDERATION_ID,
            federation_config=None,
            flwr_aid=NOOP_FLWR_AID,
            primary_task_type=TaskType.SERVER_APP,
        )
        task_id = state.run_ids[self.run_id].run.primary_task_id
        assert task_id is not None
        state.claim_task(task_id)
        state.activate_task(task_id)
        # Flower fails a run whose process sends no heartbeat. This run is in the same process.
        state.task_token_store[task_id].active_until = _FOREVER
        return self.run_id

    def end_run(self) -> None:
        """Ends the run and deletes its messages."""
        with self.lock:
            self.forget(list(self.pending))
            self.state.stop_run(self.run_id)
            self.run_id = 0
        self.writeback.close()

    def register_node(self, public_key: bytes) -> int:
        """Registers a public key's owner as a node, unless it is one, and returns the node id."""
        state, node_id = self.state, node_id_of(public_key)
        with self.lock:
            if node_id not in state.nodes:
                state.nodes[node_id] = NodeInfo(
                    node_id=node_id,
                    owner_aid=NOOP_FLWR_AID,
                    owner_name=NOOP_ACCOUNT_NAME,
                    status=NodeStatus.OFFLINE,  # may receive messages before it connects
                    registered_at=datetime.now(UTC).isoformat(),
                    public_key=public_key,
                )
                state.node_public_key_to_node_id[public_key] = node_id
        return node_id

    def abandon(self, message_id: str) -> bool:
        """Drops a partial reply, so that its node can push it again; keeps a complete one.

        Returns whether no part of the reply remains.
        """
        with self.lock:
            pending = self.pending.get(message_id)
            if pending is None:
                return True
            if pending.missing:
                self._drop_reply(message_id, pending)
            return pending.reply is None

    def restart(self, node_id: int) -> None:
        """Makes a node's unanswered messages pullable again, after its process has restarted.

        Drops its partial replies, because Flower would reject the new ones as duplicates.
        """
        with self.lock:
            waiting = self.state.inbox[node_id]
            waiting.clear()
            for message_id, pending in self.pending.of(node_id):
                if pending.reply is None or pending.missing:
                    self._drop_reply(message_id, pending)
                    waiting.append(message_id)

    def send(self, messages: Iterable[Message]) -> list[str]:
        """Puts messages into their nodes' inboxes; returns the message ids, in order."""
        sent: list[str] = []
        shared: dict[int, _Content] = {}
        # Messages of a round share their content: hash each array once, not once per node.
        with no_object_id_recompute():
            for message in messages:
                message.metadata.ttl = _TTL_S
                message_id = message.object_id
                message.metadata.__dict__["_message_id"] = message_id
                below = shared.get(id(message.content))
                if below is None:
                    below = shared[id(message.content)] = _Content(message.content)
                objects: dict[str, InflatableObject] = {**below.objects, message_id: message}
                tree = ObjectTree(object_id=message_id, children=[below.tree])
                with self.lock:
                    state = self.state
                    session = state.start_session(self.run_id)
                    stored, missing = state.store_message_and_object_tree(
                        remove_content_from_message(message), tree, session
                    )
                    if not stored:
                        raise TrainingError(
                            "send: Flower refused a message to node "
                            f"{message.metadata.dst_node_id}. The round was not started; restart "
                            "the server."
                        )
                    for object_id in missing:
                        content = objects[object_id].deflate()
                        state.store_object(self.run_id, session, object_id, content)
                    node_id = message.metadata.dst_node_id
                    pending = PendingMessage(node_id, frozenset(objects), below.payload_bytes)
                    self.pending.add(message_id, pending)
                    state.inbox[node_id].append(message_id)
                    self._sent[node_id] += len(objects)
                sent.append(message_id)
        return sent

    def objects_sent(self, node_id: int) -> int:
        """Returns how many objects a node was ever sent; shared objects count for each node."""
        return self._sent.get(node_id, 0)

    def finish_reply(self, message_id: str) -> None:
        """Queues the complete reply to a message for `next_answered`."""
        with self._answered:
            self._ready.append(message_id)
            self._answered.notify_all()

    def report_storage_error(self, error: ResourceError | None) -> None:
        """Records that this machine failed to store a reply, or, with None, that it works again."""
        self.lacks = error

    def wake(self) -> None:
        """Ends a wait in `next_answered` early, after devices connected or disconnected."""
        with self._answered:
            self._answered.notify_all()

    def next_answered(self, timeout_s: float) -> str | None:
        """Returns a message id with a complete reply; None on a timeout or on `wake`."""
        with self._answered:
            if not self._ready:
                self._answered.wait(timeout_s)
            return self._ready.popleft() if self._ready else None

    def reply_bytes(self, message_id: str) -> ReplyBytes:
        """Returns how many bytes the reply to a message has in memory, and how many in files."""
        with self.lock:
            pending = self.pending.get(message_id)
            if pending is None or pending.reply is None:
                return ReplyBytes(0, 0)
            return self.store.sizes({one.object_id for one in iterate_object_tree(pending.reply)})

    def pop_reply(self, message_id: str) -> Message | None:
        """Returns the reply to a message, once, and deletes both; None if the reply is incomplete.

        The metadata are those checked against the sender on arrival, not those in the payload. An
        unreadable payload gives a reply with an error.

        Raises:
            DiskFull: the disk has no room to assemble its arrays.
        """
        with self.lock:
            pending = self.pending.get(message_id)
            if pending is None or pending.reply is None or pending.missing:
                return None
            tree, own = pending.reply, [*pending.files.values()]
            metadata = self.state.message_res_store[tree.object_id].metadata
        try:
            limit_bytes = pending.reply_limit_bytes
            content, error = read_message(self.store, tree, limit_bytes=limit_bytes, own=own)
        except ResourceError:
            raise  # a failure of this machine, not of the node
        except Exception as failure:  # malicious bytes fail in many ways
            said = foreign(failure, _SHOWN)
            reason = (
                f"update from node {pending.node_id}: cannot read it ({type(failure).__name__}: "
                f"{said}). It was not used."
            )
            content, error = None, Error(REFUSED, reason)
        self.forget([message_id])
        if error is not None:
            return make_message(metadata=metadata, error=error)
        return make_message(metadata=metadata, content=content)

    def key_of(self, node_id: int) -> bytes | None:
        """Returns the public key of a node; None if there is no such node."""
        with self.lock:
            node = self.state.nodes.get(node_id)
            return node.public_key if node is not None else None

    def forget(self, message_ids: Collection[str]) -> None:
        """Deletes messages, their payloads and their replies."""
        with self.lock:
            for message_id in message_ids:
                pending = self.pending.pop(message_id)
                if pending is not None:
                    self._drop_reply(message_id, pending)
                    self.state.object_store.delete(message_id)
            self.state.delete_messages(set(message_ids))

    def _drop_reply(self, message_id: str, pending: PendingMessage) -> None:
        if pending.reply is None:
            return
        state, root = self.state, pending.reply.object_id
        state.message_ins_id_to_message_res_id.pop(message_id, None)
        state.message_res_store.pop(root, None)
        state.end_session(pending.session)
        self.store.release(pending.held)
        pending.drop_reply()
