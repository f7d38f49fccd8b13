"""Who is there, who was, and which of two processes with one identity."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fedcore.errors import TrustError
from server.live.network.presence import (
    INITIAL_SILENCE_S,
    LOST,
    MAX_SILENCE_S,
    POLL_GRACE_S,
    Presence,
)

Scenario = Callable[[Presence, list[float], list[int]], Awaitable[None]]


def run(scenario: Scenario) -> None:
    async def main() -> None:
        now, changes = [0.0], [0]

        def changed() -> None:
            changes[0] += 1

        await scenario(Presence(changed, lambda: now[0]), now, changes)

    asyncio.run(main())


def test_a_device_is_there_while_its_stream_is_open() -> None:
    async def scenario(presence: Presence, now: list[float], changes: list[int]) -> None:
        assert presence.offline_s(7) == float("inf")
        assert presence.arrive(7, "a", "edge", b"key")
        stream = presence.watch(7, "a")
        assert stream is not None
        now[0] = 1e6
        assert presence.nodes() == [7]
        assert presence.offline_s(7) == 0.0
        before = changes[0]
        presence.unwatch(7, stream)
        assert changes[0] == before + 1
        now[0] += 2.0
        assert presence.nodes() == []
        assert presence.offline_s(7) == 2.0

    run(scenario)


def test_a_device_that_says_when_it_calls_again_is_missed_when_it_does_not() -> None:
    async def scenario(presence: Presence, now: list[float], changes: list[int]) -> None:
        presence.arrive(7, "a", "edge", b"key")
        presence.call(7, "a", 0.5)
        now[0] = 0.5 + POLL_GRACE_S
        assert presence.nodes() == [7]
        now[0] += 0.1
        assert presence.nodes() == []
        presence.call(7, "a", 1e9)
        now[0] += MAX_SILENCE_S
        assert presence.nodes() == [7]
        now[0] += 0.1
        assert presence.nodes() == []

    run(scenario)


def test_a_call_after_the_end_of_a_stream_does_not_count_for_long() -> None:
    async def scenario(presence: Presence, now: list[float], changes: list[int]) -> None:
        presence.arrive(7, "a", "edge", b"key")
        stream = presence.watch(7, "a")
        assert stream is not None
        presence.unwatch(7, stream)
        assert presence.nodes() == []
        presence.call(7, "a")  # was on its way when the connection broke
        assert presence.nodes() == [7]
        now[0] += POLL_GRACE_S + 0.1
        assert presence.nodes() == []

    run(scenario)


def test_a_device_that_dies_before_its_stream_opens_is_missed_soon() -> None:
    async def scenario(presence: Presence, now: list[float], changes: list[int]) -> None:
        presence.arrive(7, "a", "edge", b"key")
        now[0] = INITIAL_SILENCE_S
        assert presence.nodes() == [7]
        assert presence.call(7, "a")
        now[0] += INITIAL_SILENCE_S
        assert presence.nodes() == [7]
        now[0] += 5.0
        assert presence.nodes() == []
        assert presence.offline_s(7) == 5.0
        assert presence.call(
            7, "a", MAX_SILENCE_S
        )  # it is there after all, and no stream gets through
        now[0] += MAX_SILENCE_S
        assert presence.nodes() == [7]

    run(scenario)


def test_calls_without_being_let_in_count_for_nothing() -> None:
    async def scenario(presence: Presence, now: list[float], changes: list[int]) -> None:
        assert not presence.call(7, "a")
        presence.arrive(7, "a", "edge", b"key")
        assert not presence.call(7, "b")
        assert presence.watch(7, "b") is None
        assert presence.watch(8, "a") is None

    run(scenario)


def test_a_new_process_takes_the_place_of_the_old_for_good() -> None:
    async def scenario(presence: Presence, now: list[float], changes: list[int]) -> None:
        assert presence.arrive(7, "a", "edge", b"key")
        stream = presence.watch(7, "a")
        assert stream is not None
        assert not presence.arrive(7, "a", "edge", b"key"), "the same process again"
        assert presence.arrive(7, "b", "edge", b"key")
        await asyncio.sleep(0)
        assert stream.is_set(), "the old stream is told to end"
        assert not presence.watched_by(7, stream)
        presence.unwatch(7, stream)  # the end of the old stream is no departure of the new process
        assert presence.nodes() == [7]
        with pytest.raises(TrustError, match="enrol that device under its own name"):
            presence.arrive(7, "a", "edge", b"key")

    run(scenario)


def test_a_call_rings_the_streams_of_those_who_are_called() -> None:
    async def scenario(presence: Presence, now: list[float], changes: list[int]) -> None:
        streams = []
        for node in (1, 2):
            presence.arrive(node, "a", f"edge-{node}", b"")
            streams.append(presence.watch(node, "a"))
        await asyncio.to_thread(presence.wake, [2, 99])
        await asyncio.sleep(0)
        first, second = streams
        assert first is not None
        assert second is not None
        assert not first.is_set()
        assert second.is_set()

    run(scenario)


def test_who_leaves_or_is_put_out_is_not_there() -> None:
    async def scenario(presence: Presence, now: list[float], changes: list[int]) -> None:
        for node in (1, 2):
            presence.arrive(node, "a", f"edge-{node}", b"")
            presence.watch(node, "a")
        presence.leave(1)
        presence.remove(2)
        assert presence.nodes() == []
        assert [device.name for device in presence.devices()] == ["edge-1"]
        assert not presence.call(2, "a"), "one that was put out must come again"

    run(scenario)


def test_who_is_drained_stays_so_with_another_key() -> None:
    async def scenario(presence: Presence, now: list[float], changes: list[int]) -> None:
        for node in (1, 2):
            presence.arrive(node, "a", f"edge-{node}", b"")
        presence.drain(["edge-2"])
        assert presence.nodes() == [1]
        presence.remove(2)
        presence.arrive(3, "a", "edge-2", b"another")
        assert presence.nodes() == [1]
        presence.drain([])
        assert presence.nodes() == [1, 3]

    run(scenario)


def test_a_device_that_owes_a_reply_is_left_out_until_it_calls(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(presence: Presence, now: list[float], changes: list[int]) -> None:
        for node, name in ((7, "hung"), (8, "gone"), (9, "well")):
            presence.arrive(node, "a", name, b"key")
            stream = presence.watch(node, "a")
        assert stream is not None
        presence.leave(8)
        presence.owe([7, 8])
        assert presence.nodes() == [9]
        assert {one.name: (one.online, one.owes) for one in presence.devices()} == {
            "hung": (True, True),
            "gone": (False, False),
            "well": (True, False),
        }
        presence.call(7, "a")  # with its late reply
        assert presence.nodes() == [7, 9]
        presence.owe([7])
        presence.arrive(7, "b", "hung", b"key")  # it was restarted
        assert presence.nodes() == [7, 9]

    run(scenario)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["hung"] * 2
    assert "did not reply by federation.deadline_s" in caplog.records[0].getMessage()


def test_why_a_device_left_is_kept_until_it_is_back() -> None:
    async def scenario(presence: Presence, now: list[float], changes: list[int]) -> None:
        def reason() -> str:
            (one,) = presence.devices()
            return one.reason

        presence.arrive(7, "a", "edge", b"key")
        assert reason() == ""
        now[0] += INITIAL_SILENCE_S + 1
        assert reason() == LOST, "it polled, and fell silent"
        presence.call(7, "a")
        assert reason() == ""
        stream = presence.watch(7, "a")
        assert stream is not None
        presence.unwatch(7, stream)
        assert reason() == LOST
        assert presence.watch(7, "a") is not None
        assert reason() == ""
        presence.leave(7, "TaskError")
        assert reason() == "TaskError"
        presence.arrive(7, "b", "edge", b"key", "was killed")
        assert presence.call(7, "b")
        assert reason() == "was killed"
        presence.leave(7)
        assert reason() == ""

    run(scenario)
