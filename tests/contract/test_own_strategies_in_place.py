"""What a strategy of a user's own changes in place, or asks of some nodes alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from fedcore import Algorithm
from fedcore.errors import ConfigError, RoundFailed
from tests.contract.own_strategies import run_of, train
from tests.contract.test_own_strategies import _plain, check, method, refusal


@pytest.mark.parametrize("change", ["self.v *= 0.9", "self.v[0] = 2", "self.seen.append(1)"])
def test_an_attribute_that_is_changed_in_place_is_found(tmp_path: Path, change: str) -> None:
    body = "    def __init__(self):\n        self.v, self.seen = np.ones(75), []\n\n"
    said = refusal(tmp_path, body + method("step", f"{change}; return mean, state"))
    assert f"step changed {change.partition(' ')[0].partition('.append')[0][:6]}" in said


def test_an_algorithm_from_python_is_tried_on_a_copy() -> None:
    class Drifts(Algorithm):
        folds = True

        def __init__(self, held: object = None) -> None:
            self.seen, self.held = list[int](), held

        def step(self, round: Any, weights: Any, mean: Any, state: Any) -> Any:
            self.seen.append(round.number)
            return mean, state

    mine = Drifts()
    with pytest.raises(ConfigError, match=r"step changed self\.seen"):
        check(run_of("x:Mine"), strategy=mine)
    assert mine.seen == []
    with pytest.raises(ConfigError, match=r"it cannot be copied: TypeError: .*lock.* its class"):
        check(run_of("x:Mine"), strategy=Drifts(threading.Lock()))


def test_a_strategy_of_flowers_kind_that_asks_some_twice_or_not_is_named(tmp_path: Path) -> None:
    text = "from flwr.serverapp.strategy import FedAvg\nclass Mine(FedAvg):\n    folds = False\n"
    text += "    def configure_train(self, *given):\n"
    text += "        return list(super().configure_train(*given))[:-1]\n"
    _plain(tmp_path, text)
    with pytest.raises(RoundFailed, match=r"must return one message for each node of the round"):
        train(run_of("mine.py:Mine", base=tmp_path))
