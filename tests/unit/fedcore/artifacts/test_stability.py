"""The population stability index: by hand, where nothing has moved, and where something has."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedcore.artifacts.reference import binned, edges_for
from fedcore.artifacts.stability import chance, psi, reading


def test_the_index_is_the_sum_computed_by_hand() -> None:
    # Shares with 0.5 added: 50.5, 30.5, 20.5 of 101.5 then; 20.5, 30.5, 50.5 of 101.5 now.
    share = [50.5 / 101.5, 30.5 / 101.5, 20.5 / 101.5]
    by_hand = 2 * (share[0] - share[2]) * math.log(share[0] / share[2])
    assert psi([50, 30, 20], [20, 30, 50]) == pytest.approx(by_hand, rel=1e-12)
    assert psi([50, 30, 20], [20, 30, 50]) == pytest.approx(0.532935, abs=1e-6)


def test_a_bin_that_is_empty_on_one_side_counts_and_on_both_sides_does_not() -> None:
    by_hand = (0.5 / 101 - 100.5 / 101) * math.log(0.5 / 100.5) * 2
    assert psi([100, 0], [0, 100]) == pytest.approx(by_hand, rel=1e-12)
    assert psi([60, 0, 40], [50, 0, 50]) == psi([60, 40], [50, 50])
    assert psi([60, 40], [600, 400]) < 1e-4
    assert psi([0, 0], [1, 2]) == psi([1, 2], [0, 0]) == 0.0
    assert psi([60, 40, 0], [60, 40, -7]) == 0.0


@pytest.mark.parametrize("kind", ["normal", "lognormal", "counts", "zeros", "two"])
def test_equal_distributions_are_stable_and_a_shifted_one_is_found(kind: str) -> None:
    draw = {
        "normal": lambda rng, n, by: rng.normal(by, 1, n),
        "lognormal": lambda rng, n, by: rng.lognormal(by, 1, n),
        "counts": lambda rng, n, by: rng.poisson(6 + 4 * by, n).astype(float),
        "zeros": lambda rng, n, by: np.where(rng.random(n) < 0.6, 0, rng.random(n) + by),
        "two": lambda rng, n, by: (rng.random(n) < 0.3 + 0.4 * by).astype(float),
    }[kind]
    low, found, missed = 0, 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        values = draw(rng, 2000, 0.0)
        edges = [edges_for(values)]
        (expected,) = binned(values[:, None], edges)
        (same,) = binned(draw(rng, 1000, 0.0)[:, None], edges)
        (moved,) = binned(draw(rng, 1000, 1.0)[:, None], edges)
        low += psi(expected, same) < 0.1
        found += reading(psi(expected, moved), chance(expected, moved)) == "shifted"
        missed += psi(expected, same) > chance(expected, same)
    assert low >= 198
    assert found == 200
    assert missed <= 1


def test_what_chance_explains_is_stable_however_large() -> None:
    few = [4, 0, 7, 1, 3, 2, 6, 0, 5, 2]
    assert psi([100] * 10, few) > 0.25
    assert reading(psi([100] * 10, few), chance([100] * 10, few)) == "stable"
    assert reading(0.09, 0.0) == "stable"
    assert reading(0.1, 0.05) == "moderate"
    assert reading(0.3, 0.05) == "shifted"
    assert chance([100] * 10, [100] * 10, noise_deviation=50.0) > chance([100] * 10, [100] * 10)
