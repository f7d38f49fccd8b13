"""The time of day in Flower's private modules: a server's clock may jump."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.node_pb2 import Node

from fedcore.flower.fleet import Fleet
from fedcore.flower.fleet_api import ROUTES, call
from fedcore.flower.identity import assume_identity
from tests.contract.test_flower_fleet import CALLER, KEY, ask, join, push


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    (tmp_path / "spool").mkdir()
    one = Fleet(tmp_path / "spool")
    assume_identity(one.open_run({"run": "{}"}))
    join(one, KEY)
    return one


@pytest.mark.parametrize("days", [100, -100])
@pytest.mark.parametrize("moment", ["send", "pull", "push", "take"])
def test_a_clock_that_jumps_for_a_moment_loses_no_message(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, moment: str, days: int
) -> None:
    modules = [
        import_module("flwr.supercore.corestate.in_memory_corestate"),
        import_module("flwr.server.superlink.linkstate.in_memory_linkstate"),
    ]
    true = modules[0].now

    @contextmanager
    def at(step: str) -> Iterator[None]:
        with monkeypatch.context() as patched:
            for module in modules if step == moment else ():
                patched.setattr(module, "now", lambda: true() + timedelta(days=days))
            yield

    asked = ask(10)
    with at("send"):
        (message_id,) = fleet.send([asked])
    with at("pull"):
        request = PullMessagesRequest(node=Node(node_id=CALLER.node_id))
        raw = call(fleet, CALLER, ROUTES["/v1/fleet/pull-messages"], request.SerializeToString())
        assert isinstance(raw, bytes)
        assert len(PullMessagesResponse.FromString(raw).messages_list) == 1
    with at("push"):
        push(fleet, asked, 10)
    with at("take"):
        assert fleet.next_answered(0.0) == message_id
        assert fleet.pop_reply(message_id) is not None
