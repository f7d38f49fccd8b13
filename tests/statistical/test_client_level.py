"""The noise of client-level privacy and its draws are of the size that epsilon counts on.

Seeds are fixed where they can be; each bound is passed by chance less than once in 10^6 runs.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from fedcore.seeds import Simulated, SystemEntropy
from server.rounds.client_privacy.mechanism import draw, draws_of, protect
from tests.unit.server.rounds.client_privacy.test_mechanism import (
    SIZE,
    START,
    released,
    run_of,
    summed,
)


@pytest.mark.parametrize("origin", [Simulated(3), SystemEntropy()])
def test_the_noise_has_the_size_that_is_counted(origin: Any) -> None:
    run = run_of(clip_norm=0.5, noise_multiplier=2.0, max_epsilon=1e5)
    protection = protect(run, clients=1000, cohort=50)
    draws = draws_of(origin, "client noise", 1)
    found = (released(run, protection, summed(), draws=draws) - START) * 50
    # 2,000 normal numbers: their deviation is off by more than 9 % less than once in 10^8.
    assert np.std(found) == pytest.approx(2.0 * 0.5, rel=0.09)
    assert abs(np.mean(found)) < 6 / math.sqrt(SIZE)


def test_every_node_is_drawn_on_its_own_with_the_rate_that_is_counted() -> None:
    run, there = run_of(), range(10, 210)
    protection = protect(run, clients=200, cohort=20)
    rounds = 400
    drawn = [
        draw(run, protection, there, draws_of(Simulated(0), "cohort", n), number=n)
        for n in range(rounds)
    ]
    sizes = [len(each) for each in drawn]
    # Binomial(200, 0.1): mean 20, deviation 4.24; over 400 rounds the mean is off by 5 deviations
    # less than once in a million, and sizes do vary.
    assert abs(np.mean(sizes) - 20) < 5 * 4.24 / math.sqrt(rounds)
    assert 3.4 < np.std(sizes) < 5.1
    often = Counter(node for each in drawn for node in each)
    assert set(often) <= set(there)
    assert all(abs(often[node] - 40) < 6 * 6 for node in there)
