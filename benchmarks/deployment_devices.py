"""Many devices in one process that speak the protocol and train nothing: no torch, no model.

Each keeps a stream of its own open, and pulls, signs and pushes over a connection of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fedcore.rpc.tls import require_tls_1_3

require_tls_1_3()  # before anything imports grpc

import grpc  # noqa: E402
import numpy as np  # noqa: E402
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey  # noqa: E402
from flwr.app import Message, MetricRecord, RecordDict  # noqa: E402
from flwr.app.message import make_message, remove_content_from_message  # noqa: E402
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto  # noqa: E402
from flwr.proto.fleet_pb2 import (  # noqa: E402
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import (  # noqa: E402
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node  # noqa: E402
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import (  # noqa: E402
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (  # noqa: E402
    inflate_object_from_contents,
)
from google.protobuf.message import Message as Proto  # noqa: E402

from fedcore.crypto.keys import load_key  # noqa: E402
from fedcore.crypto.kit import Kit, client_context, load_kit  # noqa: E402
from fedcore.flower.fleet import node_id_of  # noqa: E402
from fedcore.flower.fleet_bundle import contents_of, packed_bundle  # noqa: E402
from fedcore.flower.identity import assume_identity  # noqa: E402
from fedcore.rpc.bundle_pb2 import Bundle  # noqa: E402
from fedcore.rpc.hello import WAKE_PORT, hello_of  # noqa: E402
from fedcore.rpc.wake_pb2 import Call, WatchRequest  # noqa: E402
from fedcore.rpc.wake_pb2_grpc import WakeStub  # noqa: E402
from fedcore.updates.messages import METRICS, NUM_EXAMPLES, TRAIN_LOSS, weights_record  # noqa: E402
from fedcore.updates.seal import run_digest, sign_reply  # noqa: E402

_Answer = TypeVar("_Answer", bound=Proto)
_START_EVERY_S, _AGAIN_S = 0.01, 0.5


class Busy(Exception):
    """The server said when to come again."""


@dataclass
class Wire:
    """HTTP/1.1 over one connection, as little of it as the Fleet API needs."""

    port: int
    context: ssl.SSLContext
    headers: bytes
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    answered: dict[str, str] = field(default_factory=dict)
    """Headers of the last answer."""

    async def post(self, call: str, request: Proto, kind: type[_Answer]) -> _Answer:
        """One call; comes again when the server is busy."""
        body = request.SerializeToString()
        while True:
            status, raw = await self._exchange(call, body)
            if status == 200:
                return kind.FromString(raw)
            if status not in (429, 503):
                raise RuntimeError(f"{call}: HTTP {status}: {raw[:200]!r}")
            await asyncio.sleep(float(self.answered.get("retry-after", "1")))

    async def _exchange(self, call: str, body: bytes) -> tuple[int, bytes]:
        if self.streams is None:
            self.streams = await asyncio.open_connection(
                "127.0.0.1", self.port, ssl=self.context, server_hostname="127.0.0.1"
            )
        reader, writer = self.streams
        head = f"POST /v1/fleet/{call} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        writer.write(head.encode() + self.headers + b"\r\n")
        writer.write(body)
        await writer.drain()
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:] if line)
        self.answered = {name.lower(): value.strip() for name, _, value in pairs}
        raw = await reader.readexactly(int(self.answered["content-length"]))
        return int(lines[0].split()[1]), raw


@dataclass
class Told:
    """What this process tells its parent, one JSON line each."""

    count: int
    seen: dict[str, int] = field(default_factory=dict)

    def note(self, what: str) -> None:
        """Prints a line when the last of all devices has come so far, and at the first."""
        self.seen[what] = self.seen.get(what, 0) + 1
        if self.seen[what] % self.count in (0, 1):
            line = {"event": what, "devices": self.seen[what], "at_s": time.monotonic()}
            print(json.dumps(line), flush=True)


@dataclass
class Device:
    """One device."""

    kit: Kit
    key: EllipticCurvePrivateKey
    wire: Wire
    instance: str
    parameters: int
    place: int
    together: asyncio.Barrier | None = None
    """Where all devices wait until each has its reply ready; then they push at once."""
    came: bool = False
    """Whether its stream was ever open."""

    @property
    def node(self) -> Node:
        """Its node."""
        return Node(node_id=node_id_of(self.kit.public))

    async def run(self, told: Told) -> None:
        """Comes, and comes again whenever its stream or its connection ends, as the agent does."""
        while True:
            try:
                await self._attend(told)
            except (grpc.aio.AioRpcError, OSError, asyncio.IncompleteReadError):
                self.wire.streams = None  # a server cuts who is late, on a machine with much to do
            await asyncio.sleep(_AGAIN_S)

    async def _attend(self, told: Told) -> None:
        """Asks for messages once its stream is open, and each time that it is woken.

        A round may begin between a device's activation and its stream: no call wakes it then.
        """
        request = ActivateNodeRequest(public_key=self.kit.public, heartbeat_interval=1800)
        await self.wire.post("activate-node", request, ActivateNodeResponse)
        target = f"127.0.0.1:{self.wire.answered[WAKE_PORT]}"
        credentials = grpc.ssl_channel_credentials(
            self.kit.authority_pem, self.kit.key_path.read_bytes(), self.kit.certificate_pem
        )
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.secure_channel(target, credentials, options=options) as channel:
            stub = WakeStub(channel)  # type: ignore[no-untyped-call]
            async for call in stub.Watch(WatchRequest(instance=self.instance)):
                if call.kind != Call.OPEN:
                    told.note("woken")
                elif not self.came:
                    self.came = True
                    told.note("there")
                while await self._answer(told):
                    told.note("answered")

    async def _answer(self, told: Told) -> bool:
        request = PullMessagesRequest(node=self.node)
        bundle = await self.wire.post("pull-bundle", request, Bundle)
        pulled, contents = PullMessagesResponse.FromString(bundle.call), contents_of(bundle)
        if not pulled.messages_list:
            return False
        told.note("pulled")
        bare, tree = message_from_proto(pulled.messages_list[0]), pulled.message_object_trees[0]
        run_id = bare.metadata.run_id
        for object_id in {each.object_id for each in iterate_object_tree(tree)} - {*contents}:
            one = PullObjectRequest(node=self.node, run_id=run_id, object_id=object_id)
            got = await self.wire.post("pull-object", one, PullObjectResponse)
            contents[object_id] = got.object_content
        content = inflate_object_from_contents(tree.object_id, contents).content
        asked = make_message(metadata=bare.metadata, content=content)
        begin, objects = _prepared(await self._reply(asked), self.node)
        del contents, content, asked
        if self.together is not None:
            await self.together.wait()
        told.note("pushing")
        await self._push(begin, objects, run_id)
        return True

    async def _reply(self, asked: Message) -> Message:
        run_id = asked.metadata.run_id
        told = await self.wire.post(
            "get-run", GetRunRequest(node=self.node, run_id=run_id), GetRunResponse
        )
        override = run_from_proto(told.run).override_config
        settings = {name: str(value) for name, value in override.items()}
        rng = np.random.default_rng(self.place)
        weights = rng.random(self.parameters, np.float32)
        metrics = MetricRecord({NUM_EXAMPLES: 100, TRAIN_LOSS: 1.0})
        reply = Message(
            RecordDict({"arrays": weights_record(weights), METRICS: metrics}), reply_to=asked
        )
        sign_reply(
            reply.content,
            asked.content,
            purpose=asked.metadata.message_type,
            run_id=run_digest(settings),
            node_id=self.node.node_id,
            key=self.key,
            now_s=time.time(),
        )
        return reply

    async def _push(
        self, begin: PushMessagesRequest, objects: dict[str, bytes], run_id: int
    ) -> None:
        bundle = packed_bundle(begin.SerializeToString(), objects.values())
        begun = await self.wire.post("push-bundle", bundle, PushMessagesResponse)
        wanted = set(begun.objects_to_push)
        for object_id in list(objects):
            content = objects.pop(object_id)
            if object_id in wanted:
                request = PushObjectRequest(
                    node=self.node,
                    run_id=run_id,
                    object_id=object_id,
                    object_content=content,
                    session_id=begun.session_id,
                )
                await self.wire.post("push-object", request, PushObjectResponse)


def _prepared(reply: Message, node: Node) -> tuple[PushMessagesRequest, dict[str, bytes]]:
    """What begins the push of a reply, and its objects as they travel."""
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
        contents = {object_id: found.deflate() for object_id, found in objects.items()}
    begin = PushMessagesRequest(
        node=node,
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[tree],
        clientapp_runtime_list=[0.0],
    )
    return begin, contents


def _device(root: Path, place: int, parameters: int, together: asyncio.Barrier | None) -> Device:
    kit = load_kit(root / "kits" / f"edge-{place}")
    instance = f"load-{place}"
    headers = hello_of("deployment", root / "task.py").headers(instance)
    headers["content-type"] = "application/x-protobuf"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    port = int(kit.servers[0].rpartition(":")[2])
    wire = Wire(port, client_context(kit), lines.encode())
    return Device(kit, load_key(kit.key_path), wire, instance, parameters, place, together)


async def _run(options: argparse.Namespace) -> None:
    told = Told(options.count)
    together = asyncio.Barrier(options.count) if options.together else None

    async def one(place: int) -> None:
        await asyncio.sleep((place - options.first) * _START_EVERY_S)
        await _device(options.project, place, options.parameters, together).run(told)

    places = range(options.first, options.first + options.count)
    await asyncio.gather(*(one(place) for place in places))


def main() -> None:
    """Runs until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="the number of its first device")
    parser.add_argument("--parameters", type=int, required=True, help="of each reply")
    parser.add_argument("--together", action="store_true", help="push once all are ready")
    assume_identity(1)
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
