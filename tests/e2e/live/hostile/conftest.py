"""A device with a valid certificate that says what it likes."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedcore.crypto.keys import load_key
from fedcore.crypto.kit import Kit, client_context
from fedcore.flower.fleet import node_id_of
from fedcore.flower.fleet_grid import ServerStopped
from fedcore.rpc.hello import hello_of
from fedcore.updates.seal import run_digest, sign_reply
from server.live.rounds.settings import device_settings

FLEET = "/v1/fleet"
CONTENT = RecordDict({"c": ConfigRecord({"x": 1})})
"""What nodes are asked here."""


@dataclass
class Rogue:
    """Calls the Fleet API as it likes, over one connection."""

    kit: Kit
    client: httpx.Client
    headers: dict[str, str]
    run: str
    """Digest of the run that it signs for."""
    key: EllipticCurvePrivateKey

    @property
    def node(self) -> Node:
        return Node(node_id=node_id_of(self.kit.public))

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else body.SerializeToString()
        kind = {"content-type": "application/x-protobuf"}
        return self.client.post(path, content=content, headers=self.headers | kind | headers)

    def activate(self) -> int:
        request = ActivateNodeRequest(public_key=self.kit.public, heartbeat_interval=60)
        response = self.post(f"{FLEET}/activate-node", request)
        assert response.status_code == 200, response.text
        return int(ActivateNodeResponse.FromString(response.content).node_id)

    def pull(self) -> PullMessagesResponse:
        response = self.post(f"{FLEET}/pull-messages", PullMessagesRequest(node=self.node))
        assert response.status_code == 200, response.text
        return PullMessagesResponse.FromString(response.content)

    def asked(self) -> Message:
        """The message that waits for it, without its content."""
        (proto,) = self.pull().messages_list
        return message_from_proto(proto)

    def reply(self, *, asked: Message | None = None, **metrics: float) -> Message:
        """A reply to what it was asked, signed as it should be."""
        asked = asked or self.asked()
        reply = Message(RecordDict({"metrics": MetricRecord(dict(metrics))}), reply_to=asked)
        self.sign(reply)
        return reply

    def sign(self, reply: Message, asked: RecordDict = CONTENT, **changes: Any) -> None:
        """Signs a reply again, for what it should be signed for but for ``changes``."""
        reply.content.pop("envelope", None)
        signed = {
            "purpose": reply.metadata.message_type,
            "run_id": self.run,
            "node_id": self.node.node_id,
            "key": self.key,
            "now_s": time.time(),
        }
        sign_reply(reply.content, asked, **(signed | changes))

    def push(self, reply: Message, **changes: Any) -> httpx.Response:
        """Announces a reply."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        proto = message_to_proto(remove_content_from_message(reply))
        for name, value in changes.items():
            setattr(proto.metadata, name, value)
        request = PushMessagesRequest(
            node=self.node, messages_list=[proto], message_object_trees=[get_object_tree(reply)]
        )
        return self.post(f"{FLEET}/push-messages", request)

    def push_whole(self, reply: Message) -> list[int]:
        """Pushes a reply with all of its objects; returns the status of each call."""
        response = self.push(reply)
        codes = [response.status_code]
        if response.status_code != 200:
            return codes
        begun = PushMessagesResponse.FromString(response.content)
        for object_id, found in get_all_nested_objects(reply).items():
            if object_id in begun.objects_to_push:
                request = PushObjectRequest(
                    node=self.node,
                    run_id=reply.metadata.run_id,
                    object_id=object_id,
                    object_content=found.deflate(),
                    session_id=begun.session_id,
                )
                codes.append(self.post(f"{FLEET}/push-object", request).status_code)
        return codes


@pytest.fixture
def rogue(project: Any) -> Iterator[Callable[..., Rogue]]:
    """Makes rogues by name."""
    clients: list[httpx.Client] = []

    def making(name: str = "edge-0") -> Rogue:
        kit = project.device(name)
        client = httpx.Client(
            base_url=f"https://127.0.0.1:{project.port}", verify=client_context(kit), timeout=30
        )
        clients.append(client)
        headers = hello_of("tiny", project.task).headers(f"instance-{name}")
        run = run_digest(device_settings(project.run(), instance="first"))
        return Rogue(kit, client, headers, run, load_key(kit.key_path))

    yield making
    for client in clients:
        client.close()


@pytest.fixture
def ask() -> Callable[..., tuple[threading.Thread, list[Message]]]:
    """Sends one message to a node and collects what the server takes as its answer."""

    def asking(
        served: Any, node: int, timeout: float = 20.0
    ) -> tuple[threading.Thread, list[Message]]:
        answers: list[Message] = []
        message = Message(CONTENT, node, MessageType.TRAIN)
        grid = served.listening.grid()

        def collect() -> None:
            with contextlib.suppress(ServerStopped):
                answers.extend(grid.send_and_receive([message], timeout=timeout))

        thread = threading.Thread(target=collect)
        thread.start()
        while not served.listening.fleet.pending:
            time.sleep(0.01)
        return thread, answers

    return asking


_FIRST = 40
"""So many messages warm up what every message needs; memory is compared from then on."""


@dataclass
class Sent:
    """How many messages of a class were sent, and what they did to this process's memory."""

    number: int = 0
    before_bytes: int = 0

    def one(self) -> None:
        """One more was sent."""
        self.number += 1
        if self.number == _FIRST:
            self.before_bytes = _memory_bytes()


def _memory_bytes() -> int:
    """What this process, server and rogues, holds in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def sent(request: pytest.FixtureRequest) -> Iterator[Sent]:
    """Counts; writes a line to the file that ``FEDCORE_HOSTILE_TOLD`` names, once all is over."""
    counted = Sent()
    yield counted
    told = os.environ.get("FEDCORE_HOSTILE_TOLD")
    if told:
        line = {
            "class": request.node.name.removeprefix("test_"),
            "sent": counted.number,
            "memory_before_bytes": counted.before_bytes,
            "memory_after_bytes": _memory_bytes(),
        }
        with Path(told).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
