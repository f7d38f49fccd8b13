from __future__ import annotations

import random

from edge_client.agent.wake import Signals
from fedcore.rpc.jitter import spread_s


def test_a_pause_is_spread_within_its_bounds() -> None:
    pauses = [spread_s(4.0, 0.5, 1.5) for _ in range(200)]
    assert all(2.0 <= pause <= 6.0 for pause in pauses)
    assert len(set(pauses)) > 100


def test_pauses_leave_the_stream_of_the_task_alone() -> None:
    before = random.getstate()
    spread_s(1.0, 0.5, 1.0)
    Signals().pause_s()
    assert random.getstate() == before
