"""A device that does what it may, very often: the server's log and processor stay its own."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedcore.observability.lines import OneLine
from fedcore.rpc.bundle_pb2 import Bundle
from fedcore.rpc.wake_pb2 import WatchRequest
from fedcore.rpc.wake_pb2_grpc import WakeStub
from server.live.network.limits import Limits

FLEET = "/v1/fleet"
CALLS = 2000


def cpu_s(program: Any) -> float:
    fields = Path(f"/proc/{program.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@contextmanager
def channel(rogue: Any, port: int) -> Iterator[grpc.Channel]:
    kit = rogue.kit
    credentials = grpc.ssl_channel_credentials(
        kit.authority_pem, kit.key_path.read_bytes(), kit.certificate_pem
    )
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials) as opened:
        yield opened


@pytest.mark.parametrize("patient", [True, False])
def test_opening_and_cancelling_a_stream_fills_no_log(
    project: Any, launch_server: Any, rogue: Any, patient: bool
) -> None:
    device = rogue()
    server = launch_server("federation.cohort=2")
    device.activate()
    (port,) = re.findall(r"wakes on (\d+)", server.log.read_text())
    size, before_s, began = server.log.stat().st_size, cpu_s(server), time.monotonic()
    opened = 0
    with channel(device, int(port)) as wire:
        stub = WakeStub(wire)  # type: ignore[no-untyped-call]
        while time.monotonic() - began < 6.0:
            calls = stub.Watch(WatchRequest(instance=device.headers["fedcore-instance"]))
            opened += 1
            if patient:
                with contextlib.suppress(grpc.RpcError):
                    next(iter(calls))
            else:
                time.sleep(0.001)  # as long as it takes to get there
            calls.cancel()
    took_s = time.monotonic() - began
    assert opened > 20
    used_s, grown = cpu_s(server) - before_s, server.log.stat().st_size - size
    print(f"opened {opened}, {used_s / took_s:.2f} of a core, {grown} bytes")
    assert grown < 20_000
    # By opening: how many there are depends on the caller's speed, and the rest is gRPC's own work.
    assert used_s < 0.25 + 0.001 * opened
    assert device.activate(), "and the server goes on"


def test_bytes_that_are_no_request_for_a_stream_fill_no_log(
    project: Any, launch_server: Any, rogue: Any
) -> None:
    device, rng = rogue(), random.Random(3)
    server = launch_server("federation.cohort=2")
    device.activate()
    (port,) = re.findall(r"wakes on (\d+)", server.log.read_text())
    with channel(device, int(port)) as wire:
        for _ in range(100):
            path = rng.choice(["/fedcore.wake.v1.Wake/Watch", "/\x1b", "/none/x"])
            method = wire.unary_stream(path, request_serializer=bytes)
            with contextlib.suppress(grpc.RpcError):
                next(iter(method(rng.randbytes(rng.randrange(200)), timeout=0.2)))
    text = server.log.read_text()
    assert "Traceback" not in text
    assert len(text.splitlines()) < 80, text[-3000:]
    assert all(len(line.encode()) < 2000 and line.isprintable() for line in text.splitlines())
    assert device.activate()


_KINDS = {
    "activate-node": ActivateNodeRequest,
    "deactivate-node": DeactivateNodeRequest,
    "get-run": GetRunRequest,
    "pull-bundle": PullMessagesRequest,
    "pull-messages": PullMessagesRequest,
    "pull-object": PullObjectRequest,
    "push-bundle": PushMessagesRequest,
    "push-messages": PushMessagesRequest,
    "push-object": PushObjectRequest,
    "send-node-heartbeat": SendNodeHeartbeatRequest,
}


def near(raw: bytes, rng: random.Random) -> bytes:
    """Bytes that differ from a request in a few places, or in their length."""
    changed = bytearray(raw or bytes(4))
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    if not rng.randrange(12):
        del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


def requests(device: Any, asked: Message, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Calls of a device that is enrolled, whose fields are now and then something else."""
    reply = device.reply(asked=asked, **{"num-examples": 5})
    proto = message_to_proto(remove_content_from_message(reply))
    tree = get_object_tree(reply)
    run_id = asked.metadata.run_id
    while True:
        name = rng.choice(list(_KINDS))
        request = _KINDS[name]()
        for field, value in (
            ("node", device.node),
            ("run_id", rng.choice([run_id, 0, 2**63])),
            ("object_id", rng.choice([tree.object_id, "", "../" * 40, "\x1b[31m", "f" * 64])),
            ("session_id", rng.choice(["", "x"])),
            ("heartbeat_interval", rng.choice([0.0, 1.0, float("nan"), 1e300])),
            ("public_key", rng.choice([device.kit.public, b"", b"\xff" * 100])),
            ("node_id", rng.choice([device.node.node_id, 0, 2**64 - 1])),
        ):
            if field in request.DESCRIPTOR.fields_by_name:
                if field == "node":
                    request.node.CopyFrom(value)
                else:
                    setattr(request, field, value)
        if name in ("push-bundle", "push-messages"):
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                one = request.messages_list.add()
                one.CopyFrom(proto)
                for part in ("message_id", "message_type", "group_id", "reply_to_message_id"):
                    if not rng.randrange(6):
                        text = rng.choice(["", "\x1b]0;x\x07", "a" * 5000, "\u202e", "query."])
                        setattr(one.metadata, part, text)
                if not rng.randrange(6):
                    one.metadata.ttl = rng.choice([float("nan"), -1.0, 1e300])
                    one.metadata.created_at = rng.choice([float("inf"), 0.0])
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                grown = request.message_object_trees.add()
                grown.CopyFrom(tree)
                for _ in range(rng.choice([0, 0, 1, 40])):
                    grown.children.add(object_id=rng.choice(["", "zz", "f" * 64, "\x00"]))
        raw = near(request.SerializeToString(), rng)
        if name == "push-bundle":
            whole = get_all_nested_objects(reply)
            parts = [one.deflate() for one in whole.values() if one is not reply]  # never complete
            parts = rng.choice([parts, [], parts[:1], [*parts, b""], [b"x"] * 65, parts * 20])
            raw = near(
                Bundle(call=raw, objects=[near(one, rng) for one in parts]).SerializeToString(), rng
            )
        yield f"{FLEET}/{name}", raw


def test_calls_of_any_content_are_answered_and_logged_in_a_few_lines(
    project: Any, serve: Any, rogue: Any, ask: Any, caplog: pytest.LogCaptureFixture
) -> None:
    device, rng = rogue(), random.Random(7)
    codes: dict[int, int] = {}
    limits = Limits(calls_per_s=1e6, burst=10**6)
    with caplog.at_level(logging.INFO), serve(limits=limits) as served:
        device.activate()
        thread, _ = ask(served, device.node.node_id)
        asked = device.asked()
        calls = requests(device, asked, rng)
        for number in range(CALLS):
            path, body = next(calls)
            instance = rng.choice(["<x>", "y" * 300]) if not number % 50 else None
            more = {"fedcore-instance": instance} if instance else {}
            response = device.client.post(path, content=body, headers=device.headers | more)
            codes[response.status_code] = codes.get(response.status_code, 0) + 1
            if response.status_code == 401 or not number % 100:
                device.activate()
        assert device.activate(), "the server goes on"
        served.listening.stop()
        thread.join(20)
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(OneLine())
    for record in caplog.records:
        if record.name.partition(".")[0] in ("fedcore", "uvicorn", "asyncio", "grpc", "root"):
            assert not record.exc_info, handler.format(record)
            handler.emit(record)
    lines = written.getvalue().splitlines()
    print(codes, len(lines), max(map(len, lines)))
    assert all(len(line.encode()) < 2000 for line in lines)
    assert all(line.isprintable() for line in lines)
    assert len(lines) < CALLS / 10
    assert codes.get(500, 0) == 0, codes


def test_large_lists_of_objects_hold_up_nobody(serve: Any, rogue: Any, ask: Any) -> None:
    """Who sends them is told to wait, long before the others would have to."""
    with serve() as served:
        bad, good = rogue("edge-0"), rogue("edge-1")
        thread, _ = ask(served, bad.activate(), timeout=300)
        good.activate()
        reply = bad.reply(loss=0.5)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        proto = message_to_proto(remove_content_from_message(reply))
        tree = get_object_tree(reply)
        for number in range(7000):
            tree.children.add(object_id=f"{number:064x}")
        body = PushMessagesRequest(
            node=bad.node, messages_list=[proto], message_object_trees=[tree]
        ).SerializeToString()
        over, codes = threading.Event(), list[int]()

        def flood() -> None:
            while not over.is_set():
                codes.append(bad.post(f"{FLEET}/push-messages", body).status_code)

        flooding = threading.Thread(target=flood)
        flooding.start()
        slowest_s = 0.0
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            began = time.monotonic()
            good.pull()
            slowest_s = max(slowest_s, time.monotonic() - began)
            time.sleep(0.05)
        over.set()
        flooding.join()
        served.listening.stop()
        thread.join(10)
    assert codes.count(409) < 16
    assert codes.count(429) > 10
    assert slowest_s < 1.0
