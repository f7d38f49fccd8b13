"""Bundles from a device that says what it likes, and from a server that does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest, PushMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedcore.flower import fleet_api
from fedcore.flower.fleet_api import Route
from fedcore.flower.fleet_bundle import (
    BUNDLE_BYTES,
    MAX_BUNDLED,
    PULL_BUNDLE,
    PUSH_BUNDLE,
    packed_reply,
    read_bundle,
)
from fedcore.flower.fleet_client import FleetLink
from fedcore.flower.fleet_errors import Unreachable
from fedcore.rpc.bundle_pb2 import Bundle
from fedcore.rpc.hello import WAKE_PORT
from server.live.network import gate
from server.live.network.limits import Limits


def bundle_of(one: Any, reply: Message) -> Bundle:
    """A reply with all of its objects, as an honest device sends it."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    begin = PushMessagesRequest(
        node=one.node,
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[get_object_tree(reply)],
    )
    return packed_reply(begin, get_all_nested_objects(reply).values())


def test_a_bundle_that_is_not_as_it_should_be_is_refused(serve: Any, rogue: Any, ask: Any) -> None:
    with serve() as served:
        one, other = rogue(), rogue("edge-1")
        other.activate()
        thread, answers = ask(served, one.activate())
        reply = one.reply(loss=0.5)
        bundle = bundle_of(one, reply)

        def status(who: Any = one, **changes: Any) -> int:
            wrong = Bundle(call=changes.get("call", bundle.call), objects=bundle.objects)
            wrong.objects.extend(changes.get("more", ()))
            return int(who.post(PUSH_BUNDLE, wrong).status_code)

        assert status(other) == 403
        assert status(call=b"\xff\xff") == 400
        assert status(call=b"") == 403
        assert status(more=[b"x"]) == 409
        assert status(more=[b"x"] * MAX_BUNDLED) == 400
        assert status(more=[bytes(BUNDLE_BYTES)]) == 413
        assert one.post(PUSH_BUNDLE, b"\x12\x00" * 30_000).status_code == 400
        assert not served.listening.fleet.next_answered(0.0)
        response = one.post(PUSH_BUNDLE, bundle)
        assert not PushMessagesResponse.FromString(response.content).objects_to_push
        thread.join(10)
        (answer,) = answers
        assert answer.content.metric_records["metrics"]["loss"] == 0.5
        assert status() == 409, "a duplicate"


def test_each_object_of_a_bundle_counts_as_a_call(serve: Any, rogue: Any, ask: Any) -> None:
    with serve(limits=Limits(calls_per_s=1e-3, burst=40, calls_per_object=0)) as served:
        one = rogue()
        thread, _ = ask(served, one.activate())
        request = PullMessagesRequest(node=one.node)
        first = read_bundle(one.post(PULL_BUNDLE, request).content)
        count = len(first.objects)
        assert count >= 3
        bundle = bundle_of(one, one.reply(loss=0.5))  # pulls once more
        left = 40 - 1 - (1 + count) - 1
        bundle.objects.extend([b"junk"] * (left - len(bundle.objects)))
        response = one.post(PUSH_BUNDLE, bundle)
        assert response.status_code == 429, "the call itself took the last one"
        assert float(response.headers["retry-after"]) > 100
        codes = [one.post(PULL_BUNDLE, request) for _ in range(count)]
        assert all(each.status_code == 200 for each in codes)
        assert [len(read_bundle(each.content).objects) for each in codes].count(0) >= count - 10
        served.listening.stop()
        thread.join(10)


@pytest.fixture
def link(project: Any, rogue: Any) -> Iterator[FleetLink]:
    """A device's own client."""
    device = rogue()
    one = FleetLink(device.kit, headers=device.headers, stop=threading.Event())
    yield one
    one.close()


def answered(link: FleetLink) -> None:
    """Answers one message as a device does."""
    found = link.announced()
    assert found is not None
    message = link.fetch(found, limit_bytes=1 << 20)
    assert message.content["c"]["x"] == 1  # type: ignore[index]
    reply = Message(RecordDict({"metrics": MetricRecord({"loss": 0.5})}), reply_to=message)
    link.answer(reply)


@pytest.mark.parametrize("offered", [True, False])
def test_a_device_bundles_where_the_server_offers_it(
    serve: Any, ask: Any, link: FleetLink, monkeypatch: pytest.MonkeyPatch, offered: bool
) -> None:
    paths: list[str] = []

    def noted(path: str, route: Route) -> Route:
        def answer(*arguments: Any) -> Any:
            paths.append(path.rpartition("/")[2])
            return route.answer(*arguments)

        return Route(answer, route.max_bytes)

    routes = {path: noted(path, route) for path, route in fleet_api.ROUTES.items()}
    monkeypatch.setattr(gate, "ROUTES", routes)
    if not offered:
        wake = (WAKE_PORT.encode(), b"1")
        monkeypatch.setattr(gate.Gate, "_offers", lambda self: [wake])
    with serve() as served:
        link.activate()
        thread, answers = ask(served, link.node_id)
        answered(link)
        thread.join(10)
    assert len(answers) == 1
    if offered:
        assert paths == ["activate-node", "pull-bundle", "push-bundle"]
    else:
        assert {"pull-messages", "pull-object", "push-messages", "push-object"} < {*paths}
        assert not [path for path in paths if "bundle" in path]


def garbage(fleet: Any, caller: Any, body: Any) -> Bundle:
    return Bundle(call=b"\xff\xff")


def crowd(fleet: Any, caller: Any, body: Any) -> Bundle:
    found: Bundle = fleet_api._pull_bundle(fleet, caller, body)  # type: ignore[assignment]
    return Bundle(call=found.call, objects=[b""] * 300_000)


def others(fleet: Any, caller: Any, body: Any) -> Bundle:
    found: Bundle = fleet_api._pull_bundle(fleet, caller, body)  # type: ignore[assignment]
    return Bundle(call=found.call, objects=[one + b"!" for one in found.objects])


@pytest.mark.parametrize("answer", [garbage, crowd, others])
def test_a_device_believes_no_bundle(
    serve: Any,
    ask: Any,
    link: FleetLink,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[..., Any],
) -> None:
    route = Route(answer, fleet_api.ROUTES[PULL_BUNDLE].max_bytes)
    monkeypatch.setattr(gate, "ROUTES", {**fleet_api.ROUTES, PULL_BUNDLE: route})
    with serve() as served:
        link.activate()
        thread, answers = ask(served, link.node_id)
        if answer is others:  # their digests are those of nothing: each is pulled by itself
            answered(link)
            thread.join(10)
            assert len(answers) == 1
        else:
            with pytest.raises(Unreachable, match="cannot read the server's response"):
                link.announced()
            served.listening.stop()
            thread.join(10)
