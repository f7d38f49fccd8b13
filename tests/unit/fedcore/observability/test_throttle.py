"""Lines that peers cause: few a day, whatever the peers do, and all of them counted."""

from __future__ import annotations

import re

import pytest

from fedcore.observability import throttle
from fedcore.observability.throttle import (
    MEMBER_LINES,
    PEER_LINES,
    STRANGER_LINES,
    SUMMARY_S,
    PeerLines,
)

DAY_S = 86_400


class Log:
    """Lines under a clock that the test drives."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.written: list[str] = []
        self.lines = PeerLines(self.written.append, "refused", burst=1, clock=lambda: self.now_s)

    def tell(self, peer: str, kind: object, *, member: bool) -> None:
        self.lines.tell(peer, kind, f"line {peer} {kind}", member=member)

    def single(self) -> list[str]:
        return [line for line in self.written if line.startswith("line ")]

    def summed(self) -> int:
        found = (re.match(r"refused: (\d+) not logged one by one", line) for line in self.written)
        return sum(int(each[1]) for each in found if each)


def test_a_member_that_attacks_for_days_takes_few_lines_and_each_is_counted() -> None:
    log, sent = Log(), 0
    for second in range(0, 3 * DAY_S, 20):
        log.now_s = float(second)
        for kind in range(3):
            log.tell("edge-0", kind, member=True)
            sent += 1
    log.now_s += SUMMARY_S
    log.lines.summarise()
    assert PEER_LINES <= len(log.single()) <= 4 * PEER_LINES + 1
    assert len(log.written) - len(log.single()) <= 3 * 24 + 1
    assert log.summed() + len(log.single()) == sent
    assert "most: edge-0 " in log.written[-1]


def test_a_crowd_of_strangers_takes_few_lines_and_none_of_a_members(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(throttle, "_MAX_KINDS", 1000)
    log = Log()
    for number in range(20_000):
        log.now_s = number * DAY_S / 20_000
        log.tell(f"2001:db8::{number}", 403, member=False)
    assert STRANGER_LINES < len(log.single()) <= 2 * STRANGER_LINES
    log.tell("edge-0", 403, member=True)
    assert log.written[-1] == "line edge-0 403"
    log.now_s += SUMMARY_S
    log.lines.summarise()
    assert log.summed() + len(log.single()) == 20_001


def test_all_members_together_have_a_limit_too() -> None:
    log = Log()
    for number in range(MEMBER_LINES + 500):
        log.tell(f"edge-{number}", 400, member=True)
    assert len(log.single()) == MEMBER_LINES
    log.now_s += SUMMARY_S
    log.lines.summarise()
    assert (
        "refused: 500 not logged one by one since the last summary, of 500 peers"
        in (log.written[-1])
    )
    log.now_s += SUMMARY_S
    log.lines.summarise()
    assert len(log.written) == MEMBER_LINES + 1, "nothing was left out, so there is no summary"
