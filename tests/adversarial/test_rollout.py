"""Channels: which devices get a version first, and what becomes of one that is bad there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from edge_client.delivery import follow as agent
from edge_client.delivery.follow import AgentState, Following, look
from edge_client.delivery.places import ReleasePlace
from edge_client.delivery.source import folder_source
from edge_client.delivery.update import UpdateResult, update
from edge_client.inference.process import ModelLimits
from fedcore.artifacts.rollout import MAX_ROLLED_BACK, Canary, DeviceIdentity, Rollout, rollout_of
from fedcore.cli import _Parser
from fedcore.errors import ReleaseError, TrustError
from fedcore.rpc.delivery_pb2 import DeviceReport
from server.commands.release_commands import release
from server.delivery.reports import TrialJudge, book_of, verdict
from server.release.channels import end_trial, promote, rollouts
from server.release.draft import CanaryAim
from server.release.publish import publish, rollback
from server.release.registry.keys import ONLINE
from server.release.upkeep import collect_garbage, verify_files
from tests.delivering import HOST, Delivering

NOW = datetime.now(UTC)


def trial(world: Any, draft: Any, **aim: Any) -> int:
    aimed = replace(draft, canary=CanaryAim(**({"percent": 0.0} | aim)))
    manifest = publish(aimed, repository=world.repository, keys=world.keys, created=NOW)
    return manifest.version


def as_device(world: Any, name: str, store: str = "store", **more: Any) -> UpdateResult:
    return update(
        folder_source(world.repository),
        store=world.folder / store,
        model="digits",
        root=(world.keys / "root.json").read_bytes(),
        threads=1,
        identity=DeviceIdentity(name, f"fingerprint of {name}"),
        **more,
    )


def test_a_trial_is_for_its_devices_and_then_for_all(world: Any, draft: Callable[..., Any]) -> None:
    assert trial(world, draft(2.0), cohort=("edge-1",)) == 2
    shutil.copytree(world.store, world.folder / "other")
    assert as_device(world, "edge-2", "other").version == 1
    assert world.update().version == 1  # without an identity: no trial
    assert as_device(world, "edge-1").version == 2
    assert rollouts(world.repository, world.keys)["digits"][0] == 1
    promote("digits", repository=world.repository, keys=world.keys, now=NOW)
    assert as_device(world, "edge-2", "other").version == 2
    assert not as_device(world, "edge-1").changed
    with pytest.raises(ReleaseError, match="no version is on trial"):
        promote("digits", repository=world.repository, keys=world.keys, now=NOW)


def test_a_trial_that_ends_badly_moves_its_devices_on_and_no_others(
    world: Any, draft: Callable[..., Any]
) -> None:
    shutil.copytree(world.store, world.folder / "other")
    trial(world, draft(2.0), cohort=("edge-1",))
    assert as_device(world, "edge-1").version == 2
    end_trial("digits", "worse", repository=world.repository, keys=world.keys, now=NOW)
    assert as_device(world, "edge-1").version == 3
    assert world.answers() == 1.0
    assert not as_device(world, "edge-2", "other").changed
    # A device that has the bad version and is in no cohort any more is moved on as well.
    trial(world, draft(4.0), cohort=("edge-9",))
    assert as_device(world, "edge-1").version == 4
    world.publish(5.0)
    assert as_device(world, "edge-1").version == 5
    assert as_device(world, "edge-2", "other").version == 5
    stable, rollout = rollouts(world.repository, world.keys)["digits"]
    assert (stable, rollout.canary) == (5, None)
    assert [(each.version, each.why) for each in rollout.rolled_back] == [(2, "worse")]


def test_a_later_version_of_an_earlier_epoch_does_not_make_a_device_follow_a_trial(
    world: Any, draft: Callable[..., Any]
) -> None:
    world.publish(2.0)
    world.publish(3.0)
    assert as_device(world, "edge-1").version == 3
    world.rotate(*ONLINE, last_good={"digits": 1})
    assert trial(world, draft(4.0), cohort=("edge-9",)) == 2
    assert as_device(world, "edge-1").version == 1
    assert as_device(world, "edge-9").version == 2


def test_a_rollback_of_the_stable_version_ends_a_trial(
    world: Any, draft: Callable[..., Any]
) -> None:
    world.publish(2.0)
    trial(world, draft(3.0), cohort=("edge-1",))
    assert as_device(world, "edge-1").version == 3
    rollback("digits", 1, repository=world.repository, keys=world.keys, created=NOW)
    assert as_device(world, "edge-1").version == 4
    assert world.answers() == 1.0


def test_whoever_delivers_cannot_choose_a_channel(world: Any, draft: Callable[..., Any]) -> None:
    trial(world, draft(2.0), cohort=("edge-1",))
    path = world.repository / "metadata" / "3.releases.json"
    raw = path.read_bytes()
    assert b'"edge-1"' in raw
    path.write_bytes(raw.replace(b'"edge-1"', b'"edge-2"'))
    with pytest.raises(TrustError):
        as_device(world, "edge-2")
    assert world.answers() == 1.0


def test_the_first_version_is_no_canary(
    tmp_path: Path, new_world: Callable[..., Any], draft: Callable[..., Any]
) -> None:
    with pytest.raises(ReleaseError, match="cannot be a canary"):
        trial(new_world(tmp_path), draft(1.0), percent=10.0)


def test_a_share_is_a_share_and_grows_without_losing_devices() -> None:
    devices = [DeviceIdentity(f"edge-{k}", f"{k:064x}") for k in range(2000)]

    def chosen(percent: float, since: int = 9) -> set[str]:
        canary = Canary(version=9, since=since, basis_points=round(100 * percent))
        return {device.name for device in devices if canary.selects("digits", device)}

    assert chosen(0.0) == set()
    assert len(chosen(100.0)) == 2000
    assert 150 < len(chosen(10.0)) < 250
    assert chosen(10.0) < chosen(50.0)
    assert chosen(10.0) != chosen(10.0, since=10)  # not always the same devices bear the risk


@pytest.mark.parametrize(
    "custom", [{"rollout": 7}, {"rollout": {"canary": {"version": 0}}}, {"rollout": {"later": 1}}]
)
def test_a_rollout_that_is_not_known_is_refused(custom: dict[str, Any]) -> None:
    with pytest.raises(TrustError, match="rollout"):
        rollout_of(custom)


def test_what_was_rolled_back_is_bounded() -> None:
    rollout = Rollout()
    for version in range(1, 40):
        rollout = Rollout(rolled_back=rollout.ended_badly(version, "x" * 5000))
    assert [each.version for each in rollout.rolled_back] == list(range(20, 40))
    assert len(rollout.rolled_back) == MAX_ROLLED_BACK
    assert rollout_of(rollout.custom()) == rollout


def shown(world: Any, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    parser = _Parser(prog="fedcore release")
    release.arguments(parser)
    words = ["show", "--repository", str(world.repository), "--keys", str(world.keys)]
    assert release.run(parser.parse_args([*words, *more])) == 0
    return capsys.readouterr().out


def test_a_canary_that_is_worse_on_the_devices_own_gates_is_rolled_back_without_a_person(
    world: Any,
    draft: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edge_client.delivery.places.require_tls_1_3", lambda: None)
    bad = replace(draft(2.0), golden=draft(3.0).golden)  # not what it answers on these devices
    assert trial(world, bad, percent=100.0) == 2
    project, reports = Delivering(tmp_path / "project"), tmp_path / "reports"
    judge = TrialJudge(book_of(reports, world.repository), world.repository, world.keys)
    with project.served(world.repository, judge) as port:
        states = {}
        for name in ("edge-1", "edge-2", "edge-3"):
            shutil.copytree(world.store, world.folder / name)
            what = Following(
                place=ReleasePlace(server=f"{HOST}:{port}", kit=project.device(name)),
                store=world.folder / name,
                models=("digits",),
                root=None,
                threads=1,
                limits=ModelLimits(),
                look_s=3600.0,
                health_s=3600.0,
            )
            states[name] = (what, AgentState())
        for what, state in states.values():
            look(what, state)
            agent._send(what, state)
        text = shown(world, capsys, "--reports", str(reports))
        for what, state in states.values():
            assert look(what, state)
    assert "version 2 was rolled back: 2 of 2 devices could not keep version 2" in text
    assert "does not reproduce its golden outputs" in text
    rows = json.loads(shown(world, capsys, "--reports", str(reports), "--json"))
    assert rows[0]["canary"]["version"] == 3
    assert rows[0]["devices"]["2"]["refused"] >= 2
    for name in states:
        record = json.loads((world.folder / name / "models" / "digits" / "active").read_text())
        assert record["version"] == 3


@pytest.mark.parametrize(
    ("outcomes", "ends"),
    [
        ("", False),
        ("a", False),
        ("r", False),  # one alone may be a broken device
        ("rr", True),
        ("aaaaaaaaarr", True),
        ("a" * 30 + "rr", False),
        ("t" * 2, True),
    ],
)
def test_when_a_trial_ends(tmp_path: Path, outcomes: str, ends: bool) -> None:
    from server.delivery.reports import KeptReport

    names = {"a": "activated", "r": "refused", "t": "returned"}
    reports = [
        KeptReport.model_validate({"device": f"edge-{k}", "outcome": names[letter]})
        for k, letter in enumerate(outcomes)
    ]
    canary = Canary(version=2, since=2, basis_points=1000)
    assert (verdict(canary, reports) is not None) == ends
    alone = Canary(version=2, since=2, basis_points=0, cohort=("edge-0",))
    assert (verdict(alone, reports[:1]) is not None) == (outcomes[:1] in ("r", "t"))


def test_reports_on_versions_that_do_not_exist_are_dropped(world: Any, tmp_path: Path) -> None:
    book = book_of(tmp_path / "reports", world.repository)
    project = Delivering(tmp_path / "project")
    project.device("edge-1")
    (member,) = project.server.roster().members()
    for version in (1, 77):
        report = DeviceReport(model="digits", version=version, outcome=DeviceReport.REFUSED)
        book.put(member, report)
    assert [each.device for each in book.of("digits", 1)] == ["edge-1"]
    assert not (tmp_path / "reports" / "digits" / "77").exists()
    with pytest.raises(ReleaseError):
        book.put(member, DeviceReport(model="../x", version=1, outcome=DeviceReport.REFUSED))


def test_upkeep_checks_all_files_and_removes_what_nobody_names(
    world: Any, flip: Callable[[Path, int], None]
) -> None:
    world.publish(2.0)
    assert verify_files(world.repository, world.keys) == 7
    left = world.repository / "targets" / "models" / "digits" / "9" / f"{'0' * 64}.model.onnx"
    left.parent.mkdir()
    left.write_bytes(b"left")
    assert collect_garbage(world.repository, world.keys) >= len(b"left")
    assert not left.exists()
    assert verify_files(world.repository, world.keys) == 7
    assert world.update().version == 2
    flip(world.target("model.onnx"), 5)
    with pytest.raises(ReleaseError, match="differs from what was published"):
        verify_files(world.repository, world.keys)
