"""One message, answered: whatever a server puts into it, the device is there for the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from flwr.proto.message_pb2 import ObjectTree

from edge_client.agent import loop
from edge_client.agent.run import DeviceSetup
from edge_client.agent.wake import Signals, TokenBucket
from edge_client.device_folder import lock_device_folder
from edge_client.ledger.book import read_book
from fedcore.config.owner import OPEN_POLICY, DataSet, OwnerPolicy
from fedcore.errors import InvalidUpdate
from fedcore.flower.fleet_pull import AnnouncedMessage
from fedcore.flower.identity import assume_identity
from fedcore.privacy.accounting import noise_for, noise_searches
from fedcore.privacy.ledger import ledger_in
from fedcore.updates.messages import REFUSED
from tests.unit.edge_client.agent.asked import PRIVATE, RUN_ID, Link, instruction, kit_in, run_of
from tests.unit.fedcore.clients import make_task


@pytest.mark.parametrize(
    ("strategy", "wrong"),
    [
        ("DifferentialPrivacyClientSideFixedClipping", "lots"),
        ("DifferentialPrivacyClientSideAdaptiveClipping", "lots"),
        ("DifferentialPrivacyClientSideFixedClipping", [1.0, 2.0]),
    ],
)
@pytest.mark.parametrize("privacy", [PRIVATE, {}], ids=["private", "plain"])
def test_a_bad_number_for_a_mod_refuses_one_message_and_ends_nothing(
    tmp_path: Path, strategy: str, wrong: Any, privacy: dict[str, Any]
) -> None:
    task = make_task()
    run, kit = run_of(privacy=privacy, strategy=strategy), kit_in(tmp_path)
    link, runs = Link(run), dict[int, Any]()
    assume_identity(RUN_ID)
    with lock_device_folder(tmp_path / "device") as folder:
        device = DeviceSetup(kit, task, tmp_path / "task.py", OPEN_POLICY, folder)
        for number, norm in ((1, wrong), (2, 0.5)):
            message = instruction(task, run, number, clipping_norm=norm)
            found = AnnouncedMessage(message, ObjectTree())
            loop._answer_or_reject(device, cast(Any, link), Signals(), runs, found)
            charged = len(ledger_in(folder.state("run")).charges)
            assert charged == (number if privacy else 0)
    refused, done = link.answers
    assert refused.error.code == REFUSED + InvalidUpdate.exit_code
    if privacy:
        assert (
            refused.error.reason == "client 'anna': InvalidUpdate; the client's log has the details"
        )
    else:
        assert "client mods failed" in (refused.error.reason or "")
    assert not done.has_error()


def test_files_that_come_to_a_named_data_set_in_mid_run_count_at_once(tmp_path: Path) -> None:
    """Or data could be trained on under another's budget, by moving files for a while."""
    task = make_task()
    run, kit = run_of(privacy=PRIVATE), kit_in(tmp_path)
    ward, other = tmp_path / "ward", tmp_path / "other"
    for folder_made in (ward, other):
        folder_made.mkdir()
    (ward / "a.csv").write_text("1,2\n")
    (other / "b.csv").write_text("3,4\n")
    sets = tuple(DataSet(name=path.name, path=str(path), max_epsilon=1e5) for path in (ward, other))
    link, runs = Link(run), dict[int, Any]()
    assume_identity(RUN_ID)
    with lock_device_folder(tmp_path / "device") as folder:
        owner = OwnerPolicy(data=str(ward), datasets=sets)
        device = DeviceSetup(kit, task, tmp_path / "task.py", owner, folder)
        opened = []
        for number in (1, 2, 3, 4):
            if number == 3:
                (other / "b.csv").rename(ward / "b.csv")
            found = AnnouncedMessage(instruction(task, run, number), ObjectTree())
            loop._answer_or_reject(device, cast(Any, link), Signals(), runs, found)
            opened.append(runs[RUN_ID])
        assert opened[0] is opened[1] is not opened[2] is opened[3]
        charges = read_book(folder.path)
        assert charges is not None
        labels = [one.data for one in charges.runs["run"]]
    assert labels[0] == labels[1] != labels[2] == labels[3]
    assert all(not answer.has_error() for answer in link.answers)


def test_searches_for_noise_come_no_faster_than_their_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new budget in each message cost seconds of CPU each, and the message could be declined."""
    now, searched = [0.0], [0]
    monkeypatch.setattr(loop, "noise_searches", lambda: searched[0])
    bucket = TokenBucket(loop.SEARCH_S, loop.SEARCH_BURST, lambda: now[0])
    limit = loop.SearchLimit(bucket, 0)
    for _ in range(loop.SEARCH_BURST):
        assert limit.wait_s() == 0.0
        searched[0] += 1
    assert limit.wait_s() == 0.0
    searched[0] += 2
    assert limit.wait_s() == pytest.approx(2 * loop.SEARCH_S)
    assert limit.wait_s() == pytest.approx(2 * loop.SEARCH_S)  # a failed message does not end it
    now[0] += 2 * loop.SEARCH_S
    assert limit.wait_s() == 0.0


def test_a_noise_that_is_known_is_not_searched_again() -> None:
    def search(max_epsilon: float) -> int:
        before = noise_searches()
        noise_for(
            max_epsilon=max_epsilon,
            target_delta=1e-6,
            sample_rate=1.0,
            steps=3,
            accountant="rdp",
        )
        return noise_searches() - before

    assert [search(7.125), search(7.125), search(7.25)] == [1, 0, 1]
