"""A device that a server has let in is not ended by what a server answers."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree

from edge_client.agent import announce, loop
from edge_client.agent.loop import run_device
from edge_client.agent.run import DeviceSetup
from edge_client.agent.wake import Signals
from edge_client.device_folder import DeviceFolder, lock_device_folder
from fedcore.config.owner import OPEN_POLICY
from fedcore.crypto.kit import Kit, load_identity, load_kit, restrict
from fedcore.errors import DataError, DeviceError, FedcoreError, TrustError
from fedcore.flower import fleet_pull
from fedcore.flower.fleet_client import FleetLink
from fedcore.flower.fleet_errors import DeviceRejected, Unreachable
from fedcore.task.definition import load_task
from tests.unit.fedcore.crypto.conftest import Project
from tests.unit.fedcore.rpc.serving import answer_of, answering

TASK = Path(__file__).parents[4] / "examples" / "digits" / "task.py"


class Answers:
    """A server that is honest until it is told what to answer."""

    def __init__(self, always: bytes = b"") -> None:
        self.always = always
        """What is answered, where it is not empty."""
        self.asked: list[str] = []
        self.heads: list[bytes] = []

    def __call__(self, connection: Any, request: bytes) -> None:
        path = request.split(b" ", 2)[1].decode()
        self.asked.append(path)
        self.heads.append(request.partition(b"\r\n\r\n")[0])
        if self.always:
            connection.sendall(self.always)
        elif path.endswith("activate-node"):
            connection.sendall(answer_of(ActivateNodeResponse(node_id=7).SerializeToString()))
        elif path.endswith("heartbeat"):
            connection.sendall(answer_of(SendNodeHeartbeatResponse().SerializeToString()))
        else:
            connection.sendall(answer_of(PullMessagesResponse().SerializeToString()))


@dataclass
class Running:
    """A device in a thread, and its server."""

    answers: Answers
    signals: Signals
    thread: threading.Thread
    raised: list[BaseException]


@contextmanager
def kitted(
    folder: Path, answers: Callable[[Any, bytes], None]
) -> Iterator[tuple[Kit, DeviceFolder]]:
    """A device's kit and folder, while its server answers."""
    project = Project("orchard", datetime.now(UTC).replace(microsecond=0))
    serving = restrict(
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        load_identity(project.server(folder / "server", "127.0.0.1")),
    )
    kit = load_kit(project.device(folder / "kit"))
    with answering(answers, serving) as port, lock_device_folder(folder / "state") as state:
        yield replace(kit, servers=(f"https://127.0.0.1:{port}",)), state


@contextmanager
def running(folder: Path, answers: Answers) -> Iterator[Running]:
    signals, raised = Signals(), list[BaseException]()
    with kitted(folder, answers) as (kit, state):
        device = DeviceSetup(kit, load_task(TASK), TASK, OPEN_POLICY, state)

        def body() -> None:
            try:
                run_device(device, signals)
            except FedcoreError as error:
                raised.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        try:
            yield Running(answers, signals, thread, raised)
        finally:
            signals.stop.set()
            signals.work.set()
            thread.join(20.0)


def answer(head: bytes, body: bytes = b'{"detail": "because"}') -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n" % (head, len(body)) + body


ANSWERS = {
    "a codec of Python's": answer(b"418 X\r\ncontent-type: x/y; charset=hex"),
    "a codec that decompresses": answer(b"500 X\r\ncontent-type: x/y; charset=bz2", b"BZh9" * 99),
    "a codec that is slow": answer(
        b"500 X\r\ncontent-type: x/y; charset=punycode", b"a-" * 150_000
    ),
    "an address that is none": answer(b"302 X\r\nlocation: x:y"),
    "an address with an odd host": answer(b"307 X\r\nlocation: :http://[v1.x]/"),
    "an address with an odd port": answer(b"301 X\r\nlocation: :http://a:b@c:d/["),
    "cookies": answer(b"200 X" + b"".join(b"\r\nset-cookie: c%d=1" % one for one in range(999))),
    "no message": answer(b"200 X", b"\xff" * 999),
    "204": answer(b"204 X", b""),
    **{
        str(status): answer(b"%d X" % status)
        for status in (302, 400, 401, 403, 404, 409, 412, 413, 429, 500)
    },
}


@pytest.mark.parametrize("which", ANSWERS)
def test_no_answer_ends_a_device_that_was_let_in(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    which: str,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(loop, "_LOOK_S", 0.1)
    answers = Answers()
    with running(tmp_path, answers) as device:
        wait_for(lambda: "activated" in caplog.text)
        answers.always, before = ANSWERS[which], len(answers.asked)
        time.sleep(1.0)
        assert device.thread.is_alive(), device.raised
        assert 0 < len(answers.asked) - before < 60
        answers.always, before = b"", len(answers.asked)
        wait_for(lambda: len(answers.asked) >= before + 4)
    assert device.raised == []
    assert "Traceback" not in caplog.text
    assert b"cookie" not in b"".join(answers.heads).lower()


def test_a_refusal_after_a_long_outage_is_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    longest: list[float] = []

    def spread(pause_s: float, least: float, most: float) -> float:
        longest.append(pause_s)
        return 0.0

    monkeypatch.setattr(loop, "spread_s", spread)
    errors: list[Exception] = [Unreachable("gone")] * 30
    errors += [*[DeviceRejected("no")] * 2, Unreachable("x")]
    left = iter(errors)

    def work() -> None:
        if (error := next(left, None)) is not None:
            raise error

    loop._retry(work, Signals())
    assert longest[29] == 30.0
    assert longest[30:32] == pytest.approx([0.25, 0.3125])
    assert longest[32] == 30.0


@pytest.mark.parametrize(
    ("status", "kind"), [(400, DataError), (403, TrustError), (404, DeviceError)]
)
def test_a_refusal_at_first_contact_ends_it_and_says_why(
    tmp_path: Path, status: int, kind: type[FedcoreError]
) -> None:
    """Somebody stands beside it then, and the kit itself may be wrong."""
    with running(tmp_path, Answers(ANSWERS[str(status)])) as device:
        device.thread.join(20.0)
    (error,) = device.raised
    assert isinstance(error, kind)
    assert "because" in str(error)


@pytest.mark.parametrize("status", [409, 413, 503])
def test_telling_a_server_early_ends_nothing_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Before torch is loaded: what is not as it should be, the loop meets again."""
    monkeypatch.setattr(announce, "_LONGEST_S", 1.0)
    answers, moved = Answers(answer(b"%d X" % status)), list[int]()
    with kitted(tmp_path, answers) as (kit, state):
        state.record_admission(kit.public)
        began = time.monotonic()
        announce.announce(kit, TASK, state, "instance", moved.append)
        assert time.monotonic() - began < 10.0
    assert len(moved) == len(answers.asked) > 0
    assert sum(moved) > 1000


class Demanding(Answers):
    """A server with a message each time, of a run whose settings cannot be read."""

    def __call__(self, connection: Any, request: bytes) -> None:
        if not request.split(b" ", 2)[1].endswith(b"pull-messages"):
            super().__call__(connection, request)
            return
        self.asked.append("pull-messages")
        message = Message(metadata=Metadata(run_id=5, message_id="m", message_type="train"))
        message.content.SetInParent()
        pulled = PullMessagesResponse(
            messages_list=[message], message_object_trees=[ObjectTree(object_id="m")]
        )
        connection.sendall(answer_of(pulled.SerializeToString()))


def test_what_a_device_declines_does_not_come_as_fast_as_two_can_talk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No limit on work bounds it, and it held a processor."""
    monkeypatch.setattr(loop, "MESSAGE_BURST", 5 * loop.IDLE_MESSAGES)
    answers = Demanding()
    with running(tmp_path, answers) as device:
        wait_for(lambda: "pull-messages" in answers.asked)
        time.sleep(2.0)
        assert device.thread.is_alive(), device.raised
        assert 5 < answers.asked.count("pull-messages") < 12
    assert "does not take part" in caplog.text


def test_a_server_that_is_busy_on_and_on_is_asked_less_and_less(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout or 0.0)
            return len(waited) == 100

    with kitted(tmp_path, Answers(answer(b"429 X\r\nretry-after: 0"))) as (kit, _):
        link = FleetLink(kit, headers={}, stop=Stop())
        with pytest.raises(Unreachable, match="busy"):
            link.activate()
        link.close()
    assert all(0.05 <= one <= 0.2 for one in waited[:5])
    assert all(30.0 <= one <= 45.0 for one in waited[80:])
    assert caplog.text.count("busy") == 1


def test_a_goodbye_that_drips_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner's hours are over, and each byte came in time for the next."""
    monkeypatch.setattr(fleet_pull, "ENDING_S", 1.0)

    def drip(connection: Any, request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 X\r\ncontent-length: 99\r\n\r\n")
        for _ in range(99):
            time.sleep(0.1)
            connection.sendall(b"z")

    stop = threading.Event()
    stop.set()
    with kitted(tmp_path, drip) as (kit, _):
        link = FleetLink(kit, headers={}, stop=stop)
        began = time.monotonic()
        with pytest.raises(Unreachable):
            link.deactivate(1.0)
        link.close()
    assert time.monotonic() - began < 4.0


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.01)
