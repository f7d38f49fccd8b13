"""Client-level privacy gives the same model however, and by how many, clients are trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from server.simulation.virtual.state import SimulationState
from tests.unit.server.simulation.test_federate import (
    LOOP,
    PRIVATE,
    SIDE_BY_SIDE,
    Told,
    distance,
    run_of,
    train,
)

CLIENT = {"clip_norm": 0.2, "noise_multiplier": 0.5, "max_epsilon": 1e4, "target_delta": 1e-3}


def private(unit: str = "client", **settings: Any) -> dict[str, Any]:
    example = PRIVATE if unit == "both" else {}
    return {**example, "unit": unit, "client": CLIENT | {"accountant": "rdp"} | settings}


@pytest.mark.parametrize("unit", ["client", "both"])
@pytest.mark.parametrize("clip_norm", [0.2, "adaptive"])
def test_both_ways_give_the_same_model(unit: str, clip_norm: float | str) -> None:
    privacy = private(unit, clip_norm=clip_norm)
    loop, side = train(run_of(LOOP, privacy)), train(run_of(SIDE_BY_SIDE, privacy))
    assert distance(loop.weights, side.weights) <= 1e-5
    for told in (loop, side):
        assert [record.train_loss for record in told.records] == [None] * 4
        spent = [record.client_epsilon for record in told.records]
        assert None not in spent
        assert spent == sorted(spent, key=float)  # type: ignore[arg-type]
        of_examples = [record.epsilon_max is not None for record in told.records]
        assert of_examples == [unit == "both"] * 4
        # One client's data cannot be read, and one diverges: neither shows.
        assert [record.updates for record in told.records] == [6] * 4
    assert loop.outcome.federated.protection == side.outcome.federated.protection


@pytest.mark.parametrize("way", [LOOP, SIDE_BY_SIDE], ids=["loop", "vectorised"])
def test_two_processes_give_the_bits_of_one(way: dict[str, Any]) -> None:
    one = train(run_of(way, private()))
    two = train(run_of(way | {"workers": 2}, private()))
    assert distance(one.weights, two.weights) <= (0 if way is LOOP else 1e-5)


def test_noise_is_on_the_sum_whoever_is_drawn() -> None:
    def weights(noise: float) -> Told:
        return train(run_of(LOOP, private(noise_multiplier=noise), rounds=1, cohort=3))

    quiet, loud = weights(0.1), weights(10.0)
    assert quiet.records[0].cohort == loud.records[0].cohort
    gap = (loud.weights - quiet.weights) * 3 / 0.2
    # 76 weights: the same normal numbers, 9.9 times; off by half less than once in 10^6.
    assert np.std(gap) == pytest.approx(9.9, rel=0.4)
    assert isinstance(loud.state, SimulationState)
