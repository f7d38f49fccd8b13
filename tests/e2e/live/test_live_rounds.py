"""Whole runs over live TLS: a ServerApp beside the server's state, and warm devices."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from flwr.app import Message, RecordDict

from edge_client.agent import loop, wake
from edge_client.ledger.ledger import LEDGER, MARK
from fedcore.config.run import Privacy
from fedcore.errors import DeviceError, FedcoreError, TrustError
from fedcore.flower.fleet_pull import BoundedClient
from fedcore.rpc.hello import WAKE_PORT
from fedcore.updates.messages import STATISTICS
from server.live.network.gate import Gate
from tests.e2e.live.federation import federate

NAMES = ("edge-0", "edge-1")


def wait_for(what: Callable[[], bool], seconds: float = 10.0) -> float:
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < seconds, "it did not come to pass"
        time.sleep(0.005)
    return time.monotonic() - started


def all_awake(served: Any, count: int) -> bool:
    devices = served.listening.presence.devices()
    return sum(device.awake for device in devices) == count


def test_devices_train_and_are_evaluated(project: Any, serve: Any, start: Any) -> None:
    run = project.run(rounds=3, cohort=2, evaluate_cohort=2, holdout=0.3)
    with serve(run) as served:
        devices = [start(name) for name in NAMES]
        wait_for(lambda: all_awake(served, 2))
        records = federate(project, served, run)
        fleet = served.listening.fleet
        assert not fleet.pending
        assert len(fleet.state.object_store) == 0, "payloads of a round are kept after it"
        assert fleet.state.num_message_res() == 0
        for device in devices:
            device.stop()
            assert device.errors == []
    assert [record.updates for record in records] == [2, 2, 2]
    assert all("accuracy" in record.metrics for record in records)
    assert records[1].seconds < 2.0, "a warm round of two small clients takes a tenth of a second"


def test_devices_that_hold_back_all_of_their_data_evaluate_and_never_train(
    project: Any, serve: Any, start: Any
) -> None:
    """By their names edge-0 and edge-1 judge. Each device decides: asked to train it would fail."""
    apart = {"holdout": 0.5, "holdout_by": "clients", "evaluate_cohort": 2}
    run = project.run(rounds=3, cohort=2, normalisation="federated", **apart)
    notes: list[str] = []
    with serve(run) as served:
        devices = [start(f"edge-{number}") for number in range(4)]
        wait_for(lambda: all_awake(served, 4))
        records = federate(project, served, run, notes)
        for device in devices:
            device.stop()
            assert device.errors == []
    assert [(one.cohort, one.updates, one.failed) for one in records] == [(2, 2, 0)] * 3
    assert [one.sources["accuracy"].clients for one in records] == [2, 2, 2]
    assert [one.sources["accuracy"].asked for one in records] == [2, 2, 2]
    assert not [note for note in notes if "normalisation" in note or "could not" in note]


def test_a_device_that_a_server_takes_for_another_refuses_to_train(
    project: Any, serve: Any, start: Any
) -> None:
    """The settings that it got say that it judges, whatever the server asks afterwards."""
    apart = {"holdout": 0.5, "holdout_by": "clients", "evaluate_cohort": 2}
    told, asks = project.run(rounds=1, **apart), project.run(rounds=1, quorum=1.0)
    with serve(told) as served:
        device = start("edge-0")
        wait_for(lambda: all_awake(served, 1))
        with pytest.raises(FedcoreError, match=r"'edge-0' holds back all of its data"):
            federate(project, served, asks)
        device.stop()


def test_weights_of_many_pieces_arrive_as_they_were_sent(
    project: Any, serve: Any, start: Any
) -> None:
    text = project.task.read_text().replace("WEIGHTS = 0", "WEIGHTS = 3_000_000")
    project.task.write_text(text.replace("torch.zeros(WEIGHTS)", "torch.randn(WEIGHTS)"))
    run = project.run(rounds=2, cohort=2)
    with serve(run) as served:
        for name in NAMES:
            start(name)
        wait_for(lambda: all_awake(served, 2), 15)
        records = federate(project, served, run)
        assert list((project.root / "incoming").iterdir()) == [], "a payload was left behind"
    assert [(record.updates, record.failed) for record in records] == [(2, 0), (2, 0)]
    assert records[0].bytes_up > 2 * 12_000_000


def one_by_one(gate: Gate) -> list[tuple[bytes, bytes]]:
    """Offers no bundles, so that a reply can be cut off between two of its objects."""
    return [(WAKE_PORT.encode(), b"%d" % gate.wake_port)]


def test_an_update_whose_bundle_came_but_not_the_answer_is_sent_once(
    project: Any, serve: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, cut = BoundedClient.push_bundle, [0]

    def cutting(self: Any, *arguments: Any) -> Any:
        cut[0] += 1
        answer = push(self, *arguments)
        if cut[0] == 1:
            raise loop.Unreachable("the line was cut")
        return answer

    monkeypatch.setattr(BoundedClient, "push_bundle", cutting)
    run = project.run(rounds=2, cohort=1)
    with serve(run) as served:
        start("edge-0")
        records = federate(project, served, run)
    assert [record.updates for record in records] == [1, 1]
    assert cut[0] == 2


def test_an_update_that_was_cut_off_is_sent_again(
    project: Any, serve: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, cut = loop.FleetLink._push, [0]

    def cutting(self: Any, *arguments: Any) -> None:
        cut[0] += 1
        if cut[0] in (1, 3):
            raise loop.Unreachable("the line was cut")
        push(self, *arguments)

    monkeypatch.setattr(loop.FleetLink, "_push", cutting)
    monkeypatch.setattr(Gate, "_offers", one_by_one)
    run = project.run(rounds=1, cohort=1)
    with serve(run) as served:
        start("edge-0")
        wait_for(lambda: all_awake(served, 1), 15)
        started = time.monotonic()
        assert [record.updates for record in federate(project, served, run)] == [1]
        assert time.monotonic() - started < 10
    assert cut[0] > 3


def private(project: Any) -> Any:
    privacy = Privacy(unit="example", noise_multiplier=1.0, max_epsilon=1000.0)
    return project.run(rounds=1, cohort=1).model_copy(update={"privacy": privacy})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda mark: mark.mkdir(), "another kind of file"),
        (os.mkfifo, "another kind of file"),
        (lambda mark: mark.write_text(""), "Invalid JSON"),
        (lambda mark: mark.write_text('{"charges": 7}'), "says that 7 were made"),
    ],
)
def test_a_device_whose_ledger_cannot_be_read_says_so_and_is_there_for_the_next_round(
    project: Any,
    serve: Any,
    start: Any,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], object],
    told: str,
) -> None:
    run, mark = private(project), project.root / "edge-0" / MARK
    with serve(run) as served:
        device = start("edge-0")
        damage(mark)
        wait_for(lambda: all_awake(served, 1), 15)
        with pytest.raises(
            FedcoreError, match="PrivacyError; the client's log has the details"
        ) as said:
            federate(project, served, run)
        assert told not in str(said.value)
        assert told in caplog.text
        mark.rmdir() if mark.is_dir() else mark.unlink()
        assert [record.updates for record in federate(project, served, run)] == [1]
        assert not device.errors


@pytest.mark.parametrize("left", [0, 100])
def test_an_update_that_is_damaged_before_it_left_is_trained_again_and_charged_twice(
    project: Any, serve: Any, start: Any, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    push, damaged = loop.FleetLink._push, list[Path]()

    def damaging(self: Any, *arguments: Any) -> None:
        if not damaged:
            damaged.extend((project.root / "edge-0-data" / "spool").glob("*.reply"))
            damaged[0].write_bytes(damaged[0].read_bytes()[:left])
            raise loop.Unreachable("the line was cut")
        push(self, *arguments)

    monkeypatch.setattr(loop.FleetLink, "_push", damaging)
    monkeypatch.setattr(Gate, "_offers", one_by_one)
    run = private(project)
    with serve(run) as served:
        device = start("edge-0")
        wait_for(lambda: all_awake(served, 1), 15)
        assert [record.updates for record in federate(project, served, run)] == [1]
        assert not device.errors
    assert damaged[0].exists()
    assert damaged[0].with_suffix(".damaged").stat().st_size == left
    charges = json.loads((project.root / "edge-0-data" / LEDGER).read_text())["runs"]["trial"]
    assert [charge["round"] for charge in charges] == [1, 1]


def test_a_second_run_of_the_same_devices_finds_their_state(
    project: Any, serve: Any, start: Any
) -> None:
    start("edge-0")
    run = project.run(rounds=1, cohort=1)
    for _ in range(2):
        with serve(run) as served:
            wait_for(lambda served=served: all_awake(served, 1), 15)
            assert federate(project, served, run)[0].updates == 1
    assert (project.root / "edge-0-data/state/trial.state").is_file()
    kept = list((project.root / "edge-0-data/spool").glob("*.reply"))
    assert len(kept) == 1, "the same instruction of the same run is answered once, and sent again"


def test_a_call_reaches_an_idle_device_at_once(project: Any, serve: Any, start: Any) -> None:
    with serve() as served:
        start("edge-0")
        wait_for(lambda: all_awake(served, 1))
        time.sleep(0.3)  # idle: nothing is on its way
        (node,) = served.listening.presence.nodes()
        grid = served.listening.grid()
        started = time.monotonic()
        message = Message(RecordDict(), node, STATISTICS)
        (reply,) = grid.send_and_receive([message], timeout=10)
        assert time.monotonic() - started < 1.0
        assert reply.metadata.src_node_id == node


def test_without_a_stream_a_device_asks(
    project: Any, serve: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wake, "_listen", lambda *arguments: False)
    monkeypatch.setattr(wake, "_SLOW_S", 0.4)
    run = project.run(rounds=2, cohort=1)
    with serve(run) as served:
        start("edge-0")
        wait_for(lambda: len(served.listening.presence.nodes()) == 1)
        assert not all_awake(served, 1)
        assert [record.updates for record in federate(project, served, run)] == [1, 1]


def test_a_device_with_another_task_is_told_what_to_install(
    project: Any, serve: Any, start: Any
) -> None:
    other = project.root / "other.py"
    other.write_text(project.task.read_text() + "\n# another version\n")
    with serve():
        device = start("edge-0", task=other)
        device.thread.join(20)
    (error,) = device.errors
    assert isinstance(error, DeviceError)
    assert "copy the server's task file to it" in str(error)


def test_a_device_that_is_revoked_is_put_out(
    project: Any, serve: Any, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on asking, more and more rarely: who refuses it may not be the project's owner."""
    with serve() as served:
        device = start("edge-0")
        wait_for(lambda: all_awake(served, 1))
        project.revoke("edge-0")
        wait_for(lambda: not served.listening.presence.nodes(), 3)
        wait_for(lambda: "retrying: the server refuses this device" in caplog.text)
        assert device.thread.is_alive()
        known = project.members["edge-0"]
        project.members["edge-0"] = known.model_copy(update={"revoked_at": None})
        project.write_roster()
        wait_for(lambda: all_awake(served, 1), 20)
    assert caplog.text.count("retrying") == 1


def test_a_device_that_is_drained_and_enrolled_again_is_drained_still(
    project: Any, serve: Any, start: Any
) -> None:
    with serve() as served:
        presence = served.listening.presence
        presence.drain(["edge-0"])
        first = start("edge-0")
        wait_for(lambda: all_awake(served, 1))
        project.revoke("edge-0")
        wait_for(lambda: not presence.devices())
        first.stop()
        project.members["once edge-0"] = project.members.pop("edge-0")
        (project.root / "edge-0").rename(project.root / "old")
        start("edge-0", folder="again")
        wait_for(lambda: all_awake(served, 1))
        assert presence.nodes() == []
        presence.drain([])
        assert len(presence.nodes()) == 1


def test_an_operators_identity_is_no_device(project: Any, serve: Any, start: Any) -> None:
    project.device("edge-0", role="operator")
    with serve() as served:
        device = start("edge-0")
        device.thread.join(20)
        assert served.listening.presence.nodes() == []
    assert isinstance(device.errors[0], TrustError)


def test_of_two_devices_with_one_identity_the_first_is_put_out(
    project: Any, serve: Any, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with serve() as served:
        first = start("edge-0", folder="one")
        wait_for(lambda: all_awake(served, 1))
        second = start("edge-0", folder="two")
        wait_for(lambda: "another process with this identity" in caplog.text)
        wait_for(lambda: all_awake(served, 1))
        let_in = caplog.text.count("activated as node")
        time.sleep(3.0)  # in which the first one tries again
        assert caplog.text.count("activated as node") == let_in
        assert first.thread.is_alive()
        assert second.thread.is_alive()


def test_one_folder_is_for_one_process(project: Any, serve: Any, start: Any) -> None:
    with serve() as served:
        start("edge-0", folder="shared")
        wait_for(lambda: all_awake(served, 1))
        second = start("edge-0", folder="shared")
        second.thread.join(20)
    assert isinstance(second.errors[0], DeviceError)


def test_a_kit_of_another_project_is_refused(
    project: Any, serve: Any, start: Any, tmp_path: Path
) -> None:
    other = type(project)(tmp_path / "other", port=project.port)
    project.root.joinpath("edge-0").mkdir()
    other.device("edge-0")
    for name in ("key.pem", "kit.json"):
        data = (other.root / "edge-0" / name).read_bytes()
        path = project.root / "edge-0" / name
        path.write_bytes(data)
        path.chmod(0o600)
    with serve() as served:
        device = start("edge-0")
        device.thread.join(20)
        assert served.listening.presence.nodes() == []
    assert isinstance(device.errors[0], TrustError)


def test_a_port_in_use_is_said_so(project: Any, serve: Any) -> None:
    with serve(), pytest.raises(Exception, match="cannot listen on port") as caught, serve():
        pass
    assert caught.type.__name__ == "ResourceError"


def test_a_device_takes_up_with_a_server_that_was_restarted(
    project: Any, serve: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_LAST_PAUSE_S", 1.0)
    device = start("edge-0")
    for _ in range(3):
        with serve() as served:
            wait_for(lambda served=served: all_awake(served, 1), 15)
    assert device.errors == []


def test_the_stream_is_not_for_processes_that_were_not_let_in(project: Any, serve: Any) -> None:
    kit = project.device("edge-0")
    with serve() as served:
        credentials = grpc.ssl_channel_credentials(
            kit.authority_pem, kit.key_path.read_bytes(), kit.certificate_pem
        )
        target = f"127.0.0.1:{served.listening.address.wake_port}"
        with grpc.secure_channel(target, credentials) as channel:
            calls = wake.WakeStub(channel).Watch(wake.WatchRequest(instance="nobody"))
            with pytest.raises(grpc.RpcError) as caught:
                next(calls)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
