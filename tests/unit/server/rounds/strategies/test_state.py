from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAdam, FedAvg
from numpy.typing import NDArray

from fedcore.errors import ConfigError, DataError
from server.rounds.strategies.state import StrategyState, restore_strategy, strategy_state_of

VALUES: list[Any] = [
    None,
    True,
    7,
    0.1,
    float("inf"),
    "text",
    (1, [2.5, None]),
    {"a": (), 3: {"b": []}},
    np.float32(0.1),
    np.float64(0.1),
    np.arange(6, dtype=np.int16).reshape(2, 3).T,
    np.array(2.5),
]


def passed_on(value: Any) -> Any:
    """What a fresh strategy holds that was reminded of one that held ``value``."""
    before, after = FedAvg(), FedAvg()
    before.fraction_train = value
    taken = strategy_state_of(before)
    restore_strategy(after, StrategyState(json.loads(json.dumps(taken.tree)), taken.arrays))
    return after.fraction_train


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_as_they_were(value: Any) -> None:
    back: Any = passed_on(value)
    assert type(back) is type(value)
    assert np.array_equal(back, value) if isinstance(value, np.ndarray) else back == value
    assert getattr(back, "dtype", None) == getattr(value, "dtype", None)
    assert getattr(back, "shape", None) == getattr(value, "shape", None)


def test_arrays_of_flowers_come_back_byte_for_byte() -> None:
    array = Array(np.linspace(0, 1, 5))
    back: Any = passed_on({"kept": ArrayRecord({"model": array})})
    found = back["kept"]["model"]
    assert (found.dtype, found.shape, found.stype) == (array.dtype, array.shape, array.stype)
    assert found.data == array.data


def test_wrapped_strategies_are_reminded_too() -> None:
    def made() -> tuple[FedAdam, DifferentialPrivacyServerSideFixedClipping]:
        inner = FedAdam()
        return inner, DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 1.0, 5)

    inner, outer = made()
    inner.m_t = {"model": np.ones(3)}
    other_inner, other = made()
    restore_strategy(other, strategy_state_of(outer))
    moments: dict[str, NDArray[Any]] | None = other_inner.m_t
    assert moments is not None
    assert moments["model"].tolist() == [1.0, 1.0, 1.0]
    moments["model"][0] = 5.0  # its own, and it may be written to
    assert inner.m_t["model"][0] == 1.0


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, {(1, 2): 3}, np.array(["text"]), 1j, [object()]],
    ids=["object", "set", "tuple keys", "text", "complex", "inside a list"],
)
def test_what_cannot_be_stored_is_refused_rather_than_lost(value: object) -> None:
    strategy = FedAvg()
    strategy.weighted_by_key = value  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"FedAvg\.weighted_by_key.* cannot store"):
        strategy_state_of(strategy)


def _another() -> FedAvg:
    return FedAdam()


def _more() -> FedAvg:
    strategy = FedAvg()
    strategy.more = 1  # type: ignore[attr-defined]
    return strategy


def _other_function() -> FedAvg:
    return FedAvg(train_metrics_aggr_fn=lambda records, key: records[0].content["metrics"])  # type: ignore[arg-type, attr-defined, return-value]


@pytest.mark.parametrize("make", [_another, _more, _other_function])
def test_another_strategy_is_not_reminded(make: Callable[[], FedAvg]) -> None:
    with pytest.raises(DataError, match="another strategy"):
        restore_strategy(make(), strategy_state_of(FedAvg()))


class Velocity(FedAvg):
    """A user's strategy that changes what it remembers in place."""

    def __init__(self) -> None:
        super().__init__()
        self.velocity = np.ones(3, np.float32)
        self.parts: list[Any] = [FedAvg(), len]
        self.by_name = {"loss": max}


def test_what_a_users_strategy_changes_later_is_not_in_the_state() -> None:
    strategy = Velocity()
    state = strategy_state_of(strategy)
    strategy.velocity *= 0.5
    assert [array.tolist() for array in state.arrays] == [[1.0, 1.0, 1.0]]


def test_strategies_and_functions_in_containers_come_back() -> None:
    before, after = Velocity(), Velocity()
    before.parts[0].fraction_train = 0.25
    restore_strategy(after, strategy_state_of(before))
    assert after.parts[0].fraction_train == 0.25
    assert after.parts[1] is len
    assert after.by_name == {"loss": max}
