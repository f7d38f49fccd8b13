"""Devices as they run, and a server that sends more than any owner allows."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.proto.message_pb2 import PullObjectResponse

from fedcore.errors import DeviceError
from fedcore.flower import fleet_api
from fedcore.flower.fleet_api import Caller, FileResponse, Route
from fedcore.flower.fleet_bundle import PULL_BUNDLE
from fedcore.updates.messages import REFUSED, instruction_config, weights_record
from server.live.network import gate

PULL = "/v1/fleet/pull-object"
OWNER = "max_memory_bytes = 200000000\n"


def huge(fleet: Any, caller: Caller, body: Any) -> FileResponse:
    """One object of 6 GB, from a file that takes no room."""
    size_bytes = 6 << 30
    file = tempfile.TemporaryFile()  # noqa: SIM115 - whoever sends it closes it
    file.truncate(size_bytes)
    head = PullObjectResponse(object_found=True, object_available=True).SerializeToString()
    head += bytes((fleet_api._CONTENT_TAG,)) + fleet_api._varint(size_bytes)
    return FileResponse(head, file, len(head) + size_bytes)


def bomb(fleet: Any, caller: Caller, body: Any) -> Any:
    """An array that says it is made of its first chunk, very many times."""
    answer = fleet_api._pull_object(fleet, caller, body)
    if isinstance(answer, FileResponse) or not answer.object_content.startswith(b"Array "):
        return answer
    head, _, described = answer.object_content.partition(b"\x00")
    raw = json.dumps(json.loads(described) | {"arraychunk_ids": [0] * 4000}).encode()
    kind, children, _ = head.split(b" ")
    answer.object_content = b" ".join((kind, children, b"%d" % len(raw))) + b"\x00" + raw
    return answer


def bare(fleet: Any, caller: Caller, body: Any) -> Any:
    """A bundle without objects, so that each is pulled by itself."""
    answer = fleet_api._pull_bundle(fleet, caller, body)
    answer.ClearField("objects")
    return answer


def content_of(project: Any) -> Any:
    from flwr.app import RecordDict

    from fedcore.task.definition import load_task
    from fedcore.task.model import build_model, preprocess_bytes
    from fedcore.updates.pack import layout_of, pack

    model = build_model(load_task(project.task), project.run())
    config = instruction_config(layout_of(model.model), preprocess_bytes(model))
    config["server-round"] = 1
    return RecordDict({"arrays": weights_record(pack(model.model)), "config": config})


@pytest.mark.parametrize("answer", [huge, bomb])
def test_a_device_takes_in_no_more_than_its_model_and_its_owner_allow(
    project: Any,
    serve: Any,
    launch_device: Any,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[..., Any],
) -> None:
    project.task.write_text(project.task.read_text().replace("WEIGHTS = 0", "WEIGHTS = 1_500_000"))
    route = Route(answer, fleet_api.ROUTES[PULL].max_bytes)
    apart = Route(bare, fleet_api.ROUTES[PULL_BUNDLE].max_bytes)
    monkeypatch.setattr(gate, "ROUTES", {**fleet_api.ROUTES, PULL: route, PULL_BUNDLE: apart})
    owner = project.root / "owner.toml"
    owner.write_text(OWNER)
    with serve() as served:
        device = launch_device("edge-0", "--owner", str(owner))
        device.wait_for("activated as node", 60)
        before_bytes, peak_bytes = device.rss_bytes(), 0
        (node,) = served.listening.presence.nodes()
        answers: list[Message] = []

        def collect() -> None:
            message = Message(content_of(project), node, "train")
            # It writes all 6 GB to a connection that is closed, and does nothing else.
            answers.extend(served.listening.grid().send_and_receive([message], timeout=120))

        asking = threading.Thread(target=collect)
        asking.start()
        while asking.is_alive():
            peak_bytes = max(peak_bytes, device.rss_bytes())
            asking.join(0.02)
        (reply,) = answers
        assert reply.has_error()
        assert reply.error.code == REFUSED + DeviceError.exit_code, reply.error
        assert "OwnerLimit" in reply.error.reason
        assert peak_bytes - before_bytes < 200_000_000
        assert device.process.poll() is None, "it goes on, for a server that is honest again"
        assert "Traceback" not in device.log.read_text()


def endless(task: str) -> str:
    """The task with steps so slow that ten thousand epochs take half an hour."""
    loss = (
        'loss=lambda o, t: (__import__("time").sleep(0.06), nn.functional.cross_entropy(o, t))[1]'
    )
    return task.replace('name="tiny",', f'name="tiny", {loss},')


def cpu_s(program: Any) -> float:
    fields = Path(f"/proc/{program.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@pytest.mark.parametrize("limit", ["deadline", "max_round_s"])
def test_training_without_an_end_ends(
    project: Any, launch_server: Any, launch_device: Any, limit: str
) -> None:
    """Ten thousand epochs: past the round's deadline, or the owner's time, nobody trains on."""
    owner = project.root / "owner.toml"
    owner.write_text("max_round_s = 3.0\n" if limit == "max_round_s" else "")
    project.task.write_text(endless(project.task.read_text()))
    deadline_s = 15.0 if limit == "deadline" else 40.0
    server = launch_server(
        "federation.rounds=1",
        "federation.cohort=1",
        f"federation.deadline_s={deadline_s}",
        "client.epochs=10000",
    )
    device = launch_device("edge-0", "--owner", str(owner))
    device.wait_for("has passed. Training was abandoned between two steps", 60)
    assert server.end(30) == 6
    before_s = cpu_s(device)
    time.sleep(2)
    assert cpu_s(device) - before_s < 1.0, "it does not train on"


@pytest.mark.slow
def test_training_does_not_go_on_past_the_owners_hours(
    project: Any, launch_server: Any, launch_device: Any
) -> None:
    owner = project.root / "owner.toml"
    project.task.write_text(endless(project.task.read_text()))
    now = datetime.now()
    ends = now + timedelta(minutes=1 if now.second < 35 else 2)
    owner.write_text(f'hours = ["{now:%H:%M}-{ends:%H:%M}"]\n')
    launch_server("federation.rounds=1", "federation.cohort=1", "client.epochs=10000")
    device = launch_device("edge-0", "--owner", str(owner))
    device.wait_for("paused by owner policy: the time is", 150)
    assert datetime.now() < ends + timedelta(seconds=30)
    before_s = cpu_s(device)
    time.sleep(2)
    assert cpu_s(device) - before_s < 1.0
