from __future__ import annotations

import time

import pytest
from torch import nn

from edge_client.agent.request_limits import GONE_S, message_limit_bytes, reason_to_stop
from edge_client.agent.wake import Signals
from fedcore.config.owner import OwnerPolicy
from tests.unit.fedcore.clients import make_run, make_task


def test_a_message_may_be_a_few_times_as_large_as_the_model() -> None:
    task = make_task(model=lambda: nn.Linear(1_000, 1_000))
    limit_bytes = message_limit_bytes(task, make_run(), OwnerPolicy())
    assert 4_004_000 * 2 < limit_bytes < 4_004_000 * 8


@pytest.mark.parametrize("key", ["max_round_bytes", "max_memory_bytes"])
def test_the_owner_may_allow_less(key: str) -> None:
    owner = OwnerPolicy.model_validate({key: 12_345})
    assert message_limit_bytes(make_task(), make_run(), owner) == 12_345


def test_a_model_that_cannot_be_built_is_told_of_elsewhere() -> None:
    def broken() -> nn.Module:
        raise OSError("no such file")

    limit_bytes = message_limit_bytes(make_task(model=broken), make_run(), OwnerPolicy())
    assert limit_bytes >= 1 << 20


def test_work_goes_on_until_its_owner_or_its_server_is_gone() -> None:
    signals = Signals()
    assert reason_to_stop(signals) is None
    signals.lost = time.monotonic()
    assert reason_to_stop(signals) is None, "a server that restarts takes the update all the same"
    signals.lost = time.monotonic() - GONE_S - 1
    assert "no sign of the server" in (reason_to_stop(signals) or "")
    signals.lost = None
    signals.stop.set()
    assert "owner" in (reason_to_stop(signals) or "")
