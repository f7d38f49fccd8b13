from __future__ import annotations

import time

import pytest
from flwr.app import Message, RecordDict

from fedcore.flower.grid import CohortGrid, InProcessGrid
from fedcore.flower.identity import SERVER_NODE_ID, assume_identity

NODES = (11, 12, 13)


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(5)


def ask(*nodes: int) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in nodes]


def echo(message: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


def test_every_message_is_answered_in_its_order() -> None:
    grid = InProcessGrid(5, NODES, echo)
    assert list(grid.get_node_ids()) == [11, 12, 13]
    replies = grid.send_and_receive(ask(13, 11, 13))
    assert [reply.metadata.src_node_id for reply in replies] == [13, 11, 13]
    assert grid.run.run_id == 5


def test_a_node_is_run_only_when_its_reply_is_asked_for() -> None:
    seen: list[int] = []

    def handle(message: Message) -> Message:
        seen.append(message.metadata.dst_node_id)
        return echo(message)

    replies = InProcessGrid(5, NODES, handle).send_and_receive(ask(11, 12, 13))
    assert seen == []
    next(replies)
    assert seen == [11]
    list(replies)
    assert seen == [11, 12, 13]


def test_no_node_is_begun_after_the_deadline() -> None:
    def slow(message: Message) -> Message:
        time.sleep(0.06)
        return echo(message)

    replies = list(InProcessGrid(5, NODES, slow).send_and_receive(ask(*NODES), timeout=0.1))
    assert [reply.metadata.src_node_id for reply in replies] == [11, 12]


def test_a_cohort_shows_its_nodes_alone_and_sends_through_the_grid_behind() -> None:
    cohort = CohortGrid(InProcessGrid(5, NODES, echo), [12])
    assert list(cohort.get_node_ids()) == [12]
    assert cohort.run.run_id == 5
    (reply,) = cohort.send_and_receive(ask(12))
    assert reply.metadata.src_node_id == 12
    assert reply.metadata.dst_node_id == SERVER_NODE_ID


def test_messages_made_by_the_grid_reach_their_node() -> None:
    grid = InProcessGrid(5, NODES, echo)
    message = grid.create_message(RecordDict(), "train", 13, "group")
    assert message.metadata.dst_node_id == 13
    assert [r.metadata.src_node_id for r in grid.send_and_receive([message])] == [13]


def test_messages_that_are_pushed_are_answered_once_when_their_replies_are_pulled() -> None:
    behind = InProcessGrid(5, NODES, echo)
    for grid in (behind, CohortGrid(behind, NODES[:1])):
        pushed = list(grid.push_messages(ask(13, 11)))
        assert len(set(pushed)) == 2
        replies = grid.pull_messages([*pushed, "unknown"])
        assert [reply.metadata.src_node_id for reply in replies] == [13, 11]
        assert list(grid.pull_messages(pushed)) == []


def test_messages_carry_the_run_and_the_server_as_their_source() -> None:
    assume_identity(6)
    assert ask(11)[0].metadata.run_id == 6
    assert ask(11)[0].metadata.src_node_id == SERVER_NODE_ID
