"""What the live server and device rely on in Flower's private modules, held to the one version.

A failure here says what moved in Flower and which file of fedcore stands on it.
"""

from __future__ import annotations

import ast
import inspect
import io
import ssl
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from fedcore.errors import DataError, DiskFull, InvalidUpdate, TrainingError
from fedcore.flower.fleet import Fleet, node_id_of
from fedcore.flower.fleet_api import CHUNK_BYTES, ROUTES, Caller, call
from fedcore.flower.fleet_bundle import PULL_BUNDLE, PUSH_BUNDLE
from fedcore.flower.fleet_grid import Check, FleetGrid, ServerStopped
from fedcore.flower.identity import SERVER_NODE_ID, assume_identity
from fedcore.flower.records import read_record, record_bytes
from fedcore.updates.messages import weights_record
from fedcore.updates.pieces import FileArray

ROOM = Path(__file__).parents[2] / "fedcore" / "flower"
FILES = (
    "fleet.py",
    "fleet_api.py",
    *("fleet_arrivals.py", "fleet_bundle.py", "fleet_client.py"),
    "fleet_grid.py",
    "fleet_payload.py",
    "fleet_pull.py",
    *("fleet_store.py", "fleet_tree.py"),
    "records.py",
)
KEY = b"a public key"
PRIVATE = {
    *("flwr.app.message.make_message", "flwr.app.message.remove_content_from_message"),
    *("flwr.common.constant.NOOP_ACCOUNT_NAME", "flwr.common.constant.NOOP_FLWR_AID"),
    *(
        f"flwr.common.serde.{name}"
        for name in (
            *("message_from_proto", "message_to_proto", "run_from_proto"),
            *("recorddict_from_proto", "recorddict_to_proto"),
        )
    ),
    *(
        f"flwr.proto.fleet_pb2.{name}Request"
        for name in ("ActivateNode", "DeactivateNode", "PullMessages", "PushMessages")
    ),
    *(f"flwr.proto.fleet_pb2.{name}MessagesResponse" for name in ("Pull", "Push")),
    "flwr.app.message.arraychunk.ArrayChunk",
    "flwr.proto.heartbeat_pb2.SendNodeHeartbeatRequest",
    *(
        f"flwr.proto.message_pb2.{name}"
        for name in (
            *("ObjectTree", "PullObjectRequest", "PullObjectResponse"),
            *("PushObjectRequest", "PushObjectResponse"),
        )
    ),
    *("flwr.proto.node_pb2.Node", "flwr.proto.node_pb2.NodeInfo"),
    *("flwr.proto.recorddict_pb2.RecordDict", "flwr.proto.run_pb2.GetRunRequest"),
    "flwr.server.superlink.linkstate.in_memory_linkstate.InMemoryLinkState",
    *(
        f"flwr.supercore.constant.{name}"
        for name in ("HEAD_BODY_DIVIDER", "NOOP_FEDERATION_ID", "NodeStatus", "TaskType")
    ),
    "flwr.supercore.error.FlowerError",
    *(
        f"flwr.supercore.inflatable.inflatable_object.{name}"
        for name in (
            *("InflatableObject", "get_all_nested_objects", "get_object_tree"),
            "get_object_head_values_from_object_content",
            *("iterate_object_tree", "no_object_id_recompute"),
        )
    ),
    "flwr.supercore.inflatable.inflatable_utils.inflatable_class_registry",
    "flwr.supercore.object_store.in_memory_object_store.InMemoryObjectStore",
    "flwr.supercore.protobuf.client.ProtobufCall",
    "flwr.supercore.protobuf.client.ProtobufClientInterceptor",
    "flwr.supercore.protobuf.client.ProtobufRequestContext",
    "flwr.superlink.federation.NoOpFederationManager",
    "flwr.superlink.servicer.fleet.fleet_handlers",
    "flwr.supernode.fleet_http_client.FleetHttpClient",
}
"""Every private name that these files import."""
PUBLIC = {"flwr.app", "flwr.serverapp"}


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    (tmp_path / "spool").mkdir()
    one = Fleet(tmp_path / "spool")
    assume_identity(one.open_run({"run": "{}"}))
    join(one, KEY)
    return one


def join(fleet: Fleet, key: bytes) -> int:
    node_id = fleet.register_node(key)
    assert fleet.state.activate_node(node_id, 60)
    return node_id


CALLER = Caller(node_id_of(KEY), KEY, "edge")


def ask(weights: int = 5) -> Message:
    content = RecordDict(
        {
            "arrays": ArrayRecord({"model": Array(np.zeros(weights, np.float32))}),
            "config": ConfigRecord({"server-round": 1}),
        }
    )
    return Message(content, CALLER.node_id, MessageType.TRAIN)


def parameters(callable_: Any) -> list[str]:
    return list(inspect.signature(callable_).parameters)


def test_every_private_name_that_is_imported_is_listed_here() -> None:
    found = set()
    for name in FILES:
        for node in ast.walk(ast.parse((ROOM / name).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr"):
                assert node.module is not None
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    private = {name for name in found if name.rpartition(".")[0] not in PUBLIC}
    assert private == PRIVATE, f"differs by {sorted(private ^ PRIVATE)}"


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_the_private_name_is_still_there(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(module), attribute), f"Flower moved {name} out of {module}"


@pytest.mark.parametrize(
    ("handler", "taken"),
    [
        ("activate_node", ["request", "state"]),
        ("deactivate_node", ["request", "state"]),
        ("get_run", ["request", "state"]),
        ("pull_messages", ["request", "state", "store"]),
        ("pull_object", ["request", "state"]),
        ("push_messages", ["request", "state"]),
        ("push_object", ["request", "state"]),
        ("send_node_heartbeat", ["request", "state"]),
    ],
)
def test_a_handler_takes_what_it_is_given(handler: str, taken: list[str]) -> None:
    handlers = import_module("flwr.superlink.servicer.fleet.fleet_handlers")
    assert parameters(getattr(handlers, handler)) == taken, "see fedcore/flower/fleet_api.py"


def test_each_route_is_one_that_flowers_client_calls() -> None:
    source = inspect.getsource(import_module("flwr.supernode.fleet_http_client"))
    for path in ROUTES.keys() - {PULL_BUNDLE, PUSH_BUNDLE}:
        assert f'"{path}"' in source, f"Flower's client no longer calls {path}"


def test_flowers_client_takes_a_context_and_interceptors() -> None:
    client = import_module("flwr.supernode.fleet_http_client").FleetHttpClient
    assert {"base_url", "interceptors", "verify", "timeout"} <= set(parameters(client.__init__))
    seen: list[str] = []

    class Interceptor:
        def intercept(self, context: Any, call_next: Any) -> httpx.Response:
            seen.append(str(context.request.headers["content-type"]))
            raise httpx.ConnectError("refused")

    link = client("https://localhost:1", interceptors=[Interceptor()], verify=ssl.SSLContext())
    request = import_module("flwr.proto.fleet_pb2").PullMessagesRequest()
    with pytest.raises(httpx.ConnectError):
        link.PullMessages(request)
    link.close()
    assert seen == ["application/x-protobuf"] or seen[0].startswith("application/")


def test_a_chunk_of_an_array_fits_into_a_request() -> None:
    constants = import_module("flwr.common.constant")
    largest = constants.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    assert largest + 4096 < CHUNK_BYTES, "see fedcore/flower/fleet_api.py: CHUNK_BYTES"


def test_a_node_is_its_key_on_every_server(fleet: Fleet) -> None:
    assert fleet.state.get_node_id_by_public_key(KEY) == node_id_of(KEY) == fleet.register_node(KEY)
    assert 2 <= node_id_of(KEY) < 2**63
    assert node_id_of(KEY) not in (0, SERVER_NODE_ID)


def test_a_node_can_be_activated_again_at_once(fleet: Fleet) -> None:
    node, state = CALLER.node_id, fleet.state
    assert not state.activate_node(node, 60), "Flower refuses a node that it thinks is there"
    state.deactivate_node(node)
    assert state.activate_node(node, 60)


def test_the_run_goes_on_without_heartbeats(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    import flwr.supercore.corestate.in_memory_corestate as corestate

    in_a_year = corestate.now().replace(year=corestate.now().year + 1)
    monkeypatch.setattr(corestate, "now", lambda: in_a_year)
    status = fleet.state.get_run_status({fleet.run_id})[fleet.run_id]
    assert status.status == "running", "fedcore/flower/fleet.py: open_run"


def test_one_run_at_a_time(fleet: Fleet) -> None:
    with pytest.raises(TrainingError, match="a run is already in progress"):
        fleet.open_run({})
    fleet.end_run()
    assert fleet.open_run({}) != 0


def test_weights_that_all_are_sent_are_held_once(fleet: Fleet, tmp_path: Path) -> None:
    keys = [bytes([number]) for number in range(20)]
    content = RecordDict({"a": ArrayRecord({"m": Array(np.zeros(100_000, np.float32))})})
    fleet.send(Message(content, join(fleet, key), MessageType.TRAIN) for key in keys)
    assert sum(len(entry.content) for entry in fleet.store.store.values()) < 50_000
    (spool,) = {path.parent for path in tmp_path.rglob("*") if path.is_file()}
    assert 400_000 < sum(path.stat().st_size for path in spool.iterdir()) < 1.1 * 400_000
    assert fleet.store.get(next(spool.iterdir()).name) == next(spool.iterdir()).read_bytes()
    fleet.forget(list(fleet.pending))
    assert list(spool.iterdir()) == []


def test_a_message_is_handed_out_once_and_again_after_a_restart(fleet: Fleet) -> None:
    (sent,) = fleet.send([ask()])
    state = fleet.state
    first = state.get_message_ins(CALLER.node_id, 1)
    assert [message.metadata.message_id for message in first] == [sent]
    assert state.get_message_ins(CALLER.node_id, 1) == []
    fleet.restart(CALLER.node_id)
    assert [one.metadata.message_id for one in state.get_message_ins(CALLER.node_id, 1)] == [sent]


def test_what_was_forgotten_leaves_nothing_behind(fleet: Fleet) -> None:
    sent = fleet.send([ask(), ask()])
    fleet.forget(sent)
    state = fleet.state
    assert len(state.object_store) == 0
    assert state.num_message_ins() == 0
    assert state.get_message_ins(CALLER.node_id, None) == []
    assert fleet.pop_reply(sent[0]) is None


def push(fleet: Fleet, asked: Message, weights: int) -> bytes:
    """Answers as a node does, bodies of objects being files; returns the bytes of the weights."""
    values = np.random.default_rng(0).random(weights, np.float32)
    reply = Message(RecordDict({"arrays": weights_record(values)}), reply_to=asked)
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
    node = Node(node_id=CALLER.node_id)
    begin = PushMessagesRequest(
        node=node,
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[tree],
        clientapp_runtime_list=[0.0],
    )
    raw = call(fleet, CALLER, ROUTES["/v1/fleet/push-messages"], begin.SerializeToString())
    assert isinstance(raw, bytes)
    for object_id, found in objects.items():
        request = PushObjectRequest(
            node=node,
            run_id=fleet.run_id,
            object_id=object_id,
            object_content=found.deflate(),
            session_id=PushMessagesResponse.FromString(raw).session_id,
        )
        body = io.BytesIO(request.SerializeToString())
        call(fleet, CALLER, ROUTES["/v1/fleet/push-object"], body)
    return bytes(reply.content["arrays"]["model"].data)  # type: ignore[index]


@pytest.mark.parametrize("weights", [10, 3_000_000], ids=["small", "of three chunks"])
def test_a_reply_is_taken_once_and_what_is_large_of_it_stays_in_a_file(
    fleet: Fleet, weights: int, tmp_path: Path
) -> None:
    asked = ask(weights)
    (message_id,) = fleet.send([asked])
    raw = push(fleet, asked, weights)
    assert fleet.next_answered(0.0) == message_id
    taken = fleet.pop_reply(message_id)
    assert taken is not None
    assert list((tmp_path / "spool").iterdir()) == []
    array = taken.content["arrays"]["model"]  # type: ignore[index]
    assert isinstance(array, FileArray) == (weights > 10)
    assert (array.shape, array.data) == ((weights,), raw)
    assert fleet.pop_reply(message_id) is None


def test_a_disk_without_room_is_no_fault_of_a_node(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise DiskFull("no room")

    asked = ask(100_000)
    (message_id,) = fleet.send([asked])
    push(fleet, asked, 100_000)
    with monkeypatch.context() as patched:
        patched.setattr(fleet.store, "scratch", full)
        with pytest.raises(DiskFull):
            fleet.pop_reply(message_id)
    assert fleet.pop_reply(message_id) is not None, "it is still there once there is room"


def test_objects_that_a_node_was_sent_are_counted(fleet: Fleet) -> None:
    assert fleet.objects_sent(CALLER.node_id) == 0
    for count in (1, 2):
        (message_id,) = fleet.send([ask()])
        assert fleet.objects_sent(CALLER.node_id) == 6 * count
        fleet.forget([message_id])
    assert fleet.objects_sent(7) == 0


def test_garbage_is_an_error_of_data(fleet: Fleet) -> None:
    for path, route in ROUTES.items():
        with pytest.raises(DataError, match="not a valid message"):
            call(fleet, CALLER, route, b"\xff\xff\xff")
        assert route.max_bytes <= CHUNK_BYTES, path


def test_a_refusal_of_flowers_is_an_error_of_ours(fleet: Fleet) -> None:
    request = import_module("flwr.proto.fleet_pb2").ActivateNodeRequest(
        public_key=KEY, heartbeat_interval=0.001
    )
    with pytest.raises(InvalidUpdate, match="Heartbeat interval"):
        call(fleet, CALLER, ROUTES["/v1/fleet/activate-node"], request.SerializeToString())


def test_records_come_back_as_they_were() -> None:
    record = ask().content
    assert read_record(record_bytes(record), where="here") == record
    with pytest.raises(DataError, match="here: this file does not contain a record"):
        read_record(b"\xff\xff", where="here")


class Trusting:
    """Takes every reply as it is."""

    def expect(self, messages: Sequence[Message]) -> list[Check]:
        return [lambda reply: None for _ in messages]


class Nobody:
    """A presence in which every device has been gone for long."""

    def nodes(self) -> list[int]:
        return []

    def wake(self, node_ids: Any) -> None:
        list(node_ids)

    owe = wake

    def offline_s(self, node_id: int) -> float:
        return 60.0


def test_a_grid_waits_for_nobody_who_is_gone(fleet: Fleet) -> None:
    done: list[str] = []
    grid = FleetGrid(
        fleet, Nobody(), inspector=Trusting(), consumed=done.append, stopping=threading.Event()
    )
    assert (list(grid.send_and_receive([ask()], timeout=30)), len(done)) == ([], 1)
    assert not fleet.pending


def test_a_grid_ends_with_its_server(fleet: Fleet) -> None:
    stopping = threading.Event()
    grid = FleetGrid(
        fleet, Nobody(), inspector=Trusting(), consumed=lambda one: None, stopping=stopping
    )
    stopping.set()
    with pytest.raises(ServerStopped):
        list(grid.send_and_receive([ask()]))
    with pytest.raises(ServerStopped):
        grid.get_node_ids()
    assert not fleet.pending, "what was sent is forgotten"
