from __future__ import annotations

from dataclasses import replace

from server.records import ClientRecord, RoundRecord, epsilon_spent

ROUND = RoundRecord(
    round=1,
    rounds=3,
    seconds=0.5,
    cohort=4,
    updates=4,
    declined=0,
    failed=0,
    train_loss=None,
    metrics={},
    judged_on="nothing",
    epsilon_max=1.5,
    bytes_up=1,
    bytes_down=1,
)
CLIENT = ClientRecord("anna", 40, None, 2.5, 3)


def test_devices_say_what_they_spent_with_each_update() -> None:
    rounds = [ROUND, replace(ROUND, round=2, epsilon_max=2.0)]
    assert epsilon_spent(rounds, (), budget=8.0) == 2.0


def test_an_update_that_was_not_used_may_have_cost_all_that_a_device_allows() -> None:
    late = replace(ROUND, updates=3, failed=1)
    assert epsilon_spent([ROUND, late], (), budget=8.0) == 8.0
    declined = replace(ROUND, updates=3, declined=1)
    assert epsilon_spent([ROUND, declined], (), budget=8.0) == 1.5


def test_no_device_spends_more_than_the_budget_whatever_it_says() -> None:
    assert epsilon_spent([replace(ROUND, epsilon_max=1e300)], (), budget=8.0) == 8.0


def test_a_simulation_has_all_ledgers() -> None:
    lost = replace(ROUND, updates=3, failed=1)
    assert epsilon_spent([lost], [CLIENT], budget=8.0) == 2.5


def test_without_privacy_or_updates_nothing_is_stated() -> None:
    assert epsilon_spent([ROUND], (), budget=None) is None
    assert epsilon_spent([ROUND], (), budget=8.0, dropped=True) == 8.0
    assert epsilon_spent([replace(ROUND, epsilon_max=None)], (), budget=8.0) is None
