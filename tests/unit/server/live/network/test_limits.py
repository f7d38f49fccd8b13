"""Rates, room for uploads, and a log that nobody can flood."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from fedcore.flower.fleet_api import Upload
from fedcore.observability.throttle import LOG_INTERVAL_S
from server.live.network.limits import (
    STREAM_BURST,
    STREAM_S,
    Limits,
    PeerLog,
    Rates,
    Refusals,
    Streams,
    Uploads,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def unasked(node_id: int) -> int:
    return 0


def test_a_burst_is_granted_and_then_the_rate() -> None:
    clock = Clock()
    rates = Rates(Limits(calls_per_s=10, burst=3), unasked, clock)
    assert [rates.wait_s(1) for _ in range(3)] == [0.0] * 3
    assert rates.wait_s(1) == pytest.approx(0.1)
    assert rates.wait_s(2) == 0.0, "one identity's calls are no other's"
    clock.now += 0.11
    assert rates.wait_s(1) == 0.0
    assert rates.wait_s(1) > 0.0


def test_what_takes_long_to_read_counts_as_many_calls() -> None:
    clock = Clock()
    rates = Rates(Limits(calls_per_s=10, burst=100), unasked, clock)
    assert rates.wait_s(1, 64) == 0.0
    assert rates.wait_s(1, 64) == pytest.approx(2.8)
    assert rates.wait_s(1) == 0.0, "a small one is not held up by it"
    clock.now += 3.0
    assert rates.wait_s(1, 64) == 0.0


def test_calls_that_are_refused_do_not_lengthen_the_wait() -> None:
    clock = Clock()
    rates = Rates(Limits(calls_per_s=10, burst=1), unasked, clock)
    rates.wait_s(1)
    assert [rates.wait_s(1) for _ in range(5)] == pytest.approx([0.1] * 5)


def granted(rates: Rates, calls: int) -> int:
    return [rates.wait_s(1) for _ in range(calls)].count(0.0)


def test_what_is_asked_of_a_device_grants_it_calls_however_soon_it_comes() -> None:
    clock, sent = Clock(), [0]
    rates = Rates(Limits(calls_per_s=1, burst=20, calls_per_object=4), lambda node: sent[0], clock)
    assert granted(rates, 100) == 20
    for _ in range(50):  # rounds without a moment between them
        sent[0] += 6
        assert granted(rates, 100) == 24


def test_calls_that_work_granted_are_not_saved_up_beyond_the_burst() -> None:
    clock, sent = Clock(), [0]
    rates = Rates(Limits(calls_per_s=1, burst=20, calls_per_object=4), lambda node: sent[0], clock)
    for _ in range(50):  # messages that it does not answer, and asks for all the time
        sent[0] += 3
        rates.wait_s(1)
    assert granted(rates, 1000) <= 20
    assert granted(rates, 1000) == 0


def test_one_large_message_grants_more_than_the_burst() -> None:
    clock, sent = Clock(), [0]
    rates = Rates(Limits(calls_per_s=1, burst=20, calls_per_object=4), lambda node: sent[0], clock)
    assert granted(rates, 30) == 20
    sent[0] += 1000
    assert granted(rates, 10_000) == 4000


def test_a_peer_is_told_of_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    refusals = Refusals(clock)
    with caplog.at_level(logging.WARNING, "fedcore.server"):
        logging.getLogger("fedcore").propagate = True
        for _ in range(1000):
            refusals.note("edge-0", 400, "garbage")
        refusals.note("edge-0", 413, "too large")
        clock.now += LOG_INTERVAL_S
        refusals.note("edge-0", 400, "garbage")
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "refused edge-0: 400: garbage",
        "refused edge-0: 413: too large",
        "refused edge-0: 400: garbage (999 more of these since the last one was logged)",
    ]


def uploading(
    scenario: Callable[[Uploads, Clock, list[str]], object],
    *,
    complete: frozenset[str] = frozenset(),
    **limits: float,
) -> list[str]:
    """Runs a scenario over room for 10 bytes; returns which uploads were abandoned."""
    abandoned: list[str] = []
    clock = Clock()

    def abandon(message_id: str) -> bool:
        if message_id in complete:
            return False
        abandoned.append(message_id)
        return True

    async def run() -> None:
        grants = Limits(uploads_bytes=10, upload_wait_s=limits.get("upload_wait_s", 0.2))
        await scenario(Uploads(grants, abandon, clock), clock, abandoned)  # type: ignore[misc]

    asyncio.run(run())
    return abandoned


def test_uploads_wait_until_there_is_room() -> None:
    async def scenario(uploads: Uploads, clock: Clock, abandoned: list[str]) -> None:
        assert await uploads.enter(1, Upload("a", 6))
        assert await uploads.enter(2, Upload("b", 4))
        assert not await uploads.enter(3, Upload("c", 1)), "nothing was freed in time"
        waiting = asyncio.create_task(uploads.enter(3, Upload("c", 6)))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        uploads.leave("a")
        assert await waiting

    assert uploading(scenario) == []


def test_one_upload_is_let_in_however_large() -> None:
    async def scenario(uploads: Uploads, clock: Clock, abandoned: list[str]) -> None:
        assert await uploads.enter(1, Upload("a", 1000))
        assert not await uploads.enter(2, Upload("b", 1))

    uploading(scenario)


def test_an_upload_that_begins_again_keeps_its_room() -> None:
    async def scenario(uploads: Uploads, clock: Clock, abandoned: list[str]) -> None:
        for _ in range(5):
            assert await uploads.enter(1, Upload("a", 10))

    uploading(scenario)


def test_those_that_wait_are_let_in_in_turn() -> None:
    async def scenario(uploads: Uploads, clock: Clock, abandoned: list[str]) -> None:
        await uploads.enter(1, Upload("a", 10))
        order: list[str] = []

        async def enter(name: str) -> None:
            assert await uploads.enter(2, Upload(name, 10))
            order.append(name)
            uploads.leave(name)

        tasks = [asyncio.create_task(enter(name)) for name in "bcd"]
        await asyncio.sleep(0.01)
        uploads.leave("a")
        await asyncio.gather(*tasks)
        assert order == ["b", "c", "d"]

    uploading(scenario, upload_wait_s=5.0)


def test_an_upload_that_stalls_gives_way() -> None:
    async def scenario(uploads: Uploads, clock: Clock, abandoned: list[str]) -> None:
        await uploads.enter(1, Upload("a", 10))
        clock.now += 60
        assert await uploads.enter(2, Upload("b", 10))

    assert uploading(scenario) == ["a"]


def test_an_upload_that_is_complete_keeps_its_room() -> None:
    async def scenario(uploads: Uploads, clock: Clock, abandoned: list[str]) -> None:
        await uploads.enter(1, Upload("a", 10))
        clock.now += 60
        uploads.disconnected(1)
        assert not await uploads.enter(2, Upload("b", 10))

    assert uploading(scenario, complete=frozenset("a")) == []


def test_progress_is_no_stall() -> None:
    async def scenario(uploads: Uploads, clock: Clock, abandoned: list[str]) -> None:
        await uploads.enter(1, Upload("a", 10))
        clock.now += 60
        uploads.progress_of(1)
        assert not await uploads.enter(2, Upload("b", 10))

    assert uploading(scenario) == []


def test_a_device_that_is_gone_leaves_its_room() -> None:
    async def scenario(uploads: Uploads, clock: Clock, abandoned: list[str]) -> None:
        await uploads.enter(1, Upload("a", 10))
        uploads.disconnected(1)
        assert await uploads.enter(2, Upload("b", 10))

    assert uploading(scenario) == ["a"]


def test_what_a_peer_does_over_and_over_takes_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    lines = PeerLog(clock)
    with caplog.at_level(logging.INFO, "fedcore.server"):
        for _ in range(1000):
            lines.tell("edge-0", "stream open")
        assert len(caplog.records) == 20
        lines.tell("edge-1", "stream open")
        lines.tell("edge-0", "left")
        assert len(caplog.records) == 22, "another peer's, and another event, are counted apart"
        clock.now += LOG_INTERVAL_S
        lines.tell("edge-0", "stream open", "x\x1b")
    assert caplog.messages[-1] == (
        "device edge-0: stream open (x\\x1b) (980 more of these since the last one was logged)"
    )


def test_a_device_opens_its_stream_so_often_and_no_more() -> None:
    clock = Clock()
    streams = Streams(clock)
    assert sum(streams.admit(b"one") for _ in range(1000)) == STREAM_BURST
    assert streams.admit(b"two")
    clock.now += 2 * STREAM_S
    assert sum(streams.admit(b"one") for _ in range(1000)) == 2


def test_refusals_are_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    Refusals(Clock()).note("edge\x1b[2J", 403, "a\nb\ud800" * 5000)
    (message,) = caplog.messages
    assert message.isprintable()
    assert len(message) < 1300
