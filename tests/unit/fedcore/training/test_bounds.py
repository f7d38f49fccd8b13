from __future__ import annotations

import math

import pytest
import torch

from fedcore.config.owner import OwnerPolicy
from fedcore.errors import OwnerLimit
from fedcore.training.bounds import Bounds, bounds_of, resident_bytes, unbounded


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_limits_everything_goes_on() -> None:
    bounds = unbounded()
    bounds.admit(10**15, step_s=lambda: pytest.fail("nothing need be timed"))
    bounds.check()
    assert bounds.left_s == math.inf


def test_work_ends_once_its_time_is_over_by_the_limit_that_comes_first() -> None:
    clock = Clock()
    bounds = Bounds(limits_s={"the deadline": 60.0, "the owner's max_round_s": 10.0}, clock=clock)
    clock.now = 9.9
    bounds.check()
    clock.now = 10.0
    with pytest.raises(OwnerLimit, match=r"the owner's max_round_s \(10 s\) has passed.*no update"):
        bounds.check()


def test_more_steps_than_the_owner_allows_are_refused_before_they_begin() -> None:
    bounds = bounds_of(OwnerPolicy(max_round_steps=100))
    bounds.admit(100)
    with pytest.raises(OwnerLimit, match=r"asks for 101 steps.*max_round_steps = 100"):
        bounds.admit(101)


def test_what_would_take_too_long_is_refused_by_the_time_of_one_step() -> None:
    bounds = Bounds(limits_s={"the owner's max_round_s": 10.0}, clock=Clock())
    bounds.admit(99, step_s=lambda: 0.1)
    with pytest.raises(OwnerLimit, match=r"about 20 s here, but only 10 s remain.*charged"):
        bounds.admit(200, step_s=lambda: 0.1)


def test_work_ends_when_whoever_asked_for_it_is_gone_or_the_owner_wants_it() -> None:
    reasons: list[str | None] = [None, "no sign of the server for 120 s"]
    bounds = Bounds(stopped=lambda: reasons.pop(0))
    bounds.check()
    with pytest.raises(OwnerLimit, match="no sign of the server"):
        bounds.check()


def test_memory_is_looked_at_now_and_then_and_not_where_it_tells_of_the_data() -> None:
    clock, held = Clock(), [100]
    bounds = Bounds(memory_bytes=50, clock=clock, resident=lambda: held[0])
    held[0] = 200
    bounds.check()  # looked at a moment ago
    clock.now = 1.0
    bounds.check(memory=False)
    with pytest.raises(OwnerLimit, match=r"grown by 100 bytes.*max_memory_bytes = 50"):
        bounds.check()


@pytest.mark.parametrize("limit", ["max_round_s", "deadline", "hours"])
def test_each_limit_of_time_is_kept(limit: str) -> None:
    owner = OwnerPolicy(max_round_s=5.0) if limit == "max_round_s" else OwnerPolicy()
    bounds = bounds_of(
        owner,
        deadline_s=5.0 if limit == "deadline" else None,
        hours_left_s=5.0 if limit == "hours" else None,
    )
    assert 4 < bounds.left_s <= 5


def test_the_memory_of_this_process_is_known_on_linux() -> None:
    before = resident_bytes()
    kept = torch.ones(512 << 20, dtype=torch.uint8)  # far more than what was freed lies ready for
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert after - before > 128 << 20
    assert kept[0] == 1
