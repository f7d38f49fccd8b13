from __future__ import annotations

from datetime import UTC, datetime

import pytest

from server.live.network.steady_clock import APART_S, BELIEVED_S, SteadyClock

DAY_S = 86_400.0


class Times:
    def __init__(self) -> None:
        self.wall, self.passed = 1.8e9, 50.0

    def go(self, seconds: float) -> None:
        self.wall += seconds
        self.passed += seconds


@pytest.fixture
def times() -> Times:
    return Times()


@pytest.fixture
def clock(times: Times) -> SteadyClock:
    return SteadyClock(lambda: times.wall, lambda: times.passed)


def test_it_is_the_systems_time_while_that_goes_as_it_should(
    times: Times, clock: SteadyClock
) -> None:
    for _ in range(100):
        times.go(10.0)
        times.wall += 0.9 * APART_S / 100  # slewed, over and over
        assert clock.seconds() == times.wall
    assert clock() == datetime.fromtimestamp(times.wall, UTC)


@pytest.mark.parametrize("jump_s", [100 * DAY_S, -100 * DAY_S, 2 * APART_S])
def test_a_jump_that_goes_back_soon_changes_nothing(
    times: Times, clock: SteadyClock, jump_s: float
) -> None:
    started = times.wall
    times.wall += jump_s
    for _ in range(20):
        times.go(5.0)
        assert clock.seconds() == pytest.approx(started + times.passed - 50.0)
    times.wall -= jump_s
    assert clock.seconds() == times.wall


def test_a_clock_that_was_set_is_believed_after_a_while(times: Times, clock: SteadyClock) -> None:
    times.wall += 100 * DAY_S
    assert clock.seconds() < times.wall - 99 * DAY_S
    times.go(BELIEVED_S - 1)
    assert clock.seconds() < times.wall - 99 * DAY_S
    times.go(2)
    assert clock.seconds() == times.wall
    times.go(1)
    assert clock.seconds() == times.wall
