"""What comes at the network port and should not: each refused, and the server goes on."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest, PushObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedcore.crypto.kit import client_context
from fedcore.updates.messages import REFUSED
from server.live.network.limits import Limits

FLEET = "/v1/fleet"


def test_what_comes_without_a_certificate_gets_nowhere(project: Any, serve: Any) -> None:
    with serve() as served:
        bare = ssl.create_default_context(cadata=project.server().kit.authority_pem.decode())
        with (
            socket.create_connection(("127.0.0.1", project.port)) as raw,
            bare.wrap_socket(raw, server_hostname="127.0.0.1") as tls,
        ):
            tls.sendall(b"POST /v1/fleet/activate-node HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                assert tls.recv(1) == b""  # TLS 1.3 tells a client of its refusal when it reads
        target = f"localhost:{served.listening.address.wake_port}"
        authority = grpc.ssl_channel_credentials(project.server().kit.authority_pem)
        with grpc.secure_channel(target, authority) as channel:
            ready = grpc.channel_ready_future(channel)
            with pytest.raises(grpc.FutureTimeoutError):
                ready.result(timeout=1)


@pytest.mark.slow
def test_nothing_below_tls_1_3_is_spoken(project: Any, launch_server: Any) -> None:
    server = launch_server("federation.cohort=2")
    kit = project.device("edge-0")
    (wake_port,) = re.findall(r"wakes on (\d+)", server.log.read_text())
    for port in (project.port, int(wake_port)):
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = client_context(kit)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.maximum_version = version
            context.set_alpn_protocols(["h2", "http/1.1"])
            spoken = None
            with (
                contextlib.suppress(ssl.SSLError, ConnectionError),
                socket.create_connection(("127.0.0.1", port)) as raw,
                context.wrap_socket(raw, server_hostname="127.0.0.1") as tls,
            ):
                spoken = tls.version()
            assert spoken == ("TLSv1.3" if version == ssl.TLSVersion.TLSv1_3 else None)


def test_nothing_but_the_fleet_api_is_there(serve: Any, rogue: Any) -> None:
    paths = (
        *("/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/pull-messages"),
        *("/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/get-fab"),
        *("/v1/fleet/confirm-message-received", "/docs", "/openapi.json", "/health", "/"),
    )
    with serve():
        one = rogue()
        one.activate()
        assert [one.post(path, b"").status_code for path in paths] == [404] * len(paths)
        assert one.client.get(f"{FLEET}/pull-messages").status_code == 404


def test_a_caller_speaks_for_itself_alone(serve: Any, rogue: Any) -> None:
    with serve():
        one, other = rogue(), rogue("edge-1")
        one.activate()
        other.activate()
        calls = {
            "activate-node": ActivateNodeRequest(
                public_key=other.kit.public, heartbeat_interval=60
            ),
            "deactivate-node": DeactivateNodeRequest(node_id=other.node.node_id),
            "pull-messages": PullMessagesRequest(node=other.node),
            "pull-object": PullObjectRequest(node=other.node, run_id=1, object_id="0" * 64),
            "push-object": PushObjectRequest(node=other.node, run_id=1, object_id="0" * 64),
        }
        codes = {
            path: one.post(f"{FLEET}/{path}", body).status_code for path, body in calls.items()
        }
        assert codes == dict.fromkeys(calls, 403)


def test_a_reply_is_taken_from_the_node_that_was_asked(serve: Any, rogue: Any, ask: Any) -> None:
    with serve() as served:
        one, other = rogue(), rogue("edge-1")
        asked, spare = one.activate(), other.activate()
        thread, answers = ask(served, asked)
        reply = one.reply(loss=0.5)
        assert other.pull().messages_list == []
        # In another's name, to a message of another, and for another run.
        assert other.push(reply).status_code == 403
        assert other.push(reply, src_node_id=spare).status_code == 409
        assert one.push(reply, run_id=77).status_code == 409
        assert one.push(reply, message_id="0" * 64).status_code == 409
        assert one.push(reply, reply_to_message_id="").status_code == 409
        first = one.push(reply)
        assert first.status_code == 200
        begun = PushMessagesResponse.FromString(first.content)
        second = Message(RecordDict({"m": MetricRecord({"loss": 9.0})}), reply_to=reply)
        second.metadata.__dict__.update(reply.metadata.__dict__)
        assert one.push(second).status_code == 409, "one message has one reply"
        for object_id, found in get_all_nested_objects(reply).items():
            content = PushObjectRequest(
                node=other.node,
                run_id=reply.metadata.run_id,
                object_id=object_id,
                object_content=found.deflate(),
                session_id=begun.session_id,
            )
            assert other.post(f"{FLEET}/push-object", content).status_code == 409
            content.node.CopyFrom(one.node)
            forged = PushObjectRequest(object_content=b"forged")
            forged.MergeFrom(content)
            forged.object_content = content.object_content + b"!"
            response = one.post(f"{FLEET}/push-object", forged)
            assert not PushObjectResponse.FromString(response.content).stored
            response = one.post(f"{FLEET}/push-object", content)
            assert PushObjectResponse.FromString(response.content).stored
        thread.join(10)
        (answer,) = answers
        assert answer.content.metric_records["metrics"]["loss"] == 0.5
        assert one.push(reply).status_code == 409, "a duplicate"


def test_what_a_payload_says_of_itself_is_not_believed(serve: Any, rogue: Any, ask: Any) -> None:
    with serve() as served:
        one = rogue()
        thread, answers = ask(served, one.activate())
        reply = one.reply(loss=0.5)
        reply.metadata.__dict__["_src_node_id"] = 4711  # inside the object, in its own bytes
        response = one.push(reply, src_node_id=one.node.node_id)
        begun = PushMessagesResponse.FromString(response.content)
        for object_id, found in get_all_nested_objects(reply).items():
            content = PushObjectRequest(
                node=one.node,
                run_id=reply.metadata.run_id,
                object_id=object_id,
                object_content=found.deflate(),
                session_id=begun.session_id,
            )
            one.post(f"{FLEET}/push-object", content)
        thread.join(10)
        assert answers[0].metadata.src_node_id == one.node.node_id


def test_an_update_that_cannot_be_read_is_an_error_of_its_client(
    serve: Any, rogue: Any, ask: Any
) -> None:
    with serve() as served:
        one = rogue()
        thread, answers = ask(served, one.activate())
        reply = one.reply(loss=0.5)
        # The tree leaves out what the objects refer to.
        tree = get_object_tree(reply)
        del tree.children[:]
        reply.metadata.__dict__["_message_id"] = reply.object_id
        proto = message_to_proto(remove_content_from_message(reply))
        request = PushMessagesRequest(
            node=one.node, messages_list=[proto], message_object_trees=[tree]
        )
        begun = PushMessagesResponse.FromString(one.post(f"{FLEET}/push-messages", request).content)
        content = PushObjectRequest(
            node=one.node,
            run_id=reply.metadata.run_id,
            object_id=reply.object_id,
            object_content=reply.deflate(),
            session_id=begun.session_id,
        )
        one.post(f"{FLEET}/push-object", content)
        thread.join(10)
        assert answers[0].has_error()
        assert answers[0].error.code == REFUSED


def test_of_a_thousand_mutated_replies_none_is_taken(
    serve: Any, rogue: Any, ask: Any, sent: Any
) -> None:
    rng = random.Random(7)
    limits = Limits(calls_per_s=1e6, burst=10**6)
    with serve(limits=limits) as served:
        one = rogue()
        thread, answers = ask(served, one.activate(), timeout=300)
        reply = one.reply(loss=0.5)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        proto = message_to_proto(remove_content_from_message(reply))
        sound = PushMessagesRequest(
            node=one.node, messages_list=[proto], message_object_trees=[get_object_tree(reply)]
        ).SerializeToString()
        codes = set()
        for _ in range(1000):
            raw = bytearray(sound)
            for _ in range(rng.randint(1, 8)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            codes.add(one.post(f"{FLEET}/push-messages", bytes(raw)).status_code)
            sent.one()
        assert codes <= {200, 400, 403, 409}, codes
        served.listening.stop()
        thread.join(10)
        assert answers == [], "no object was ever pushed, so nothing may have been taken"


@pytest.mark.slow
def test_a_body_that_is_too_large_is_not_read(project: Any, launch_server: Any, rogue: Any) -> None:
    server = launch_server("federation.cohort=2")
    one = rogue()
    one.activate()
    for _ in range(3):  # what the first requests allocate is no matter of size
        one.pull()
    before, peak = server.rss_bytes(), [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], server.rss_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    megabyte = bytes(2**20)

    def body() -> Iterator[bytes]:
        for _ in range(400):
            yield megabyte

    try:
        announced = {"content-length": str(400 * 2**20)}
        for headers in (announced, {"transfer-encoding": "chunked"}):
            for path in ("push-object", "pull-messages", "activate-node"):
                try:
                    response = one.client.post(
                        f"{FLEET}/{path}", content=body(), headers=one.headers | headers
                    )
                    assert response.status_code == 413
                except httpx.TransportError:
                    pass  # it hung up while the body was being sent
        bare = ssl.create_default_context(cadata=project.server().kit.authority_pem.decode())
        with (
            contextlib.suppress(ssl.SSLError, ConnectionError),
            socket.create_connection(("127.0.0.1", project.port)) as raw,
            bare.wrap_socket(raw, server_hostname="127.0.0.1") as tls,
        ):
            tls.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\n")
            tls.sendall(b"content-length: 419430400\r\n\r\n")
            for piece in body():
                tls.sendall(piece)
            pytest.fail("the whole body of a peer without a certificate was taken in")
    finally:
        done.set()
        watcher.join()
    assert peak[0] - before <= 16 * 2**20, f"{(peak[0] - before) / 2**20:.1f} MiB"
    assert one.pull().messages_list == [], "and the server goes on"


def test_headers_without_end_are_hung_up_on(project: Any, serve: Any, rogue: Any) -> None:
    kit = project.device("edge-0")
    with serve():
        with (
            socket.create_connection(("127.0.0.1", project.port)) as raw,
            client_context(kit).wrap_socket(raw, server_hostname="127.0.0.1") as tls,
        ):
            tls.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\nx: ")
            with pytest.raises((ConnectionError, ssl.SSLError)):
                tls.sendall(b"a" * 2**26)
        rogue().activate()


def test_a_body_that_never_comes_is_waited_for_no_longer(serve: Any, rogue: Any) -> None:
    with serve(limits=Limits(body_s=0.3)):
        one = rogue()
        one.activate()

        def body() -> Iterator[bytes]:
            yield b"a"
            time.sleep(1.0)

        response = one.client.post(f"{FLEET}/pull-messages", content=body(), headers=one.headers)
        assert response.status_code == 408


def test_who_calls_too_often_is_told_to_wait(serve: Any, rogue: Any) -> None:
    with serve(limits=Limits(calls_per_s=5.0, burst=10)):
        one, other = rogue(), rogue("edge-1")
        one.activate()
        request = PullMessagesRequest(node=one.node)
        responses = [one.post(f"{FLEET}/pull-messages", request) for _ in range(20)]
        refused = [response for response in responses if response.status_code == 429]
        assert refused
        assert 0 < float(refused[0].headers["retry-after"]) <= 0.2
        other.activate()


def test_a_call_before_activation_is_sent_back(serve: Any, rogue: Any) -> None:
    with serve():
        one = rogue()
        response = one.post(f"{FLEET}/pull-messages", PullMessagesRequest(node=one.node))
        assert response.status_code == 401
        one.activate()
        one.headers["fedcore-instance"] = "another process"
        response = one.post(f"{FLEET}/pull-messages", PullMessagesRequest(node=one.node))
        assert response.status_code == 401
