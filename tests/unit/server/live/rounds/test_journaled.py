"""Rounds over a journal: who is asked, who is not asked again, and who is waited for."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, MessageType, MetricRecord, RecordDict

from fedcore.errors import ResourceError, RoundFailed
from fedcore.flower.grid import OwnGrid
from fedcore.flower.identity import assume_identity
from fedcore.observability import patience
from fedcore.updates.messages import DECLINED, REFUSED, error_kind
from server.live.journal.journal import VALUES, Journal, create, reopen
from server.live.rounds import journaled as journal_keeper
from server.live.rounds.journaled import JournalCheckpointer, JournalGrid
from server.records import RoundRecord
from server.rounds.cohort import Cohort, Draw
from tests.unit.server.live.journal.journals import LARGE, answer, asked, progress, record, signed

NODES = (4, 5, 6)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    assume_identity(1)
    monkeypatch.setattr(journal_keeper, "_POLL_S", 0.01)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(create(tmp_path, {})) as made:
        yield made


class Devices(OwnGrid):
    """Devices that are there, or are gone for some looks at who is."""

    def __init__(
        self, gone: dict[int, int] | None = None, failing: Mapping[int, int] | None = None
    ) -> None:
        super().__init__(1)
        self.gone = gone or {}
        self.failing = dict(failing or {})
        """The codes of what nodes fail with."""
        self.asked: list[list[int]] = []

    def get_node_ids(self) -> Iterable[int]:
        there = [node for node in NODES if not self.gone.get(node)]
        self.gone = {node: left - 1 for node, left in self.gone.items() if left}
        return there

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        messages = list(messages)
        self.asked.append([message.metadata.dst_node_id for message in messages])
        for message in messages:
            node = message.metadata.dst_node_id
            if node in self.failing:
                yield Message(Error(self.failing[node], "its disk is gone"), reply_to=message)
            elif not self.gone.get(node):
                metrics = MetricRecord({"num-examples": node})
                yield signed(Message(RecordDict({"metrics": metrics}), reply_to=message))


class Rounds(JournalGrid):
    """Replies as a round takes them: each is accepted before the next is asked for."""

    refused: Collection[int] = ()
    """Nodes whose replies are discarded instead."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        for reply in super().send_and_receive(messages, timeout=timeout):
            node, kind = reply.metadata.src_node_id, reply.metadata.message_type
            if node in self.refused:
                self._journal.discard(kind, node)
            elif not reply.has_error() and kind in ("train", "evaluate"):
                self._journal.accept(reply)
            yield reply


def messages(kind: str = MessageType.TRAIN) -> list[Message]:
    return [Message(RecordDict(), node, kind) for node in NODES]


def answered(replies: Iterable[Message]) -> list[int]:
    return sorted(reply.metadata.src_node_id for reply in replies if not reply.has_error())


def test_who_has_answered_is_not_asked_again(journal: Journal) -> None:
    first = Rounds(Devices(), journal, admit=set, quorum=1.0)
    replies = first.send_and_receive(messages(), timeout=5)
    assert next(iter(replies)).metadata.src_node_id == 4
    replies.close()  # type: ignore[attr-defined]
    devices = Devices()
    again = Rounds(devices, journal, admit=set, quorum=1.0)
    found = list(again.send_and_receive(messages(), timeout=5))
    assert answered(found) == [4, 5, 6]
    assert devices.asked == [[5, 6]]
    assert [reply.content["metrics"]["num-examples"] for reply in found] == [4, 5, 6]  # type: ignore[index]


def test_training_and_evaluation_are_answered_apart(journal: Journal) -> None:
    devices = Devices()
    grid = Rounds(devices, journal, admit=set, quorum=1.0)
    list(grid.send_and_receive(messages(), timeout=5))
    assert answered(grid.send_and_receive(messages(MessageType.EVALUATE), timeout=5)) == [4, 5, 6]
    assert devices.asked == [[4, 5, 6], [4, 5, 6]]


def test_what_is_asked_outside_rounds_is_not_kept(journal: Journal) -> None:
    devices = Devices()
    grid = Rounds(devices, journal, admit=set, quorum=1.0)
    for _ in range(2):
        assert answered(grid.send_and_receive(messages("query.statistics"))) == [4, 5, 6]
    assert len(devices.asked) == 2


def test_a_device_that_failed_is_asked_again_after_a_restart_alone(journal: Journal) -> None:
    devices = Devices(failing={5: REFUSED})
    grid = Rounds(devices, journal, admit=set, quorum=0.5)
    assert len(list(grid.send_and_receive(messages(), timeout=5))) == 3
    assert devices.asked == [[4, 5, 6]]
    devices.failing.clear()
    assert answered(grid.send_and_receive(messages(), timeout=5)) == [4, 5, 6]
    assert devices.asked[1:] == [[5]]


def test_what_devices_failed_with_is_not_of_this_machines_kinds(journal: Journal) -> None:
    devices = Devices(failing={4: REFUSED + ResourceError.exit_code, 5: REFUSED + 4, 6: DECLINED})
    grid = Rounds(devices, journal, admit=set, quorum=0.5)
    errors = [reply.error for reply in grid.send_and_receive(messages(), timeout=5)]
    assert [error_kind(error.code) for error in errors[:2]] == [RoundFailed, RoundFailed]
    assert [error.reason for error in errors] == ["its disk is gone"] * 3
    assert errors[2].code == DECLINED


def test_a_device_that_the_round_needs_is_waited_for(journal: Journal) -> None:
    devices = Devices(gone={6: 5})
    grid = Rounds(devices, journal, admit=set, quorum=1.0)
    assert answered(grid.send_and_receive(messages(), timeout=30)) == [4, 5, 6]
    assert devices.asked == [[4, 5, 6], [6]]


def test_a_device_that_the_round_does_not_need_is_not_waited_for(journal: Journal) -> None:
    devices = Devices(gone={6: 1000})
    grid = Rounds(devices, journal, admit=set, quorum=0.6)
    assert answered(grid.send_and_receive(messages(), timeout=30)) == [4, 5]


def test_after_a_restart_a_device_has_time_to_come_back(journal: Journal) -> None:
    devices = Devices(gone={6: 5})
    grid = Rounds(devices, journal, admit=set, quorum=0.6, rejoin_s=30.0)
    assert answered(grid.send_and_receive(messages(), timeout=30)) == [4, 5, 6]


@pytest.mark.parametrize(("quorum", "rejoin_s"), [(1.0, 0.0), (0.5, 30.0)])
def test_nobody_is_waited_for_past_the_deadline(
    journal: Journal, quorum: float, rejoin_s: float
) -> None:
    grid = Rounds(Devices(gone={6: 10**6}), journal, admit=set, quorum=quorum, rejoin_s=rejoin_s)
    started = time.monotonic()
    assert answered(grid.send_and_receive(messages(), timeout=0.3)) == [4, 5]
    assert 0.2 < time.monotonic() - started < 5.0


def drawing(*draws: list[int] | None, weight: int = 1) -> Draw:
    left = list(draws)

    def draw(*, short: bool = False) -> Cohort:
        if short:
            raise RoundFailed("fewer than the quorum are there")
        drawn = left.pop(0)
        if drawn is None:
            raise RoundFailed("too few are there")
        return Cohort(drawn, dict.fromkeys(drawn, weight))

    return draw


def keeper_of(journal: Journal, deadline_s: float = 30.0, **more: Any) -> JournalCheckpointer:
    return JournalCheckpointer(
        journal,
        report=lambda record: None,
        deadline_s=deadline_s,
        **more,
    )


def test_a_cohort_is_drawn_once(tmp_path: Path, journal: Journal) -> None:
    assert keeper_of(journal).cohort("train", drawing([4, 6])).nodes == [4, 6]
    journal.close()
    again = reopen(tmp_path)
    assert again is not None
    with closing(again):
        assert keeper_of(again).cohort("train", drawing([5, 6])).nodes == [4, 6]
        assert keeper_of(again).cohort("evaluate", drawing([5])).nodes == [5]


def test_a_round_waits_for_its_devices_until_the_deadline(journal: Journal) -> None:
    assert keeper_of(journal).cohort("train", drawing(None, None, [4])).nodes == [4]
    with pytest.raises(RoundFailed, match="too few"):
        keeper_of(journal, deadline_s=-1.0).cohort("evaluate", drawing(None, [4]))


def test_an_evaluation_waits_for_as_many_as_it_asks_and_then_for_one(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = keeper_of(journal, evaluated=2)
    keeper.cohort("train", drawing([4, 5, 6]))
    assert keeper.cohort("evaluate", drawing(None, [4], [4], [4, 6])).nodes == [4, 6]
    journal.drop_cohorts()
    keeper.cohort("train", drawing([4, 5, 6]))
    monkeypatch.setattr(journal_keeper, "GRACE_S", 0.05)
    assert keeper.cohort("evaluate", drawing(None, *[[5]] * 1000)).nodes == [5]
    journal.drop_cohorts()
    keeper.cohort("train", drawing([4]))
    assert keeper.cohort("evaluate", drawing([4], [4, 6])).nodes == [4], (
        "as many as trained are enough"
    )


def test_after_a_restart_an_evaluation_gives_devices_time_to_come_back(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_keeper, "GRACE_S", 0.0)
    journal.record_cohort("train", Cohort([4, 6], dict.fromkeys([4, 6], 1)))
    keeper = keeper_of(journal, evaluated=2, rejoin_s=30.0)
    assert keeper.cohort("evaluate", drawing(*[[4]] * 20, [4, 6])).nodes == [4, 6]


def test_updates_of_a_round_weigh_what_they_did_when_it_selected(
    tmp_path: Path, journal: Journal
) -> None:
    first = keeper_of(journal).cohort("train", drawing([*NODES], weight=1000))
    assert first.weights == dict.fromkeys(NODES, 1000)
    grid = Rounds(Devices(gone={6: 10**6}), journal, admit=set, quorum=0.6)
    assert answered(grid.send_and_receive(messages(), timeout=5)) == [4, 5]
    journal.close()
    again = reopen(tmp_path)  # when a device has been enrolled that committed to nothing
    assert again is not None
    with closing(again):
        keeper = keeper_of(again)
        assert keeper.cohort("train", drawing()) == first
        again.drop_cohorts()  # the round failed: what was kept weighs as the rest
        second = keeper.cohort("train", drawing([*NODES]))
        assert second.weights == dict.fromkeys(NODES, 1)
        grid = Rounds(Devices(), again, admit=set, quorum=1.0)
        found = {
            reply.metadata.src_node_id: reply.content["metrics"]["num-examples"]  # type: ignore[index]
            for reply in grid.send_and_receive(messages(), timeout=5)
        }
        assert found == {4: 4, 5: 5, 6: 6}, "it is kept as it was signed"


def test_who_is_no_member_any_more_is_not_asked(journal: Journal) -> None:
    devices = Devices()
    grid = Rounds(devices, journal, admit=lambda nodes: {*nodes} - {5}, quorum=1.0)
    assert answered(grid.send_and_receive(messages(), timeout=5)) == [4, 6]
    assert devices.asked == [[4, 6]]


def test_a_round_is_reported_before_its_updates_are_deleted(
    tmp_path: Path, journal: Journal
) -> None:
    there: list[int] = []

    def report(of: RoundRecord) -> None:
        there.append(sum(1 for _ in (tmp_path / VALUES).iterdir()))

    keeper = JournalCheckpointer(journal, report=report, deadline_s=1.0)
    keeper.commit(progress(0), None)
    keeper.cohort("train", drawing([4]))
    keeper.accept([answer(asked(4), 0.5, LARGE)])
    keeper.commit(progress(1), record(1))
    journal.close()
    assert there == [1]
    assert not list((tmp_path / VALUES).iterdir())


def test_a_draw_of_nobody_is_kept_as_a_draw(journal: Journal) -> None:
    keeper = JournalCheckpointer(
        journal,
        report=lambda record: None,
        deadline_s=1.0,
    )
    assert keeper.cohort("train", drawing([])).nodes == []
    assert keeper.cohort("train", drawing([4, 5])).nodes == []


def test_one_that_is_refused_is_not_kept_and_is_asked_again_after_a_restart(
    tmp_path: Path, journal: Journal
) -> None:
    grid = Rounds(Devices(), journal, admit=set, quorum=0.6)
    grid.refused = {5}
    assert answered(grid.send_and_receive(messages(), timeout=5)) == [4, 5, 6]
    journal.close()
    again = reopen(tmp_path)
    assert again is not None
    with closing(again):
        devices = Devices()
        grid = Rounds(devices, again, admit=set, quorum=1.0)
        assert answered(grid.send_and_receive(messages(), timeout=5)) == [4, 5, 6]
        assert devices.asked == [[5]]


def test_a_kept_one_that_would_not_be_accepted_today_is_asked_for_again(
    tmp_path: Path, journal: Journal
) -> None:
    list(Rounds(Devices(), journal, admit=set, quorum=1.0).send_and_receive(messages(), timeout=5))
    journal.close()
    again = reopen(tmp_path)
    assert again is not None
    with closing(again):
        devices = Devices()
        grid = Rounds(devices, again, admit=set, quorum=1.0)
        grid.refused = {6}
        assert answered(grid.send_and_receive(messages(), timeout=5)) == [4, 5, 6, 6]
        assert devices.asked == [[6]], "the reply of before was dropped"
    last = reopen(tmp_path)
    assert last is not None
    with closing(last):
        devices = Devices()
        grid = Rounds(devices, last, admit=set, quorum=1.0)
        assert answered(grid.send_and_receive(messages(), timeout=5)) == [4, 5, 6]
        assert devices.asked == [[6]]


def test_a_reply_of_another_type_than_asked_stops_nothing(journal: Journal) -> None:
    class Lying(Devices):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterator[Message]:
            for reply in super().send_and_receive(messages, timeout=timeout):
                reply.metadata.__dict__["_message_type"] = "query.x"
                yield reply

    keeper_of(journal).cohort("train", drawing([*NODES]))
    grid = Rounds(Lying(), journal, admit=set, quorum=1.0)
    grid.refused = NODES
    assert answered(grid.send_and_receive(messages(), timeout=1)) == [4, 5, 6]


def test_a_round_that_waits_says_for_whom_and_for_how_long(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "SILENT_S", 0.0)
    waits: list[str] = []
    devices = Devices(gone={5: 99, 6: 99})
    grid = Rounds(
        devices, journal, admit=set, quorum=1.0, on_wait=waits.append, name="edge-{}".format
    )
    list(grid.send_and_receive(messages(), timeout=1.0))
    assert re.fullmatch(
        r"round 1 \(train\) waits for edge-5 \(not connected\), edge-6 \(not connected\): "
        r"1 of 3 have answered, [\d.]+ s so far, [\d.]+ s left",
        waits[0],
    )


def test_a_round_that_lacks_devices_says_so(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "SILENT_S", 0.0)
    waits: list[str] = []
    keeper = JournalCheckpointer(
        journal,
        report=lambda record: None,
        deadline_s=0.5,
        on_wait=waits.append,
    )

    def draw(*, short: bool = False) -> Cohort:
        raise RoundFailed("round 1: 1 client is there, and 3 are asked for. It was not begun.")

    with pytest.raises(RoundFailed):
        keeper.cohort(MessageType.TRAIN, draw)
    assert waits[0].startswith("round 1: 1 client is there, and 3 are asked for: ")
    assert waits[0].endswith(" left.")
